// Package domain makes a command a domain: one of an emulated host, or of a real Xen.
package domain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/anyxen"
	"barevif/hypercall/emu"
	"barevif/hypercall/xendev"
	"barevif/tools/cli"
	"barevif/tools/internal/users"
	"barevif/tools/xenhost"

	"github.com/spf13/cobra"
)

// Flags select the domain that this process is: a domain of an emulated host, or the
// Xen domain in which it runs.
type Flags struct {
	Socket string // of the emulated host
	User   string // whose host is joined, too
	Dom    uint16
	Xen    bool

	Doorbell xendev.Doorbell // on Xen

	Beside bool // the domain may have processes already, as on Xen
}

// Register adds the flags to cmd. dom is the default of --dom.
func (f *Flags) Register(cmd *cobra.Command, dom hypercall.DomID) {
	socket, _ := joinPlace()
	cmd.Flags().StringVar(&f.Socket, "emu", socket, "join the emulated host that listens at this `socket`")
	cmd.Flags().StringVar(&f.User, "emu-user", "", "join a host of this `user` too, beside one's own and root's; without --emu, where barevif host of that user listens")
	cmd.Flags().Uint16Var(&f.Dom, "dom", uint16(dom), "be the domain of this `number` on the emulated host")
	cmd.Flags().BoolVar(&f.Xen, "xen", false, "be the Xen domain this machine is, through /dev/xen")
	cli.Exclusive(cmd, "emu", "xen")
	cli.Exclusive(cmd, "dom", "xen")
	cli.Exclusive(cmd, "emu-user", "xen")
}

// A Domain is a hypercall.Domain that this process is.
type Domain struct {
	hypercall.Domain
	Gone <-chan struct{} // closed when the domain ends by itself; nil: it never does
	End  func()          // ends the domain; this process is none any more
}

// Watch calls cancel with ErrHostGone when the domain ends by itself, until ctx ends.
func (d *Domain) Watch(ctx context.Context, cancel context.CancelCauseFunc) {
	go func() {
		select {
		case <-d.Gone:
			cancel(ErrHostGone)
		case <-ctx.Done():
		}
	}()
}

// endPatience bounds how long a process goes on after its host has ended: a device that
// has lost its xenstore waits about 10 s for it before it gives up.
const endPatience = 20 * time.Second

// Lost says that the host has ended, waits for ended, which reports that everything in the
// domain has ended, too, and returns the reason.
func (d *Domain) Lost(say func(format string, args ...any), ended <-chan error) error {
	say("domain %d: the emulated host has ended; taking the vifs down, within %v", d.ID(), endPatience)
	select {
	case <-ended:
	case <-time.After(endPatience):
	}
	return ErrHostGone
}

// ErrHostGone is the reason why a domain of an emulated host ends by itself.
var ErrHostGone = &cli.Advice{
	Err:  errors.New("the emulated host has ended, and this domain with it"),
	Next: `start it again: "barevif host"`,
}

// Open makes this process the selected domain.
func (f *Flags) Open(ctx context.Context) (*Domain, error) {
	if f.Xen {
		d, err := xendev.Open(xendev.Config{Doorbell: f.Doorbell})
		if err != nil {
			return nil, xenRefused(err)
		}
		return &Domain{Domain: d, End: func() { d.Close() }}, nil
	}
	if f.Dom == 0 || f.Dom >= uint16(hypercall.DomSelf) {
		return nil, cli.BadValue("dom", strconv.Itoa(int(f.Dom)), cli.DomainNumber)
	}
	hosts := users.Own()
	if f.User != "" {
		uid, err := users.Lookup(f.User)
		if err != nil {
			return nil, cli.BadValue("emu-user", f.User, "a user of this machine")
		}
		hosts = append(hosts, uid)
	}
	if f.Socket == "" {
		return nil, cli.BadValue("emu", "", "the socket of an emulated host, as \"barevif host\" prints it")
	}
	if socket, owner := joinPlace(); f.Socket == socket {
		if f.User != "" {
			owner = hosts[len(hosts)-1]
			socket = anyxen.Socket(owner)
			f.Socket = socket
		}
		// Every user can make the default place, so check its owner before anything
		// is sent to a socket there.
		if err := checkPlace(filepath.Dir(socket), owner); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, &cli.Advice{Err: err, Next: "remove it, or name the socket of a host with --emu", Refused: true}
		}
	}
	join := emu.Join
	if f.Beside {
		join = emu.JoinBeside
	}
	d, err := join(ctx, f.Socket, hypercall.DomID(f.Dom), hosts...)
	var foreign *emu.ForeignHostError
	switch {
	case err == nil:
		return &Domain{Domain: d, Gone: d.Done(), End: d.Destroy}, nil
	case ctx.Err() != nil:
		return nil, err
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, &cli.Advice{Err: fmt.Errorf("no emulated host listens at %s: %w", f.Socket, err),
			Next: `start one with "barevif host", or name its socket with --emu`}
	case errors.As(err, &foreign):
		return nil, foreignHost(foreign)
	case errors.Is(err, fs.ErrPermission):
		return nil, &cli.Advice{Err: err, Next: "run as the user that started the host, or as root", Refused: true}
	case errors.Is(err, emu.ErrDomainExists):
		return nil, &cli.Advice{Err: err, Next: "end the process that is this domain, or choose another with --dom"}
	}
	return nil, &cli.Advice{Err: err, Next: "is " + f.Socket + ` the socket "barevif host" printed?`}
}

// foreignHost is the error for a host of another user, whom it names.
func foreignHost(e *emu.ForeignHostError) error {
	next := "name the socket of a host of your own with --emu"
	if e.UID >= 0 {
		next += fmt.Sprintf(", or, if this is the one you mean, add --emu-user %d", e.UID)
	}
	return &cli.Advice{
		Err:  fmt.Errorf("the host at %s belongs to user %s, not to you: %w", e.Path, users.Name(e.UID), e),
		Next: next, Refused: true,
	}
}

// xenRefused adds advice that a NodeError, which names the cause, cannot give: an emulated
// host needs no Xen.
func xenRefused(err error) error {
	next := "run as root in a Xen domain"
	if errors.Is(err, xendev.ErrNotXen) {
		next = `without a Xen, start an emulated host with "barevif host" and leave --xen away`
	}
	return &cli.Advice{Err: err, Next: next, Refused: true}
}

// Free ensures that the kernel does not own the vif of the Xen domain, too. With take it
// takes the vif from the kernel.
func (f *Flags) Free(vif string, take bool) error {
	if take {
		if err := xenhost.Take(xendev.Config{}, vif); err != nil {
			return fmt.Errorf("take vif %s from the kernel: %w", vif, err)
		}
	}
	if err := xenhost.CheckFree(xendev.Config{}, vif); err != nil {
		return &cli.Advice{Err: err, Next: "--take does that (as root)", Refused: true}
	}
	return nil
}
