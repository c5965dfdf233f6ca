package pvnet

import (
	"fmt"
	"testing"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
)

// Whatever refs a frontend chooses, each is found where its page is, and no other is. Refs that
// share a slot by their low bits are hashed with the secret: else a frontend could make every
// lookup compare hundreds of them.
func TestATableFindsTheRefsItHolds(t *testing.T) {
	const secret = 0x9e3779b8
	for _, tt := range []struct {
		name   string
		ref    func(i int) hypercall.GrantRef
		hashed bool
	}{
		{"in a row", func(i int) hypercall.GrantRef { return hypercall.GrantRef(1020 + i) }, false},
		{"in a row up to the last one", func(i int) hypercall.GrantRef { return ^hypercall.GrantRef(i) }, false},
		{"in two rows", func(i int) hypercall.GrantRef { return hypercall.GrantRef(8 + i + i/256*5000) }, true},
		{"of the same low bits", func(i int) hypercall.GrantRef { return hypercall.GrantRef(1+i) << 22 }, true},
		{"of two slots", func(i int) hypercall.GrantRef { return hypercall.GrantRef(1+i)<<10 | hypercall.GrantRef(i%2) }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const pages = netif.GrefListMax
			held := make(map[hypercall.GrantRef]int)
			var runs []*pageRun
			for first := 0; first < pages; first += pages / 8 {
				r := &pageRun{access: hypercall.Access(first / (pages / 8) % 2), arena: arena.NewReadOnly(shm.Heap(pages/8), shm.PageSize, nil)}
				for i := range pages / 8 {
					held[tt.ref(first+i)] = first + i
					r.refs = append(r.refs, tt.ref(first+i))
					copy(r.arena.Bytes(uint32(i)), fmt.Sprintf("page %03d", first+i))
				}
				runs = append(runs, r)
			}
			table := newGrantTable(runs, secret)
			if want := map[bool]uint32{false: lowBits, true: secret | 1}[tt.hashed]; table.factor != want || len(held) != pages {
				t.Errorf("the factor is %#x, not %#x, for %d refs", table.factor, want, len(held))
			}
			for ref, i := range held {
				b := table.bytes(ref, 5, 3, hypercall.ReadOnly)
				if string(b) != fmt.Sprintf("%03d", i) || cap(b) != 3 {
					t.Fatalf("page %d: %q", i, b)
				}
				if writable := i/(pages/8)%2 == 1; (table.bytes(ref, 0, 1, hypercall.ReadWrite) != nil) != writable {
					t.Fatalf("page %d: that it may be written is not %v", i, writable)
				}
				s := table.find(ref)
				if r := table.runs[s.run]; r.refs[s.page] != ref {
					t.Fatalf("page %d: its run says %d", i, r.refs[s.page])
				}
				for _, other := range []hypercall.GrantRef{ref + 1, ref - 1, ref ^ 1<<31, ref + tableSlots, 0} {
					if _, ok := held[other]; table.has(other) != ok {
						t.Fatalf("%d is held is not %v", other, ok)
					}
				}
			}
		})
	}
	if newGrantTable(nil, secret) != nil {
		t.Error("a table of no pages")
	}
}
