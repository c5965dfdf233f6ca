package forward_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/pvnet/pvnettest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// Frames of Write arrive in their order, and a frame that nobody can send is refused.
func TestWrittenFramesArrive(t *testing.T) {
	w := pvnettest.New(t, toolstack.Vif{}, pvnet.Config{}, pvnet.Config{})
	s, err := forward.NewSender(w.Back, forward.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const frames = 2000
	got := make(chan []byte, 16)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	go w.Front.Listen(ctx, func(f pvnet.Frame) {
		b := make([]byte, f.Len())
		f.CopyTo(b)
		select {
		case got <- b:
		case <-ctx.Done():
		}
	})
	frame := func(i int) []byte { return append(make([]byte, 60), byte(i>>8), byte(i)) }
	if s.Write(make([]byte, pvnet.MinFrame-1)) || s.Write(make([]byte, pvnet.MaxFrame+1)) {
		t.Error("a frame that no vif takes was taken")
	}
	go func() {
		for i := range frames {
			for !s.Write(frame(i)) && ctx.Err() == nil { // as many as may wait do
				time.Sleep(time.Millisecond)
			}
		}
	}()
	last := -1
	for last < frames-1 {
		select {
		case b := <-got:
			i := int(b[60])<<8 | int(b[61])
			// A frame that found no page is lost, but none is overtaken.
			if i <= last || !bytes.Equal(b, frame(i)) {
				t.Fatalf("frame %d after %d", i, last)
			}
			if last = i; i > frames-40 {
				last = frames // the very last may be lost too
			}
		case <-ctx.Done():
			t.Fatalf("no frame after %d", last)
		}
	}
	if n := s.Stats(); n.Sent == 0 {
		t.Errorf("%+v", n)
	}
	cancel()
	s.Close()
	if s.Write(frame(1)) {
		t.Error("a closed Sender takes a frame")
	}
	if err := s.Err(); !errors.Is(err, forward.ErrClosed) {
		t.Error(err)
	}
}

// Frames of all lengths arrive as they were written, however the ring of those that wait wraps, and
// once it has grown nothing is allocated for them.
func TestWrittenFramesAreCopiedWithoutGarbage(t *testing.T) {
	w := pvnettest.New(t, toolstack.Vif{}, pvnet.Config{}, pvnet.Config{})
	s, err := forward.NewSender(w.Back, forward.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	rx := ownRX(t, w.Front, 0)
	var list [40][]byte
	for i := range list {
		list[i] = packet([]int{14, 60, 61, 1514, 4097, 9000}[i%6], i)
	}
	room := make([]byte, 9000)
	var frames [8]pvnet.Frame
	cycle := func() {
		sent := 0
		for got := 0; got < len(list); {
			for sent < len(list) && sent-got < 12 && s.Write(list[sent]) { // fewer than there are pages for
				sent++
			}
			n, err := rx.Receive(frames[:])
			if err != nil {
				t.Fatal(err)
			}
			for i := range frames[:n] {
				if k := frames[i].CopyTo(room); !bytes.Equal(room[:k], list[got]) {
					t.Fatalf("frame %d: %d bytes that are another's", got, k)
				}
				got++
			}
			rx.Release(frames[:n])
		}
	}
	for range 20 {
		cycle()
	}
	least := 1e9
	for range 5 { // what runs beside the test allocates now and then
		least = min(least, testing.AllocsPerRun(10, cycle))
	}
	if least >= 1 {
		t.Errorf("%v allocations for %d frames", least, len(list))
	}
}

// While the link is down, or nothing is taken, a bounded number of frames waits.
func TestWrittenFramesAreBounded(t *testing.T) {
	w := pvnettest.New(t, toolstack.Vif{}, pvnet.Config{}, pvnet.Config{})
	s, err := forward.NewSender(w.Back, forward.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	refused := 0
	for range 5000 { // the frontend takes none
		if !s.Write(make([]byte, 1500)) {
			refused++
		}
	}
	if refused < 3000 {
		t.Errorf("only %d of 5000 frames were refused", refused)
	}
	if n := s.Stats(); n.Full < uint64(refused) {
		t.Errorf("%+v, %d refused", n, refused)
	}
}

// Frames that are written while the link is down are lost, and counted as such.
func TestFramesWrittenWithoutALinkAreCountedAsDown(t *testing.T) {
	h := pvnettest.NewHub(t, 1, toolstack.Vif{}, func(int) pvnet.Config { return pvnet.Config{} }, pvnet.ServeConfig{})
	s := newSender(t, h.Backs[0], forward.Config{})
	h.Disconnect(0)
	const frames = 20
	for range frames {
		s.Write(make([]byte, 60))
	}
	if err := labtest.Comes(func() error {
		if n := s.Stats(); n != (forward.Stats{Down: frames}) {
			return fmt.Errorf("%+v", n)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}
