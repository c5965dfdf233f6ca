package domain

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"barevif/hypercall/anyxen"
	"barevif/tools/cli"
	"barevif/tools/internal/users"
)

// joinPlace returns the default socket at which a domain joins its host, and the user who
// must own its directory. A process run with sudo falls back to the socket of the user who
// ran sudo, so that a backend needs no flag.
func joinPlace() (socket string, owner int) {
	me := os.Geteuid()
	own := anyxen.Socket(me)
	uid, ok := users.Sudo()
	if !ok {
		return own, me
	}
	if _, err := os.Lstat(own); err == nil && checkPlace(filepath.Dir(own), me) == nil {
		return own, me
	}
	return anyxen.Socket(uid), uid
}

// checkPlace returns an error unless dir belongs to user owner and nobody else may use it.
// Every user can make a directory of that name below /tmp.
func checkPlace(dir string, owner int) error {
	if err := checkOwner(dir, owner); err != nil {
		return err
	}
	st, err := os.Lstat(dir)
	if err == nil && st.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%s is open to others (mode %#o), and should have mode 0700", dir, st.Mode().Perm())
	}
	return err
}

// checkOwner returns an error unless dir is a directory that only user owner may write.
func checkOwner(dir string, owner int) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	switch sys, ok := st.Sys().(*syscall.Stat_t); {
	case !st.IsDir():
		return fmt.Errorf("%s is not a directory", dir)
	case ok && int(sys.Uid) != owner && owner == os.Geteuid():
		return fmt.Errorf("%s belongs to user %s, not to you", dir, users.Name(int(sys.Uid)))
	case ok && int(sys.Uid) != owner:
		return fmt.Errorf("%s belongs to user %s, not to %s", dir, users.Name(int(sys.Uid)), users.Name(owner))
	case st.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("others may write %s (mode %#o)", dir, st.Mode().Perm())
	}
	return nil
}

// PrivateDir makes dir for this user alone, or checks that it is private already.
func PrivateDir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return &cli.Advice{Err: fmt.Errorf("make a place for sockets: %w", err), Next: "choose another with --socket"}
	}
	if err := checkOwner(dir, os.Geteuid()); err != nil {
		return &cli.Advice{Err: err, Next: "remove it, or choose another place with --socket"}
	}
	return nil
}

// maxSocketPath is the length of sun_path of struct sockaddr_un (linux/un.h), in bytes,
// without the 0 at its end.
const maxSocketPath = 107

// FreePath makes path free for a socket: it removes a socket that a process left behind.
func FreePath(path string) error {
	if len(path) > maxSocketPath {
		return fmt.Errorf("the path of a socket is too long: %d bytes, at most %d: %s", len(path), maxSocketPath, path)
	}
	c, err := net.Dial("unixpacket", path)
	if err == nil {
		c.Close()
		return fmt.Errorf("a process listens at %s already", path)
	}
	if errors.Is(err, syscall.EPROTOTYPE) {
		return fmt.Errorf("another program's socket is at %s", path)
	}
	refused := errors.Is(err, syscall.ECONNREFUSED) // nobody listens
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there and is no socket", path)
	case !refused:
		return fmt.Errorf("a socket that this user may not use is at %s", path)
	}
	return os.Remove(path)
}
