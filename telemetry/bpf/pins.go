//go:build linux

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"barevif/telemetry/bpf/refused"
)

// DefaultRoot is the directory of the pins unless a [Store] sets another.
const DefaultRoot = "/sys/fs/bpf/barevif"

// Names of the pins of one device. metrics is a file to cat, the others are maps.
const (
	pinCounters = "counters"
	pinInfo     = "info"
	pinFields   = "fields"
	pinEvents   = "events"
	pinMetrics  = "metrics"
)

// pinNames are in the order of removal: a pin that refers to others comes before them.
var pinNames = [...]string{pinMetrics, pinEvents, pinFields, pinCounters, pinInfo}

// fresh is the suffix of a pin that is about to replace an older one.
const fresh = "-new"

// ErrBusy says that another process holds the pins of a device with this name.
var ErrBusy = errors.New("another process owns the pins")

// A pinDir is the directory of one device's pins. It is locked until close or the end of
// this process: unlike a file, a lock does not survive kill -9.
type pinDir struct {
	path string
	lock *os.File
	gid  int // group of the files, or -1
}

// openPinDir makes and locks root/name. Its errors say in plain words why that failed.
func openPinDir(root, name string, gid int) (*pinDir, error) {
	if err := checkRoot(root); err != nil {
		return nil, err
	}
	path := filepath.Join(root, name)
	// An owner that closes may remove the directory that we just opened: then the one
	// that we locked is no longer at path.
	for range 16 {
		made := os.Mkdir(path, 0o755)
		if made != nil && !errors.Is(made, fs.ErrExist) {
			return nil, fmt.Errorf("make pins: %w", made)
		}
		d, err := lockPinDir(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			if made == nil && !errors.Is(err, ErrBusy) {
				unix.Rmdir(path) // fails if it is not empty, that is, another owner's by now
			}
			return nil, err
		}
		if gid >= 0 {
			err = d.lock.Chown(-1, gid)
		}
		// Mkdir obeys the umask.
		if err = errors.Join(err, d.lock.Chmod(0o755)); err != nil {
			d.lock.Close()
			return nil, fmt.Errorf("make pins: %w", err)
		}
		d.gid = gid
		return d, nil
	}
	return nil, fmt.Errorf("make pins: %s keeps vanishing", path)
}

func lockPinDir(path string) (*pinDir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make pins: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	lock := os.NewFile(uintptr(fd), path)
	if err := locked(lock, path); err != nil {
		lock.Close()
		return nil, err
	}
	return &pinDir{path: path, lock: lock}, nil
}

func locked(dir *os.File, path string) error {
	var opened, there unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &opened); err != nil {
		return fmt.Errorf("make pins: %w", err)
	}
	if int(opened.Uid) != os.Geteuid() {
		return fmt.Errorf("make pins: %s belongs to uid %d", path, opened.Uid)
	}
	if opened.Mode&0o022 != 0 {
		return fmt.Errorf("make pins: others may write %s", path)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if err == unix.EWOULDBLOCK {
			return fmt.Errorf("make pins: %s: %w", path, ErrBusy)
		}
		return fmt.Errorf("make pins: lock %s: %w", path, err)
	}
	if err := unix.Lstat(path, &there); err != nil || there.Ino != opened.Ino || there.Dev != opened.Dev {
		return fs.ErrNotExist
	}
	return nil
}

// checkRoot makes root if its parent is a BPF file system, and refuses a root to which
// another user could add files.
func checkRoot(root string) error {
	if !filepath.IsAbs(root) {
		return fmt.Errorf("make pins: %s is not an absolute path", root)
	}
	parent := filepath.Dir(root)
	if err := isBPF(parent); err != nil {
		if isBPF(root) != nil { // root may itself be the mount
			return err
		}
	} else if strings.Contains(filepath.Base(root), ".") {
		return fmt.Errorf("make pins: %s: a BPF file system allows no dots in names", root)
	} else if err := os.Mkdir(root, 0o755); err == nil {
		if err := os.Chmod(root, 0o755); err != nil {
			return fmt.Errorf("make pins: %w", err)
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make pins: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(root, &st); err != nil {
		return fmt.Errorf("make pins: %w", &fs.PathError{Op: "stat", Path: root, Err: err})
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("make pins: %s is not a directory", root)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("make pins: %s belongs to uid %d", root, st.Uid)
	case st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0:
		return fmt.Errorf("make pins: others may write %s", root)
	}
	return isBPF(root)
}

// isBPF returns nil if dir is in a BPF file system.
func isBPF(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("make pins: %w", &fs.PathError{Op: "statfs", Path: dir, Err: err})
	}
	if uint32(st.Type) != unix.BPF_FS_MAGIC {
		return fmt.Errorf("make pins: no BPF file system is mounted at %s", dir)
	}
	return nil
}

func (d *pinDir) at(name string) string { return filepath.Join(d.path, name) }

// put pins object as name with the given mode and replaces an older pin: a process that
// opens the path finds the old or the new object, never none.
func (d *pinDir) put(name string, object interface{ Pin(string) error }, mode fs.FileMode) error {
	tmp := d.at(name + fresh)
	if err := remove(tmp); err != nil {
		return err
	}
	err := object.Pin(tmp)
	if err == nil && d.gid >= 0 {
		err = os.Chown(tmp, -1, d.gid)
	}
	if err == nil {
		err = os.Chmod(tmp, mode)
	}
	if err == nil {
		err = os.Rename(tmp, d.at(name))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("pin %s: %w", d.at(name), refused.Terse(err)), remove(tmp))
	}
	return nil
}

// drop removes pins by name, including those of a killed owner.
func (d *pinDir) drop(names ...string) error {
	var errs []error
	for _, n := range names {
		errs = append(errs, remove(d.at(n)), remove(d.at(n+fresh)))
	}
	return errors.Join(errs...)
}

// close removes all pins and the directory, and releases the lock. Files in it that are
// not ours stay, and with them the directory.
func (d *pinDir) close() error {
	err := d.drop(pinNames[:]...)
	if e := unix.Rmdir(d.path); e != nil && e != unix.ENOENT && e != unix.ENOTEMPTY && e != unix.EEXIST {
		err = errors.Join(err, &fs.PathError{Op: "rmdir", Path: d.path, Err: e})
	}
	return errors.Join(err, d.lock.Close())
}

func remove(path string) error {
	if err := unix.Unlink(path); err != nil && err != unix.ENOENT {
		return &fs.PathError{Op: "unlink", Path: path, Err: err}
	}
	return nil
}
