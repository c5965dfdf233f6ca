//go:build linux

// Package xendev is a [hypercall.Domain] on a real Xen, through the device nodes of
// Linux: /dev/xen/gntalloc grants memory to another domain, /dev/xen/gntdev maps and
// copies another domain's memory, /dev/xen/evtchn handles event channels, and
// /dev/xen/xenbus leads to xenstore.
//
// It needs no cgo, no library of Xen, and no raw hypercalls. Those are in the privcmd
// package, for what the nodes cannot do, and where the kernel permits them.
//
// It opens the nodes when they are first needed, close-on-exec: a grant lives until its
// last descriptor and mapping is gone, so a child must not inherit one. For a missing or
// forbidden node the error is a [*NodeError], which says what to load or to permit.
//
// A [Domain] and its Waiters, Shares and Mappings belong to the caller that opened it.
// When the process dies, in whatever way, the kernel ends all of them. The kernel keeps a
// page that the peer still has mapped until it is unmapped.
//
// # Suspend and resume
//
// A domain that is saved and restored, or migrated, continues as a new domain of Xen: its
// domid changes, its event channels are closed and its grants are ended. Linux re-registers
// the watches of all connections to xenstore, each of which fires, answers the commit of
// an open transaction with EAGAIN, and tells programs nothing else. After that a Waiter and
// a Share of before can only be closed and ended, and new ones made.
//
// A Domain notices the resume at the next call that opens or closes a port. It deals with
// all Waiters at once, because Linux's evtchn driver has a fault: it stops with a BUG
// (drivers/xen/evtchn.c, evtchn_unbind_from_user; see life) in any call that takes a port of before the resume out of its list, and the process can then not be ended.
// The Domain makes the driver forget those ports. What remains is:
//
//   - the driver's files stay open until the process ends, one for each Waiter and one more
//     for each resume;
//   - the interrupts of the ports stay in /proc/interrupts until the domain ends, and once the
//     process has ended, under a name that the kernel has freed, which may be any bytes;
//   - a process that is killed after the resume but before the Domain has noticed it runs
//     into the BUG, and so does one where the numbers of all ports of a Waiter were in use
//     again by then, by another program or the kernel.
//
// A handover ([hypercall.HandoverDomain]) passes the open files of gntalloc and evtchn on. A
// domain that is resumed in the milliseconds between Offer and Adopt leaves the new process
// with dead ports that it takes for living ones.
//
// A mapping of a peer's pages does not survive either. Domains that serve backends are not
// meant to be suspended.
package xendev

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/xendev/privcmd"
)

// A Config says how to use the nodes. The zero Config works.
type Config struct {
	// Root is the directory that contains dev, proc and sys; "" means "/".
	Root string

	// GrantLimit, in pages, is the value to which gntalloc's limit is raised if it is
	// lower. The limit is for the whole system, and raising it needs root. 0 leaves it
	// alone; it is 1024 unless somebody changed it.
	GrantLimit int

	// LockMemory locks the pages of Memory (mlock(2)), so that they are never swapped
	// out. Shared and mapped pages are the kernel's and never are.
	LockMemory bool

	// Doorbell selects how Notify reaches Xen.
	Doorbell Doorbell
}

// A Doorbell is a way to fire an event channel.
type Doorbell uint8

const (
	// DoorbellIoctl uses evtchn, which makes the hypercall for us. It works in every
	// domain.
	DoorbellIoctl Doorbell = iota

	// DoorbellHypercall makes the hypercall (EVTCHNOP_send) through privcmd. The kernel
	// then does not check that the port is ours. In a domU it needs xen-privcmd loaded
	// with unrestricted=1; without that, opening a port fails ([privcmd.ErrRestricted]).
	DoorbellHypercall
)

func (d Doorbell) String() string {
	if d == DoorbellHypercall {
		return "hypercall"
	}
	return "ioctl"
}

// path returns the path of a file below the root.
func (c Config) path(elem ...string) string {
	root := c.Root
	if root == "" {
		root = "/"
	}
	return filepath.Join(root, filepath.Join(elem...))
}

// A Domain is the domain this program runs in. It is safe for concurrent use.
type Domain struct {
	cfg      Config
	id       atomic.Uint32
	gntalloc gntalloc
	gntdev   node
	held     atomic.Int64 // pages that are shared now

	raiseOnce sync.Once
	raiseErr  error // why GrantLimit could not be set

	evtchn   evtchn
	life     life
	unclosed []*os.File // guarded by life.mu; files that must not be closed, even by the garbage collection

	mu      sync.Mutex
	calls   *privcmd.Conn            // guarded by mu; opened for the first DoorbellHypercall
	closed  bool                     // guarded by mu
	shares  map[*ownedShare]struct{} // guarded by mu; those that have not ended
	offered map[any]bool             // guarded by mu; shares and waiters of which there is an Offer

	// never is always false, but the compiler cannot know that. So it must assume that
	// Copy stores ops in sink, and keeps them off the stack, which may move while the
	// kernel has only an address.
	never bool
	sink  []hypercall.CopyOp
}

var _ hypercall.HandoverDomain = (*Domain)(nil)

// Open asks xenstore which domain this is. It fails with a [*NodeError] if there is no
// xenstore, above all on a machine that is no Xen domain ([ErrNotXen]).
func Open(cfg Config) (*Domain, error) {
	if n := os.Getpagesize(); n != shm.PageSize {
		return nil, fmt.Errorf("xendev: this kernel's pages have %d bytes, those of the ring protocol %d", n, shm.PageSize)
	}
	if cfg.GrantLimit < 0 {
		return nil, errors.New("xendev: negative Config.GrantLimit")
	}
	id, err := askID(cfg)
	if err != nil {
		return nil, err
	}
	return newDomain(cfg, id), nil
}

func newDomain(cfg Config, id hypercall.DomID) *Domain {
	d := &Domain{
		cfg:      cfg,
		gntalloc: linuxGntalloc{},
		shares:   make(map[*ownedShare]struct{}),
		gntdev:   node{path: cfg.path("dev/xen/gntdev"), module: "xen-gntdev"},
		evtchn:   linuxEvtchn{},
	}
	d.life.late, d.life.fresh = probeLate, probeSoon
	d.id.Store(uint32(id))
	return d
}

// ID returns the domain's number as of Open, of the last [Domain.Store], or of the last
// resume that was noticed.
func (d *Domain) ID() hypercall.DomID { return hypercall.DomID(d.id.Load()) }

// other returns the number by which other domains and grant entries know peer.
func (d *Domain) other(peer hypercall.DomID) hypercall.DomID {
	if peer == hypercall.DomSelf {
		return d.ID()
	}
	return peer
}

// Close closes the nodes and thereby ends what was not ended before. Memory that is still
// mapped in this process is the exception: its grants end with its End or Release.
// Waiters and connections to xenstore are closed separately. Close is idempotent.
func (d *Domain) Close() error {
	d.mu.Lock()
	calls, closed, shares := d.calls, d.closed, d.shares
	d.calls, d.closed, d.shares = nil, true, nil
	d.mu.Unlock()
	if closed {
		return nil
	}
	errs := []error{d.gntdev.close()}
	for s := range shares {
		errs = append(errs, s.file.Close())
	}
	if calls != nil {
		errs = append(errs, calls.Close())
	}
	return errors.Join(errs...)
}

// hypercalls returns the connection to privcmd, which all doorbells share.
func (d *Domain) hypercalls() (*privcmd.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, net.ErrClosed
	}
	if d.calls != nil {
		return d.calls, nil
	}
	c, err := privcmd.Open(d.cfg.path("dev/xen"))
	if err != nil {
		return nil, d.cfg.explain(d.cfg.path("dev/xen/privcmd"), "xen-privcmd", err)
	}
	if _, _, err := c.Version(); err != nil { // report a restriction now, not with each Notify
		return nil, errors.Join(err, c.Close())
	}
	d.calls = c
	return c, nil
}
