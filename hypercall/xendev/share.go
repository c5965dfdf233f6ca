//go:build linux

package xendev

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// A gntalloc is Linux's driver behind /dev/xen/gntalloc (drivers/xen/gntalloc.c), or what a
// test puts in its place.
type gntalloc interface {
	// open opens the node. check refuses a file that it has not opened.
	open(Config) (*os.File, error)
	check(Config, *os.File) error

	alloc(fd int, peer hypercall.DomID, flags uint16, pages int) (index uint64, refs []hypercall.GrantRef, err error)
	dealloc(fd int, index uint64, pages int) error
}

type linuxGntalloc struct{}

func (linuxGntalloc) open(cfg Config) (*os.File, error) {
	path := cfg.path("dev/xen/gntalloc")
	f, err := openFile(path, 0)
	if err != nil {
		return nil, cfg.explain(path, "xen-gntalloc", err)
	}
	return f, nil
}

func (linuxGntalloc) check(cfg Config, f *os.File) error {
	return sameNode(cfg.path("dev/xen/gntalloc"), f)
}

func (linuxGntalloc) alloc(fd int, peer hypercall.DomID, flags uint16, pages int) (uint64, []hypercall.GrantRef, error) {
	return allocGrefs(fd, peer, flags, pages)
}

func (linuxGntalloc) dealloc(fd int, index uint64, pages int) error {
	return deallocGrefs(fd, index, pages)
}

// An ownedShare is what the domain knows of a Share: an open file of gntalloc of its own,
// which can pass to another process without the pages of other Shares.
type ownedShare struct {
	d      *Domain
	file   *os.File
	index  uint64 // of the first page, in the file
	access hypercall.Access
	b      []byte
	given  atomic.Bool // another process has the file too, and keeps the grants
}

// Share returns zeroed pages, each granted to peer until End. Xen does not say whether
// peer exists. The pages count towards gntalloc's limit, which is for the whole system.
// At the limit the error wraps [hypercall.ErrNoGrants] and says what the limit is and
// where to raise it. Each Share takes a descriptor.
//
// End never returns [hypercall.ErrInUse]: the kernel keeps a page that the peer still
// maps, without counting it towards the limit, and frees it when it is unmapped.
func (d *Domain) Share(peer hypercall.DomID, pages int, access hypercall.Access) (*hypercall.Share, error) {
	if err := checkPages("share", pages); err != nil {
		return nil, err
	}
	f, err := d.gntalloc.open(d.cfg)
	if err != nil {
		return nil, err
	}
	d.raiseOnce.Do(func() { d.raiseErr = d.cfg.raiseLimit() })
	s := &ownedShare{d: d, file: f, access: access}
	var flags uint16
	if access == hypercall.ReadWrite {
		flags = gntallocWritable
	}
	var refs []hypercall.GrantRef
	err = s.control(func(fd int) (err error) {
		s.index, refs, err = d.gntalloc.alloc(fd, d.other(peer), flags, pages)
		return err
	})
	if err == nil {
		share, err := s.mapPages(d.other(peer), refs)
		if err == nil {
			return share, nil
		}
		return nil, errors.Join(err, s.file.Close()) // its last close ends the grants
	}
	if errors.Is(err, unix.ENOSPC) {
		err = d.noGrants(pages)
	} else {
		err = fmt.Errorf("xendev: share %d pages with domain %d: %w", pages, peer, err)
	}
	return nil, errors.Join(err, f.Close())
}

// control runs f with the descriptor of the file.
func (s *ownedShare) control(f func(fd int) error) error {
	raw, err := s.file.SyscallConn()
	if err != nil {
		return err
	}
	if e := raw.Control(func(fd uintptr) { err = f(int(fd)) }); e != nil {
		return e
	}
	return err
}

// mapPages maps the file's pages and makes the Share of them.
func (s *ownedShare) mapPages(peer hypercall.DomID, refs []hypercall.GrantRef) (*hypercall.Share, error) {
	d, pages := s.d, len(refs)
	err := s.control(func(fd int) (err error) {
		s.b, err = unix.Mmap(fd, int64(s.index), pages*shm.PageSize, unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_SHARED|unix.MAP_POPULATE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("xendev: map %d shared pages: %w", pages, err)
	}
	m, err := shm.New(s.b)
	if err == nil {
		err = d.keep(s)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(s.b))
	}
	d.held.Add(int64(pages))
	share := hypercall.NewShare(m, peer, s.access, refs, s.end)
	share.SetOwned(s)
	return share, nil
}

// keep notes a file that Close of the domain has to close.
func (d *Domain) keep(s *ownedShare) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return net.ErrClosed
	}
	d.shares[s] = struct{}{}
	return nil
}

// end gives up both holds on the pages, our mapping and the file's entry: either one keeps
// the grants alive.
func (s *ownedShare) end() error {
	d, pages := s.d, len(s.b)/shm.PageSize
	if err := unix.Munmap(s.b); err != nil {
		return fmt.Errorf("xendev: end share of %d pages: %w", pages, err)
	}
	d.held.Add(-int64(pages))
	d.mu.Lock()
	_, open := d.shares[s]
	delete(d.shares, s)
	d.mu.Unlock()
	if !open {
		return nil // Close of the domain has ended the grants
	}
	var err error
	if !s.given.Load() {
		err = s.control(func(fd int) error { return d.gntalloc.dealloc(fd, s.index, pages) })
	}
	if err = errors.Join(err, s.file.Close()); err != nil {
		return fmt.Errorf("xendev: end share of %d pages: %w", pages, err)
	}
	return nil
}

// limitFile holds the limit of drivers/xen/gntalloc.c.
const limitFile = "sys/module/xen_gntalloc/parameters/limit"

// GrantLimit returns how many pages gntalloc grants in the whole system.
func GrantLimit(cfg Config) (int, error) { return readInt(cfg.path(limitFile)) }

// raiseLimit raises the limit to Config.GrantLimit if it is lower.
func (c Config) raiseLimit() error {
	if c.GrantLimit == 0 {
		return nil
	}
	now, err := GrantLimit(c)
	if err != nil {
		return err
	}
	if now >= c.GrantLimit {
		return nil
	}
	return writeFile(c.path(limitFile), strconv.Itoa(c.GrantLimit))
}

func (d *Domain) noGrants(asked int) error {
	limit := "unknown"
	if n, err := GrantLimit(d.cfg); err == nil {
		limit = strconv.Itoa(n)
	}
	err := fmt.Errorf("share %d pages: %w: this program has %d, the limit for the whole system is %s (%s)",
		asked, hypercall.ErrNoGrants, d.held.Load(), limit, "/"+limitFile)
	if d.raiseErr != nil {
		err = fmt.Errorf("%w; it could not be raised to %d: %w", err, d.cfg.GrantLimit, d.raiseErr)
	}
	return err
}

func readInt(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// writeFile writes an existing file of sysfs, which accepts a value in one write only.
func writeFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
