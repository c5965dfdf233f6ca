//go:build linux

package xendev

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// Share returns zeroed pages, each granted to peer until End. Xen does not say whether
// peer exists. The pages count towards gntalloc's limit, which is for the whole system.
// At the limit the error wraps [hypercall.ErrNoGrants] and says what the limit is and
// where to raise it.
//
// End never returns [hypercall.ErrInUse]: the kernel keeps a page that the peer still
// maps, without counting it towards the limit, and frees it when it is unmapped.
func (d *Domain) Share(peer hypercall.DomID, pages int, access hypercall.Access) (*hypercall.Share, error) {
	if err := checkPages("share", pages); err != nil {
		return nil, err
	}
	fd, err := d.gntalloc.enter(&d.cfg)
	if err != nil {
		return nil, err
	}
	defer d.gntalloc.leave()
	d.raiseOnce.Do(func() { d.raiseErr = d.cfg.raiseLimit() })

	var flags uint16
	if access == hypercall.ReadWrite {
		flags = gntallocWritable
	}
	index, refs, err := allocGrefs(fd, d.other(peer), flags, pages)
	if errors.Is(err, unix.ENOSPC) {
		return nil, d.noGrants(pages)
	}
	if err != nil {
		return nil, fmt.Errorf("xendev: share %d pages with domain %d: %w", pages, peer, err)
	}
	b, err := unix.Mmap(fd, int64(index), pages*shm.PageSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		err = fmt.Errorf("xendev: map %d shared pages: %w", pages, err)
		return nil, errors.Join(err, deallocGrefs(fd, index, pages))
	}
	m, err := shm.New(b)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(b), deallocGrefs(fd, index, pages))
	}

	first := refs[0] // saved, because the caller may change Refs
	d.held.Add(int64(pages))
	d.mu.Lock()
	d.indices[first] = index
	d.mu.Unlock()
	end := func() error { return d.endShare(b, first, index, pages) }
	return hypercall.NewShare(m, d.other(peer), access, refs, end), nil
}

// endShare gives up both holds on the pages, our mapping and the file's entry: either one
// keeps the grants alive.
func (d *Domain) endShare(b []byte, first hypercall.GrantRef, index uint64, pages int) error {
	d.mu.Lock()
	delete(d.indices, first)
	d.mu.Unlock()
	if err := unix.Munmap(b); err != nil {
		return fmt.Errorf("xendev: end share of %d pages: %w", pages, err)
	}
	d.held.Add(-int64(pages))
	fd, err := d.gntalloc.enter(&d.cfg)
	if err != nil {
		return nil // Close of the node has ended the grants
	}
	defer d.gntalloc.leave()
	if err := deallocGrefs(fd, index, pages); err != nil {
		return fmt.Errorf("xendev: end share of %d pages: %w", pages, err)
	}
	return nil
}

// NotifyOnEnd makes the kernel fire p when the grants of s end: at End and, its purpose,
// when this process dies without End (SET_UNMAP_NOTIFY of gntalloc.h). The peer then
// looks and finds that we are gone. p must be a port of a Waiter of this Domain; the
// kernel keeps it allocated as long as s lives. A nil p cancels the notification.
func (d *Domain) NotifyOnEnd(s *hypercall.Share, p hypercall.Port) error {
	d.mu.Lock()
	index, ok := uint64(0), false
	if len(s.Refs) > 0 {
		index, ok = d.indices[s.Refs[0]]
	}
	d.mu.Unlock()
	if !ok {
		return errors.New("xendev: notify on end of what is not a live share of this domain")
	}
	fd, err := d.gntalloc.enter(&d.cfg)
	if err != nil {
		return err
	}
	defer d.gntalloc.leave()
	if p == nil {
		err = setUnmapNotify(fd, index, 0, 0)
	} else {
		err = setUnmapNotify(fd, index, notifySendEvent, p.ID())
	}
	if err != nil {
		return fmt.Errorf("xendev: notify on end of a share: %w", err)
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
