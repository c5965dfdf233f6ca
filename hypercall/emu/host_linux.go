package emu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// hostDomains is how many domains a host can have. Their tables share two memfds, which
// take no memory until they are used.
const hostDomains = 256

// acceptRetry is how long a host waits after accept has failed.
const acceptRetry = 10 * time.Millisecond

// ErrTooManyDomains is returned by a host that has no table left.
var ErrTooManyDomains = errors.New("emu: the host has no room for another domain")

// A Host is a [Machine] whose domains may live in separate processes. When such a process
// dies, in whatever way, its domain ends.
type Host struct {
	*Machine
	listener *privateListener
	serving  sync.WaitGroup

	connMu sync.Mutex
	conns  map[*net.UnixConn]hypercall.DomID // guarded by connMu: the domain, or DomSelf before it has joined; nil once closed
}

// Listen makes a host that processes [Join] at path, a unix socket, which must not exist
// yet. Only processes of the same user and root's may join: see [ListenPrivate].
// Config.Mapped is implied; Config.Grants is at most 4096.
func Listen(path string, cfg Config) (*Host, error) {
	cfg.Mapped = true
	m, err := newMachine(cfg)
	if err != nil {
		return nil, err
	}
	if m.tableSize() > maxWireRefs+reservedRefs {
		return nil, fmt.Errorf("emu: %d grants, a host allows %d", cfg.Grants, maxWireRefs/2)
	}
	m.memory = fileMemory{}
	m.bells = newFDBell
	t, err := newFileTables(m.tableSize(), m.cfg.Ports+1)
	if err != nil {
		return nil, err
	}
	m.tables = t
	l, err := listenPrivate("unixpacket", path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("emu: listen: %w", err), t.close())
	}
	h := &Host{Machine: m, listener: l, conns: make(map[*net.UnixConn]hypercall.DomID)}
	h.serving.Go(func() { h.accept(t) })
	return h, nil
}

// Close ends every domain and removes the socket. It returns when nothing of the host
// runs any more. It is idempotent.
func (h *Host) Close() error {
	h.listener.Close()
	h.shut()
	h.connMu.Lock()
	conns := h.conns
	h.conns = nil
	h.connMu.Unlock()
	for c := range conns { // connections that have not joined as a domain
		c.Close()
	}
	h.serving.Wait()
	return h.tables.close()
}

func (h *Host) accept(t *fileTables) {
	for {
		c, err := h.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(acceptRetry) // out of descriptors: some will be closed
			continue
		}
		h.serving.Go(func() { h.serve(c, t) })
	}
}

// serve serves one domain of another process until it ends.
func (h *Host) serve(c *net.UnixConn, t *fileTables) {
	defer c.Close()
	if !h.keep(c) {
		return
	}
	defer h.forget(c)
	s := &server{conn: c, tables: t, buf: make([]byte, maxPacket)}
	if !s.join(h) {
		return
	}
	for s.next() {
	}
	s.p.end(!s.left)
}

func (h *Host) keep(c *net.UnixConn) bool {
	h.connMu.Lock()
	defer h.connMu.Unlock()
	if h.conns == nil {
		return false
	}
	h.conns[c] = hypercall.DomSelf
	return true
}

// joined notes that c is domain id, or is about to be.
func (h *Host) joined(c *net.UnixConn, id hypercall.DomID) {
	h.connMu.Lock()
	defer h.connMu.Unlock()
	if _, open := h.conns[c]; open {
		h.conns[c] = id
	}
}

// dying reports whether a process of domain id has died and the host has not finished its end yet.
func (h *Host) dying(id hypercall.DomID) bool {
	h.connMu.Lock()
	defer h.connMu.Unlock()
	for c, of := range h.conns {
		if of == id && hungUp(c) {
			return true
		}
	}
	return false
}

// hungUp reports whether the other end of c is closed.
func hungUp(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	var p [1]unix.PollFd
	err = raw.Control(func(fd uintptr) {
		p[0].Fd = int32(fd)
		_, _ = unix.Poll(p[:], 0) // poll reports POLLHUP without being asked
	})
	return err == nil && p[0].Revents&unix.POLLHUP != 0
}

func (h *Host) forget(c *net.UnixConn) {
	h.connMu.Lock()
	defer h.connMu.Unlock()
	delete(h.conns, c)
}

// A server answers the requests of one domain, on one goroutine.
type server struct {
	conn   *net.UnixConn
	tables *fileTables
	g      *guest
	p      *program
	left   bool // the domain sent opLeave
	buf    []byte
}

// An answer is the result of a request. fds are closed once they are sent.
type answer struct {
	reply
	refs []hypercall.GrantRef
	runs []run
	fds  []int
}

// give adds a descriptor to the answer.
func (a *answer) give(fd int, err error) error {
	if err == nil {
		a.fds = append(a.fds, fd)
	}
	return err
}

func (s *server) receive() (r request, refs []hypercall.GrantRef, ok bool) {
	p, err := readPacket(s.conn, s.buf)
	if err != nil {
		return r, nil, false
	}
	p.closeFDs() // a domain never sends descriptors
	rest, err := decode(p.data, &r)
	if err != nil || len(rest)%4 != 0 {
		return r, nil, false
	}
	refs = make([]hypercall.GrantRef, len(rest)/4)
	_, err = decode(rest, refs)
	return r, refs, err == nil
}

func (s *server) send(a *answer, err error) bool {
	var text string
	if err != nil {
		text = a.setError(err)
	}
	a.NRefs, a.NRuns = uint32(len(a.refs)), uint32(len(a.runs))
	b, err := encode(&a.reply, a.refs, a.runs, []byte(text))
	if err == nil {
		err = writePacket(s.conn, b, a.fds)
	}
	for _, fd := range a.fds {
		unix.Close(fd)
	}
	return err == nil
}

// mostDying is how long a joining process waits at most until the host has finished the end of a dead one of the same
// domain.
const mostDying = 5 * time.Second

func (s *server) join(h *Host) bool {
	r, _, ok := s.receive()
	if !ok || r.Op != opJoin {
		return false
	}
	var a answer
	if r.N != wireVersion {
		s.send(&a, fmt.Errorf("emu: the host speaks version %d, the domain %d", wireVersion, r.N))
		return false
	}
	var p *program
	var err error
	for end := time.Now().Add(mostDying); ; time.Sleep(time.Millisecond) {
		dying := h.dying(r.Peer) // asked before newProgram: the dead process may be gone after it
		h.joined(s.conn, r.Peer)
		p, err = h.newProgram(r.Peer, r.Beside, func() { s.conn.Close() })
		if err == nil {
			break
		}
		h.joined(s.conn, hypercall.DomSelf)
		if !errors.Is(err, ErrDomainExists) || !dying || hungUp(s.conn) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		s.send(&a, err)
		return false
	}
	g := p.g
	s.g, s.p = g, p
	a.setTables(g.guestTables)
	err = a.give(readOnly(s.tables.grants.file))
	if err == nil {
		err = a.give(fdOf(s.tables.ports.file))
	}
	if !s.send(&a, err) || err != nil {
		p.end(false)
		return false
	}
	return true
}

func (a *answer) setTables(t guestTables) {
	a.Slot, a.ID = uint32(t.slot), t.incarnation
	a.Grants, a.Ports = uint32(len(t.grants)), uint32(len(t.ports))
}

// next answers one request. It reports false when the domain has left or the connection
// has ended.
func (s *server) next() bool {
	r, refs, ok := s.receive()
	if s.left = ok && r.Op == opLeave; !ok || s.left {
		return false
	}
	var a answer
	err := s.do(&r, refs, &a)
	if err == nil {
		s.p.note(&r, &a.reply)
	}
	return s.send(&a, err)
}

func (s *server) do(r *request, refs []hypercall.GrantRef, a *answer) (err error) {
	g := s.g
	switch r.Op {
	case opKeepPages:
		a.ID, err = g.keepPages(int(r.N))
	case opDropPages:
		g.dropPages(r.ID)
	case opShare:
		var b backing
		var gr grants
		if gr, b, err = g.share(r.Peer, int(r.N), r.Access); err != nil {
			return err
		}
		defer b.close()
		a.setGrants(gr)
		return a.give(fdOf(b.(*fileBacking).file))
	case opEndShare:
		err = g.endShare(r.ID, r.Refuse)
	case opMap:
		var m mapped
		m, err = g.mapGrants(r.Peer, refs, r.Access)
		a.ID, a.runs = m.ID, m.Runs
	case opUnmap:
		err = g.unmapGrants(r.ID)
	case opAttach:
		var b backing
		var gr grants
		if gr, b, err = g.attach(r.Peer, hypercall.GrantRef(r.N)); err != nil {
			return err
		}
		defer b.close()
		a.setGrants(gr)
		if gr.Access == hypercall.ReadOnly {
			return a.give(readOnly(b.(*fileBacking).file))
		}
		return a.give(fdOf(b.(*fileBacking).file))
	case opLookup:
		var t guestTables
		t, err = g.lookup(r.Peer)
		a.setTables(t)
	case opWaiter:
		var b bell
		if a.ID, b, err = g.newWaiter(true); err != nil {
			return err
		}
		return a.give(fdOf(b.(*fdBell).file))
	case opCloseWaiter:
		g.closeWaiter(r.ID)
	case opUnbound:
		err = a.setEnd(g.unbound(r.ID, r.Peer))
	case opBind:
		err = a.setEnd(g.bind(r.ID, r.Peer, hypercall.PortID(r.N)))
	case opClosePort:
		g.closePort(hypercall.PortID(r.N), r.Gen)
	case opFarEnd:
		err = s.farEnd(r, a)
	case opStore:
		err = s.store(a)
	case opCloseStore:
		g.closeStore(r.ID)
	case opOffer, opWithdraw, opAdoptShare, opAdoptWaiter, opForget:
		err = s.handOver(r, refs, a)
	default:
		err = fmt.Errorf("emu: request %d", r.Op)
	}
	return err
}

func (a *answer) setGrants(g grants) { a.ID, a.Access, a.refs = g.Serial, g.Access, g.Refs }

func (a *answer) setEnd(e channelEnd, err error) error {
	a.Port, a.Gen = uint32(e.ID), e.Gen
	return err
}

// farEnd answers with port 0 if there is no far end.
func (s *server) farEnd(r *request, a *answer) error {
	s.g.m.mu.Lock()
	defer s.g.m.mu.Unlock()
	far, port := s.g.farLocked(hypercall.PortID(r.N), r.Gen)
	if far == nil {
		return nil
	}
	c := &far.channels[port]
	a.Slot, a.Port, a.Gen = uint32(far.slot), uint32(port), c.gen
	return a.give(fdOf(far.waiters[c.waiter].(*fdBell).file))
}

func (s *server) store(a *answer) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("emu: socketpair: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "xenstore")
	a.ID, err = s.g.serve(ours, func() { shutdown(ours) })
	if err != nil {
		ours.Close()
		unix.Close(fds[1])
		return err
	}
	return a.give(fds[1], nil)
}

// shutdown makes both ends of a socket read io.EOF.
func shutdown(f *os.File) {
	if rc, err := f.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
}

// readOnly opens a memfd again, so that it cannot be mapped writable.
func readOnly(f *os.File) (int, error) {
	fd, err := fdOf(f)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	ro, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("emu: reopen read-only: %w", err)
	}
	return ro, nil
}

// fileTables are the tables of all domains of a host, in two memfds. The event words keep
// their generations from one domain to the next.
type fileTables struct {
	nGrants, nPorts int
	grants, ports   *fileBacking
	grantMem        region
	portMem         region

	mu   sync.Mutex
	free []int // guarded by mu
}

func newFileTables(nGrants, nPorts int) (_ *fileTables, err error) {
	t := &fileTables{nGrants: nGrants, nPorts: nPorts}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	if t.grants, err = newFileBacking(tableBytes(nGrants, 8)); err != nil {
		return nil, err
	}
	if t.ports, err = newFileBacking(tableBytes(nPorts, 4)); err != nil {
		return nil, err
	}
	if t.grantMem, err = mapTable(t.grants.file, nGrants, 8, hypercall.ReadWrite); err != nil {
		return nil, err
	}
	if t.portMem, err = mapTable(t.ports.file, nPorts, 4, hypercall.ReadWrite); err != nil {
		return nil, err
	}
	for slot := hostDomains - 1; slot >= 0; slot-- {
		t.free = append(t.free, slot)
	}
	return t, nil
}

// tableBytes returns the size of the tables of all domains, of n words each.
func tableBytes(n, word int) int {
	return (hostDomains*n*word + shm.PageSize - 1) / shm.PageSize * shm.PageSize
}

// mapTable maps the tables without populating them: most of them are never used.
func mapTable(f *os.File, n, word int, access hypercall.Access) (region, error) {
	return newRegion(unix.Mmap(int(f.Fd()), 0, tableBytes(n, word), protection(access), unix.MAP_SHARED))
}

// sliceTables returns the tables of one domain.
func sliceTables(grants []atomic.Uint64, ports []atomic.Uint32, nGrants, nPorts, slot int) guestTables {
	return guestTables{
		slot:   slot,
		grants: grants[slot*nGrants : (slot+1)*nGrants],
		ports:  ports[slot*nPorts : (slot+1)*nPorts],
	}
}

func (t *fileTables) open() (guestTables, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.free) == 0 {
		return guestTables{}, ErrTooManyDomains
	}
	slot := t.free[len(t.free)-1]
	t.free = t.free[:len(t.free)-1]
	return sliceTables(words64(t.grantMem.Memory), words32(t.portMem.Memory), t.nGrants, t.nPorts, slot), nil
}

func (t *fileTables) release(g guestTables) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free = append(t.free, g.slot)
}

func (t *fileTables) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, r := range []*region{&t.grantMem, &t.portMem} {
		if r.free != nil {
			errs = append(errs, r.free())
			r.free = nil
		}
	}
	for _, b := range []*fileBacking{t.grants, t.ports} {
		if b != nil {
			errs = append(errs, b.close())
		}
	}
	t.grants, t.ports = nil, nil
	return errors.Join(errs...)
}
