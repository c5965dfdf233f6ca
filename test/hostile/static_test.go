package hostile

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
)

// Types of requests about static grants.
const (
	grefSize = 8
	grefAdd  = 9
	grefDel  = 10
)

// A guest adds and removes pages as no correct frontend does, while it sends and receives in
// them, and closes in the midst of it. The backend lends the pages to its user. Nothing is
// left mapped, and its frames pass all the same.
func TestT11StaticGrantsAtRandom(t *testing.T) {
	l := newLab(t, emu.Config{Mapped: true}) // pages of several shares in one mapping
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Queues: 2, StaticGrants: true, LendRx: true}})
	const rounds, requests = 20, 60
	for range rounds {
		g := l.newCtrlGuest()
		page, err := l.guest.Share(backID, 1, hypercall.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		g.more = append(g.more, page.End)
		g.connect()
		refs := append(append([]hypercall.GrantRef{}, g.Pages.Refs...), g.Posted.Refs...)
		refs = append(refs, page.Refs[0], g.Rings.Refs[0], 0, 1<<30)
		for i := range requests {
			if i%10 == 0 {
				g.requireTraffic()
				long := pattern(1000, i) // long enough to be lent
				copy(g.Pages.Page(i%32), long)
				g.Front.Put(g.Req(i%32, 0, 1000, 0).Words())
				g.Front.Push()
				g.sink.requireFrame(t, long)
				g.awaitAnswers(1)
			}
			n := rand.IntN(12)
			for k, r := range rand.Perm(len(refs))[:n] {
				binary.LittleEndian.PutUint32(page.Page(0)[8*k:], uint32(refs[r]))
				readOnly := r < len(g.Pages.Refs)
				if rand.IntN(50) == 0 {
					readOnly = !readOnly
				}
				binary.LittleEndian.PutUint32(page.Page(0)[8*k+4:], map[bool]uint32{true: 1}[readOnly])
			}
			typ := uint16(grefSize + rand.IntN(3))
			g.Ctrl.Put(raw.CtrlReq{ID: uint16(i), Type: typ, Data: [3]uint32{uint32(rand.IntN(40) / 13 % 3), uint32(page.Refs[0]), uint32(n)}})
			g.Ctrl.Push()
			if i == requests-1 {
				break // the end comes before the answer
			}
			if _, err := g.Ctrl.Answers(1, deadline()); err != nil {
				t.Fatal(err)
			}
		}
		if features(g.dev)&telemetry.FeatureStaticGrants == 0 {
			t.Error("nothing was ever added")
		}
		g.disconnect()
	}
}
