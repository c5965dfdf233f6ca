package telemetry

import "testing"

func TestReasonsAddUpToDroppedAndErrors(t *testing.T) {
	s := NewSet(1)
	b := s.RX(0)
	var want uint64
	for r := DropNoBuffer; r < endReasons; r++ {
		b.Drop(r, uint64(r))
		want += uint64(r)
	}
	b.Flush()
	st := s.Snapshot()
	var sum uint64
	for r := DropNoBuffer; r < endReasons; r++ {
		sum += st.RX.Lost(r)
	}
	if sum != want || st.RX.Dropped()+st.RX.Errors() != want {
		t.Fatalf("reasons sum to %d, dropped %d + errors %d, counted %d", sum, st.RX.Dropped(), st.RX.Errors(), want)
	}
}
