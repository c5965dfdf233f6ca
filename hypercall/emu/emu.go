package emu

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"

	"barevif/hypercall"
)

// Config describes a machine. The zero Config works.
type Config struct {
	// Mapped puts memory into sealed memfds instead of the Go heap. Linux only.
	Mapped bool

	// Grants is how many pages one domain may have granted at once; 0 means 1024, the
	// default limit of /dev/xen/gntalloc, which is per system. Pages set aside because a
	// peer still maps them do not count, but granted and set-aside pages together never
	// exceed twice this number.
	Grants int

	// Ports is how many event channels one domain may have open; 0 means 4095, all but
	// the first of the two-level ABI.
	Ports int

	// Store serves a xenstore connection of dom, on a separate goroutine. When the domain
	// closes the connection or dies, reads return io.EOF. nil: there is no xenstore, and
	// Domain.Store fails with errors.ErrUnsupported.
	Store func(dom hypercall.DomID, conn io.ReadWriteCloser)

	// Admit may refuse a connection to xenstore before it is made: the domain gets its
	// error. If it returns nil, Store is called next. It must not call the machine. nil:
	// every connection is admitted.
	Admit func(dom hypercall.DomID) error
}

const (
	defaultGrants = 1024
	defaultPorts  = 4095
	maxGrants     = 32768 // 64 frames of 512 version 1 entries: Xen's own default
	maxPorts      = 131071
	reservedRefs  = 8 // GNTTAB_NR_RESERVED_ENTRIES of xen/include/public/grant_table.h
)

var (
	// ErrDomainExists is returned when a domain of that number lives.
	ErrDomainExists = errors.New("emu: the domain exists already")

	// ErrLocalCopy is returned by Copy for an operation with two local ends.
	ErrLocalCopy = errors.New("emu: a copy from local memory to local memory")

	errDead    = fmt.Errorf("emu: the domain is gone: %w", hypercall.ErrClosed)
	errClosed  = fmt.Errorf("emu: the machine is closed: %w", hypercall.ErrClosed)
	errNoStore = fmt.Errorf("emu: the machine has no xenstore: %w", errors.ErrUnsupported)
)

// A Machine is one emulated host. Its methods may be called from any goroutine.
type Machine struct {
	cfg    Config
	memory memory
	tables tables
	bells  func() (bell, error)
	sys    system

	serial atomic.Uint64 // the last number given to a share, mapping, waiter or other object
	stores sync.WaitGroup

	mu      sync.Mutex
	guests  map[hypercall.DomID]*guest // guarded by mu
	onDeath []func(hypercall.DomID)    // guarded by mu
	orphans int                        // guarded by mu: pages of dead domains still mapped
	closed  bool                       // guarded by mu
}

// New makes a machine without domains.
func New(cfg Config) (*Machine, error) {
	m, err := newMachine(cfg)
	if err != nil {
		return nil, err
	}
	m.tables = heapTables{grants: m.tableSize(), ports: m.cfg.Ports + 1}
	m.bells = newChanBell
	m.memory = heapMemory{}
	if cfg.Mapped {
		if m.memory, err = mappedMemory(); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func newMachine(cfg Config) (*Machine, error) {
	if cfg.Grants == 0 {
		cfg.Grants = defaultGrants
	}
	if cfg.Ports == 0 {
		cfg.Ports = defaultPorts
	}
	if cfg.Grants < 0 || cfg.Grants > maxGrants || cfg.Ports < 0 || cfg.Ports > maxPorts {
		return nil, fmt.Errorf("emu: %d grants (at most %d), %d ports (at most %d)",
			cfg.Grants, maxGrants, cfg.Ports, maxPorts)
	}
	return &Machine{cfg: cfg, sys: thisSystem, guests: make(map[hypercall.DomID]*guest)}, nil
}

// tableSize returns the number of refs of a domain, including reserved ones.
func (m *Machine) tableSize() int { return reservedRefs + 2*m.cfg.Grants }

// next returns a number that was never used before and fits a grant entry.
func (m *Machine) next() uint64 { return m.serial.Add(1) & entrySerial }

// NewDomain starts a domain in this process. The error is [ErrDomainExists] if a domain
// of that number lives, and net.ErrClosed after Close.
func (m *Machine) NewDomain(id hypercall.DomID) (*Domain, error) {
	g, err := m.newGuest(id)
	if err != nil {
		return nil, err
	}
	d := newDomain(id, g, m.memory, m.sys)
	m.mu.Lock()
	g.domain = d
	dead := g.dead
	m.mu.Unlock()
	if dead { // destroyed before this call returned
		return nil, errDead
	}
	return d, nil
}

// Domain returns the living domain of that number in this process, or
// hypercall.ErrNoDomain.
func (m *Machine) Domain(id hypercall.DomID) (*Domain, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if g := m.guests[id]; g != nil && g.domain != nil {
		return g.domain, nil
	}
	return nil, hypercall.ErrNoDomain
}

// Destroy ends the domain of that number, wherever it runs, as if it had crashed. Its
// ports close without an event, its mappings are unmapped, and its grants can no longer
// be mapped or copied. A domain that maps its pages keeps them. In this process the
// memory that the domain holds stays readable until it is released, because its
// goroutines live on. Destroy returns when the machine has dropped the domain and every
// OnDeath function has returned.
func (m *Machine) Destroy(id hypercall.DomID) error {
	m.mu.Lock()
	g := m.guests[id]
	m.mu.Unlock()
	if g == nil {
		return hypercall.ErrNoDomain
	}
	g.destroy()
	return nil
}

// OnDeath registers f, which is called after each death of a domain, without a lock held.
// Destroy waits for f, so f must not wait for the death.
func (m *Machine) OnDeath(f func(hypercall.DomID)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onDeath = append(m.onDeath, f)
}

// Close destroys all domains and returns when every Config.Store function has returned.
// It is idempotent.
func (m *Machine) Close() error {
	m.shut()
	return m.tables.close()
}

// shut ends everything except the tables.
func (m *Machine) shut() {
	m.mu.Lock()
	m.closed = true
	var all []*guest
	for _, g := range m.guests {
		all = append(all, g)
	}
	m.mu.Unlock()
	for _, g := range all {
		g.destroy()
	}
	m.stores.Wait()
}

// A Ledger counts the resources that the domains of a machine hold now.
type Ledger struct {
	Domains     int
	Grants      int // pages granted
	Pages       int // pages granted, and private pages
	Mappings    int // pages of other domains mapped; a page mapped twice counts twice
	Quarantined int // pages given up while a peer still maps them
	Ports       int
	Waiters     int
	Connections int // to xenstore
}

// Ledger returns the current counts.
func (m *Machine) Ledger() Ledger {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := Ledger{Domains: len(m.guests), Quarantined: m.orphans}
	for _, g := range m.guests {
		l.Grants += g.granted
		l.Pages += g.granted + g.private
		l.Mappings += g.mapped
		l.Quarantined += g.quarantined
		l.Ports += g.open
		l.Waiters += len(g.waiters)
		l.Connections += len(g.conns)
	}
	return l
}

// CheckClean returns an error that names everything that a domain still holds. A living
// domain that holds nothing is no error.
func (m *Machine) CheckClean() error {
	l := m.Ledger()
	var left []string
	for _, c := range []struct {
		n    int
		what string
	}{
		{l.Grants, "grants"}, {l.Pages, "pages"}, {l.Mappings, "mappings"},
		{l.Quarantined, "quarantined pages"}, {l.Ports, "ports"},
		{l.Waiters, "waiters"}, {l.Connections, "connections"},
	} {
		if c.n != 0 {
			left = append(left, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	if left != nil {
		return fmt.Errorf("emu: left behind: %s", strings.Join(left, ", "))
	}
	return nil
}
