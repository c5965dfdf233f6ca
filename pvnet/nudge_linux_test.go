package pvnet

import (
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"barevif/hypercall/emu"
)

// A full TX is one whose owner waits in SendWait for room that the other end has not made.
type fullTX struct {
	*pair
	tx   *TX
	rx   *RX        // of the other end
	sent chan error // the result of SendWait
}

// newFullTX returns the TX of the backend or of the frontend. The event channels of its machine are
// eventfds, as those of a machine whose domains are processes.
func newFullTX(t *testing.T, backend bool) *fullTX {
	t.Helper()
	h, err := emu.Listen(filepath.Join(t.TempDir(), "host"), emu.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	p := &fullTX{pair: joinIn(t, h.Machine, plain, Config{}), sent: make(chan error, 1)}
	if backend {
		p.tx, _ = own(t, p.back)
		_, p.rx = own(t, p.front)
	} else {
		p.tx, _ = own(t, p.front)
		_, p.rx = own(t, p.back)
	}
	p.fill(t)
	return p
}

// fill sends until there is no room, and has another goroutine wait for it.
func (p *fullTX) fill(t *testing.T) {
	t.Helper()
	var f [1]Frame
	for p.tx.AllocSize(f[:], 60) == 1 {
		if _, err := p.tx.Send(f[:]); err == ErrFull {
			f[0].Release()
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if p.tx.Nudge() {
		t.Error("nobody waits")
	}
	go func() {
		var f [1]Frame
		_, err := p.tx.AllocWait(f[:], 60)
		if err == nil {
			_, err = p.tx.SendWait(f[:])
		}
		p.sent <- err
	}()
	comes(t, "the wait", func() bool { return waits(&p.tx.half) })
}

// drain receives all that was sent.
func (p *fullTX) drain(t *testing.T) {
	t.Helper()
	var f [64]Frame
	for {
		n, err := p.rx.Poll(f[:])
		p.rx.Release(f[:n])
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return
		}
	}
}

// A SendWait that is nudged goes on once there is room, while the goroutine that nudges keeps the only processor busy:
// Go's scheduler may look at the eventfd ten milliseconds later. Without room it waits on.
func TestANudgedSendWaitGoesOn(t *testing.T) {
	for _, backend := range []bool{true, false} {
		p := newFullTX(t, backend)
		comes(t, "a wait", p.tx.Nudge)
		for range 20 {
			if !p.tx.Nudge() {
				t.Error("there is no room")
			}
			time.Sleep(time.Millisecond)
		}
		if !waits(&p.tx.half) || len(p.sent) > 0 {
			t.Error("a nudge ended the wait")
		}
		late := 0
		for range 20 {
			procs := runtime.GOMAXPROCS(1)
			p.drain(t)
			const turns = 200 // together less than two milliseconds
			for i := 0; i < turns && len(p.sent) == 0; i++ {
				p.tx.Nudge()
				runtime.Gosched()
			}
			if len(p.sent) == 0 {
				late++
			}
			runtime.GOMAXPROCS(procs)
			if err := <-p.sent; err != nil {
				t.Fatal(err)
			}
			p.drain(t)
			p.fill(t)
		}
		if late > 0 {
			t.Errorf("backend %v: SendWait still waited after the nudges, %d times", backend, late)
		}
		p.drain(t)
		if err := <-p.sent; err != nil {
			t.Fatal(err)
		}
	}
}

// A peer that makes room and sends no event costs a few nudges, which do not end the wait: the slow tick ends it.
func TestANudgeIsNoEvent(t *testing.T) {
	p := newFullTX(t, true)
	lift := p.fdom.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
	comes(t, "a wait", p.tx.Nudge)
	p.drain(t)
	for i := range 100 {
		if waits := p.tx.Nudge(); waits != (i >= mostNudges) {
			t.Errorf("nudge %d: it waits on: %v", i, waits)
		}
	}
	time.Sleep(20 * time.Millisecond) // not to wait for anything: the goroutine would run now
	if len(p.sent) > 0 {
		t.Error("a nudge ended the wait")
	}
	lift()
	l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
	l.tick()
	<-l.recheckAt
	l.rescue()
	if err := <-p.sent; err != nil {
		t.Fatal(err)
	}
	p.drain(t)
}
