package emu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// Join makes this process domain id of the host that listens at path. The host must be a
// process of this user, of root, or of one of users, given by uid: it sees everything
// that the domain sends. ctx bounds only the joining. The domain lives until Destroy, the
// end of the process, or the end of the host. If a process that was domain id has died and the
// host has not ended the domain yet, Join waits up to five seconds for that. The error may be [ErrDomainExists],
// [ErrTooManyDomains] or a [*ForeignHostError].
func Join(ctx context.Context, path string, id hypercall.DomID, users ...int) (*Domain, error) {
	return join(ctx, path, id, false, users)
}

// JoinBeside is [Join] for a domain that may live already: this process becomes one more
// process of it, as programs of one Linux are of a domain of Xen. Each process holds what
// it opened, and Destroy and the end of the process give that back. The domain ends with
// the last of its processes.
func JoinBeside(ctx context.Context, path string, id hypercall.DomID, users ...int) (*Domain, error) {
	return join(ctx, path, id, true, users)
}

func join(ctx context.Context, path string, id hypercall.DomID, beside bool, users []int) (*Domain, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("emu: join: %w", err)
	}
	conn := c.(*net.UnixConn)
	uid, err := peerUID(conn)
	if err == nil && !trusted(uid, users...) {
		err = &ForeignHostError{path, uid}
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	r := &remote{conn: conn, buf: make([]byte, maxPacket), dead: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { r.conn.Close() })
	err = r.join(id, beside)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		r.conn.Close()
		r.unmap()
		return nil, fmt.Errorf("emu: join as domain %d: %w", id, err)
	}
	d := newDomain(id, r, fileMemory{}, thisSystem)
	go r.listen(d)
	return d, nil
}

// A remote is a domain's connection to a machine in another process.
type remote struct {
	conn *net.UnixConn
	dead chan struct{} // closed when the host is gone or has destroyed us

	mu      sync.Mutex  // held for one request and its reply
	replies chan packet // the reply to it
	buf     []byte      // used by listen only, once joined

	tables  guestTables // our own
	grants  []atomic.Uint64
	ports   []atomic.Uint32
	regions []region
}

func (r *remote) join(id hypercall.DomID, beside bool) error {
	b, err := encode(&request{Op: opJoin, Peer: id, N: wireVersion, Beside: beside})
	if err != nil {
		return err
	}
	if err := writePacket(r.conn, b, nil); err != nil {
		return err
	}
	p, err := readPacket(r.conn, r.buf)
	if err != nil {
		return err
	}
	defer p.closeFDs()
	var rep reply
	rest, err := decode(p.data, &rep)
	if err != nil {
		return err
	}
	if err := rep.error(rest); err != nil {
		return err
	}
	for _, t := range []struct {
		n, word int
		access  hypercall.Access
	}{{int(rep.Grants), 8, hypercall.ReadOnly}, {int(rep.Ports), 4, hypercall.ReadWrite}} {
		f, err := p.takeMemory(tableBytes(t.n, t.word))
		if err != nil {
			return err
		}
		reg, err := mapTable(f.file, t.n, t.word, t.access)
		f.close()
		if err != nil {
			return err
		}
		r.regions = append(r.regions, reg)
	}
	r.grants, r.ports = words64(r.regions[0].Memory), words32(r.regions[1].Memory)
	r.replies = make(chan packet)
	r.tables, err = r.table(&rep)
	return err
}

// takeMemory takes a descriptor over as memory of size bytes, after checking that it is a
// sealed memfd of that size: access to a shrunk file would fault.
func (p *packet) takeMemory(size int) (*fileBacking, error) {
	fd, err := p.takeFD()
	if err != nil {
		return nil, err
	}
	b := &fileBacking{os.NewFile(uintptr(fd), "memfd:barevif")}
	if err := checkMemory(fd, size); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func checkMemory(fd, size int) error {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return fmt.Errorf("emu: the descriptor is no memfd: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("emu: fstat: %w", err)
	}
	if got&seals != seals || st.Size != int64(size) {
		return fmt.Errorf("emu: a memfd of %d bytes with seals %#x, expected %d bytes and %#x", st.Size, got, size, seals)
	}
	return nil
}

// table returns the tables that the host's reply names.
func (r *remote) table(rep *reply) (guestTables, error) {
	if rep.Slot >= hostDomains || rep.Grants == 0 || rep.Ports == 0 ||
		tableBytes(int(rep.Grants), 8) != len(r.grants)*8 || tableBytes(int(rep.Ports), 4) != len(r.ports)*4 {
		return guestTables{}, fmt.Errorf("emu: the host speaks of table %d", rep.Slot)
	}
	t := sliceTables(r.grants, r.ports, int(rep.Grants), int(rep.Ports), int(rep.Slot))
	t.incarnation = rep.ID
	return t, nil
}

// listen passes replies on until the connection ends; then it ends d.
func (r *remote) listen(d *Domain) {
	for {
		p, err := readPacket(r.conn, r.buf)
		if err != nil {
			break
		}
		p.data = slices.Clone(p.data) // call uses it while we read on
		r.replies <- p                // a call waits: the host only sends replies
	}
	r.conn.Close()
	close(r.dead)
	d.die()
	r.unmap() // no goroutine is inside: die waited for them
}

func (r *remote) unmap() {
	for _, reg := range r.regions {
		_ = reg.free()
	}
}

// A result is a decoded reply.
type result struct {
	reply
	packet
	refs []hypercall.GrantRef
	runs []run
}

// call sends a request to the host. The caller closes the descriptors of the result.
func (r *remote) call(q *request, refs []hypercall.GrantRef) (*result, error) {
	if len(refs) > maxWireRefs {
		return nil, fmt.Errorf("emu: %d refs in one call, the limit is %d", len(refs), maxWireRefs)
	}
	b, err := encode(q, refs)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if writePacket(r.conn, b, nil) != nil {
		return nil, errDead
	}
	select {
	case p := <-r.replies:
		return parse(p)
	case <-r.dead:
		return nil, errDead
	}
}

func parse(p packet) (_ *result, err error) {
	res := &result{packet: p}
	defer func() {
		if err != nil {
			res.closeFDs()
		}
	}()
	rest, err := decode(p.data, &res.reply)
	if err != nil {
		return nil, err
	}
	if uint64(res.NRefs)*4+uint64(res.NRuns)*20 > uint64(len(rest)) {
		return nil, errors.New("emu: a reply is too short")
	}
	res.refs, res.runs = make([]hypercall.GrantRef, res.NRefs), make([]run, res.NRuns)
	if rest, err = decode(rest, res.refs); err != nil {
		return nil, err
	}
	if rest, err = decode(rest, res.runs); err != nil {
		return nil, err
	}
	if err := res.error(rest); err != nil {
		return nil, err
	}
	return res, nil
}

// callForFD is a call that returns a descriptor.
func (r *remote) callForFD(op opcode) (*result, int, error) {
	res, err := r.call(&request{Op: op}, nil)
	if err != nil {
		return nil, -1, err
	}
	defer res.closeFDs()
	fd, err := res.takeFD()
	return res, fd, err
}

// tell is a call that fails only if the domain has ended.
func (r *remote) tell(q request) {
	if res, err := r.call(&q, nil); err == nil {
		res.closeFDs()
	}
}

func (r *remote) own() guestTables { return r.tables }

func (r *remote) leave() {
	r.tell(request{Op: opLeave}) // the connection ends instead of a reply
	<-r.dead
}

func (r *remote) keepPages(n int) (uint64, error) {
	res, err := r.call(&request{Op: opKeepPages, N: uint32(n)}, nil)
	if err != nil {
		return 0, err
	}
	defer res.closeFDs()
	return res.ID, nil
}

func (r *remote) dropPages(id uint64) { r.tell(request{Op: opDropPages, ID: id}) }

func (r *remote) share(peer hypercall.DomID, pages int, access hypercall.Access) (grants, backing, error) {
	if pages <= 0 {
		return grants{}, nil, errNoPages
	}
	if pages > maxWireRefs {
		return grants{}, nil, hypercall.ErrNoGrants
	}
	return r.memory(&request{Op: opShare, Peer: peer, N: uint32(pages), Access: access})
}

// memory is a call whose result is a share.
func (r *remote) memory(q *request) (grants, backing, error) {
	res, err := r.call(q, nil)
	if err != nil {
		return grants{}, nil, err
	}
	defer res.closeFDs()
	b, err := r.takeShare(res)
	if err != nil {
		return grants{}, nil, err
	}
	return grants{res.ID, res.Access, res.refs}, b, nil
}

// takeShare takes the memory of the share that a result describes.
func (r *remote) takeShare(res *result) (backing, error) {
	b, err := res.takeMemory(len(res.refs) * shm.PageSize)
	if err != nil {
		return nil, err // not a typed nil
	}
	return b, nil
}

func (r *remote) endShare(id uint64, refuse bool) error {
	res, err := r.call(&request{Op: opEndShare, ID: id, Refuse: refuse}, nil)
	return r.done(res, err)
}

// done returns the error of a call that gives something up: nil if the domain has ended,
// since it holds nothing.
func (r *remote) done(res *result, err error) error {
	switch {
	case errors.Is(err, errDead):
		return nil
	case err != nil:
		return err
	}
	res.closeFDs()
	return nil
}

func (r *remote) mapGrants(peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) (mapped, error) {
	res, err := r.call(&request{Op: opMap, Peer: peer, Access: access}, refs)
	if err != nil {
		return mapped{}, err
	}
	defer res.closeFDs()
	return mapped{res.ID, res.runs}, nil
}

func (r *remote) unmapGrants(id uint64) error {
	res, err := r.call(&request{Op: opUnmap, ID: id}, nil)
	return r.done(res, err)
}

func (r *remote) attach(peer hypercall.DomID, ref hypercall.GrantRef) (grants, backing, error) {
	return r.memory(&request{Op: opAttach, Peer: peer, N: uint32(ref)})
}

func (r *remote) lookup(peer hypercall.DomID) (guestTables, error) {
	res, err := r.call(&request{Op: opLookup, Peer: peer}, nil)
	if err != nil {
		return guestTables{}, err
	}
	defer res.closeFDs()
	return r.table(&res.reply)
}

func (r *remote) newWaiter(bool) (uint64, bell, error) {
	res, fd, err := r.callForFD(opWaiter)
	if err != nil {
		return 0, nil, err
	}
	return res.ID, openFDBell(fd), nil
}

func (r *remote) closeWaiter(id uint64) { r.tell(request{Op: opCloseWaiter, ID: id}) }

func (r *remote) unbound(waiter uint64, peer hypercall.DomID) (channelEnd, error) {
	return r.port(&request{Op: opUnbound, ID: waiter, Peer: peer})
}

func (r *remote) bind(waiter uint64, peer hypercall.DomID, remote hypercall.PortID) (channelEnd, error) {
	return r.port(&request{Op: opBind, ID: waiter, Peer: peer, N: uint32(remote)})
}

func (r *remote) port(q *request) (channelEnd, error) {
	res, err := r.call(q, nil)
	if err != nil {
		return channelEnd{}, err
	}
	defer res.closeFDs()
	return r.end(res.Port, res.Gen)
}

// end returns a port of ours that the host names.
func (r *remote) end(port, gen uint32) (channelEnd, error) {
	if uint64(port) >= uint64(len(r.tables.ports)) {
		return channelEnd{}, fmt.Errorf("emu: the host speaks of port %d", port)
	}
	return channelEnd{hypercall.PortID(port), gen}, nil
}

func (r *remote) closePort(id hypercall.PortID, gen uint32) {
	r.tell(request{Op: opClosePort, N: uint32(id), Gen: gen})
}

func (r *remote) farEnd(id hypercall.PortID, gen uint32) (*farEnd, error) {
	res, err := r.call(&request{Op: opFarEnd, N: uint32(id), Gen: gen}, nil)
	if err != nil {
		return nil, err
	}
	defer res.closeFDs()
	if res.Port == 0 {
		return nil, nil
	}
	at := uint64(res.Slot)*uint64(len(r.tables.ports)) + uint64(res.Port)
	if at >= uint64(len(r.ports)) {
		return nil, fmt.Errorf("emu: the host speaks of port %d of table %d", res.Port, res.Slot)
	}
	fd, err := res.takeFD()
	if err != nil {
		return nil, err
	}
	b := openFDBell(fd)
	return &farEnd{word: &r.ports[at], gen: res.Gen, bell: b, free: b.close}, nil
}

func (r *remote) store() (uint64, io.ReadWriteCloser, error) {
	res, fd, err := r.callForFD(opStore)
	if err != nil {
		return 0, nil, err
	}
	return res.ID, os.NewFile(uintptr(fd), "xenstore"), nil
}

func (r *remote) closeStore(id uint64) { r.tell(request{Op: opCloseStore, ID: id}) }
