package pvnet

import (
	"fmt"
	"log/slog"
	"sync/atomic"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/xenbus"
)

// An undo is a list of steps, each of which gives back one resource. It runs backwards,
// once, from whatever point the set-up reached.
type undo []func()

func (u *undo) add(f func()) { *u = append(*u, f) }

func (u *undo) run() {
	for i := len(*u) - 1; i >= 0; i-- {
		(*u)[i]()
	}
	*u = nil
}

// How many pages a frontend's queue shares in each direction: one for every slot, or
// fewer where the system limits the grants. All queues get the same number.
const (
	pagesPerHalf    = 256
	pagesPerHalfMin = 32
)

// privatePages is how many private pages a queue receives into by default: one ring's
// worth in the user's hands and another in flight.
const privatePages = 512

// A setup does the part of a connection's set-up that both ends need.
type setup struct {
	dom         hypercall.Domain
	peer        hypercall.DomID
	log         *slog.Logger
	quarantined *atomic.Uint64 // pages that the peer did not give back
	c           *conn
	steer       *atomic.Pointer[steering] // backend: how frames are hashed; nil: they are not

	limiter       *limiter // backend: of the vif
	groups        *groups  // backend: the vif's multicast filter
	lockedThreads bool     // Config.LockedThreads: waiters block a thread
}

func newSetup(d *Device, xd *xenbus.Device, c *conn) *setup {
	return &setup{
		dom: d.domain, peer: dom(xd), log: d.log, quarantined: &d.quarantined, c: c,
		limiter: &d.limiter, groups: &d.groups, lockedThreads: d.cfg.LockedThreads,
	}
}

func (m *setup) private(pages int) (*arena.Arena, error) {
	mem, err := m.dom.Memory(pages)
	if err != nil {
		return nil, fmt.Errorf("%d private pages: %w", pages, err)
	}
	a := arena.NewReserved(mem.Memory, shm.PageSize, mem.Populate)
	m.c.arenas = append(m.c.arenas, a)
	m.c.undo.add(func() { a.Retire(func() { mem.Release() }) })
	m.c.private += pages
	return a, nil
}

// share grants pages to the peer and makes an arena of them.
func (m *setup) share(pages int, access hypercall.Access) (*hypercall.Share, *arena.Arena, error) {
	s, err := m.dom.Share(m.peer, pages, access)
	if err != nil {
		return nil, nil, err
	}
	return s, m.arenaOf(s), nil
}

// own makes the connection end a share of which no arena is made.
func (m *setup) own(s *hypercall.Share) {
	m.c.undo.add(func() { m.end(s) })
	m.c.shared += s.Pages()
}

// arenaOf makes an arena of a share, which ends once every page is back.
func (m *setup) arenaOf(s *hypercall.Share) *arena.Arena {
	a := arena.New(s.Memory, shm.PageSize)
	if s.Access == hypercall.ReadOnly { // the peer reads no page before a frame was sent in it, so memory can come late
		a = arena.NewReserved(s.Memory, shm.PageSize, func(first, n int) {
			for i := range n {
				s.Page(first + i)[0] = 0
			}
		})
	}
	m.c.undo.add(func() { a.Retire(func() { m.end(s) }) })
	m.c.shared += s.Pages()
	return a
}

// end ends a share. Pages that the peer keeps mapped are quarantined: they are never used
// again.
func (m *setup) end(s *hypercall.Share) {
	pages := s.Pages()
	if err := s.End(); err != nil {
		m.quarantined.Add(uint64(pages))
		m.log.Warn("pages quarantined", "pages", pages, "peer", m.peer, "err", err)
	}
}

func (m *setup) waiter() (hypercall.Waiter, error) {
	if d, ok := m.dom.(hypercall.ThreadDomain); ok && m.lockedThreads {
		return d.ThreadWaiter()
	}
	return m.dom.Waiter()
}

// parker makes the parker of an event channel that is opened later.
func (m *setup) parker() (*parker, error) {
	w, err := m.waiter()
	if err != nil {
		return nil, err
	}
	m.c.closes(w)
	return newParker(w), nil
}

// port opens an event channel on a waiter of its own and makes the parker p for it.
func (m *setup) port(p **parker, open func(hypercall.Waiter) (hypercall.Port, error)) (port hypercall.Port, err error) {
	if *p, err = m.parker(); err != nil {
		return nil, err
	}
	return (*p).open(open)
}
