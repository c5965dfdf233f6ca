package pvnet_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
)

// A besideDomain stands for the same domain in another process.
type besideDomain struct{ *emu.Domain }

// A flow is numbered frames that frontends, one after the other, send to a backend that sends
// them back.
type flow struct {
	t    testing.TB
	back chan int

	mu   sync.Mutex
	next int // guarded by mu; the number of the next frame to send
}

// A rower is a frontend that sends and receives the frames of a flow.
type rower struct {
	f       *flow
	d       *pvnet.Device
	stop    chan struct{}
	stopped sync.WaitGroup
	quiet   chan struct{} // closed: it sends no more
	sent    error         // after quiet
}

func (f *flow) row(d *pvnet.Device) *rower {
	r := &rower{f: f, d: d, stop: make(chan struct{}), quiet: make(chan struct{})}
	r.stopped.Go(func() {
		d.Listen(context.Background(), func(frame pvnet.Frame) {
			b := make([]byte, frame.Len())
			frame.CopyTo(b)
			n := int(binary.BigEndian.Uint32(b[14:]))
			if !bytes.Equal(b, echoFrame(n)) {
				n = -1
			}
			f.back <- n
		})
	})
	r.stopped.Go(func() {
		defer close(r.quiet)
		for {
			select {
			case <-r.stop:
				return
			default:
			}
			f.mu.Lock()
			n := f.next
			f.mu.Unlock()
			if _, err := d.Write(echoFrame(n)); err != nil {
				r.sent = err
				return
			}
			f.mu.Lock()
			f.next++
			f.mu.Unlock()
			if n%100 == 0 {
				time.Sleep(time.Millisecond) // the other end has room for two rings' worth of echoes
			}
		}
	})
	return r
}

// want takes k frames, beginning with number n.
func (f *flow) want(n, k int) int {
	f.t.Helper()
	e := echoed{t: f.t.(*testing.T), back: f.back}
	return e.want(n, k)
}

// asks is an ask of TakeOver that has d handed over. change may change what arrives.
func asks(d *pvnet.Device, change func(*pvnet.TakenVif)) func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
	return func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
		given, verdict, over := make(chan *pvnet.TakenVif, 1), make(chan error), make(chan error, 1)
		go func() {
			over <- d.HandOver(func(state []byte, files []*os.File) error {
				given <- &pvnet.TakenVif{State: state, Files: files}
				return <-verdict
			}, nil)
		}()
		select {
		case in := <-given:
			in.Accept = func() error { verdict <- nil; return <-over }
			in.Refuse = func(why error) { verdict <- why; <-over }
			if change != nil {
				change(in)
			}
			return in, nil
		case err := <-over:
			return nil, err
		}
	}
}

// A rowing is a backend that echoes, and a frontend whose frames pass.
type rowing struct {
	*lab
	t    *testing.T
	v    toolstack.Vif
	fdom *emu.Domain
	back *process
	flow *flow
	r    *rower
	n    int
}

func startRowing(t *testing.T, back pvnet.ServeConfig, cfg pvnet.Config) *rowing {
	l := newLab(t)
	w := &rowing{lab: l, t: t, fdom: l.domain(1)}
	bdom := l.domain(2)
	w.v = l.add(toolstack.Vif{Front: 1, Back: 2})
	w.back = l.process(bdom, back)
	d, err := pvnet.Connect(ctx(t), w.fdom, "0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	await(t, wait(t, w.back.came), true)
	w.flow = &flow{t: t, back: make(chan int, 1<<20)}
	w.r = w.flow.row(d)
	w.n = w.flow.want(0, 300)
	return w
}

// end takes what is under way and ends everything.
func (w *rowing) end() {
	w.t.Helper()
	close(w.r.stop)
	wait(w.t, w.r.quiet)
	// What was sent comes back, and nothing else.
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		w.flow.mu.Lock()
		next := w.flow.next
		w.flow.mu.Unlock()
		if len(w.flow.back) >= next-w.n || time.Now().After(end) {
			break
		}
	}
	w.r.d.Disconnect()
	w.r.stopped.Wait()
	w.flow.want(w.n, w.flow.next-w.n)
	if n := len(w.flow.back); n > 0 {
		w.t.Errorf("%d frames too many", n)
	}
	w.back.end(context.Canceled)
}

// takeOver has a new process take the frontend over, while frames pass. The frontend stays where it
// is if the backend leaves frames unanswered for a second, as it does on a machine that has no
// processor for it; then it is asked again.
func (w *rowing) takeOver(cfg pvnet.Config) {
	w.t.Helper()
	old := w.r
	d, err := pvnet.TakeOver(ctx(w.t), &besideDomain{w.fdom}, "0", cfg, asks(old.d, nil))
	for end := time.Now().Add(time.Minute); err != nil && strings.Contains(err.Error(), "is not handed over: after 1s ") && time.Now().Before(end); {
		w.t.Logf("asked again: %v", err)
		d, err = pvnet.TakeOver(ctx(w.t), &besideDomain{w.fdom}, "0", cfg, asks(old.d, nil))
	}
	if err != nil {
		w.t.Fatal(err)
	}
	old.stopped.Wait()
	if !errors.Is(old.sent, pvnet.ErrHandover) {
		w.t.Errorf("the old process's Write: %v", old.sent)
	}
	w.r = w.flow.row(d)
	w.n = w.flow.want(w.n, 300)
}

// A frontend goes from process to process while frames pass in both directions: none is lost,
// comes twice or out of order, xenstore and the backend notice nothing, the pages and ports
// stay the same, and the counters of all processes together account for each frame.
func TestAFrontendIsTakenOver(t *testing.T) {
	for name, c := range map[string]struct {
		back pvnet.ServeConfig
		cfg  pvnet.Config
	}{
		"plain":         {},
		"lent":          {cfg: pvnet.Config{LendRx: true}},
		"with offloads": {pvnet.ServeConfig{Config: pvnet.Config{Offload: true}}, pvnet.Config{Offload: true}},
		"static grants": {pvnet.ServeConfig{Config: pvnet.Config{StaticGrants: true}}, pvnet.Config{StaticGrants: true}},
		"on threads":    {cfg: pvnet.Config{LockedThreads: true}},
	} {
		t.Run(name, func(t *testing.T) {
			if c.cfg.LockedThreads && runtime.GOOS != "linux" {
				t.Skip("a thread can block for a domain on Linux only")
			}
			w := startRowing(t, c.back, c.cfg)
			unchanged := w.stays4(w.v)
			keys := w.keys(w.v.FrontDir())
			before := w.Ledger()
			var noticed int
			watching, stop := context.WithCancel(context.Background())
			seen := make(chan struct{})
			go func() {
				defer close(seen)
				for range w.back.dev.Links(watching) {
					noticed++
				}
			}()
			var sent, received uint64
			count := func() {
				st := w.r.d.Stats()
				sent, received = sent+st.TX.Get(telemetry.Packets), received+st.RX.Get(telemetry.Packets)
				if lost := st.TX.Lost(telemetry.DropDisconnected) + st.RX.Lost(telemetry.DropDisconnected); lost > 0 {
					t.Errorf("%d frames count as lost", lost)
				}
			}
			for range 4 {
				old := w.r
				w.takeOver(c.cfg)
				now := w.r
				w.r = old
				count()
				w.r = now
			}
			if now := w.Ledger(); now.Grants != before.Grants || now.Ports != before.Ports || now.Waiters != before.Waiters || now.Mappings != before.Mappings || now.Quarantined != 0 {
				t.Errorf("%+v is in use, %+v was", now, before)
			}
			unchanged()
			if now := w.keys(w.v.FrontDir()); fmt.Sprint(now) != fmt.Sprint(keys) {
				t.Errorf("published: %v, before %v", now, keys)
			}
			stop()
			<-seen
			if noticed != 1 {
				t.Errorf("the backend's link has changed %d times", noticed)
			}
			w.end()
			count()
			if total := uint64(w.flow.next); sent != total || received != total {
				t.Errorf("%d frames were sent, the frontends count %d sent and %d received", total, sent, received)
			}
		})
	}
}

// What goes wrong on the way leaves the frontend with the process that has it, which goes on
// with the frame where it stopped.
func TestAFrontendThatIsNotTakenOverStays(t *testing.T) {
	state := func(f func(m map[string]any)) func(*pvnet.TakenVif) {
		return func(in *pvnet.TakenVif) {
			var m map[string]any
			if err := json.Unmarshal(in.State, &m); err != nil {
				panic(err)
			}
			f(m)
			in.State, _ = json.Marshal(m)
		}
	}
	queue := func(f func(q map[string]any)) func(*pvnet.TakenVif) {
		return state(func(m map[string]any) { f(m["Queues"].([]any)[0].(map[string]any)) })
	}
	features := func(key string, v any) func(*pvnet.TakenVif) {
		return state(func(m map[string]any) { m["Features"].(map[string]any)[key] = v })
	}
	parsed := func(p map[string]any) func(*pvnet.TakenVif) {
		return queue(func(q map[string]any) { q["Parsed"] = p })
	}
	add := func(key string, by float64) func(*pvnet.TakenVif) {
		return queue(func(q map[string]any) { q[key] = q[key].(float64) + by })
	}
	for name, c := range map[string]struct {
		change func(*pvnet.TakenVif)
		says   string
	}{
		"garbage":              {func(in *pvnet.TakenVif) { in.State = []byte("{") }, "JSON"},
		"too long":             {func(in *pvnet.TakenVif) { in.State = make([]byte, 1<<20) }, "1048576 bytes"},
		"another vif":          {state(func(m map[string]any) { m["ID"] = "7" }), "vif 7"},
		"another backend":      {state(func(m map[string]any) { m["Back"] = 9 }), "backend 9"},
		"a mark with a slash":  {state(func(m map[string]any) { m["Mark"] = "a/b" }), "mark"},
		"more files":           {state(func(m map[string]any) { m["Files"] = 3 }), "3 files"},
		"fewer than no files":  {state(func(m map[string]any) { m["Files"] = -1 }), "-1 files"},
		"no queues":            {state(func(m map[string]any) { m["Queues"] = nil }), "without queues"},
		"more queues":          {state(func(m map[string]any) { q := m["Queues"].([]any); m["Queues"] = append(q, q[0]) }), "2 queues"},
		"no offer":             {state(func(m map[string]any) { m["Offer"] = nil }), "offer"},
		"another offer":        {state(func(m map[string]any) { m["Offer"] = make([]byte, 16) }), "offer"},
		"a control ring":       {state(func(m map[string]any) { m["Ctrl"] = map[string]any{"Next": 0} }), "3 shares"},
		"static grants of two": {state(func(m map[string]any) { m["Ctrl"] = map[string]any{"Static": []bool{true, true}} }), "static grants of 2"},
		"a hash that is none":  {state(func(m map[string]any) { m["Ctrl"] = map[string]any{"Hash": map[string]any{"Table": []int{-1}}} }), "Table[0]"},
		"a short hash key":     {state(func(m map[string]any) { m["HashKey"] = []byte{1} }), "1 bytes"},
		"event channels apart": {features("Split", false), "event channels"},
		"offloads":             {features("Offload", true), "Config.Offload"},
		"offloads of nobody":   {features("PeerTakes", 1<<20), "0x100000"},
		"queues of nobody":     {features("Offered", -1), "without queues"},
		"a station as group":   {state(func(m map[string]any) { m["Multicast"].(map[string]any)["Wanted"] = [][6]int{{2, 0, 0, 0, 0, 1}} }), "02:00:00:00:00:01"},
		"a group twice": {state(func(m map[string]any) {
			m["Multicast"].(map[string]any)["Listed"] = [][6]int{{1, 0, 0, 0, 0, 1}, {1, 0, 0, 0, 0, 1}}
		}), "twice"},
		"too many groups":                         {state(func(m map[string]any) { m["Multicast"].(map[string]any)["Listed"] = make([][6]int, 65) }), "65 multicast"},
		"a request too many":                      {add("TxNext", 1), "tx: ring"},
		"a request too few":                       {add("TxNext", -1), "tx: ring"},
		"a page too many":                         {add("RxNext", 1), "rx: ring"},
		"a response too many":                     {add("RxConsumed", 1), ""},
		"responses of the future":                 {add("RxConsumed", 200), ""}, // the ring's or the pages': the backend goes on meanwhile
		"pages of the past":                       {add("RxConsumed", -1), ""},
		"no pages posted":                         {queue(func(q map[string]any) { q["Posted"] = nil }), "0 pages are posted"},
		"one page everywhere":                     {queue(func(q map[string]any) { q["Posted"] = make([]byte, 256) }), "page 0 is posted"},
		"a parsed frame of pages that are posted": {parsed(map[string]any{"Slots": 1, "Segments": []map[string]any{{"Page": 3, "Len": 99}}}), "parsed"},
		"a parsed frame of nothing":               {parsed(map[string]any{"Slots": 1}), "parsed"},
		"other rings":                             {func(*pvnet.TakenVif) {}, "tx-ring-ref"}, // see below
		"no answer": {func(in *pvnet.TakenVif) {
			refuse := in.Refuse
			in.Accept = func() error { refuse(errors.New("gone")); return errors.New("it has not heard of it") }
		}, "not heard of it"},
	} {
		t.Run(name, func(t *testing.T) {
			r, p, err := os.Pipe()
			if errors.Is(err, errors.ErrUnsupported) {
				t.Skip("there are no files to hand over: ", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			w := startRowing(t, pvnet.ServeConfig{}, pvnet.Config{})
			unchanged := w.stays4(w.v)
			before := w.Ledger()
			ref := w.v.FrontDir() + "/tx-ring-ref"
			was := w.read(ref)
			if name == "other rings" {
				w.write(ref, "999")
			}
			_, err = pvnet.TakeOver(ctx(t), &besideDomain{w.fdom}, "0", pvnet.Config{}, asks(w.r.d, func(in *pvnet.TakenVif) {
				in.Files = []*os.File{r}
				c.change(in)
			}))
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("taken over: %v", err)
			}
			w.write(ref, was)
			if r.Close() == nil {
				t.Error("a descriptor that came with it is open")
			}
			w.n = w.flow.want(w.n, 500)
			if now := w.Ledger(); now.Grants != before.Grants || now.Pages != before.Pages || now.Ports != before.Ports || now.Waiters != before.Waiters {
				t.Errorf("%+v is in use, %+v was", now, before)
			}
			unchanged()
			w.takeOver(pvnet.Config{}) // in order, after that
			w.end()
		})
	}
}

// While frames in shared pages are in anybody's hands, the frontend stays where it is.
func TestAFrontendWaitsForItsPages(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	d, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{LendRx: true})
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	await(t, back, true)
	tx, rx := own(t, d)
	btx, brx := own(t, back)
	next := &besideDomain{fdom}
	stays := func(says string) {
		t.Helper()
		_, err := pvnet.TakeOver(ctx(t), next, "0", pvnet.Config{}, asks(d, nil))
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Fatalf("taken over: %v", err)
		}
		await(t, d, true)
	}
	var f, g [1]pvnet.Frame
	if tx.AllocSize(f[:], 100) != 1 {
		t.Fatal("no frame")
	}
	stays("1 pages of frames to send in queue 0 are held")
	f[0].CopyFrom(frame(100, 1))
	if _, err := tx.Send(f[:]); err != nil {
		t.Fatal(err)
	}
	stays("the backend has not answered 1 requests of queue 0")
	if n, err := brx.Receive(g[:]); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	brx.Release(g[:])
	if _, err := btx.AllocWait(f[:], 100); err != nil {
		t.Fatal(err)
	}
	f[0].CopyFrom(frame(100, 2))
	if _, err := btx.SendWait(f[:]); err != nil {
		t.Fatal(err)
	}
	if n, err := rx.Receive(g[:]); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	stays("1 pages of frames received in queue 0 are held")
	rx.Release(g[:])
	after, err := pvnet.TakeOver(ctx(t), next, "0", pvnet.Config{}, asks(d, nil))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range after.Rings().Halves {
		if h.Ring == "rx" && h.Lent != 256 { // the page that was lent there is posted too
			t.Errorf("%d pages are posted", h.Lent)
		}
	}
	if _, err := tx.AllocWait(f[:], 60); !errors.Is(err, pvnet.ErrHandover) {
		t.Errorf("AllocWait after it was handed over: %v", err)
	}
	if again, err := pvnet.Connect(ctx(t), next, "0", pvnet.Config{}); again != after || err != nil {
		t.Errorf("a Connect beside it: %v", err)
	}
	after.Disconnect()
}

func own(t *testing.T, d *pvnet.Device) (*pvnet.TX, *pvnet.RX) {
	t.Helper()
	tx, err := d.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	rx, err := d.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	return tx, rx
}

// A frame that was taken out of the ring, and had no buffer, is received by the next process,
// before those that came after it.
func TestAFrameBetweenRingAndReceiverIsTakenOver(t *testing.T) {
	for _, size := range []int{60, 9000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			l := newLab(t)
			fdom, bdom := l.domain(1), l.domain(2)
			l.add(toolstack.Vif{Front: 1, Back: 2})
			backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
			cfg := pvnet.Config{Buffers: 17}
			d, err := pvnet.Connect(ctx(t), fdom, "0", cfg)
			if err != nil {
				t.Fatal(err)
			}
			back := wait(t, backs)
			await(t, back, true)
			_, rx := own(t, d)
			const frames = 30
			for n := range frames {
				if _, err := back.Write(frame(size, n)); err != nil {
					t.Fatal(err)
				}
			}
			var held []pvnet.Frame
			for {
				var f [1]pvnet.Frame
				n, err := rx.Receive(f[:])
				if errors.Is(err, pvnet.ErrNoBuffers) {
					break
				}
				if n != 1 || err != nil {
					t.Fatal(n, err)
				}
				held = append(held, f[0])
			}
			parsed := false
			after, err := pvnet.TakeOver(ctx(t), &besideDomain{fdom}, "0", cfg, asks(d, func(in *pvnet.TakenVif) {
				parsed = bytes.Contains(in.State, []byte(`"Segments"`))
			}))
			if err != nil {
				t.Fatal(err)
			}
			if !parsed {
				t.Error("no frame was between ring and receiver")
			}
			_, rx = own(t, after)
			for n := range frames {
				var f [1]pvnet.Frame
				if n < len(held) {
					f[0] = held[n] // the old process's, still readable
				} else if k, err := rx.Receive(f[:]); k != 1 || err != nil {
					t.Fatal(k, err)
				}
				b := make([]byte, f[0].Len())
				f[0].CopyTo(b)
				if !bytes.Equal(b, frame(size, n)) {
					t.Fatalf("frame %d is another", n)
				}
				f[0].Release()
			}
			after.Disconnect()
		})
	}
}

// All queues go together, with the control ring and what the backend was told on it, and with
// the multicast list.
func TestAFrontendOfSeveralQueuesIsTakenOver(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	cfg := pvnet.Config{Queues: 3, StaticGrants: true, Hash: &pvnet.HashConfig{Table: []int{2, 1, 0, 2}}}
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Config: pvnet.Config{Queues: 3, StaticGrants: true}, Hotplug: true})
	d, err := pvnet.Connect(ctx(t), fdom, "0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	await(t, back, true)
	go back.Listen(context.Background(), func(pvnet.Frame) {}) // it answers requests
	groups := []pvnet.MAC{{1, 0, 0x5e, 0, 0, 1}, {1, 0, 0x5e, 0, 0, 2}}
	if err := d.SetMulticast(ctx(t), groups); err != nil {
		t.Fatal(err)
	}
	const agreed = telemetry.FeatureHash | telemetry.FeatureStaticGrants | telemetry.FeatureControlRing
	features := func(d *pvnet.Device) {
		t.Helper()
		for end := time.Now().Add(time.Minute); d.Features()&agreed != agreed; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("agreed on %v", d.Features())
			}
		}
	}
	features(d)
	unchanged := l.stays4(v)
	before := l.Ledger()
	for range 3 {
		var asked []byte
		next, err := pvnet.TakeOver(ctx(t), &besideDomain{fdom}, "0", cfg, asks(d, func(in *pvnet.TakenVif) { asked = in.State }))
		if err != nil {
			t.Fatal(err)
		}
		features(next)
		if next.Active() != 3 || !bytes.Contains(asked, []byte(`"Static":[true,true,true]`)) {
			t.Errorf("%d queues, %s", next.Active(), asked)
		}
		if err := next.SetMulticast(ctx(t), groups); err != nil {
			t.Error(err)
		}
		<-d.Done()
		d = next
	}
	if now := l.Ledger(); now.Grants != before.Grants || now.Ports != before.Ports || now.Waiters != before.Waiters || now.Mappings != before.Mappings {
		t.Errorf("%+v is in use, %+v was", now, before)
	}
	if _, err := pvnet.TakeOver(ctx(t), &besideDomain{fdom}, "0", pvnet.Config{Queues: 2}, asks(d, nil)); err == nil || !strings.Contains(err.Error(), "3 queues") {
		t.Errorf("a process with room for two: %v", err)
	}
	if err := d.SetMulticast(ctx(t), groups[:1]); err != nil {
		t.Error(err)
	}
	if err := d.SetHash(ctx(t), &pvnet.HashConfig{}); err != nil {
		t.Error(err)
	}
	for i := range 3 {
		if _, err := d.Write(frame(100+i, i)); err != nil {
			t.Error(err)
		}
	}
	unchanged()
	d.Disconnect()
}

// Without a connection, or another process, the vif is connected in the usual way.
func TestAFrontendThatNobodyHasIsConnected(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	nobody := func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) { return nil, nil }
	d, err := pvnet.TakeOver(ctx(t), fdom, "0", pvnet.Config{}, nobody)
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	await(t, back, true)
	broken := errors.New("it keeps the vif")
	fails := func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) { return nil, broken }
	if _, err := pvnet.TakeOver(ctx(t), &besideDomain{fdom}, "0", pvnet.Config{}, fails); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	d.Disconnect()
	accepted := false
	none := func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
		return &pvnet.TakenVif{Accept: func() error { accepted = true; return nil }}, nil
	}
	d, err = pvnet.TakeOver(ctx(t), fdom, "0", pvnet.Config{}, none)
	if err != nil || !accepted {
		t.Fatal(accepted, err)
	}
	d.Disconnect()
}

// A frontend whose halves a Poller waits for is handed over, and if it stays, the Poller goes
// on waiting for it.
func TestAPolledFrontendIsTakenOver(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	d, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	await(t, back, true)
	_, rx := own(t, d)
	p, err := pvnet.NewPoller(fdom, pvnet.PollerConfig{})
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip("only on Linux a domain waits for many event channels at once:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Add(rx, 7); err != nil {
		t.Fatal(err)
	}
	came := make(chan error, 64) // nil: a frame
	go func() {
		for {
			ready, err := p.Wait()
			if err != nil {
				return
			}
			for _, r := range ready {
				if r.Err != nil {
					came <- r.Err
					return
				}
				var f [1]pvnet.Frame
				n, _ := rx.Poll(f[:])
				for range n {
					came <- nil
				}
				rx.Release(f[:n])
			}
		}
	}()
	receives := func() {
		t.Helper()
		if _, err := back.Write(frame(100, 1)); err != nil {
			t.Fatal(err)
		}
		if err := wait(t, came); err != nil {
			t.Fatal(err)
		}
	}
	receives()
	next := &besideDomain{fdom}
	if _, err := pvnet.TakeOver(ctx(t), next, "0", pvnet.Config{}, asks(d, func(in *pvnet.TakenVif) { in.State = []byte("{") })); err == nil {
		t.Fatal("taken over")
	}
	receives()
	after, err := pvnet.TakeOver(ctx(t), next, "0", pvnet.Config{}, asks(d, nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := wait(t, came); !errors.Is(err, pvnet.ErrHandover) {
		t.Errorf("the Poller's member: %v", err)
	}
	after.Disconnect()
}

// A vif that was just taken over opens the mirror of its counters late, which may take long. If
// another process is to take it over before, it opens the mirror while frames still pass.
func TestTheLateMirrorIsOpenedBeforeTheNextTakeOver(t *testing.T) {
	w := startRowing(t, pvnet.ServeConfig{}, pvnet.Config{})
	var mirrors names
	w.takeOver(pvnet.Config{Counters: &mirrors})
	if err := w.r.d.PrepareHandOver(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if open, _, _ := mirrors.now(); len(open) != 1 {
		t.Errorf("open: %v", open)
	}
	if err := w.r.d.PrepareHandOver(ctx(t)); err != nil {
		t.Fatal(err)
	}
	w.n = w.flow.want(w.n, 300)
	w.takeOver(pvnet.Config{})
	if open, ever, _ := mirrors.now(); len(open) != 0 || ever != 1 {
		t.Errorf("open: %v, %d ever", open, ever)
	}
	w.end()
}
