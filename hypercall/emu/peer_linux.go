package emu

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// A ForeignHostError is returned by [Join] for a host that another user runs.
type ForeignHostError struct {
	Path string
	UID  int // user of the host; -1: a user that this user namespace does not know
}

func (e *ForeignHostError) Error() string {
	if e.UID < 0 {
		return fmt.Sprintf("emu: the host at %s runs as a user that this user namespace does not know", e.Path)
	}
	return fmt.Sprintf("emu: the host at %s runs as uid %d", e.Path, e.UID)
}

// trusted reports whether a process of uid may be the other end of a connection: one of
// this user, of root, or of one of also.
func trusted(uid int, also ...int) bool {
	return uid >= 0 && (uid == 0 || uid == os.Geteuid() || slices.Contains(also, uid))
}

// peerUID returns the user of the process at the other end of c, or -1 if this user
// namespace does not know it. The kernel recorded the user when that process called
// connect or listen, so it does not matter who owns the path now.
func peerUID(c syscall.Conn) (int, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	var cred *unix.Ucred
	if e := rc.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); e != nil {
		return -1, e
	}
	if err != nil {
		return -1, os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}
	if cred.Uid == overflowUID() && !knowsEveryUser() {
		return -1, nil
	}
	return int(cred.Uid), nil
}

// overflowUID stands for all users that a user namespace does not know
// (user_namespaces(7)).
func overflowUID() uint32 {
	uid := uint32(65534)
	if b, err := os.ReadFile("/proc/sys/kernel/overflowuid"); err == nil {
		_, _ = fmt.Sscan(string(b), &uid)
	}
	return uid
}

// knowsEveryUser reports whether this user namespace maps every uid, as the initial one
// does: then the overflow uid is an ordinary user.
func knowsEveryUser() bool {
	f, err := os.Open("/proc/self/uid_map")
	if err != nil {
		return false
	}
	defer f.Close()
	return mapsEveryUser(bufio.NewScanner(f))
}

func mapsEveryUser(lines *bufio.Scanner) bool {
	var sum uint64
	for lines.Scan() {
		var inside, outside, count uint64
		if _, err := fmt.Sscan(lines.Text(), &inside, &outside, &count); err != nil {
			return false
		}
		sum += count
	}
	return sum >= 1<<32-1 // 4294967295 is no user
}

// A privateListener accepts connections of this user and of root.
type privateListener struct{ *net.UnixListener }

// ListenPrivate listens at path, a unix socket of network "unix" or "unixpacket", for
// processes of this user and of root. The socket has mode 0600 from the moment it exists,
// whatever the umask is. If another user's connection comes nevertheless, it is closed
// and Accept does not return it.
func ListenPrivate(network, path string) (net.Listener, error) {
	l, err := listenPrivate(network, path)
	if err != nil {
		return nil, err // not a typed nil
	}
	return l, nil
}

func listenPrivate(network, path string) (*privateListener, error) {
	switch network {
	case "unix", "unixpacket":
	default:
		return nil, net.UnknownNetworkError(network)
	}
	cfg := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) (err error) {
		// bind gives the file the mode of the socket, less the umask. Changing the mode
		// after bind would leave other users a moment to connect.
		if e := rc.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return os.NewSyscallError("fchmod", err)
	}}
	l, err := cfg.Listen(context.Background(), network, path)
	if err != nil {
		return nil, err
	}
	return &privateListener{l.(*net.UnixListener)}, nil
}

// AcceptUnix waits for a connection of this user or of root.
func (l *privateListener) AcceptUnix() (*net.UnixConn, error) {
	for {
		c, err := l.UnixListener.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(c); err == nil && trusted(uid) {
			return c, nil
		}
		c.Close()
	}
}

// Accept is AcceptUnix, for a net.Listener.
func (l *privateListener) Accept() (net.Conn, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	return c, nil
}
