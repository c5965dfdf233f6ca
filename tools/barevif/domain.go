package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/xendev"
	"barevif/tools/internal/users"

	"github.com/spf13/cobra"
)

// domainFlags select the domain that this process is: a domain of an emulated host, or the
// Xen domain in which it runs.
type domainFlags struct {
	socket string
	user   string
	dom    uint16
	xen    bool
}

func (f *domainFlags) register(cmd *cobra.Command, dom hypercall.DomID) {
	socket, _ := joinPlace()
	cmd.Flags().StringVar(&f.socket, "emu", socket, "join the emulated host that listens at this `socket`")
	cmd.Flags().StringVar(&f.user, "emu-user", "", "join a host of this `user` too, beside one's own and root's")
	cmd.Flags().Uint16Var(&f.dom, "dom", uint16(dom), "be the domain of this `number` on the emulated host")
	cmd.Flags().BoolVar(&f.xen, "xen", false, "be the Xen domain this machine is, through /dev/xen")
	exclusive(cmd, "emu", "xen")
	exclusive(cmd, "dom", "xen")
	exclusive(cmd, "emu-user", "xen")
}

// A domain is a hypercall.Domain that this process is.
type domain struct {
	hypercall.Domain
	gone  <-chan struct{} // closed when the domain ends by itself; nil: it never does
	close func()
}

// watch calls cancel with errHostGone when the domain ends by itself, until ctx ends.
func (d *domain) watch(ctx context.Context, cancel context.CancelCauseFunc) {
	go func() {
		select {
		case <-d.gone:
			cancel(errHostGone)
		case <-ctx.Done():
		}
	}()
}

// endPatience bounds how long a process goes on after its host has ended: a device that
// has lost its xenstore waits about 10 s for it before it gives up.
const endPatience = 20 * time.Second

// lost says that the host has ended, waits for ended, which reports that everything in the
// domain has ended, too, and returns the reason.
func (d *domain) lost(say func(format string, args ...any), ended <-chan error) error {
	say("domain %d: the emulated host has ended; taking the vifs down, within %v", d.ID(), endPatience)
	select {
	case <-ended:
	case <-time.After(endPatience):
	}
	return errHostGone
}

// errHostGone is the reason why a domain of an emulated host ends by itself.
var errHostGone = &advice{
	err:  errors.New("the emulated host has ended, and this domain with it"),
	next: `start it again: "barevif host"`,
}

// open makes this process the selected domain.
func (f *domainFlags) open(ctx context.Context) (*domain, error) {
	if f.xen {
		d, err := xendev.Open(xendev.Config{})
		if err != nil {
			return nil, xenRefused(err)
		}
		return &domain{Domain: d, close: func() { d.Close() }}, nil
	}
	if f.dom == 0 || f.dom >= uint16(hypercall.DomSelf) {
		return nil, badValue("dom", strconv.Itoa(int(f.dom)), allowedBy["dom"])
	}
	hosts := users.Own()
	if f.user != "" {
		uid, err := users.Lookup(f.user)
		if err != nil {
			return nil, badValue("emu-user", f.user, "a user of this machine")
		}
		hosts = append(hosts, uid)
	}
	if socket, owner := joinPlace(); f.socket == socket && f.user == "" {
		// Every user can make the default place, so check its owner before anything
		// is sent to a socket there.
		if err := checkPlace(filepath.Dir(socket), owner); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, &advice{err: err, next: "remove it, or name the socket of a host with --emu", refused: true}
		}
	}
	d, err := emu.Join(ctx, f.socket, hypercall.DomID(f.dom), hosts...)
	var foreign *emu.ForeignHostError
	switch {
	case err == nil:
		return &domain{Domain: d, gone: d.Done(), close: d.Destroy}, nil
	case ctx.Err() != nil:
		return nil, err
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, &advice{err: fmt.Errorf("no emulated host listens at %s: %w", f.socket, err),
			next: `start one with "barevif host", or name its socket with --emu`}
	case errors.As(err, &foreign):
		return nil, foreignHost(foreign)
	case errors.Is(err, fs.ErrPermission):
		return nil, &advice{err: err, next: "run as the user that started the host, or as root", refused: true}
	case errors.Is(err, emu.ErrDomainExists):
		return nil, &advice{err: err, next: "end the process that is this domain, or choose another with --dom"}
	}
	return nil, &advice{err: err, next: "is " + f.socket + ` the socket "barevif host" printed?`}
}

// foreignHost is the error for a host of another user, whom it names.
func foreignHost(e *emu.ForeignHostError) error {
	next := "name the socket of a host of your own with --emu"
	if e.UID >= 0 {
		next += fmt.Sprintf(", or, if this is the one you mean, add --emu-user %d", e.UID)
	}
	return &advice{
		err:  fmt.Errorf("the host at %s belongs to user %s, not to you: %w", e.Path, users.Name(e.UID), e),
		next: next, refused: true,
	}
}

// xenRefused adds advice that a NodeError, which names the cause, cannot give: an emulated
// host needs no Xen.
func xenRefused(err error) error {
	next := "run as root in a Xen domain"
	if errors.Is(err, xendev.ErrNotXen) {
		next = `without a Xen, start an emulated host with "barevif host" and leave --xen away`
	}
	return &advice{err: err, next: next, refused: true}
}

// hostSocket returns the default socket of a host of the user uid, in a directory of that
// user.
func hostSocket(uid string) string {
	return filepath.Join(os.TempDir(), "barevif-"+uid, "host.sock")
}

// joinPlace returns the default socket at which a domain joins its host, and the user who
// must own its directory. A process run with sudo falls back to the socket of the user who
// ran sudo, so that a backend needs no flag.
func joinPlace() (socket string, owner int) {
	me := os.Geteuid()
	own := hostSocket(strconv.Itoa(me))
	uid, ok := users.Sudo()
	if !ok {
		return own, me
	}
	if _, err := os.Lstat(own); err == nil && checkPlace(filepath.Dir(own), me) == nil {
		return own, me
	}
	return hostSocket(strconv.Itoa(uid)), uid
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

// privateDir makes dir for this user alone, or checks that it is private already.
func privateDir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return &advice{err: fmt.Errorf("make a place for sockets: %w", err), next: "choose another with --socket"}
	}
	if err := checkOwner(dir, os.Geteuid()); err != nil {
		return &advice{err: err, next: "remove it, or choose another place with --socket"}
	}
	return nil
}

// maxSocketPath is the length of sun_path of struct sockaddr_un (linux/un.h), in bytes,
// without the 0 at its end.
const maxSocketPath = 107

// freePath makes path free for a socket: it removes a socket that a process left behind.
func freePath(path string) error {
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
