package pvnet

import (
	"slices"
	"strings"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet/ctrl"
	"barevif/pvnet/netif"
)

// The state of a control ring that the frontend does not have is refused, and so is that of a
// ring whose page shows impossible indices, or which is gone.
func TestTheStateOfNoControlRing(t *testing.T) {
	s := toldState{Ctrl: new(ctrlState)}
	if _, err := s.check(new(conn)); err == nil || !strings.Contains(err.Error(), "which the frontend does not have") {
		t.Errorf("no ring: %v", err)
	}
	if told, err := new(toldState).check(new(conn)); err != nil || told.known || told.hash != nil || told.grants != nil {
		t.Errorf("nothing told: %+v, %v", told, err)
	}
	p := join(t, emu.Config{}, plain, Config{})
	page, err := p.fdom.Share(p.bdom.ID(), 1, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer page.End()
	ctrl.NewClient(page.Memory)
	c := new(conn)
	m := &setup{dom: p.bdom, peer: p.fdom.ID(), c: c}
	if c.ctrlPage, err = m.ringPage("ctrl", page.Refs[0]); err != nil {
		t.Fatal(err)
	}
	defer c.undo.run()
	if _, err := s.check(c); err != nil {
		t.Errorf("a ring: %v", err)
	}
	page.Out(0).Store(129) // the requests' producer
	if _, err := s.check(c); err == nil || !strings.Contains(err.Error(), "ctrl") {
		t.Errorf("more requests than slots: %v", err)
	}
}

// Static grants that were told and are not mapped yet are described as those that are.
func TestGrantsThatAreNotMappedYetAreDescribed(t *testing.T) {
	told := [][]netif.GrefEntry{{{Ref: 9, Flags: netif.GrefReadOnly}, {Ref: 8}}, nil}
	s := &grantServer{queues: make([]grantQueue, 2), told: told}
	if got := s.lists(); len(got) != 2 || !slices.Equal(got[0], told[0]) {
		t.Errorf("%v, want %v", got, told)
	}
	if s.told = nil; s.lists() != nil || (*grantServer)(nil).lists() != nil {
		t.Error("no grants are described")
	}
}
