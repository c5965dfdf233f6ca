package forward

import (
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/xenbus/toolstack"
)

// Frames that wait while a Sender ends are counted as Ended, also if the link has news at that moment.
func TestALinkEventWhileASenderEnds(t *testing.T) {
	h := pvnettest.NewHub(t, 1, toolstack.Vif{}, func(int) pvnet.Config { return pvnet.Config{} }, pvnet.ServeConfig{DrainTimeout: -1})
	s, err := NewSender(h.Backs[0], Config{})
	if err != nil {
		t.Fatal(err)
	}
	const ring = 256
	for range ring + 4*Batch { // the ring, and more than the goroutine takes at once
		for !s.Write(make([]byte, 100)) {
			time.Sleep(time.Millisecond)
		}
	}
	s.mu.Lock() // the first half of end
	s.err = ErrClosed
	q := s.queues[0]
	q.tx.SetDeadline(s.deadlineLocked(false)) // as follow does
	s.mu.Unlock()
	time.Sleep(20 * time.Millisecond) // not to wait for anything: the goroutine would drop its batch now
	s.mu.Lock()
	s.err = nil
	s.mu.Unlock()
	s.Close()
	if n := s.Stats(); n.Down != 0 || n.Ended == 0 {
		t.Errorf("%+v", n)
	}
}
