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
)

// Dirs returns the directories in which processes of user uid have their sockets, the
// preferred one first. In the first only that user, or root, can make anything.
func Dirs(uid int) []string {
	n := strconv.Itoa(uid)
	first := filepath.Join("/run/user", n)
	if uid == 0 {
		first = "/run"
	}
	return []string{filepath.Join(first, "barevif"), filepath.Join(os.TempDir(), "barevif-"+n)}
}

// Names of sockets in a directory: inspect-PID-RANDOM.sock. Processes in different
// namespaces may have the same PID.
const (
	socketPrefix = "inspect-"
	socketSuffix = ".sock"
)

// checkDir returns an error unless dir belongs to user uid and nobody else may use it.
func checkDir(dir string, uid int) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !st.IsDir():
		return fmt.Errorf("%s is not a directory", dir)
	case !ok || int(sys.Uid) != uid:
		return fmt.Errorf("%s does not belong to uid %d", dir, uid)
	case st.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s is open to others (mode %#o), and should have mode 0700", dir, st.Mode().Perm())
	}
	return nil
}

// place returns a directory for our socket, which it makes if it is not there.
func place(dirs []string) (string, error) {
	var errs error
	for _, dir := range dirs {
		err := os.Mkdir(dir, 0o700)
		if err == nil || errors.Is(err, fs.ErrExist) {
			if err = checkDir(dir, os.Geteuid()); err == nil {
				return dir, nil
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
