package pvnet

import (
	"sync/atomic"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
)

// A grantTable holds the pages of a frontend that one queue of a backend keeps mapped:
// static grants, which the frontend adds by messages on the control ring. A request that
// names one of them needs no grant operation. A table never changes: the control ring's
// goroutine makes another one and stores it in both engines of the queue ([grantUser]).
//
// A lookup is a multiplication, a load and a comparison. The refs of one frontend mostly
// follow each other, and then their low bits are the index of their slots. Other refs are
// hashed, with a multiplier that the frontend does not know: else it could choose refs that
// share a slot, and each lookup would compare hundreds of them.
type grantTable struct {
	slots  [tableSlots]grantSlot // open addressing, at most half of it in use
	factor uint32
	runs   []*pageRun
}

// A grantSlot says where the page of a ref is mapped. An empty slot has no page.
type grantSlot struct {
	ref      hypercall.GrantRef
	run      uint8 // index of runs
	writable bool
	page     uint16              // of the run
	mem      *[shm.PageSize]byte // the page itself
}

const (
	tableBits  = 10
	tableSlots = 1 << tableBits
	tableShift = 32 - tableBits

	// The factor with which the low bits of a ref are the index of its slot.
	lowBits = 1 << tableShift
)

// Both fit: an index of maxRuns runs, and a table that is never more than half full.
var (
	_ [1<<8 - maxRuns]struct{}
	_ [tableSlots/2 - netif.GrefListMax]struct{}
)

// A pageRun is a mapping of pages that are added, and unmapped, together.
type pageRun struct {
	refs   []hypercall.GrantRef // by page
	access hypercall.Access
	arena  *arena.Arena // its buffers are the pages
	unmap  func()

	// Of the receiving engine, inside its gate.
	lent  []bool // by page: a frame in it is in a user's hands
	nlent int
}

// newPageRun makes a run of the mapping m of refs, which all has counted. wake wakes the
// receiving engine's owner when a lent page comes back.
func newPageRun(m *hypercall.Mapping, refs []hypercall.GrantRef, access hypercall.Access, wake func(), all *atomic.Int64) *pageRun {
	unmap := func() {
		m.Release()
		all.Add(-1)
	}
	return &pageRun{
		refs: refs, access: access, unmap: unmap, lent: make([]bool, len(refs)),
		arena: arena.NewReadOnly(m.Memory, shm.PageSize, wake),
	}
}

// retire unmaps the run as soon as no page of it is lent. No engine uses it any more.
func (r *pageRun) retire() {
	for i, lent := range r.lent {
		if !lent {
			r.arena.Put(uint32(i))
		}
	}
	r.arena.Retire(r.unmap)
}

// newGrantTable makes the table of runs; nil if there are none. They have no more pages than
// [netif.GrefListMax] together.
func newGrantTable(runs []*pageRun, secret uint32) *grantTable {
	if len(runs) == 0 {
		return nil
	}
	t := &grantTable{factor: lowBits, runs: runs}
	if !t.fill(false) {
		t.slots, t.factor = [tableSlots]grantSlot{}, secret|1
		t.fill(true)
	}
	return t
}

// fill puts the pages of the runs into the slots. Without probe it reports false, and stops,
// if two refs have the same slot.
func (t *grantTable) fill(probe bool) bool {
	for i, r := range t.runs {
		for page, ref := range r.refs {
			s := t.slot(ref)
			if s.mem != nil && !probe {
				return false
			}
			if s.mem != nil {
				s = t.next(ref, 0)
			}
			*s = grantSlot{ref, uint8(i), r.access == hypercall.ReadWrite, uint16(page), (*[shm.PageSize]byte)(r.arena.Bytes(uint32(page)))}
		}
	}
	return true
}

// slot returns the slot where the search for ref begins.
func (t *grantTable) slot(ref hypercall.GrantRef) *grantSlot {
	return &t.slots[uint32(ref)*t.factor>>tableShift]
}

// next returns the slot behind that of ref which holds want; an empty one if none does.
func (t *grantTable) next(ref, want hypercall.GrantRef) *grantSlot {
	for at := uint32(ref)*t.factor>>tableShift + 1; ; at++ {
		if s := &t.slots[at%tableSlots]; s.mem == nil || s.ref == want {
			return s
		}
	}
}

// find returns the slot of ref. It is an empty one if the page of ref is not mapped.
func (t *grantTable) find(ref hypercall.GrantRef) *grantSlot {
	s := t.slot(ref)
	if s.ref != ref && s.mem != nil {
		s = t.next(ref, ref)
	}
	return s
}

// bytes returns n bytes of the page of ref from off on, or nil if the page is not mapped
// with that access. A nil table has no pages. The n bytes lie in one page.
func (t *grantTable) bytes(ref hypercall.GrantRef, off uint16, n int, access hypercall.Access) []byte {
	if t == nil {
		return nil
	}
	s := t.find(ref)
	if s.mem == nil || access == hypercall.ReadWrite && !s.writable {
		return nil
	}
	end := int(off) + n
	return s.mem[off:end:end]
}

// has reports whether the page of ref is mapped.
func (t *grantTable) has(ref hypercall.GrantRef) bool {
	if t == nil {
		return false
	}
	return t.find(ref).mem != nil
}

// all returns the runs of the table.
func (t *grantTable) all() []*pageRun {
	if t == nil {
		return nil
	}
	return t.runs
}

// pages returns how many pages the table holds.
func (t *grantTable) pages() int { return pagesOf(t.all()) }

func pagesOf(runs []*pageRun) (n int) {
	for _, r := range runs {
		n += len(r.refs)
	}
	return n
}

// A grantUser is an engine's view of its queue's grantTable. The engine takes up a new
// table at the start of a batch, so that a table it has left behind is used by nobody.
type grantUser struct {
	newest atomic.Pointer[grantTable] // stored by the control ring's goroutine
	table  *grantTable                // the last one taken up; inside the gate
}

// takeUp makes the newest table the one in use. The caller is inside the gate.
func (u *grantUser) takeUp() *grantTable {
	u.table = u.newest.Load()
	return u.table
}
