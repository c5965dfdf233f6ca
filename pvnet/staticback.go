package pvnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/ctrl"
	"barevif/pvnet/netif"
	"barevif/telemetry"
)

// A grantServer is the backend's part of static grants: it maps the pages that the frontend
// names on the control ring and puts them into the tables of the queue's engines. Its
// methods run on the control ring's goroutine, one at a time. What netif.h leaves open is
// decided as follows: the list page is copied once; an addition is all or nothing; a page
// whose removal is reported is no longer mapped.
type grantServer struct {
	d      *Device
	dom    hypercall.Domain
	peer   hypercall.DomID
	log    *slog.Logger
	queues []grantQueue
	all    *atomic.Int64 // how many mappings the vifs of our Serve have

	// By queue, the pages of a connection that goes on, until restore has mapped them; nil:
	// none.
	told [][]netif.GrefEntry
}

// A grantQueue is one queue of a grantServer.
type grantQueue struct {
	rx     *backRX
	tx     *backTX
	halves [2]*half
	wake   func() // wakes the receiving half's owner
	table  *grantTable
	left   []*pageRun // mapped, but in no table any longer: an engine may still use them, or their pages are lent
	seed   uint32
}

// maxRuns is how many mappings a queue may have. Each is a memory region of the process, of
// which Linux allows 65530 for all frontends together (vm.max_map_count), and Go's runtime
// ends a process that can have no more. Our frontend needs two. For one that adds its pages a
// few at a time, makeRoom maps them again together. Once the vifs of a Serve have mostRuns
// together, a queue gets ownRuns of its own and no more, besides the one that makeRoom needs:
// so many frontends cannot have more together than the process can, and none takes the last
// from another.
const (
	maxRuns  = 64
	ownRuns  = 8
	mostRuns = 1 << 14
)

// maxMapped is how many pages a queue may have mapped: those that it may have added, once
// more while they are mapped again together.
const maxMapped = 2 * netif.GrefListMax

// newGrantServer makes the server of the queues of m, before the link comes up. The
// undo list of the connection unmaps what it has mapped. all counts the mappings, with those
// of other vifs.
func newGrantServer(m *setup, d *Device, all *atomic.Int64) *grantServer {
	s := &grantServer{d: d, dom: m.dom, peer: m.peer, log: m.log, all: all}
	for i, q := range m.c.queues {
		s.queues = append(s.queues, grantQueue{
			rx: q.rx.(*backRX), tx: q.tx.(*backTX), halves: [2]*half{&d.rx[i].half, &d.tx[i].half},
			wake: q.rxPark.wake, seed: rand.Uint32(),
		})
	}
	m.c.undo.add(func() {
		for i := range s.queues {
			for _, r := range s.queues[i].mapped() {
				r.retire()
			}
		}
	})
	return s
}

// serve makes c answer the messages about static grants.
func (s *grantServer) serve(c *ctrl.Server) {
	c.Handle(netif.CtrlGetGrefMappingSize, s.size)
	c.Handle(netif.CtrlAddGrefMapping, s.add)
	c.Handle(netif.CtrlDelGrefMapping, s.del)
}

// queue returns the queue that a request names, or nil.
func (s *grantServer) queue(r *netif.CtrlRequest) *grantQueue {
	if r.Data[0] >= uint32(len(s.queues)) {
		return nil
	}
	return &s.queues[r.Data[0]]
}

// size answers how many pages of a queue can be mapped: as many as a list page names, which
// is a page for each slot of both rings.
func (s *grantServer) size(r netif.CtrlRequest) (netif.CtrlStatus, uint32) {
	if s.queue(&r) == nil {
		return netif.CtrlInvalidParameter, 0
	}
	return netif.CtrlSuccess, netif.GrefListMax
}

// add maps the pages of a list, or none of them.
func (s *grantServer) add(r netif.CtrlRequest) (netif.CtrlStatus, uint32) {
	q := s.queue(&r)
	if q == nil {
		return netif.CtrlInvalidParameter, 0
	}
	list, err := s.readList(&r)
	if err == nil {
		err = q.mayAdd(list)
	}
	if err == nil {
		err = s.mapAll(q, list)
	}
	if err != nil {
		s.log.Warn("static grants refused", "queue", r.Data[0], "pages", r.Data[2], "err", err)
		return netif.CtrlInvalidParameter, 0
	}
	s.d.agree(telemetry.FeatureStaticGrants)
	return netif.CtrlSuccess, 0
}

// mayAdd checks what the list asks for.
func (q *grantQueue) mayAdd(list []netif.GrefEntry) error {
	if have := q.table.pages(); len(list) > netif.GrefListMax-have {
		return fmt.Errorf("%d of at most %d are mapped already", have, netif.GrefListMax)
	}
	named := make(map[hypercall.GrantRef]bool, len(list))
	for _, e := range list {
		switch {
		case e.Ref == 0: // an empty slot of the table
			return errors.New("grant 0 is reserved")
		case e.Flags&^netif.GrefReadOnly != 0:
			return fmt.Errorf("grant %d has unknown flags %#x", e.Ref, e.Flags)
		case named[e.Ref]:
			return fmt.Errorf("grant %d is named twice", e.Ref)
		case q.table.has(e.Ref):
			return fmt.Errorf("grant %d is mapped already", e.Ref)
		}
		named[e.Ref] = true
	}
	return nil
}

// mapAll maps the pages of list in two runs, those that may be mapped read-only and the
// others, and gives the engines a table with them.
func (s *grantServer) mapAll(q *grantQueue, list []netif.GrefEntry) error {
	s.makeRoom(q)
	have := q.table.all()
	var runs []*pageRun
	for access, refs := range byAccess(list) {
		if len(refs) == 0 {
			continue
		}
		r, err := s.mapRun(q, len(have)+len(runs), refs, hypercall.Access(access))
		if err != nil {
			for _, r := range runs {
				r.retire()
			}
			return err
		}
		runs = append(runs, r)
	}
	q.use(newGrantTable(slices.Concat(have, runs), q.seed))
	return nil
}

// byAccess returns the refs of a list by the access with which they may be mapped.
func byAccess(list []netif.GrefEntry) (refs [2][]hypercall.GrantRef) {
	for _, e := range list {
		access := hypercall.ReadWrite
		if e.Flags&netif.GrefReadOnly != 0 {
			access = hypercall.ReadOnly
		}
		refs[access] = append(refs[access], e.Ref)
	}
	return refs
}

// mapRun maps pages for a queue that has so many mappings, besides those that are left.
func (s *grantServer) mapRun(q *grantQueue, have int, refs []hypercall.GrantRef, access hypercall.Access) (*pageRun, error) {
	return s.mapIf(q, have, refs, access, func(all int64) bool {
		return have+len(q.left) < ownRuns || all < mostRuns
	})
}

// mapIf is mapRun if the queue has room, and may says that all vifs have.
func (s *grantServer) mapIf(q *grantQueue, have int, refs []hypercall.GrantRef, access hypercall.Access, may func(all int64) bool) (*pageRun, error) {
	have += len(q.left)
	if all := s.all.Add(1) - 1; have >= maxRuns || !may(all) {
		s.all.Add(-1)
		return nil, fmt.Errorf("the queue has %d mappings already, and all vifs have %d: pages that are added together share one", have, all)
	}
	m, err := s.dom.Map(s.peer, refs, access)
	if err != nil {
		s.all.Add(-1)
		return nil, err
	}
	return newPageRun(m, refs, access, q.wake, s.all), nil
}

// use gives both engines table t, which they take up with their next batch.
func (q *grantQueue) use(t *grantTable) {
	q.table = t
	q.rx.newest.Store(t)
	q.tx.newest.Store(t)
}

// del unmaps the pages of a list. It refuses those that were not added, those named twice
// and, all together, those of a mapping of which a page is lent: their frames are not
// answered yet.
func (s *grantServer) del(r netif.CtrlRequest) (netif.CtrlStatus, uint32) {
	q := s.queue(&r)
	if q == nil {
		return netif.CtrlInvalidParameter, 0
	}
	list, err := s.readList(&r)
	if err != nil {
		s.log.Warn("static grants not removed", "queue", r.Data[0], "pages", r.Data[2], "err", err)
		return netif.CtrlInvalidParameter, 0
	}
	for i := range list {
		list[i].Status = uint16(netif.CtrlInvalidParameter)
	}
	if err := s.writeList(&r, list); err != nil { // nobody would learn what was unmapped
		s.log.Warn("static grants not removed: their list cannot be written", "queue", r.Data[0], "err", err)
		return netif.CtrlInvalidParameter, 0
	}
	n := s.unmap(q, list)
	if err := s.writeList(&r, list); err != nil {
		s.log.Warn("cannot write which static grants were removed", "queue", r.Data[0], "err", err)
	}
	return netif.CtrlSuccess, n
}

// unmap unmaps the pages of list, sets the status of those that are no longer mapped, and
// returns how many they are. The other pages of each mapping are mapped again, together if
// they can be; a page that cannot is copied by grant operations from then on.
func (s *grantServer) unmap(q *grantQueue, list []netif.GrefEntry) (n uint32) {
	if q.table == nil {
		return 0
	}
	gone := make(map[hypercall.GrantRef]bool, len(list))
	for _, e := range list {
		gone[e.Ref] = q.table.has(e.Ref)
	}
	var keep, torn []*pageRun
	for _, r := range q.table.all() {
		if slices.ContainsFunc(r.refs, func(ref hypercall.GrantRef) bool { return gone[ref] }) {
			torn = append(torn, r)
		} else {
			keep = append(keep, r)
		}
	}
	if len(torn) == 0 {
		return 0
	}
	before := q.table
	q.use(newGrantTable(keep, q.seed))
	if lent, ok := q.awaitUse(); !ok || lent > 0 {
		q.use(before)
		return 0
	}
	for _, r := range torn {
		r.retire()
		rest := slices.DeleteFunc(slices.Clone(r.refs), func(ref hypercall.GrantRef) bool { return gone[ref] })
		again, err := s.mapMost(q, len(keep), rest, r.access)
		keep = append(keep, again...)
		if err != nil {
			s.log.Warn("static grants unmapped together with others", "pages", len(rest)-pagesOf(again), "err", err)
		}
	}
	q.use(newGrantTable(keep, q.seed))
	for i, e := range list {
		if gone[e.Ref] {
			list[i].Status = uint16(netif.CtrlSuccess)
			gone[e.Ref] = false
			n++
		}
	}
	return n
}

// useTimeout is how long an engine may need to leave a table: its owner may have to come
// back from a batch, and may have lost its processor.
const useTimeout = time.Second

// awaitUse makes both engines take up the table of q, and unmaps the runs that are left and
// have no lent page. It returns how many pages are lent that the table does not hold, and
// false if an engine does not take it up in time, or is about to be stopped.
func (q *grantQueue) awaitUse() (lent int, ok bool) {
	end := time.Now().Add(useTimeout)
	busy := make(map[*pageRun]bool)
	ok = q.halves[0].visit(end, func() {
		q.rx.takeUp()
		lent = q.rx.lentOutside(q.table)
		for _, r := range q.rx.lentRuns {
			busy[r] = true
		}
	})
	if ok = ok && q.halves[1].visit(end, func() { q.tx.takeUp() }); ok {
		q.left = slices.DeleteFunc(q.left, func(r *pageRun) bool {
			if !busy[r] {
				r.retire()
			}
			return !busy[r]
		})
	}
	return lent, ok
}

// readList copies the list page of a request into memory of ours, once.
func (s *grantServer) readList(r *netif.CtrlRequest) ([]netif.GrefEntry, error) {
	n := r.Data[2]
	if n == 0 || n > netif.GrefListMax {
		return nil, fmt.Errorf("a list of %d", n)
	}
	b := make([]byte, n*netif.GrefEntrySize)
	if err := s.copyList(r, hypercall.CopyOp{Src: s.listPage(r), Dst: hypercall.Area{Local: b}, Len: uint32(len(b))}); err != nil {
		return nil, err
	}
	return getGrefs(b), nil
}

// writeList writes list to the list page of a request.
func (s *grantServer) writeList(r *netif.CtrlRequest, list []netif.GrefEntry) error {
	b := putGrefs(nil, list)
	return s.copyList(r, hypercall.CopyOp{Src: hypercall.Area{Local: b}, Dst: s.listPage(r), Len: uint32(len(b))})
}

func (s *grantServer) listPage(r *netif.CtrlRequest) hypercall.Area {
	return hypercall.Area{Dom: s.peer, Ref: hypercall.GrantRef(r.Data[1])}
}

func (s *grantServer) copyList(r *netif.CtrlRequest, op hypercall.CopyOp) error {
	op.Status = hypercall.GeneralError
	ops := []hypercall.CopyOp{op}
	if err := s.dom.Copy(ops); err != nil {
		return err
	}
	if st := ops[0].Status; st != hypercall.OK {
		return &hypercall.GrantError{Op: "copy", Dom: s.peer, Ref: hypercall.GrantRef(r.Data[1]), Status: st}
	}
	return nil
}

// putGrefs appends the entries of list to b as they are in a list page.
func putGrefs(b []byte, list []netif.GrefEntry) []byte {
	for _, e := range list {
		b = binary.LittleEndian.AppendUint32(b, uint32(e.Ref))
		b = binary.LittleEndian.AppendUint16(b, e.Flags)
		b = binary.LittleEndian.AppendUint16(b, e.Status)
	}
	return b
}
