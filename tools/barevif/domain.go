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

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/xendev"

	"github.com/spf13/cobra"
)

// domainFlags say which domain a process is: one of an emulated host, or the one
// that runs it.
type domainFlags struct {
	socket string
	dom    uint16
	xen    bool
}

func (f *domainFlags) register(cmd *cobra.Command, dom hypercall.DomID) {
	cmd.Flags().StringVar(&f.socket, "emu", joinSocket(), "join the emulated host that listens at this `socket`")
	cmd.Flags().Uint16Var(&f.dom, "dom", uint16(dom), "be the domain of this `number` on the emulated host")
	cmd.Flags().BoolVar(&f.xen, "xen", false, "be the Xen domain this machine is, through /dev/xen")
	cmd.MarkFlagsMutuallyExclusive("emu", "xen")
	cmd.MarkFlagsMutuallyExclusive("dom", "xen")
}

// A domain is a hypercall.Domain that this process is.
type domain struct {
	hypercall.Domain
	gone  <-chan struct{} // closed when the domain ends on its own; nil: it does not
	close func()
}

// watch has cancel called with errHostGone when the domain ends on its own, until
// ctx ends.
func (d *domain) watch(ctx context.Context, cancel context.CancelCauseFunc) {
	go func() {
		select {
		case <-d.gone:
			cancel(errHostGone)
		case <-ctx.Done():
		}
	}()
}

// errHostGone is why a domain of an emulated host ends on its own.
var errHostGone = &advice{
	err:  errors.New("the emulated host has ended, and this domain with it"),
	next: `start it again: "barevif host"`,
}

// open makes this process the domain.
func (f *domainFlags) open(ctx context.Context) (*domain, error) {
	if f.xen {
		d, err := xendev.Open(xendev.Config{})
		if err != nil {
			return nil, xenRefused(err)
		}
		return &domain{Domain: d, close: func() { d.Close() }}, nil
	}
	d, err := emu.Join(ctx, f.socket, hypercall.DomID(f.dom))
	switch {
	case err == nil:
		return &domain{Domain: d, gone: d.Done(), close: d.Destroy}, nil
	case ctx.Err() != nil:
		return nil, err
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, &advice{err: fmt.Errorf("no emulated host listens at %s: %w", f.socket, err),
			next: `start one with "barevif host", or name its socket with --emu`}
	case errors.Is(err, fs.ErrPermission):
		return nil, &advice{err: err, next: "run as the user that started the host, or as root", refused: true}
	case errors.Is(err, emu.ErrDomainExists):
		return nil, &advice{err: err, next: "end the process that is this domain, or choose another with --dom"}
	}
	return nil, &advice{err: err, next: "is " + f.socket + ` the socket "barevif host" printed?`}
}

// xenRefused adds what a NodeError, whose text names the cause and the way out,
// cannot know: that there is another way.
func xenRefused(err error) error {
	next := "run as root in a Xen domain"
	if errors.Is(err, xendev.ErrNotXen) {
		next = `without a Xen, start an emulated host with "barevif host" and leave --xen away`
	}
	return &advice{err: err, next: next, refused: true}
}

// hostSocket is where a host of the user with that number listens if it is not told
// where: in a directory of that user's own.
func hostSocket(uid string) string {
	return filepath.Join(os.TempDir(), "barevif-"+uid, "host.sock")
}

// joinSocket is where a domain looks for its host: root also finds that of the user
// who became root, so that a backend run with sudo needs no flag.
func joinSocket() string {
	own := hostSocket(strconv.Itoa(os.Geteuid()))
	if _, err := os.Stat(own); err == nil || os.Geteuid() != 0 {
		return own
	}
	if uid, err := strconv.ParseUint(os.Getenv("SUDO_UID"), 10, 32); err == nil {
		return hostSocket(strconv.FormatUint(uid, 10))
	}
	return own
}

// privateDir makes dir for this user alone, or finds that it is.
func privateDir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return &advice{err: fmt.Errorf("make a place for sockets: %w", err), next: "choose another with --socket"}
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if owner, ok := st.Sys().(*syscall.Stat_t); !st.IsDir() || st.Mode().Perm()&0o022 != 0 ||
		ok && int(owner.Uid) != os.Geteuid() {
		return &advice{err: fmt.Errorf("%s is not a directory that only this user writes", dir),
			next: "remove it, or choose another place with --socket"}
	}
	return nil
}

// maxSocketPath is what sun_path of struct sockaddr_un holds (linux/un.h), without
// the 0 at its end.
const maxSocketPath = 107

// freePath makes room for a socket: it removes one that a process left behind.
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
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there and is no socket", path)
	}
	return os.Remove(path)
}
