package pvnet

import (
	"math/bits"
	"path/filepath"
	"sync"
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
	for park.w.Wait(time.Now(), true) == nil { // what has come before the test begins
	}
	park.woken, park.wakeSent = [2]bool{}, false
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

// A SendWait is not nudged before there is room for it, and then it is.
func TestASendWaitIsNudgedForRoom(t *testing.T) {
	for _, backend := range []bool{true, false} {
		p := newFullTX(t, backend)
		comes(t, "a wait", p.tx.Nudge)
		for range 20 {
			if !p.tx.Nudge() {
				t.Error("the call waits no more")
			}
		}
		if n := p.nudges.Load(); n > 0 {
			t.Errorf("%d nudges without room", n)
		}
		if !waits(&p.tx.half) || len(p.sent) > 0 {
			t.Error("the wait has ended")
		}
		dom := p.fdom // that of the other end
		if !backend {
			dom = p.bdom
		}
		lift := dom.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
		p.drain(t)
		if waits, n := p.tx.Nudge(), p.nudges.Load(); waits || n != 1 {
			t.Errorf("there is room: it waits on: %v; %d nudges", waits, n)
		}
		lift()
		p.tx.park.Load().wake()
		if err := <-p.sent; err != nil {
			t.Fatal(err)
		}
		p.drain(t)
	}
}

// A peer that makes room and sends no event costs few nudges, which do not end the wait: the slow tick ends it.
func TestANudgeIsNoEvent(t *testing.T) {
	p := newFullTX(t, true)
	lift := p.fdom.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
	comes(t, "a wait", p.tx.Nudge)
	p.drain(t)
	for i := 1; i <= 1000; i++ {
		if waits, due := p.tx.Nudge(), bits.OnesCount(uint(i)) == 1; waits == due {
			t.Errorf("call %d: it waits on: %v", i, waits)
		}
	}
	if n := p.nudges.Load(); n != 10 { // 1, 2, 4 … 512
		t.Errorf("%d nudges in 1000 calls", n)
	}
	if len(p.sent) > 0 {
		t.Error("a nudge ended the wait")
	}
	lift()
	l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
	l.tick()
	if l.recheckAt == nil {
		t.Fatal("the slow tick finds nothing")
	}
	<-l.recheckAt
	l.rescue()
	if err := <-p.sent; err != nil {
		t.Fatal(err)
	}
	p.drain(t)
}

// A waiting TX serves the requests of the slow tick also while another goroutine nudges it.
func TestANudgeLosesNoRequest(t *testing.T) {
	p := newFullTX(t, true)
	comes(t, "a wait", p.tx.Nudge)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				p.tx.Nudge()
			}
		}
	}()
	end := sync.OnceFunc(func() {
		close(stop)
		<-stopped
	})
	defer end()
	for range 20000 {
		p.tx.request(requestStall)
		comes(t, "an answer", func() bool { return p.tx.requests.Load() == 0 })
	}
	end()
	p.drain(t)
	if err := <-p.sent; err != nil {
		t.Fatal(err)
	}
}

// A connection whose ring is gone is not looked at again, and one whose drain time is short looks by itself.
func TestSomeWaitsAreNotNudged(t *testing.T) {
	p := newFullTX(t, true)
	comes(t, "a wait", p.tx.Nudge)
	lift := p.fdom.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
	p.drain(t)
	lift()
	eng, drain := p.tx.eng, p.tx.drain.timeouts.drain
	p.tx.drain.timeouts.drain = time.Second
	if !p.tx.Nudge() {
		t.Error("the call looks by itself")
	}
	p.tx.drain.timeouts.drain = drain
	gone := &goneTX{sender: eng}
	p.tx.eng = gone
	for range 3 {
		if !p.tx.Nudge() {
			t.Error("a ring that is gone has room")
		}
	}
	if gone.looks != 1 {
		t.Errorf("%d looks at a ring that is gone", gone.looks)
	}
	p.tx.eng = eng
	if n := p.nudges.Load(); n > 0 {
		t.Errorf("%d nudges", n)
	}
	p.tx.park.Load().wake()
	if err := <-p.sent; err != nil {
		t.Fatal(err)
	}
	p.drain(t)
}

// A goneTX is a sender whose ring's memory is gone.
type goneTX struct {
	sender
	looks int
}

func (g *goneTX) overdue() bool {
	g.looks++
	panic(fault(0x1000))
}

type fault uintptr

func (f fault) Addr() uintptr { return uintptr(f) }
