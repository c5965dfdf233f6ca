//go:build linux

// Package xendev is a [hypercall.Domain] on a real Xen, through the device nodes
// of Linux: /dev/xen/gntalloc gives memory to another domain, /dev/xen/gntdev
// maps and copies another domain's, /dev/xen/evtchn is the doorbell, and
// /dev/xen/xenbus the way to xenstore.
//
// It needs no cgo and no library of Xen, and no raw hypercalls: those are in the
// privcmd package, for what the nodes cannot do, where the kernel allows them.
//
// Nodes are opened when first needed, close-on-exec: a grant lives until the last
// descriptor and mapping of it is gone, so a child must not inherit one. One that
// is missing or forbidden is a [*NodeError], which says what to load or to allow.
//
// A [Domain] and its Waiters, Shares and Mappings belong to whoever opened it.
// When the process dies, however it dies, the kernel ends all of them; a page
// the peer still has mapped stays set aside in the kernel until it is not.
package xendev

import (
	"context"
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

// A Config says how to use the nodes. Its zero value works.
type Config struct {
	// Root is where dev, proc and sys are; "" means "/".
	Root string

	// GrantLimit is what gntalloc's limit, which is the whole system's, is
	// raised to if it is lower, in pages. It needs root. 0 leaves the limit (1024
	// unless somebody changed it) alone.
	GrantLimit int

	// LockMemory locks what Memory gives (mlock(2)), so that none of it is ever
	// swapped out. Shared and mapped pages are the kernel's and never are.
	LockMemory bool

	// Doorbell is how Notify reaches Xen.
	Doorbell Doorbell
}

// A Doorbell is a way to fire an event channel.
type Doorbell uint8

const (
	// DoorbellIoctl asks evtchn, which makes the hypercall for us. It works in
	// every domain.
	DoorbellIoctl Doorbell = iota

	// DoorbellHypercall makes the hypercall (EVTCHNOP_send) through privcmd. The
	// kernel does not check then that the port is ours. In a domU it needs
	// xen-privcmd loaded with unrestricted=1; without, no port can be opened
	// ([privcmd.ErrRestricted]).
	DoorbellHypercall
)

func (d Doorbell) String() string {
	if d == DoorbellHypercall {
		return "hypercall"
	}
	return "ioctl"
}

// path is the file of that name below the root.
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
	gntalloc node
	gntdev   node
	held     atomic.Int64 // pages shared now

	raiseOnce sync.Once
	raiseErr  error // why GrantLimit could not be had

	mu      sync.Mutex
	calls   *privcmd.Conn                 // guarded by mu; opened for the first DoorbellHypercall
	indices map[hypercall.GrantRef]uint64 // guarded by mu; first ref of a Share → its place in the gntalloc file
	closed  bool                          // guarded by mu

	// never is false and nobody sets it. The compiler cannot know, so what
	// Copy would store in sink if it were true is never on a stack that may
	// move while only its address is kept.
	never bool
	sink  []hypercall.CopyOp
}

var _ hypercall.Domain = (*Domain)(nil)

// Open finds out which domain this is, which takes one question to xenstore. It
// fails with a [*NodeError] where there is no xenstore to ask, above all on a
// machine that is no Xen domain ([ErrNotXen]).
func Open(cfg Config) (*Domain, error) {
	if n := os.Getpagesize(); n != shm.PageSize {
		return nil, fmt.Errorf("xendev: this kernel's pages have %d bytes, those of the ring protocol %d", n, shm.PageSize)
	}
	if cfg.GrantLimit < 0 {
		return nil, errors.New("xendev: negative Config.GrantLimit")
	}
	id, err := askID(context.Background(), cfg)
	if err != nil {
		return nil, err
	}
	return newDomain(cfg, id), nil
}

func newDomain(cfg Config, id hypercall.DomID) *Domain {
	d := &Domain{
		cfg:      cfg,
		gntalloc: node{path: cfg.path("dev/xen/gntalloc"), module: "xen-gntalloc"},
		gntdev:   node{path: cfg.path("dev/xen/gntdev"), module: "xen-gntdev"},
		indices:  make(map[hypercall.GrantRef]uint64),
	}
	d.id.Store(uint32(id))
	return d
}

// ID is the domain's number: as of Open, or of the last [Domain.Store], which a
// migrated domain opens anew.
func (d *Domain) ID() hypercall.DomID { return hypercall.DomID(d.id.Load()) }

// other is the number other domains, and grant entries, know peer by.
func (d *Domain) other(peer hypercall.DomID) hypercall.DomID {
	if peer == hypercall.DomSelf {
		return d.ID()
	}
	return peer
}

// Close closes the nodes; what was not ended before is ended by it, except memory
// that is still mapped here: its grants end with its End or Release. Waiters and
// connections to xenstore are closed on their own. Close is idempotent.
func (d *Domain) Close() error {
	d.mu.Lock()
	calls, closed := d.calls, d.closed
	d.calls, d.closed = nil, true
	d.mu.Unlock()
	if closed {
		return nil
	}
	errs := []error{d.gntalloc.close(), d.gntdev.close()}
	if calls != nil {
		errs = append(errs, calls.Close())
	}
	return errors.Join(errs...)
}

// hypercalls is the connection to privcmd, which all doorbells share.
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
	if _, _, err := c.Version(); err != nil { // rather now than with every Notify
		return nil, errors.Join(err, c.Close())
	}
	d.calls = c
	return c, nil
}
