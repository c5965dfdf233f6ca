package pvnet

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet/netif"
	"barevif/telemetry"
)

// static joins a pair whose backend has mapped the frontend's pages. The messages go from
// the client to the server without a ring.
func static(t testing.TB, p *pair) *staticPair {
	t.Helper()
	return staticAmong(t, p, new(atomic.Int64))
}

// staticAmong is static for a vif of several, whose mappings all counts.
func staticAmong(t testing.TB, p *pair, all *atomic.Int64) *staticPair {
	t.Helper()
	bm := &setup{dom: p.bdom, peer: p.fdom.ID(), log: p.back.log, quarantined: &p.back.quarantined, c: p.conns[1]}
	page, err := p.fdom.Share(p.bdom.ID(), 1, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	p.conns[0].undo.add(func() { page.End() })
	client := &grantClient{d: p.front, c: p.conns[0], list: page.Bytes(), listRef: page.Refs[0], added: make([]bool, len(p.conns[0].queues))}
	s := &staticPair{pair: p, client: client, server: newGrantServer(bm, p.back, all)}
	for i := range p.conns[0].queues {
		if n, err := client.add(context.Background(), s.call, i); err != nil || n != 512 {
			t.Fatalf("queue %d: %d pages, %v", i, n, err)
		}
	}
	return s
}

type staticPair struct {
	*pair
	client *grantClient
	server *grantServer
}

func (s *staticPair) call(_ context.Context, typ netif.CtrlType, fill func() [3]uint32) (netif.CtrlStatus, uint32, error) {
	status, data := s.ask(netif.CtrlRequest{Type: typ, Data: fill()})
	return status, data, nil
}

func (s *staticPair) ask(r netif.CtrlRequest) (netif.CtrlStatus, uint32) {
	switch r.Type {
	case netif.CtrlGetGrefMappingSize:
		return s.server.size(r)
	case netif.CtrlAddGrefMapping:
		return s.server.add(r)
	default:
		return s.server.del(r)
	}
}

// send sends n frames of size bytes from a frontend, with the seeds from seed on.
func sendFrames(t *testing.T, tx *TX, n, size, seed int) {
	t.Helper()
	var f [1]Frame
	for i := range n {
		if k, err := tx.AllocWait(f[:], size); k != 1 || err != nil {
			t.Fatal(k, err)
		}
		b := make([]byte, size)
		pattern(b, seed+i)
		f[0].CopyFrom(b)
		if k, err := tx.SendWait(f[:]); k != 1 || err != nil {
			t.Fatal(k, err)
		}
	}
}

func TestMappedFramesTakeNoGrantOperation(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		mapped := p.back.rx[0].eng.(*backRX).newest.Load() != nil
		tx, _ := own(t, from)
		_, rx := own(t, to)
		before := p.bdom.Calls().CopyOps
		var f [1]Frame
		for i, size := range sizes {
			sendFrames(t, tx, 1, size, i)
			if n, err := rx.Receive(f[:]); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			rx.Release(f[:])
		}
		if n := p.bdom.Calls().CopyOps - before; mapped != (n == 0) {
			t.Errorf("%d grant copies; pages mapped: %v", n, mapped)
		}
	})
}

func TestALentFrameIsTheFrontendsPage(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{LendRx: true})
	static(t, p)
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	for i, size := range []int{lendMin, 1500, 4096, 20000} {
		sendFrames(t, tx, 1, size, i)
		var f [1]Frame
		if n, err := rx.Receive(f[:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if err := same(&f[0], i); err != nil {
			t.Fatal(err)
		}
		if !f[0].ReadOnly() || f[0].Headroom() != 0 || f[0].Tailroom() != 0 || f[0].Prepend(1) != nil || f[0].Extend(1) != nil {
			t.Fatalf("size %d: read-only %v, room %d and %d", size, f[0].ReadOnly(), f[0].Headroom(), f[0].Tailroom())
		}
		f[0].SetChecksum(ChecksumPartial)
		if err := f[0].CompleteChecksum(); err != ErrShared {
			t.Fatalf("CompleteChecksum of a page nobody may write: %v", err)
		}
		stale := f[0]
		if err := rx.Release(f[:]); err != nil {
			t.Fatal(err)
		}
		if err := stale.Release(); err != ErrStale {
			t.Fatalf("a second release: %v", err)
		}
	}
	if st := p.back.Stats(); st.RX.Get(telemetry.LentPackets) != 4 || st.RX.Get(telemetry.CopiedBytes) != 0 {
		t.Errorf("%d lent, %d bytes copied", st.RX.Get(telemetry.LentPackets), st.RX.Get(telemetry.CopiedBytes))
	}
	// What is short is cheaper to copy, and what has offloads must not change under us.
	sendFrames(t, tx, 1, lendMin-1, 9)
	var f [1]Frame
	rx.Receive(f[:])
	if f[0].ReadOnly() {
		t.Error("a short frame was lent")
	}
	rx.Release(f[:])
}

func TestAHeldFrameHoldsUpItsRing(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{LendRx: true})
	static(t, p)
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	eng := p.back.rx[0].eng.(*backRX)
	var held, f [1]Frame
	sendFrames(t, tx, 1, 1000, 0)
	if n, err := rx.Receive(held[:]); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	for i := 1; i < 256; i++ {
		sendFrames(t, tx, 1, 1000, i)
		if n, err := rx.Receive(f[:]); n != 1 || err != nil {
			t.Fatal(i, n, err)
		}
		if err := same(&f[0], i); err != nil {
			t.Fatal(err)
		}
		rx.Release(f[:])
	}
	if n := tx.Alloc(f[:]); n != 0 {
		t.Fatal("the frontend has a page although nothing was answered")
	}
	if got := eng.ring.Unanswered(); got != 256 {
		t.Fatalf("%d unanswered", got)
	}
	if err := same(&held[0], 0); err != nil {
		t.Fatal(err)
	}
	rx.Release(held[:])
	if got := eng.ring.Unanswered(); got != 0 || eng.lentNow != 0 || len(eng.lentRuns) != 0 {
		t.Fatalf("%d unanswered, %d lent in %d runs", got, eng.lentNow, len(eng.lentRuns))
	}
	if n := tx.Alloc(f[:]); n != 1 {
		t.Fatal("no page after the release")
	}
	f[0].Release()
}

// At most half the ring is lent: the rest is copied, so that a user who holds frames for a
// while still gets more.
func TestAtMostHalfTheRingIsLent(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{LendRx: true})
	static(t, p)
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	frames, lent := make([]Frame, 200), 0
	sendFrames(t, tx, len(frames), 1000, 0)
	for n := 0; n < len(frames); {
		k, err := rx.Receive(frames[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += k
	}
	for i := range frames {
		if err := same(&frames[i], i); err != nil {
			t.Fatal(err)
		}
		if frames[i].ReadOnly() {
			lent++
		}
	}
	if lent != 128 {
		t.Errorf("%d of %d frames lent", lent, len(frames))
	}
	// Released in any order, everything is answered in the end.
	for _, i := range rand.Perm(len(frames)) {
		rx.Release(frames[i : i+1])
	}
	if got := p.back.rx[0].eng.(*backRX).ring.Unanswered(); got != 0 {
		t.Errorf("%d unanswered", got)
	}
}

// A frame that another goroutine releases is answered although its owner waits, however it
// waits: the frontend may have no page left.
func TestAReleaseElsewhereIsAnswered(t *testing.T) {
	for _, mode := range []WaitMode{Park, Adaptive, Busy} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			p := join(t, emu.Config{}, plain, Config{LendRx: true, Wait: mode})
			static(t, p)
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			out := make(chan Frame, 256)
			done := make(chan error, 1)
			go func() {
				var f [1]Frame
				for range 3 * 256 {
					if _, err := rx.Receive(f[:]); err != nil {
						done <- err
						return
					}
					out <- f[0]
				}
				done <- nil
			}()
			go func() { // releases the frames when the ring is full of unanswered requests
				for range 3 {
					var all []Frame
					for range 256 {
						all = append(all, <-out)
					}
					releaseAll(all)
				}
			}()
			sendFrames(t, tx, 3*256, 1000, 0)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// The end of a connection waits for lent frames of all its queues together no longer than for
// those of one: its frontend waits closeTimeout for us, and then gives the pages up.
func TestAllQueuesWaitForLentFramesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := join(t, emu.Config{Grants: 4096}, queues(4), Config{LendRx: true})
		static(t, p)
		var held [4]Frame
		for q := range held {
			tx, err := p.front.OwnTX(q)
			if err != nil {
				t.Fatal(err)
			}
			sendFrames(t, tx, 1, 1000, q)
			if n, err := p.back.rx[q].Poll(held[q : q+1]); n != 1 || err != nil || !held[q].ReadOnly() {
				t.Fatal(n, err, held[q].ReadOnly())
			}
		}
		p.back.quiesce(p.conns[1], "test over")
		start := time.Now()
		p.back.detach(p.conns[1])
		p.conns[1] = nil
		if took := time.Since(start); took < lentTimeout || took > lentTimeout+10*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		releaseAll(held[:])
	})
}

// Two requests may name one page at different offsets, as those of a frontend do that keeps
// two buffers in a page: the page is lent once, and the second frame is copied.
func TestAPageIsLentOnceAtATime(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{LendRx: true})
	static(t, p)
	_, rx := own(t, p.back)
	eng := p.front.tx[0].eng.(*frontTX)
	var page [1]uint32
	eng.shared.Get(page[:])
	b := eng.shared.Bytes(page[0])
	pattern(b[:2000], 1)
	pattern(b[2048:4048], 2)
	for id, off := range []uint16{0, 2048} {
		eng.ring.Put(netif.TxRequest{Ref: eng.refs[page[0]], Offset: off, ID: uint16(id), Size: 2000})
	}
	eng.ring.Publish()
	var f [2]Frame
	if n, err := rx.Receive(f[:]); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	if !f[0].ReadOnly() || f[1].ReadOnly() {
		t.Errorf("lent: %v, %v", f[0].ReadOnly(), f[1].ReadOnly())
	}
	for i := range f {
		if err := same(&f[i], i+1); err != nil {
			t.Error(err)
		}
	}
	rx.Release(f[:])
	for eng.ring.InFlight() > 0 { // the engine does not know these requests
		if n, err := eng.ring.Poll(); n == 0 || err != nil {
			t.Fatal(n, err)
		}
		eng.ring.Take()
	}
	eng.shared.Put(page[0])
}

// A frame whose pages cannot all be lent is copied, and its responses wait for nothing: here
// its second piece is in the page of the first.
func TestAFrameThatIsCopiedAfterAllWaitsForNoPage(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{LendRx: true})
	static(t, p)
	_, rx := own(t, p.back)
	eng, back := p.front.tx[0].eng.(*frontTX), p.back.rx[0].eng.(*backRX)
	var page [1]uint32
	eng.shared.Get(page[:])
	want := make([]byte, 3000)
	pattern(want, 4)
	copy(eng.shared.Bytes(page[0]), want)
	ref := eng.refs[page[0]]
	eng.ring.Put(netif.TxRequest{Ref: ref, ID: 0, Size: 3000, Flags: netif.TxMoreData})
	eng.ring.Put(netif.TxRequest{Ref: ref, Offset: 2000, ID: 1, Size: 1000})
	eng.ring.Publish()
	var f [1]Frame
	if n, err := rx.Receive(f[:]); n != 1 || err != nil || f[0].ReadOnly() {
		t.Fatal(n, err, f[0].ReadOnly())
	}
	if err := same(&f[0], 4); err != nil {
		t.Error(err)
	}
	if n := back.ring.Unanswered(); n != 0 || back.lentNow != 0 || back.of != [256]lentPage{} {
		t.Errorf("%d requests unanswered, %d pages lent", n, back.lentNow)
	}
	rx.Release(f[:])
	for range 2 { // the engine does not know these requests
		eng.ring.Poll()
		eng.ring.Take()
	}
	eng.shared.Put(page[0])
}

// list shares a page with entries and returns the words of a request about it.
func (s *staticPair) list(t *testing.T, queue int, entries ...netif.GrefEntry) netif.CtrlRequest {
	t.Helper()
	copy(s.client.list, putGrefs(nil, entries))
	return netif.CtrlRequest{Data: [3]uint32{uint32(queue), uint32(s.client.listRef), uint32(len(entries))}}
}

// statuses returns the statuses of the first n entries of the list page.
func (s *staticPair) statuses(n int) (st []netif.CtrlStatus) {
	for i := range n {
		at := s.client.list[i*netif.GrefEntrySize:]
		st = append(st, netif.CtrlStatus(uint16(at[6])|uint16(at[7])<<8))
	}
	return st
}

func TestWhatCannotBeAddedIsRefusedWhole(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	s := static(t, p)
	tx, rx := p.conns[0].queues[0].tx.(*frontTX).refs, p.conns[0].queues[0].rx.(*frontRX).refs
	all := append(slices.Clone(tx), rx...)
	remove := func(refs []hypercall.GrantRef) (n uint32) {
		var l []netif.GrefEntry
		for _, r := range refs {
			l = append(l, netif.GrefEntry{Ref: r})
		}
		r := s.list(t, 0, l...)
		r.Type = netif.CtrlDelGrefMapping
		if st, n := s.ask(r); st != netif.CtrlSuccess {
			t.Fatal(st, n)
		}
		return uint32(len(refs))
	}
	remove(all)
	if n := p.m.Ledger().Mappings; n != 2 { // the two rings
		t.Fatalf("%d pages mapped after all were removed", n)
	}
	ro, rw := netif.GrefEntry{Ref: tx[0], Flags: netif.GrefReadOnly}, netif.GrefEntry{Ref: rx[0]}
	private, err := p.fdom.Share(9, 1, hypercall.ReadWrite) // granted to another domain
	if err != nil {
		t.Fatal(err)
	}
	defer private.End()
	other, err := p.fdom.Share(p.bdom.ID(), 1, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer other.End()
	many := make([]netif.GrefEntry, netif.GrefListMax)
	for i, ref := range all {
		many[i] = netif.GrefEntry{Ref: ref}
		if i < len(tx) {
			many[i].Flags = netif.GrefReadOnly
		}
	}
	page := uint32(s.client.listRef)
	for _, tt := range []struct {
		name    string
		data    [3]uint32
		entries []netif.GrefEntry
	}{
		{"no queue", [3]uint32{1, page, 1}, []netif.GrefEntry{ro}},
		{"no entry", [3]uint32{0, page, 0}, []netif.GrefEntry{ro}},
		{"too many entries", [3]uint32{0, page, netif.GrefListMax + 1}, many},
		{"a million entries", [3]uint32{0, page, 1 << 20}, many},
		{"no list page", [3]uint32{0, 7, 1}, nil},
		{"another's list page", [3]uint32{0, uint32(private.Refs[0]), 1}, nil},
		{"a ref twice", [3]uint32{0, page, 2}, []netif.GrefEntry{ro, ro}},
		{"unknown flags", [3]uint32{0, page, 1}, []netif.GrefEntry{{Ref: rx[0], Flags: 2}}},
		{"a reserved ref", [3]uint32{0, page, 1}, []netif.GrefEntry{{Ref: 0}}},
		{"a ref that is no grant", [3]uint32{0, page, 2}, []netif.GrefEntry{rw, {Ref: 1 << 30}}},
		{"a ref of another domain's grant", [3]uint32{0, page, 2}, []netif.GrefEntry{rw, {Ref: private.Refs[0]}}},
		{"a read-only grant that is to be written", [3]uint32{0, page, 3}, []netif.GrefEntry{ro, rw, {Ref: tx[1]}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.list(t, 0, tt.entries...)
			if st, _ := s.ask(netif.CtrlRequest{Type: netif.CtrlAddGrefMapping, Data: tt.data}); st != netif.CtrlInvalidParameter {
				t.Errorf("answered %v", st)
			}
			if n := p.m.Ledger().Mappings; n != 2 {
				t.Errorf("%d pages mapped", n)
			}
			st, n := s.ask(netif.CtrlRequest{Type: netif.CtrlDelGrefMapping, Data: tt.data})
			if listed := tt.data[0] == 0 && tt.data[1] == page && tt.data[2]-1 < netif.GrefListMax; n != 0 || (st == netif.CtrlSuccess) != listed {
				t.Errorf("the removal of what was not added is answered %v, %d", st, n)
			}
		})
	}
	add := func(l ...netif.GrefEntry) netif.CtrlStatus {
		r := s.list(t, 0, l...)
		r.Type = netif.CtrlAddGrefMapping
		st, _ := s.ask(r)
		return st
	}
	if st := add(ro, rw); st != netif.CtrlSuccess {
		t.Fatal(st)
	}
	if st := add(rw); st != netif.CtrlInvalidParameter {
		t.Errorf("a ref that is mapped already: %v", st)
	}
	remove([]hypercall.GrantRef{tx[0], rx[0]})
	if st := add(many...); st != netif.CtrlSuccess {
		t.Fatal(st)
	}
	if st := add(netif.GrefEntry{Ref: other.Refs[0]}); st != netif.CtrlInvalidParameter {
		t.Errorf("one more than fits: %v", st)
	}
	remove(all)
}

// Grant 0 is the guest's console, which Xen lets the control domain map. No request can name it,
// so it is not added: it could be added again and again, and not removed.
func TestTheConsolesGrantIsNotAdded(t *testing.T) {
	if (&grantQueue{}).mayAdd([]netif.GrefEntry{{Ref: 0}}) == nil {
		t.Error("grant 0 may be added")
	}
}

func TestRemovedPagesAreUnmappedAndTheOthersStay(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{LendRx: true})
	s := static(t, p)
	refs := p.conns[0].queues[0].tx.(*frontTX).refs
	remove := func(l ...netif.GrefEntry) (n uint32) {
		t.Helper()
		r := s.list(t, 0, l...)
		r.Type = netif.CtrlDelGrefMapping
		st, n := s.ask(r)
		if st != netif.CtrlSuccess {
			t.Fatal(st)
		}
		return n
	}
	before := p.m.Ledger().Mappings
	n := remove(netif.GrefEntry{Ref: refs[3]}, netif.GrefEntry{Ref: 1 << 30}, netif.GrefEntry{Ref: refs[3]}, netif.GrefEntry{Ref: refs[200]})
	if want := []netif.CtrlStatus{0, 2, 2, 0}; n != 2 || !slices.Equal(s.statuses(4), want) {
		t.Errorf("%d removed, statuses %v, want %v", n, s.statuses(4), want)
	}
	if now := p.m.Ledger().Mappings; now != before-2 {
		t.Errorf("%d pages mapped, %d before", now, before)
	}
	table := p.back.rx[0].eng.(*backRX).newest.Load()
	if table.has(refs[3]) || table.has(refs[200]) || !table.has(refs[0]) || table.pages() != 510 {
		t.Errorf("%d pages in the table", table.pages())
	}
	// Frames in all pages still arrive.
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	var f [1]Frame
	arriveOneByOne(t, tx, rx)
	// A page whose frame is in a user's hands stays mapped, and so does what was added with it.
	sendFrames(t, tx, 1, 1000, 7)
	rx.Receive(f[:])
	run := p.back.rx[0].eng.(*backRX).lentRuns[0]
	beside := netif.GrefEntry{Ref: run.refs[slices.Index(run.lent, false)]}
	if n := remove(beside); n != 0 || s.statuses(1)[0] != netif.CtrlInvalidParameter {
		t.Errorf("%d removed, status %v, while a frame is lent", n, s.statuses(1)[0])
	}
	if err := same(&f[0], 7); err != nil {
		t.Error(err)
	}
	rx.Release(f[:])
	if n := remove(beside); n != 1 {
		t.Errorf("%d removed after the release", n)
	}
}

// However a frontend adds and removes its pages, its queue takes few mappings. Each is a
// memory region of the process, which the kernel limits (vm.max_map_count, 65530) for all
// guests together: Go's runtime ends the process that can have no more.
func TestAFrontendTakesFewMappings(t *testing.T) {
	p := join(t, emu.Config{Mapped: true}, plain, Config{})
	s := static(t, p)
	all := s.client.refs(0)
	ask := func(typ netif.CtrlType, l ...netif.GrefEntry) (netif.CtrlStatus, uint32) {
		r := s.list(t, 0, l...)
		r.Type = typ
		return s.ask(r)
	}
	runs := func() int {
		t.Helper()
		table := p.back.rx[0].eng.(*backRX).newest.Load()
		if table == nil {
			return 0
		}
		if pages := p.m.Ledger().Mappings - 2; pages != table.pages() { // without the rings
			t.Errorf("%d pages mapped, %d in the table", pages, table.pages())
		}
		return len(table.runs)
	}
	var odd []netif.GrefEntry
	for i := 1; i < len(all); i += 2 {
		odd = append(odd, all[i])
	}
	if st, n := ask(netif.CtrlDelGrefMapping, odd...); st != netif.CtrlSuccess || n != uint32(len(odd)) {
		t.Fatalf("every other page removed: %v, %d", st, n)
	}
	if n := runs(); n > maxRuns {
		t.Errorf("%d mappings after every other page was removed", n)
	}
	ask(netif.CtrlDelGrefMapping, all...)
	added := 0
	for _, e := range all {
		if st, _ := ask(netif.CtrlAddGrefMapping, e); st == netif.CtrlSuccess {
			added++
		}
	}
	if n := runs(); n > maxRuns || added != len(all) {
		t.Errorf("%d mappings of %d pages that were added one by one, of %d", n, added, len(all))
	}
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	arriveOneByOne(t, tx, rx)
	ask(netif.CtrlDelGrefMapping, all...)
	if st, _ := ask(netif.CtrlAddGrefMapping, all...); st != netif.CtrlSuccess || runs() != 2 {
		t.Errorf("all pages at once: %v, %d mappings", st, runs())
	}
}

// A frontend that adds and removes single pages, in whatever order and however often, keeps
// them mapped: their mappings are joined before they run out.
func TestPagesThatComeAndGoOneByOneStayMapped(t *testing.T) {
	p := join(t, emu.Config{Mapped: true}, plain, Config{})
	s := static(t, p)
	q := &s.server.queues[0]
	all := s.client.refs(0)
	in := make([]bool, len(all))
	for i := range in {
		in[i] = true
	}
	turn := func(i int) {
		t.Helper()
		r := s.list(t, 0, all[i])
		if r.Type = netif.CtrlAddGrefMapping; in[i] {
			r.Type = netif.CtrlDelGrefMapping
		}
		if st, n := s.ask(r); st != netif.CtrlSuccess || n != 1 && in[i] {
			t.Fatalf("page %d: %v is answered %v, %d", i, r.Type, st, n)
		}
		in[i] = !in[i]
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 10_000 {
		i := rnd.IntN(len(all))
		turn(i)
		if q.table.has(all[i].Ref) != in[i] {
			t.Fatalf("page %d: mapped is not %v", i, in[i])
		}
		if n := len(q.mapped()); n > maxRuns {
			t.Fatalf("%d mappings", n)
		}
	}
	if n := p.m.Ledger().Mappings - 2; n != q.table.pages() || len(q.left) != 0 {
		t.Errorf("%d pages mapped, %d in the table, %d mappings left", n, q.table.pages(), len(q.left))
	}
	for i := range all {
		if !in[i] {
			turn(i)
		}
	}
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	before := p.bdom.Calls().CopyOps
	arriveOneByOne(t, tx, rx)
	if n := p.bdom.Calls().CopyOps - before; n != 0 {
		t.Errorf("%d grant copies although all pages are mapped", n)
	}
}

// A mapping of which a page is lent stays until the page is back, also when its pages were
// mapped again with others. Such mappings count: the limits hold, and room comes back with the
// frames.
func TestMappingsOfLentPagesCount(t *testing.T) {
	p := join(t, emu.Config{Mapped: true}, plain, Config{LendRx: true})
	s := static(t, p)
	q := &s.server.queues[0]
	eng := p.front.tx[0].eng.(*frontTX)
	all := s.client.refs(0)
	ask := func(typ netif.CtrlType, l ...netif.GrefEntry) bool {
		t.Helper()
		r := s.list(t, 0, l...)
		r.Type = typ
		st, n := s.ask(r)
		if runs, pages := len(q.mapped()), pagesOf(q.mapped()); runs > maxRuns || pages > maxMapped {
			t.Fatalf("%d mappings of %d pages", runs, pages)
		}
		return st == netif.CtrlSuccess && (typ != netif.CtrlDelGrefMapping || n == uint32(len(l)))
	}
	if !ask(netif.CtrlDelGrefMapping, all...) {
		t.Fatal("the pages cannot be removed")
	}
	for _, e := range all[:56] { // of pages to send, each a mapping of its own
		if !ask(netif.CtrlAddGrefMapping, e) {
			t.Fatal("a page is not added")
		}
	}
	_, rx := own(t, p.back)
	held := make([]Frame, 56)
	for i := range held {
		eng.ring.Put(netif.TxRequest{Ref: all[i].Ref, ID: uint16(i), Size: 1000})
	}
	eng.ring.Publish()
	if n, err := rx.Receive(held); n != len(held) || err != nil || q.rx.lentNow != n {
		t.Fatal(n, err, q.rx.lentNow)
	}
	refused := 0
	for _, e := range all[56:] {
		if !ask(netif.CtrlAddGrefMapping, e) {
			refused++
		}
	}
	if refused == 0 || len(q.left) == 0 {
		t.Errorf("%d pages refused, %d mappings left, while most are lent", refused, len(q.left))
	}
	if ask(netif.CtrlDelGrefMapping, all[0]) {
		t.Error("a page is removed while a user has it")
	}
	rx.Release(held)
	for _, e := range all[56:] {
		if !q.table.has(e.Ref) && !ask(netif.CtrlAddGrefMapping, e) {
			t.Error("a page is refused although no frame is held any longer")
		}
	}
	if !ask(netif.CtrlDelGrefMapping, all...) || p.m.Ledger().Mappings != 2 {
		t.Errorf("%d pages are mapped after all were removed", p.m.Ledger().Mappings)
	}
	for range held { // the engine does not know these requests
		eng.ring.Poll()
		eng.ring.Take()
	}
}

// While the pages of earlier mappings are lent, a queue maps no page a third time.
func TestAQueueMapsItsPagesTwiceAtMost(t *testing.T) {
	p := join(t, emu.Config{Mapped: true}, plain, Config{})
	s := static(t, p)
	q := &s.server.queues[0]
	all := s.client.refs(0)
	for _, e := range all[:4] { // two mappings that could be joined
		r := s.list(t, 0, e)
		if r.Type = netif.CtrlDelGrefMapping; e == all[1] {
			continue
		}
		s.ask(r)
		r.Type = netif.CtrlAddGrefMapping
		s.ask(r)
	}
	before := q.table
	q.left = []*pageRun{{refs: make([]hypercall.GrantRef, netif.GrefListMax-1)}}
	if err := s.server.merge(q); err != nil || q.table != before {
		t.Errorf("%v, %d mappings joined, %d pages mapped", err, len(before.runs)-len(q.table.runs), pagesOf(q.mapped()))
	}
	q.left = nil
	if err := s.server.merge(q); err != nil || q.table == before || q.table.pages() != before.pages() {
		t.Errorf("%v, %d pages of %d mapped", err, q.table.pages(), before.pages())
	}
}

// The mappings of all vifs together are bounded: when they run out, a queue keeps its pages
// mapped in a few, however its frontend adds them.
func TestTheMappingsOfAllVifsAreBounded(t *testing.T) {
	var all atomic.Int64
	const others, free, vifs = mostRuns - 150, 150, 4
	all.Store(others)
	t.Cleanup(func() { // once the vifs are gone
		if n := all.Load(); n != others {
			t.Errorf("%d mappings are counted, %d are there", n, others)
		}
	})
	var pairs []*staticPair
	for range vifs {
		s := staticAmong(t, join(t, emu.Config{Mapped: true}, plain, Config{}), &all)
		pairs = append(pairs, s)
		r := s.list(t, 0, s.client.refs(0)...)
		r.Type = netif.CtrlDelGrefMapping
		s.ask(r)
	}
	for i := range 200 {
		for v, s := range pairs {
			r := s.list(t, 0, s.client.refs(0)[i+200])
			r.Type = netif.CtrlAddGrefMapping
			if st, _ := s.ask(r); st != netif.CtrlSuccess {
				t.Fatalf("vif %d: page %d is answered %v, with %d mappings of its own", v, i, st, len(s.server.queues[0].mapped()))
			}
			if n := all.Load(); n > mostRuns+vifs*(ownRuns+1) {
				t.Fatalf("%d mappings", n)
			}
		}
	}
	sum := int64(others)
	for _, s := range pairs {
		sum += int64(len(s.server.queues[0].mapped()))
	}
	if sum != all.Load() || sum > mostRuns {
		t.Errorf("%d mappings, %d counted", sum, all.Load())
	}
	all.Add(free) // other vifs take what is left
	s := pairs[0]
	for _, e := range s.client.refs(0)[:200] {
		r := s.list(t, 0, e)
		r.Type = netif.CtrlAddGrefMapping
		if st, _ := s.ask(r); st != netif.CtrlSuccess {
			t.Fatalf("%v, with %d mappings of its own", st, len(s.server.queues[0].mapped()))
		}
	}
	if n := len(s.server.queues[0].mapped()); n > ownRuns {
		t.Errorf("a queue has %d mappings although there are no more", n)
	}
	q := &s.server.queues[0]
	if r, err := s.server.mapRun(q, ownRuns, q.table.runs[0].refs, hypercall.ReadOnly); err == nil {
		r.retire()
		t.Error("a queue that has its own mappings gets another one")
	}
	q.left = []*pageRun{{}}
	before := q.table
	if err := s.server.merge(q); err == nil || q.table != before {
		t.Error("a queue that has a mapping too many gets another one")
	}
	q.left = nil
	all.Add(-free)
}

// Pages are added and removed while frames move, and however the owners wait.
func TestPagesComeAndGoUnderTraffic(t *testing.T) {
	for _, mode := range []WaitMode{Park, Busy} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			p := join(t, emu.Config{}, plain, Config{Wait: mode})
			s := static(t, p)
			ftx, frx := own(t, p.front)
			btx, brx := own(t, p.back)
			var wg sync.WaitGroup
			var removed atomic.Int64
			const frames, least = 3000, 10 * 64
			flow := func(tx *TX, rx *RX) {
				batches := make(chan int, 1)
				wg.Go(func() {
					defer close(batches)
					// Another batch is sent until enough pages have come and gone meanwhile.
					for first := 0; first == 0 || removed.Load() < least; first += frames {
						batches <- first
						sendFrames(t, tx, frames, 700, first)
					}
				})
				wg.Go(func() {
					var f [1]Frame
					for first := range batches {
						for i := range frames {
							if _, err := rx.Receive(f[:]); err != nil {
								t.Error(err)
								return
							}
							if err := same(&f[0], first+i); err != nil {
								t.Error(err)
							}
							rx.Release(f[:])
						}
					}
				})
			}
			flow(ftx, brx)
			flow(btx, frx)
			done := make(chan struct{})
			go func() { wg.Wait(); close(done) }()
			all := s.client.refs(0)
			for {
				select {
				case <-done:
					if n := removed.Load(); n < least {
						t.Errorf("%d pages were removed", n)
					}
					return
				default:
				}
				runtime.Gosched() // there may be one thread
				i := rand.IntN(len(all) - 64)
				r := s.list(t, 0, all[i:i+64]...)
				r.Type = netif.CtrlDelGrefMapping
				if _, n := s.ask(r); n != 64 {
					t.Errorf("%d of 64 removed", n)
				}
				removed.Add(64)
				r = s.list(t, 0, all[i:i+64]...)
				r.Type = netif.CtrlAddGrefMapping
				if st, _ := s.ask(r); st != netif.CtrlSuccess {
					t.Error(st)
				}
			}
		})
	}
}

// What a frontend may not do it may not do with pages that are mapped either.
func TestMappedPagesForgiveNothing(t *testing.T) {
	for _, tt := range []struct {
		name string
		reqs []netif.TxRequest
		drop telemetry.Reason
	}{
		{name: "a frame across the end of its page", reqs: []netif.TxRequest{{Offset: 4000, Size: 97}}},
		{name: "a piece across the end of its page", reqs: []netif.TxRequest{{Size: 3000, Flags: netif.TxMoreData}, {Offset: 3097, Size: 1000}}},
		{name: "a first piece across the end of its page", reqs: []netif.TxRequest{{Offset: 2000, Size: 3200, Flags: netif.TxMoreData}, {Size: 1000}}},
		{name: "too short", reqs: []netif.TxRequest{{Size: 13}}, drop: telemetry.DropTooShort},
		{name: "pieces longer than the frame", reqs: []netif.TxRequest{{Size: 500, Flags: netif.TxMoreData}, {Size: 501}}, drop: telemetry.DropBadChain},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := join(t, emu.Config{}, plain, Config{LendRx: true})
			static(t, p)
			_, rx := own(t, p.back)
			eng := p.front.tx[0].eng.(*frontTX)
			for _, r := range tt.reqs {
				r.Ref = eng.refs[0]
				eng.ring.Put(r)
			}
			eng.ring.Publish()
			var f [1]Frame
			n, err := rx.Poll(f[:])
			if _, violation := errors.AsType[*PeerError](err); n != 0 || violation != (tt.drop == 0) {
				t.Fatalf("%d frames, %v", n, err)
			}
			if tt.drop != 0 {
				if n := p.back.Stats().RX.Lost(tt.drop); n != 1 {
					t.Errorf("%d counted as %v", n, tt.drop)
				}
				for range tt.reqs { // the engine does not know these requests
					if n, err := eng.ring.Poll(); n == 0 || err != nil {
						t.Fatal(n, err)
					}
					if rsp := eng.ring.Take(); rsp.Status != netif.Error {
						t.Errorf("answered %v", rsp.Status)
					}
				}
			}
		})
	}
}

// A page that was added to be read is not written, whatever a posted request says: it is
// mapped read-only, and a write would be a fault of ours.
func TestAPageMappedToBeReadIsNotWritten(t *testing.T) {
	for _, size := range []int{1000, 6000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p := join(t, emu.Config{}, plain, Config{})
			static(t, p)
			tx, _ := own(t, p.back)
			to, from := p.front.rx[0].eng.(*frontRX), p.front.tx[0].eng.(*frontTX)
			for i := range to.refs { // the pages that are posted next
				to.refs[i] = from.refs[i]
			}
			var f [4]Frame
			_, rx := own(t, p.front)
			for range 300 { // beyond those that were posted before
				n := tx.AllocSize(f[:1], size)
				if k, err := tx.Send(f[:n]); k != 1 || err != nil {
					t.Fatal(k, err)
				}
				if k, err := rx.Poll(f[:]); err != nil {
					t.Fatal(err)
				} else if k > 0 {
					rx.Release(f[:k])
				}
			}
			if n := p.back.Stats().TX.Lost(telemetry.DropBadGref); n == 0 {
				t.Error("no frame was refused")
			}
		})
	}
}

// arriveOneByOne sends 300 frames, each once the one before was received.
func arriveOneByOne(t *testing.T, tx *TX, rx *RX) {
	t.Helper()
	var f [1]Frame
	for i := range 300 {
		sendFrames(t, tx, 1, 1000, i)
		if k, err := rx.Receive(f[:]); k != 1 || err != nil {
			t.Fatal(k, err)
		}
		if err := same(&f[0], i); err != nil {
			t.Fatal(err)
		}
		rx.Release(f[:])
	}
}
