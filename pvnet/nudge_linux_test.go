package pvnet

import (
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
)

// A full TX is one whose owner waits in SendWait for room that the other end has not made.
type fullTX struct {
	*pair
	tx   *TX
	rx   *RX        // of the other end
	sent chan error // the result of SendWait

	nudges atomic.Int32 // how often its Waiter was nudged
}

// A nudged is the Waiter of a fullTX.
type nudged struct {
	hypercall.Waiter
	by *fullTX
}

func (n nudged) Nudge() {
	n.by.nudges.Add(1)
	n.Waiter.(hypercall.Nudger).Nudge()
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
	park := p.tx.park.Load()
	park.w = nudged{park.w, p} // nobody waits yet
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

// A SendWait is nudged only once there is room for it.
func TestASendWaitIsNudgedForRoom(t *testing.T) {
	for _, backend := range []bool{true, false} {
		p := newFullTX(t, backend)
		comes(t, "a wait", p.tx.Nudge)
		for range 20 {
			if !p.tx.Nudge() {
				t.Error("there is no room")
			}
		}
		if n := p.nudges.Load(); n > 0 {
			t.Errorf("%d nudges without room", n)
		}
		if !waits(&p.tx.half) || len(p.sent) > 0 {
			t.Error("the wait has ended")
		}
		p.drain(t)
		if err := <-p.sent; err != nil {
			t.Fatal(err)
		}
		p.drain(t)
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
	if n := p.nudges.Load(); n != mostNudges {
		t.Errorf("%d nudges, and not %d", n, mostNudges)
	}
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
