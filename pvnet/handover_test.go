package pvnet_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// A process is a Serve, as one of several processes of a domain. Its devices echo what they
// receive.
type process struct {
	l    *lab
	stop context.CancelCauseFunc
	err  chan error
	came chan *pvnet.Device

	holds chan chan struct{} // the echo has stopped, until the channel in it is closed

	mu  sync.Mutex
	dev *pvnet.Device // guarded by mu; the device that echoes
	rx  *pvnet.RX     // guarded by mu; its half
}

func (l *lab) process(dom *emu.Domain, cfg pvnet.ServeConfig) *process { return l.processIn(dom, cfg) }

func (l *lab) processIn(dom hypercall.Domain, cfg pvnet.ServeConfig) *process {
	l.t.Helper()
	c, stop := context.WithCancelCause(context.Background())
	p := &process{l: l, stop: stop, err: make(chan error, 1), came: make(chan *pvnet.Device, 16), holds: make(chan chan struct{})}
	cfg.Hotplug = true
	go func() {
		p.err <- pvnet.Serve(c, dom, cfg, func(d *pvnet.Device) {
			p.echo(d)
		})
	}()
	return p
}

// echo sends what d receives back, until d has ended. It stops between two frames for
// holds.
func (p *process) echo(d *pvnet.Device) {
	rx, err := d.OwnRX(0)
	if err != nil {
		p.l.t.Error(err)
		return
	}
	tx, err := d.OwnTX(0)
	if err != nil {
		p.l.t.Error(err)
		return
	}
	p.mu.Lock()
	p.dev, p.rx = d, rx
	p.mu.Unlock()
	p.came <- d
	var in [8]pvnet.Frame
	var out [1]pvnet.Frame
	for {
		n, err := rx.Receive(in[:])
		for i := range n {
			b := make([]byte, in[i].Len())
			in[i].CopyTo(b)
			if _, err := tx.AllocWait(out[:], len(b)); err != nil {
				p.l.t.Errorf("a frame that was received is not sent: %v", err)
			}
			out[0].CopyFrom(b)
			if _, err := tx.SendWait(out[:]); err != nil {
				p.l.t.Errorf("a frame that was received is not sent: %v", err)
			}
		}
		rx.Release(in[:n])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			resume := make(chan struct{})
			select {
			case p.holds <- resume:
			case <-d.Done():
				return
			}
			select {
			case <-resume:
			case <-d.Done():
				return
			}
			rx.SetDeadline(time.Time{})
		} else if err != nil {
			return
		}
	}
}

// hold stops the echo until resume is closed.
func (p *process) hold() (resume chan struct{}) {
	p.mu.Lock()
	rx := p.rx
	p.mu.Unlock()
	rx.SetDeadline(time.Unix(1, 0))
	return wait(p.l.t, p.holds)
}

// end ends the process and checks why.
func (p *process) end(cause error) {
	p.l.t.Helper()
	p.stop(cause)
	if err := wait(p.l.t, p.err); !errors.Is(err, cause) {
		p.l.t.Errorf("Serve: %v, want %v", err, cause)
	}
}

// handsOver is a TakeOver that asks p for its device. change may change what arrives.
func (p *process) handsOver(change func(*pvnet.TakenVif)) func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
	return func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
		p.mu.Lock()
		d := p.dev
		p.mu.Unlock()
		resume := p.hold()
		return handed(d, func() { close(resume) }, change)
	}
}

// handed asks for a device as a TakeOver does. stays runs if it is not given.
func handed(d *pvnet.Device, stays func(), change func(*pvnet.TakenVif)) (*pvnet.TakenVif, error) {
	given, verdict, over := make(chan []byte, 1), make(chan error), make(chan error, 1)
	go func() {
		err := d.HandOver(func(state []byte, _ []*os.File) error { given <- state; return <-verdict }, nil)
		if err != nil {
			stays()
		}
		over <- err
	}()
	select {
	case state := <-given:
		in := &pvnet.TakenVif{State: state}
		in.Accept = func() error { verdict <- nil; return nil } // as soon as it is said, whatever that process does then
		in.Refuse = func(why error) { verdict <- why; <-over }
		if change != nil {
			change(in)
		}
		return in, nil
	case err := <-over:
		return nil, err
	}
}

// An echoed sends numbered frames, and wants each back once and in order.
type echoed struct {
	t     *testing.T
	front *pvnet.Device
	back  chan int
	sent  chan error
	done  chan struct{}
}

func startEchoed(t *testing.T, front *pvnet.Device) *echoed {
	e := &echoed{t: t, front: front, back: make(chan int, 1<<20), sent: make(chan error, 1), done: make(chan struct{})}
	go front.Listen(context.Background(), func(f pvnet.Frame) {
		b := make([]byte, f.Len())
		f.CopyTo(b)
		n := int(binary.BigEndian.Uint32(b[14:]))
		if !bytes.Equal(b, echoFrame(n)) {
			n = -1
		}
		e.back <- n
	})
	go func() {
		for n := 0; ; n++ {
			select {
			case <-e.done:
				e.sent <- nil
				return
			default:
			}
			if _, err := front.Write(echoFrame(n)); err != nil {
				e.sent <- err
				return
			}
			if n%100 == 0 {
				time.Sleep(time.Millisecond) // the other end has room for two rings' worth of echoes
			}
		}
	}()
	return e
}

func echoFrame(n int) []byte {
	b := frame(60+n*7%3000, n)
	binary.BigEndian.PutUint32(b[14:], uint32(n))
	return b
}

// want takes k frames, beginning with number n.
func (e *echoed) want(n, k int) int {
	e.t.Helper()
	for range k {
		if got := wait(e.t, e.back); got != n {
			e.t.Fatalf("frame %d came, not %d", got, n)
		}
		n++
	}
	return n
}

// stays4 fails the test if the state of the backend is written.
func (l *lab) stays4(v toolstack.Vif) (check func()) {
	l.t.Helper()
	path := v.BackDir() + "/state"
	w, err := l.tools.Watch(ctx(l.t), path)
	if err != nil {
		l.t.Fatal(err)
	}
	wait(l.t, w.C()) // xenstore reports each watch once when it is set
	return func() {
		l.t.Helper()
		select {
		case <-w.C():
			l.t.Error("the state was written")
		default:
		}
		if s := l.read(path); s != "4" {
			l.t.Errorf("the state is %s", s)
		}
		w.Close()
	}
}

// A vif goes from process to process while frames pass in both directions: none is lost,
// comes twice or out of order, xenstore and the frontend notice nothing, and the counters
// of all processes together account for each frame.
func TestAVifIsHandedOver(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	p := l.process(bdom, pvnet.ServeConfig{})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	await(t, wait(t, p.came), true)
	unchanged := l.stays4(v)
	var noticed atomic.Int32
	go func() {
		for range front.Links(ctx(t)) {
			noticed.Add(1)
		}
	}()
	claim := l.read(v.BackDir() + "/claim")
	e := startEchoed(t, front)
	n := e.want(0, 500)
	var received, sent uint64
	for range 5 {
		next := l.process(bdom, pvnet.ServeConfig{TakeOver: p.handsOver(nil)})
		await(t, wait(t, next.came), true)
		n = e.want(n, 500)
		st := p.dev.Stats()
		received, sent = received+st.RX.Get(telemetry.Packets), sent+st.TX.Get(telemetry.Packets)
		p.end(pvnet.ErrHandover)
		p = next
	}
	close(e.done)
	if err := wait(t, e.sent); err != nil {
		t.Error(err)
	}
	total := int(front.Stats().TX.Get(telemetry.Packets))
	e.want(n, total-n)
	soon(t, "claimed by the last process", func() bool { return l.read(v.BackDir()+"/claim") != claim })
	unchanged()
	if n := noticed.Load(); n != 1 {
		t.Errorf("the frontend's link has changed %d times", n)
	}
	st := p.dev.Stats()
	received, sent = received+st.RX.Get(telemetry.Packets), sent+st.TX.Get(telemetry.Packets)
	if received != uint64(total) || sent != uint64(total) {
		t.Errorf("%d frames were sent, the backends have received %d and sent %d", total, received, sent)
	}
	front.Disconnect()
	p.end(context.Canceled)
	if s := l.read(v.BackDir() + "/claim"); !strings.Contains(s, "ENOENT") && !strings.Contains(s, "not") {
		t.Errorf("the claim is left: %q", s)
	}
}

// Whatever goes wrong on the way, the process that has the vif goes on with it where it
// stopped.
func TestAVifThatIsNotTakenStays(t *testing.T) {
	state := func(f func(map[string]any)) func(*pvnet.TakenVif) {
		return func(in *pvnet.TakenVif) {
			var m map[string]any
			if err := json.Unmarshal(in.State, &m); err != nil {
				panic(err)
			}
			f(m)
			in.State, _ = json.Marshal(m)
		}
	}
	for name, c := range map[string]struct {
		change func(*pvnet.TakenVif)
		cfg    pvnet.Config
		says   string
	}{
		"garbage":            {change: func(in *pvnet.TakenVif) { in.State = []byte("{") }, says: "JSON"},
		"too long":           {change: func(in *pvnet.TakenVif) { in.State = make([]byte, 1<<20) }, says: "1048576 bytes"},
		"another vif":        {change: state(func(m map[string]any) { m["ID"] = "7" }), says: "vif 1/7"},
		"another domain":     {change: state(func(m map[string]any) { m["Front"] = 9 }), says: "vif 9/0"},
		"another type":       {change: state(func(m map[string]any) { m["Type"] = "vbd" }), says: "vbd 1/0"},
		"no claim":           {change: state(func(m map[string]any) { m["Claim"] = map[string]any{} }), says: "is not the id of a claim"},
		"claim with a blank": {change: state(func(m map[string]any) { m["Claim"] = map[string]any{"Claim": strings.Repeat("a", 31) + " "} }), says: "is not the id of a claim"},
		"earlier claim":      {change: state(func(m map[string]any) { m["Claim"].(map[string]any)["Earlier"] = "a/b" }), says: "is not the id of a claim"},
		"mark with a slash":  {change: state(func(m map[string]any) { m["Claim"].(map[string]any)["Mark"] = "a/b" }), says: "mark"},
		"other rings":        {change: state(func(m map[string]any) { m["Keys"].(map[string]any)["tx-ring-ref"] = "999" }), says: "other keys"},
		"other offers":       {change: state(func(m map[string]any) { m["Offers"].(map[string]any)["feature-warp"] = "1" }), says: "feature-warp"},
		"fewer features":     {says: "which this process does not have"},
		"no answer": {change: func(in *pvnet.TakenVif) {
			refuse := in.Refuse
			in.Accept = func() error { refuse(errors.New("gone")); return errors.New("it has not heard of it") }
		}, says: "not heard of it"},
	} {
		t.Run(name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if errors.Is(err, errors.ErrUnsupported) {
				t.Skip("there are no files to hand over: ", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			l := newLab(t)
			fdom, bdom := l.domain(1), l.domain(2)
			v := l.add(toolstack.Vif{Front: 1, Back: 2})
			p := l.process(bdom, pvnet.ServeConfig{Config: pvnet.Config{Offload: true}})
			front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
			if err != nil {
				t.Fatal(err)
			}
			await(t, wait(t, p.came), true)
			unchanged := l.stays4(v)
			e := startEchoed(t, front)
			n := e.want(0, 200)
			if name != "fewer features" {
				c.cfg.Offload = true
			}
			log := new(logtest.Log)
			c.cfg.Logger = log.Logger()
			next := l.process(bdom, pvnet.ServeConfig{Config: c.cfg, TakeOver: p.handsOver(func(in *pvnet.TakenVif) {
				in.Files = []*os.File{r}
				if c.change != nil {
					c.change(in)
				}
			})})
			for end := time.Now().Add(time.Minute); len(log.Lines("cannot take a vif over")) == 0; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("nothing was logged")
				}
			}
			if len(log.Lines(c.says)) != 1 {
				t.Errorf("nothing says %q: %s", c.says, log)
			}
			n = e.want(n, 500)
			select {
			case <-next.came:
				t.Error("the other process has the vif too")
			default:
			}
			if r.Close() == nil {
				t.Error("a descriptor that came with it is open")
			}
			next.end(context.Canceled)
			unchanged()
			close(e.done)
			if err := wait(t, e.sent); err != nil {
				t.Error(err)
			}
			e.want(n, int(front.Stats().TX.Get(telemetry.Packets))-n)
			front.Disconnect()
			p.end(context.Canceled)
		})
	}
}

// All queues of a vif go together, and its control ring with them.
func TestAVifOfSeveralQueuesIsHandedOver(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	cfg := pvnet.Config{Queues: 3}
	p := l.process(bdom, pvnet.ServeConfig{Config: cfg})
	front, err := pvnet.Connect(ctx(t), fdom, "0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	old := wait(t, p.came)
	await(t, old, true)
	unchanged := l.stays4(v)
	before := l.Ledger()
	next := l.process(bdom, pvnet.ServeConfig{Config: cfg, TakeOver: p.handsOver(nil)})
	d := wait(t, next.came)
	await(t, d, true)
	if d.Active() != 3 || d.Budget() != old.Budget() && old.Budget() != (pvnet.Budget{}) {
		t.Errorf("%d queues, %v", d.Active(), d.Budget())
	}
	p.end(pvnet.ErrHandover)
	unchanged()
	if now := l.Ledger(); now != before {
		t.Errorf("%+v is in use, %+v was", now, before)
	}
	front.Disconnect()
	next.end(context.Canceled)
}

// A vif without a connection is given up, and claimed by the process that asked.
func TestAVifWithoutAConnectionIsGivenUp(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	p := l.process(bdom, pvnet.ServeConfig{})
	wait(t, p.came)
	next := l.process(bdom, pvnet.ServeConfig{TakeOver: p.handsOver(nil)})
	d := wait(t, next.came)
	p.end(pvnet.ErrHandover)
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	await(t, d, true)
	front.Disconnect()
	next.end(context.Canceled)
	if err := d.HandOver(func([]byte, []*os.File) error { return nil }, nil); !errors.Is(err, pvnet.ErrDisconnected) {
		t.Errorf("a device that has ended: %v", err)
	}
}

// A vif that the user of Serve does not want is not asked for; it is claimed once the process that
// serves it has given it up.
func TestAVifThatMayNotBeTakenStaysUntilItsProcessEnds(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := toolstack.Vif{Front: 1, Back: 2, MAC: [6]byte{0, 0x16, 0x3e, 0, 0, 9}}
	l.add(v)
	p := l.process(bdom, pvnet.ServeConfig{})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	await(t, wait(t, p.came), true)
	stays := l.stays4(v)
	type question struct {
		front hypercall.DomID
		id    string
		mac   pvnet.MAC
	}
	asked := make(chan question, 16)
	next := l.process(bdom, pvnet.ServeConfig{
		MayTake: func(front hypercall.DomID, id string, says pvnet.Toolstack) error {
			asked <- question{front, id, says.MAC}
			return errors.New("not wanted")
		},
		TakeOver: func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
			t.Error("the vif was asked for")
			return nil, nil
		},
	})
	if got, want := wait(t, asked), (question{1, "0", pvnet.MAC(v.MAC)}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	stays()
	if len(next.came) != 0 {
		t.Error("both processes have the vif")
	}
	p.end(pvnet.ErrHandover)
	await(t, wait(t, next.came), true)
	next.end(context.Canceled)
}

// The process that has handed a vif over serves it again once it is told that the other
// one may be gone.
func TestAVifComesBackFromAProcessThatDied(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	p := l.process(bdom, pvnet.ServeConfig{})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	d := wait(t, p.came)
	await(t, d, true)
	reclaim := make(chan struct{})
	if err := d.HandOver(func([]byte, []*os.File) error { return nil }, reclaim); err != nil {
		t.Fatal(err)
	}
	wait(t, d.Done())
	if _, err := d.OwnTX(0); !errors.Is(err, pvnet.ErrHandover) {
		t.Errorf("a device that was handed over: %v", err)
	}
	select {
	case <-p.came:
		t.Error("served again at once")
	case <-time.After(50 * time.Millisecond):
	}
	close(reclaim)
	await(t, wait(t, p.came), true) // nobody answers for the claim any more
	front.Disconnect()
	p.end(context.Canceled)
}
