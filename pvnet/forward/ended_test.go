package forward

import (
	"fmt"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// Frames that wait while a Sender ends are counted as Ended, also if the link has news at that moment.
func TestALinkEventWhileASenderEnds(t *testing.T) {
	h := pvnettest.NewHub(t, 1, toolstack.Vif{}, func(int) pvnet.Config { return pvnet.Config{} }, pvnet.ServeConfig{DrainTimeout: -1})
	s, err := NewSender(h.Backs[0], Config{})
	if err != nil {
		t.Fatal(err)
	}
	const ring, more = 256, 4 * Batch // more than the goroutine takes at once
	left := ring + more
	if err := labtest.Comes(func() error {
		for ; left > 0; left-- {
			if !s.Write(make([]byte, 100)) {
				return fmt.Errorf("%d frames are not taken: %+v", left, s.Stats())
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock() // the first half of end
	s.err = ErrClosed
	q := s.queues[0]
	q.tx.SetDeadline(s.deadlineLocked(false)) // as follow does
	s.mu.Unlock()
	time.Sleep(20 * time.Millisecond) // time in which a goroutine whose deadline has passed would drop its batch as Down
	s.mu.Lock()
	s.err = nil
	s.mu.Unlock()
	s.Close()
	if n := s.Stats(); n.Down != 0 || n.Ended != more {
		t.Errorf("%+v", n)
	}
}
