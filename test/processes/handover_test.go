//go:build linux

package processes

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/handover"
	"barevif/telemetry"
	"barevif/xenbus/xenstore/server/labtest"
)

// The steps of a hand-over at which the new process prints the step and waits for a line.
const (
	stepDialled  = "dialled"  // the processes have agreed
	stepGiven    = "given"    // the vif has stopped in the old process and is offered
	stepAttached = "attached" // the new process has the rings, and is about to accept
	stepAccepted = "accepted" // the old process has, or will have, the answer
	stepUp       = "up"       // the new process moves frames
	stepFinished = "finished" // the old process has been told to end
)

var steps = [...]string{stepDialled, stepGiven, stepAttached, stepAccepted, stepUp, stepFinished}

// stepwise returns a function that prints the name of a step and waits for a line of standard
// input, and a context that ends with the input, by the cause over.
func stepwise(parent context.Context) (ctx context.Context, cancel context.CancelCauseFunc, step func(name string), over error) {
	ctx, cancel = context.WithCancelCause(parent)
	over = errors.New("told to")
	lines := make(chan string, 16)
	go func() {
		for s := bufio.NewScanner(os.Stdin); s.Scan(); {
			lines <- s.Text()
		}
		cancel(over)
	}()
	step = func(name string) {
		fmt.Println(name)
		select {
		case <-lines:
		case <-ctx.Done():
		}
	}
	return ctx, cancel, step, over
}

// runHandover is a backend that echoes frames and hands its vif over; as "successor" it takes
// the vif over first. Standard input has a line for each step, and its end ends it.
func runHandover(ctx context.Context) error {
	dom, err := emu.JoinBeside(ctx, os.Getenv("BAREVIF_TEST_SOCKET"), 2)
	if err != nil {
		return err
	}
	defer dom.Destroy()
	ctx, cancel, step, over := stepwise(ctx)
	defer cancel(nil)
	path, id := os.Getenv("BAREVIF_TEST_HANDOVER"), handover.Identity{Domain: 2}
	cfg := pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{StaticGrants: true, LendRx: true}}
	finish := func() {}
	e := &echoer{}
	if os.Getenv(childVar) == "successor" {
		c, err := handover.Dial(ctx, path, id)
		if err != nil {
			return err
		}
		defer c.Close()
		step(stepDialled)
		cfg.TakeOver = func(ctx context.Context, front hypercall.DomID, id string) (*pvnet.TakenVif, error) {
			in, err := c.TakeOver(ctx, front, id)
			if in == nil {
				return nil, err
			}
			step(stepGiven)
			accept := in.Accept
			in.Accept = func() error {
				step(stepAttached)
				err := accept()
				step(stepAccepted)
				return err
			}
			return in, nil
		}
		up := make(chan struct{})
		var once sync.Once
		e.up = func() { once.Do(func() { step(stepUp); close(up) }) }
		finish = func() {
			<-up
			c.Finish(ctx) // without the other process there is nothing to finish
			step(stepFinished)
		}
	}
	go func() {
		finish()
		os.Remove(path) // a process that was killed leaves it
		l, err := handover.Listen(path, id, nil)
		if err != nil {
			fmt.Println(err)
			return
		}
		e.offer(l)
		fmt.Println("ready")
		select {
		case <-l.Done():
			cancel(pvnet.ErrHandover)
		case <-ctx.Done():
		}
		l.Close()
	}()
	err = pvnet.Serve(ctx, dom, cfg, e.serve)
	if errors.Is(err, over) || errors.Is(err, pvnet.ErrHandover) {
		return nil
	}
	return err
}

// An echoer sends what a device receives back, and stops between two frames when it is held.
type echoer struct {
	up func() // nil: nothing

	mu       sync.Mutex
	listener *handover.Listener // guarded by mu; nil: none yet
	dev      *pvnet.Device      // guarded by mu; nil: none
	vif      handover.Vif       // guarded by mu; of dev
}

func (e *echoer) offer(l *handover.Listener) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.listener = l
	if e.dev != nil {
		l.Add(e.vif)
	}
}

func (e *echoer) serve(d *pvnet.Device) {
	rx, err := d.OwnRX(0)
	if err != nil {
		return // it has ended
	}
	tx, err := d.OwnTX(0)
	if err != nil {
		return
	}
	held, resume := make(chan struct{}), make(chan struct{})
	e.mu.Lock()
	e.dev, e.vif = d, handover.Vif{
		Device: d,
		Hold: func(ctx context.Context) ([]*os.File, error) {
			rx.SetDeadline(time.Unix(1, 0))
			select {
			case <-held:
				return nil, nil
			case <-d.Done():
				return nil, pvnet.ErrDisconnected
			}
		},
		Resume: func() {
			select {
			case resume <- struct{}{}:
			case <-d.Done():
			}
		},
	}
	if e.listener != nil {
		e.listener.Add(e.vif)
	}
	e.mu.Unlock()
	if e.up != nil {
		e.up()
	}
	go sayStatic(d)
	var in, out [1]pvnet.Frame
	for {
		n, err := rx.Receive(in[:])
		if n > 0 {
			b := make([]byte, in[0].Len())
			in[0].CopyTo(b)
			rx.Release(in[:])
			if _, err = tx.AllocWait(out[:], len(b)); err == nil {
				out[0].CopyFrom(b)
				_, err = tx.SendWait(out[:])
			}
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			select {
			case held <- struct{}{}:
			case <-d.Done():
			}
			select {
			case <-resume:
			case <-d.Done():
			}
			rx.SetDeadline(time.Time{})
		case err != nil:
			return
		}
	}
}

// static is what a process prints once frames pass in both directions without a grant operation.
const static = "no grant operation for 300 frames"

// sayStatic waits until d has static grants, and prints what they save.
func sayStatic(d *pvnet.Device) {
	until := func(ok func() bool) bool {
		for !ok() {
			select {
			case <-d.Done():
				return false
			case <-time.After(time.Millisecond):
			}
		}
		return true
	}
	frames := func() uint64 { st := d.Stats(); return st.TX.Get(telemetry.Packets) }
	ops := func() uint64 { st := d.Stats(); return st.RX.Get(telemetry.GrantOps) + st.TX.Get(telemetry.GrantOps) }
	if !until(func() bool { return d.Features()&telemetry.FeatureStaticGrants != 0 }) {
		return
	}
	sent := frames() + 300
	if !until(func() bool { return frames() > sent }) { // the batches of before are done
		return
	}
	before := ops()
	sent = frames() + 300
	if !until(func() bool { return frames() > sent }) {
		return
	}
	if n := ops() - before; n > 0 {
		fmt.Println(n, "grant operations with static grants")
		return
	}
	fmt.Println(static)
}

// An exchange is one end of the vif in this process that sends numbered frames and counts how
// often each comes back.
type exchange struct {
	t    *testing.T
	dom  *emu.Domain // of a frontend; nil for a backend
	dev  *pvnet.Device
	done chan struct{}
	sent chan int

	mu    sync.Mutex
	came  []int // guarded by mu; by number
	last  time.Time
	downs int // guarded by mu
}

func (m *machine) exchange(t *testing.T) *exchange {
	t.Helper()
	dom, err := m.host.NewDomain(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dom.Destroy)
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	dev, err := pvnet.Connect(ctx, dom, "0", pvnet.Config{StaticGrants: true})
	if err != nil {
		t.Fatal(err)
	}
	x := startExchange(t, dev)
	x.dom = dom
	return x
}

func startExchange(t *testing.T, dev *pvnet.Device) *exchange {
	x := &exchange{t: t, dev: dev, done: make(chan struct{}), sent: make(chan int, 1)}
	go func() {
		for ev := range x.dev.Links(context.Background()) {
			x.mu.Lock()
			if !ev.Up {
				x.downs++
			}
			x.mu.Unlock()
		}
	}()
	go x.dev.Listen(context.Background(), func(f pvnet.Frame) {
		b := make([]byte, f.Len())
		f.CopyTo(b)
		x.mu.Lock()
		defer x.mu.Unlock()
		n := int(binary.BigEndian.Uint64(b[18:]))
		if n >= len(x.came) || !bytes.Equal(b, numberedFrame(uint64(n))) {
			t.Errorf("a frame that was not sent came back")
			return
		}
		x.came[n]++
		x.last = time.Now()
	})
	go func() {
		for n := 0; ; n++ {
			select {
			case <-x.done:
				x.sent <- n
				return
			default:
			}
			x.mu.Lock()
			x.came = append(x.came, 0)
			x.mu.Unlock()
			if _, err := x.dev.Write(numberedFrame(uint64(n))); err != nil {
				t.Errorf("frame %d: %v", n, err)
				x.sent <- n
				return
			}
			if n%20 == 19 {
				time.Sleep(time.Millisecond)
			}
		}
	}()
	return x
}

// await waits until frames that are sent from now on come back.
func (x *exchange) await() {
	x.t.Helper()
	begun := time.Now()
	for end := begun.Add(labtest.Limit); ; time.Sleep(time.Millisecond) {
		x.mu.Lock()
		last := x.last
		x.mu.Unlock()
		if last.Sub(begun) > 20*time.Millisecond {
			return
		}
		if time.Now().After(end) {
			x.t.Fatal("no frames")
		}
	}
}

// end stops sending and returns how many frames did not come back, and how often the link
// went down. No frame may come twice. If some may be lost, they are once the last one has come,
// since frames keep their order, and the last ones have some seconds to come; else as long as it
// takes.
func (x *exchange) end(lossless bool) (lost, downs int) {
	x.t.Helper()
	close(x.done)
	sent := <-x.sent
	limit := labtest.Limit
	if !lossless {
		limit = 5 * time.Second
	}
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		lost = 0
		x.mu.Lock()
		for n, k := range x.came[:sent] {
			switch {
			case k == 0:
				lost++
			case k > 1:
				x.t.Errorf("frame %d came %d times", n, k)
			}
		}
		over := lost == 0 || !lossless && x.came[sent-1] > 0
		downs = x.downs
		x.mu.Unlock()
		if over || time.Now().After(end) {
			break
		}
	}
	if x.dom != nil {
		x.dev.Disconnect()
		x.dom.Destroy()
	}
	return lost, downs
}

// expect takes lines until one is want.
func (c *child) expect(want string) {
	c.t.Helper()
	for limit := time.After(labtest.Limit); ; {
		select {
		case line, open := <-c.lines:
			if line == want {
				return
			}
			if !open {
				c.t.Fatalf("%s has ended before %q", c.name, want)
			}
		case <-limit:
			c.t.Fatalf("%s did not say %q", c.name, want)
		}
	}
}

func (c *child) goOn() { fmt.Fprintln(c.in.(interface{ Write([]byte) (int, error) })) }

// Either process is killed at any step of a hand-over. Until the new one has accepted the
// vif, the old one goes on with it and no frame is lost; whoever is left serves it in the
// end, nobody gets a frame twice, and nothing is left behind. The static grants are the new
// one's with the vif.
func TestEitherProcessIsKilledDuringAHandover(t *testing.T) {
	for _, victim := range []string{"nobody", "the old one", "the new one"} {
		for at, step := range steps {
			if victim == "nobody" && at > 0 {
				continue
			}
			t.Run(victim+" at "+step, func(t *testing.T) {
				m := newMachine(t)
				env := "BAREVIF_TEST_HANDOVER=" + m.socket + ".handover"
				old := m.startChild("hand", env)
				old.expect("ready")
				x := m.exchange(t)
				old.expect(static)
				successor := m.startChild("successor", env)
				for i, s := range steps {
					successor.expect(s)
					if i == at && victim != "nobody" {
						break
					}
					successor.goOn()
				}
				survivor, lossless := successor, true
				switch victim {
				case "nobody":
					if err := old.wait(); err != nil {
						t.Errorf("the old process: %v", err)
					}
				case "the old one":
					lossless = at >= len(steps)-3 // it has nothing of the vif any more
					if step == stepFinished {
						old.wait() // it has ended in order
					} else {
						old.kill()
					}
					for range steps[at:] {
						successor.goOn()
					}
				case "the new one":
					survivor, lossless = old, at < 3
					successor.kill()
					if step == stepFinished { // there is no other left
						old.wait()
						survivor, lossless = m.startChild("hand", env), false
					}
				}
				x.await()
				if survivor == successor && lossless { // else the frontend has told a process that is gone
					survivor.expect(static)
				}
				lost, downs := x.end(lossless)
				t.Logf("%d frames lost, the frontend's link went down %d times", lost, downs)
				if lossless && (lost > 0 || downs > 0) {
					t.Error("frames are lost, or the frontend noticed")
				}
				survivor.stop()
				m.requireNothingLeft()
			})
		}
	}
}
