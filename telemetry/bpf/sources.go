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

// KindMetrics is a source of which this process may read the text only.
const KindMetrics = "metrics"

// A Source is where counters of one device were found. Another process may have
// made it: what is read from it is checked, but need not be true.
type Source struct {
	Name string // of the device: telemetry.Info.Name
	Kind string // KindPins, KindMaps, KindMemfd or KindMetrics
	Path string // of the pins or of the memfd; "" for maps without pins
	ID   uint32 // of the info map, of maps without pins

	// UID is the user who made it, or -1 if that is not known. The kernel says it
	// of memfds and of directories of pins. Maps say it themselves, and are
	// believed where users without privilege can make none.
	UID int
}

// List finds the devices of this machine that this process may read: pins below
// root ("" means [DefaultRoot]), maps without pins if it is privileged, and
// memfds of processes it may look into. The error tells of what could not be
// searched; what was found is given with it.
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

// pinsOwner is who put the pins of a directory there. Where others may write it
// that can be anyone.
func pinsOwner(dir *unix.Stat_t) int {
	if dir.Mode&0o022 != 0 {
		return -1
	}
	return int(dir.Uid)
}

// enter opens the directory of src, if it is the one that was listed. What is below
// the path it gives stays that directory's, whatever becomes of its name.
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

// onlyPrivileged reports whether making maps takes a privilege.
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
			return out, nil // no more, or not for us
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
	seen := map[file]bool{} // a reader has it open, too
	for _, l := range links {
		to, err := os.Readlink(l)
		if err != nil {
			continue // gone since, or not for us
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

// memfdName is the device's name in where a link of /proc leads to.
func memfdName(to string) (name string, ok bool) {
	name, ok = strings.CutPrefix(to, "/memfd:"+memfdPrefix)
	return str([]byte(strings.TrimSuffix(name, " (deleted)"))), ok
}
