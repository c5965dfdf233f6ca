//go:build linux

package inspect

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"barevif/hypercall/userdir"
)

// Dirs returns the directories in which processes of user uid have their sockets, the
// preferred one first. Only in the last ones, which are among temporary files, can another user
// make anything.
func Dirs(uid int) []string {
	dirs := places(uid)
	if former := userdir.Former(uid); former != "" {
		dirs = append(dirs, former)
	}
	return dirs
}

// places returns the directories of [Dirs] that this release uses. In a user namespace root may
// own its /run, as in a container, or be a user of the machine, who has another there.
func places(uid int) (dirs []string) {
	if uid == 0 {
		dirs = append(dirs, "/run/barevif")
	}
	if n := userdir.Outside(uid); n != 0 {
		dirs = append(dirs, filepath.Join("/run/user", strconv.Itoa(n), "barevif"))
	}
	return append(dirs, userdir.Temp(uid))
}

// Names of sockets in a directory: inspect-PID-RANDOM.sock. Processes in different
// namespaces may have the same PID.
const (
	socketPrefix = "inspect-"
	socketSuffix = ".sock"
	socketRandom = 6 // characters
)

// checkLength returns an error if the path of a socket in dir is too long for the kernel, which
// would say no more than that it is invalid.
func checkLength(dir string) error {
	const most = 107 // sun_path of unix(7)
	longest := len(filepath.Join(dir, socketPrefix+"4194304-"+strings.Repeat("x", socketRandom)+socketSuffix))
	if longest > most {
		return fmt.Errorf("%s is too long for a directory of sockets: by %d bytes", dir, longest-most)
	}
	return nil
}

// errStranger is the error for a path that belongs to another user. No process of ours has a
// socket there.
var errStranger = errors.New("another user's")

// checkDir returns an error unless dir is a directory of user uid that no other user may enter.
// The error is errStranger if the path belongs to another user, be it a directory, a file or a link.
func checkDir(dir string, uid int) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !ok:
		return fmt.Errorf("%s has no owner", dir)
	case int(sys.Uid) != uid:
		return fmt.Errorf("%s is %w: it belongs to uid %d, not %d", dir, errStranger, sys.Uid, uid)
	case !st.IsDir():
		return fmt.Errorf("%s is not a directory", dir)
	case st.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s is open to others (mode %#o), and should have mode 0700", dir, st.Mode().Perm())
	}
	return nil
}

// canMake reports whether user uid can make dir: where it is belongs to that user, or to all.
func canMake(dir string, uid int) bool {
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	st, err := os.Stat(filepath.Dir(dir))
	if err != nil || !st.IsDir() {
		return false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	return st.Mode().Perm()&0o002 != 0 || ok && int(sys.Uid) == uid && st.Mode().Perm()&0o200 != 0
}

// place returns a directory for our socket, which it makes if it is not there.
func place(dirs []string) (string, error) {
	var errs error
	for _, dir := range dirs {
		err := checkLength(dir)
		if err == nil {
			err = os.Mkdir(dir, 0o700)
			if err == nil || errors.Is(err, fs.ErrExist) {
				if err = checkDir(dir, os.Geteuid()); err == nil {
					return dir, nil
				}
			}
		}
		errs = errors.Join(errs, err)
	}
	return "", errs
}

// sockets returns the paths of the sockets in dir, if the directory is the private one of
// user uid. A directory that is missing, or that this process may not enter, has none.
func sockets(dir string, uid int) ([]string, error) {
	if err := checkDir(dir, uid); err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return nil, nil
		}
		return nil, err
	}
	all, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	var out []string
	for _, e := range all {
		if e.Type() == fs.ModeSocket && strings.HasPrefix(e.Name(), socketPrefix) && strings.HasSuffix(e.Name(), socketSuffix) {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out, nil
}

// peerOf returns the process at the other end of c, and its user.
func peerOf(c *net.UnixConn) (pid, uid int, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0, -1, err
	}
	var cred *unix.Ucred
	if e := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return 0, -1, e
	}
	if err != nil {
		return 0, -1, os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}
	return int(cred.Pid), int(cred.Uid), nil
}

// removeDead removes sockets in dir at which nobody listens any more, since their processes
// were killed.
func removeDead(dir string) {
	paths, _ := sockets(dir, os.Geteuid())
	for _, path := range paths {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			os.Remove(path)
		}
	}
}
