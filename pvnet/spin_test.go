package pvnet

import "testing"

// A lateRing is ready after so many looks.
type lateRing struct {
	engine
	after, looks int
}

func (r *lateRing) ready(int) bool {
	r.looks++
	return r.looks > r.after
}

func TestAdaptiveParksWhereLookingDoesNotPay(t *testing.T) {
	h := &half{}
	h.gate.state.Store(gateBusy)
	s := spinner{most: 1000}
	r := &lateRing{}

	// Frames that come soon are found, every time.
	for range 100 {
		*r = lateRing{after: 10}
		if !s.found(h, r, 1) {
			t.Fatal("not found after 10 looks")
		}
	}
	// Frames that never come in time are looked for ever less often.
	total := 0
	for range 1000 {
		*r = lateRing{after: 1 << 30}
		if s.found(h, r, 1) {
			t.Fatal("found what was not there")
		}
		total += r.looks
	}
	if most := 1000 * 1000 / 40; total > most {
		t.Errorf("%d looks in 1000 waits for nothing, at most %d", total, most)
	}
	// Once they come soon again, it takes no more waits than that to see it.
	for i := 0; ; i++ {
		*r = lateRing{after: 10}
		if s.found(h, r, 1) {
			break
		}
		if i > 1<<mostMisses {
			t.Fatal("not looked at again")
		}
	}
	*r = lateRing{after: 10}
	if !s.found(h, r, 1) {
		t.Error("one success did not count")
	}
}

func TestParkNeverLooks(t *testing.T) {
	var s spinner
	r := &lateRing{}
	if s.found(&half{}, r, 1) || r.looks != 0 {
		t.Errorf("%d looks", r.looks)
	}
}

func TestBusyLooksUntilTheGateCloses(t *testing.T) {
	h := &half{}
	h.gate.state.Store(gateBusy)
	s := spinner{most: -1}
	r := &lateRing{after: 3 * spinYield}
	if !s.found(h, r, 1) {
		t.Error("gave up")
	}
	h.gate.state.Store(gateClosing)
	*r = lateRing{after: 1 << 30}
	if s.found(h, r, 1) || r.looks > spinYield {
		t.Errorf("%d looks behind a gate that closes", r.looks)
	}
}
