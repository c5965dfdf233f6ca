//go:build linux

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Prune removes the pins below root ("" for [DefaultRoot]) whose owner ended without a
// Close: this user's pins, and for root those of every user. It returns the directories
// it removed. It leaves a directory whose owner lives, which it recognises by the lock: a
// lock ends with its process. It also leaves a directory that holds anything but pins of
// a [Store], and fails on a root that is not in a BPF file system.
//
// An owner that starts while Prune examines the directory of its name may find it locked,
// and then gets no pins: see [ErrBusy].
func Prune(root string) (removed []string, err error) {
	if root == "" {
		root = DefaultRoot
	}
	dir, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("prune pins: %w", &fs.PathError{Op: "open", Path: root, Err: err})
	}
	parent := os.NewFile(uintptr(dir), root)
	defer parent.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(dir, &st); err != nil {
		return nil, fmt.Errorf("prune pins: %w", &fs.PathError{Op: "statfs", Path: root, Err: err})
	}
	if uint32(st.Type) != unix.BPF_FS_MAGIC {
		return nil, fmt.Errorf("prune pins: %s is not in a BPF file system", root)
	}
	names, err := parent.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("prune pins: %w", err)
	}
	var errs []error
	for _, name := range names {
		gone, err := pruneOne(dir, name)
		if err != nil {
			errs = append(errs, fmt.Errorf("prune pins: %s: %w", filepath.Join(root, name), err))
		}
		if gone {
			removed = append(removed, filepath.Join(root, name))
		}
	}
	return removed, errors.Join(errs...)
}

// pruneOne removes the directory name of parent if it holds pins of a dead owner. It
// works on the directory that it opened and locked, even if name refers to another one
// meanwhile.
func pruneOne(parent int, name string) (gone bool, err error) {
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
	case unix.ENOTDIR, unix.ELOOP, unix.ENOENT:
		return false, nil // not a directory, or gone
	case unix.EACCES, unix.EPERM:
		return false, nil // another user's directory
	default:
		return false, err
	}
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	var opened, there unix.Stat_t
	if err := unix.Fstat(fd, &opened); err != nil {
		return false, err
	}
	if me := os.Geteuid(); me != 0 && int(opened.Uid) != me {
		return false, nil
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return false, nil // the owner lives
	} else if err != nil {
		return false, err
	}
	if err := unix.Fstatat(parent, name, &there, unix.AT_SYMLINK_NOFOLLOW); err != nil || there.Ino != opened.Ino || there.Dev != opened.Dev {
		return false, nil
	}
	pins, err := dir.Readdirnames(-1)
	if err != nil {
		return false, err
	}
	known := map[string]bool{}
	for _, p := range pinNames {
		known[p], known[p+fresh] = true, true
	}
	for _, p := range pins {
		if !known[p] {
			return false, nil
		}
	}
	for _, p := range pins {
		if err := unix.Unlinkat(fd, p, 0); err != nil && err != unix.ENOENT {
			return false, err
		}
	}
	if err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR); err != nil {
		return false, err
	}
	return true, nil
}
