package pvnet

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/hypercall/emu"
)

// A page of a frontend that a backend has mapped is gone when a listener comes to it, behind
// frames that are copied, or lent, already. All pages of the batch come back.
func TestAFaultInAMappedPage(t *testing.T) {
	for _, lend := range []bool{false, true} {
		for name, sizes := range map[string][]int{
			"the first frame":           {100},
			"behind frames of one page": {100, 1500, 100, 1500, 100},
			"behind a long frame":       {100, 20000, 1500, 9000},
			"in a long frame":           {1500, 100, 20000},
			"in a frame that is lent":   {100, 1500, 1500},
		} {
			t.Run(fmt.Sprintf("%s, lent: %v", name, lend), func(t *testing.T) {
				p := join(t, emu.Config{Mapped: true}, plain, Config{LendRx: lend, Buffers: 64})
				static(t, p)
				tx, _ := own(t, p.front)
				e := p.back.rx[0].eng.(*backRX)
				table := e.newest.Load()
				sent := tx.eng.(*frontTX)
				for i, size := range sizes[:len(sizes)-1] {
					sendFrames(t, tx, 1, size, i)
				}
				before := slices.Clone(sent.state)
				sendFrames(t, tx, 1, sizes[len(sizes)-1], 0)
				first := 0 // page of the last frame
				for sent.state[first] != idFirst || before[first] == idFirst {
					first++
				}
				gone := table.find(sent.refs[first]).mem[:]
				if err := unix.Mprotect(gone, unix.PROT_NONE); err != nil {
					t.Fatal(err)
				}
				err := p.back.Listen(context.Background(), func(Frame) {}) // a batch ends before a long frame
				if _, ok := err.(*PeerError); !ok {
					t.Fatalf("Listen ended with %v", err)
				}
				if free, all := e.private.Free(), e.private.Len(); free != all {
					t.Errorf("%d of %d private pages are free", free, all)
				}
				if e.lentNow != 0 || len(e.lentRuns) != 0 {
					t.Errorf("%d pages are lent, of %d runs", e.lentNow, len(e.lentRuns))
				}
				for _, r := range table.runs {
					for page, lent := range r.lent {
						if lent {
							t.Errorf("page %d is lent", page)
						}
					}
				}
			})
		}
	}
}
