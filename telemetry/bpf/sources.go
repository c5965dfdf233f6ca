//go:build linux

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// KindMetrics is a source of which this process may read only the text.
const KindMetrics = "metrics"

// A Source is a place where the counters of one device were found. Another process may
// have made it: its contents are checked, but need not be true.
type Source struct {
	Name string // of the device: telemetry.Info.Name
	Kind string // KindPins, KindMaps, KindMemfd or KindMetrics
	Path string // path of the pins or of the memfd; "" for maps without pins
	ID   uint32 // id of the info map, for maps without pins

	// UID is the user who made it, or -1 if unknown. For memfds and directories of pins
	// it comes from the kernel. Maps state it themselves; they are believed where
	// unprivileged users cannot make maps.
	UID int
}

// List finds the devices of this machine that this process may read: pins below root (""
// means [DefaultRoot]), maps without pins if the process is privileged, and memfds of
// processes that it may inspect. With an error, which says what could not be searched, it
// also returns the sources that it found.
func List(root string) ([]Source, error) {
	if root == "" {
		root = DefaultRoot
	}
	pins, err1 := listPins(root)
	maps, err2 := listMaps()
	memfds, err3 := listMemfds()
	return slices.Concat(pins, maps, memfds), errors.Join(err1, err2, err3)
}

func listPins(root string) ([]Source, error) {
	dirs, err := os.ReadDir(root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []Source
	for _, d := range dirs {
		dir := filepath.Join(root, d.Name())
		var st unix.Stat_t
		if !d.IsDir() || unix.Lstat(dir, &st) != nil {
			continue
		}
		src := Source{Name: str([]byte(d.Name())), Path: dir, UID: pinsOwner(&st)}
		if unix.Access(filepath.Join(dir, pinInfo), unix.R_OK) == nil {
			src.Kind = KindPins
		} else if unix.Access(filepath.Join(dir, pinMetrics), unix.R_OK) == nil {
			src.Kind = KindMetrics
		} else {
			continue
		}
		out = append(out, src)
	}
	return out, nil
}

// pinsOwner returns the owner of the pins in a directory, or -1 if other users may write
// the directory: then anyone may have put them there.
func pinsOwner(dir *unix.Stat_t) int {
	if dir.Mode&0o022 != 0 {
		return -1
	}
	return int(dir.Uid)
}

// enter opens the directory of src, if it is still the one that was listed. Paths below
// the returned path stay in that directory, even if its name is reused.
func (src *Source) enter() (path string, leave func(), err error) {
	fd, err := unix.Open(src.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &fs.PathError{Op: "open", Path: src.Path, Err: err}
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && pinsOwner(&st) != src.UID {
		err = fmt.Errorf("%w: %s has another owner now", fs.ErrNotExist, src.Path)
	}
	if err != nil {
		unix.Close(fd)
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d", fd), func() { unix.Close(fd) }, nil
}

// onlyPrivileged reports whether making maps needs a privilege.
func onlyPrivileged() bool {
	b, err := os.ReadFile("/proc/sys/kernel/unprivileged_bpf_disabled")
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

func listMaps() ([]Source, error) {
	var out []Source
	believed := onlyPrivileged()
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.EPERM):
			return out, nil // no more maps, or not permitted
		case err != nil:
			return out, err
		}
		id = next
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue // gone since
		}
		if rec, err := readInfo(m); err == nil && str(rec.Kind[:]) == KindMaps {
			src := Source{Name: str(rec.Vif[:]), Kind: KindMaps, ID: uint32(id), UID: -1}
			if believed {
				src.UID = int(rec.UID)
			}
			out = append(out, src)
		}
		m.Close()
	}
}

func listMemfds() ([]Source, error) {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil, err
	}
	var out []Source
	type file struct{ dev, ino uint64 }
	seen := map[file]bool{} // a reader has the memfd open, too
	for _, l := range links {
		to, err := os.Readlink(l)
		if err != nil {
			continue // gone since, or not permitted
		}
		name, ok := memfdName(to)
		if !ok {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(l, &st) != nil || seen[file{st.Dev, st.Ino}] {
			continue
		}
		seen[file{st.Dev, st.Ino}] = true
		out = append(out, Source{Name: name, Kind: KindMemfd, Path: l, UID: int(st.Uid)})
	}
	return out, nil
}

// memfdName returns the device's name from the target of a link in /proc.
func memfdName(to string) (name string, ok bool) {
	name, ok = strings.CutPrefix(to, "/memfd:"+memfdPrefix)
	return str([]byte(strings.TrimSuffix(name, " (deleted)"))), ok
}
