package pvnet_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// staticOnes is a Config with static grants.
var staticOnes = pvnet.Config{StaticGrants: true, LendRx: true}

// A told is a vif of one queue with static grants, under traffic.
type told struct {
	*lab
	fdom, bdom *emu.Domain
	front      *pvnet.Device
	p          *process // that serves it
	e          *echoed
	n          int // the next frame that is to come
}

func newTold(t *testing.T, cfg pvnet.Config) *told {
	l := newLab(t)
	s := &told{lab: l, fdom: l.domain(1), bdom: l.domain(2)}
	l.add(toolstack.Vif{Front: 1, Back: 2})
	s.p = l.process(s.bdom, pvnet.ServeConfig{Config: cfg})
	var err error
	if s.front, err = pvnet.Connect(ctx(t), s.fdom, "0", pvnet.Config{StaticGrants: true}); err != nil {
		t.Fatal(err)
	}
	await(t, wait(t, s.p.came), true)
	awaitStatic(t, s.front, s.p.dev)
	s.e = startEchoed(t, s.front)
	s.n = s.e.want(0, 300)
	return s
}

// takeOver has another process take the vif over.
func (s *told) takeOver(cfg pvnet.Config, change func(*pvnet.TakenVif)) {
	s.t.Helper()
	next := s.process(s.bdom, pvnet.ServeConfig{Config: cfg, TakeOver: s.p.handsOver(change)})
	await(s.t, wait(s.t, next.came), true)
	s.p.end(pvnet.ErrHandover)
	s.p = next
}

// wantCopies takes frames, and wants grant copies for them, or none.
func (s *told) wantCopies(some bool) {
	s.t.Helper()
	next := func() { // frames that are sent from now on
		s.n = s.e.want(s.n, int(s.front.Stats().TX.Get(telemetry.Packets))+300-s.n)
	}
	next() // the table of now is in use
	before := s.bdom.Calls().CopyOps
	next()
	if n := s.bdom.Calls().CopyOps - before; some != (n > 0) {
		s.t.Errorf("%d grant copies for 300 frames each way", n)
	}
}

// end wants every frame once, and ends the vif.
func (s *told) end() {
	s.t.Helper()
	close(s.e.done)
	if err := wait(s.t, s.e.sent); err != nil {
		s.t.Error(err)
	}
	s.e.want(s.n, int(s.front.Stats().TX.Get(telemetry.Packets))-s.n)
	s.front.Disconnect()
	s.p.end(context.Canceled)
	if n := s.Ledger().Mappings; n != 0 {
		s.t.Errorf("%d pages are mapped in the end", n)
	}
}

// With a vif goes the table of its static grants: no frame is copied by grant operations in
// the process that has it, nor in the one after that, and the frontend adds and removes pages
// as before.
func TestStaticGrantsPassWithTheirVif(t *testing.T) {
	cfg := pvnet.Config{StaticGrants: true} // a page that is lent may not be removed
	s := newTold(t, cfg)
	before := s.Ledger().Mappings
	pages := s.front.SentPages(0)[:3]
	for round := range 4 {
		s.takeOver(cfg, nil)
		awaitStatic(t, s.p.dev)
		if now := s.Ledger().Mappings; now != before {
			t.Errorf("round %d: %d pages are mapped, %d were", round, now, before)
		}
		s.wantCopies(false)
		for _, typ := range []netif.CtrlType{netif.CtrlDelGrefMapping, netif.CtrlAddGrefMapping} {
			status, n, statuses, err := s.front.Tell(ctx(t), typ, 0, pages...)
			del := typ == netif.CtrlDelGrefMapping
			if err != nil || status != netif.CtrlSuccess || del && (n != 3 || slices.Max(statuses) != 0) {
				t.Errorf("round %d: %v: %v, %d, %v, %v", round, typ, status, n, statuses, err)
			}
		}
		if status, _, _, err := s.front.Tell(ctx(t), netif.CtrlAddGrefMapping, 0, pages...); err != nil || status != netif.CtrlInvalidParameter {
			t.Errorf("round %d: pages that are mapped already: %v, %v", round, status, err)
		}
		s.wantCopies(false)
	}
	s.end()
}

// A vif that is handed on before its table is mapped takes the table with it.
func TestATableThatIsNotMappedYetPasses(t *testing.T) {
	s := newTold(t, staticOnes)
	for range 6 {
		s.takeOver(staticOnes, nil)
	}
	awaitStatic(t, s.p.dev)
	s.wantCopies(false)
	s.end()
}

// Each request on the control ring has one answer, which says what has happened, whether it
// comes before a take-over, is under way in one, or waits for the next process.
func TestRequestsMeetATakeOver(t *testing.T) {
	cfg := pvnet.Config{StaticGrants: true} // a page that is lent may not be removed
	s := newTold(t, cfg)
	pages := s.front.SentPages(0)[:16] // each becomes a mapping of its own, of which a queue has 64 at most
	stop, stopped := make(chan struct{}), make(chan struct{})
	var asked atomic.Int64
	go func() {
		defer close(stopped)
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			page := pages[n%len(pages)]
			status, k, _, err := s.front.Tell(ctx(t), netif.CtrlDelGrefMapping, 0, page)
			if err != nil || status != netif.CtrlSuccess || k != 1 {
				t.Errorf("request %d: removed %d, %v, %v", n, k, status, err)
				return
			}
			if status, _, _, err := s.front.Tell(ctx(t), netif.CtrlAddGrefMapping, 0, page); err != nil || status != netif.CtrlSuccess {
				t.Errorf("request %d: added, %v, %v", n, status, err)
				return
			}
			asked.Add(1)
		}
	}()
	last := int64(0)
	for range 8 {
		soon(t, "asked again", func() bool { return asked.Load() > last || t.Failed() })
		last = asked.Load()
		s.n = s.e.want(s.n, 50)
		s.takeOver(cfg, nil)
	}
	close(stop)
	wait(t, stopped)
	if n := asked.Load(); n < 8 {
		t.Errorf("%d requests", n)
	}
	awaitStatic(t, s.p.dev)
	s.wantCopies(false)
	s.end()
}

// A table that cannot be mapped is no reason to refuse the vif: frames are copied.
func TestATableThatCannotBeMappedIsCopiedFor(t *testing.T) {
	for name, c := range map[string]struct {
		ref  hypercall.GrantRef // in place of the first one; 1<<30: and those behind it of all others; 0: all stay
		cfg  pvnet.Config
		says string
	}{
		"no grants":       {1 << 30, staticOnes, "pages=512 of=512"},
		"a reserved ref":  {5, staticOnes, "pages=1 of=512"},
		"another's grant": {1, staticOnes, "pages=1 of=512"}, // 1: filled in below
		"switched off":    {0, pvnet.Config{Queues: 2}, "keeps no pages of a frontend mapped"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newTold(t, staticOnes)
			if c.ref == 1 {
				private, err := s.fdom.Share(9, 1, hypercall.ReadWrite)
				if err != nil {
					t.Fatal(err)
				}
				defer private.End()
				c.ref = private.Refs[0]
			}
			log := new(logtest.Log)
			c.cfg.Logger = log.Logger()
			s.takeOver(c.cfg, changed(func(m map[string]any) {
				if c.ref == 0 {
					m["Offers"].(map[string]any)["multi-queue-max-queues"] = "2" // the processes offer the same
					return
				}
				list := grants(m, 0)
				if c.ref != 1<<30 {
					list = list[:netif.GrefEntrySize]
				}
				for i := range len(list) / netif.GrefEntrySize {
					binary.LittleEndian.PutUint32(list[i*netif.GrefEntrySize:], uint32(c.ref)+uint32(i))
				}
			}))
			soon(t, "logged", func() bool { return len(log.Lines(c.says)) == 1 })
			all := c.ref == 0 || c.ref == 1<<30
			if !all {
				awaitStatic(t, s.p.dev)
				s.n = s.e.want(s.n, 600)
			} else if s.wantCopies(true); s.p.dev.Features()&telemetry.FeatureStaticGrants != 0 {
				t.Error("it shows static grants")
			}
			s.end()
		})
	}
}

// changed is a change of what arrives in a hand-over, by keys of its JSON. A []byte in the
// end is written as base64 again.
func changed(f func(map[string]any)) func(*pvnet.TakenVif) {
	return func(in *pvnet.TakenVif) {
		var m map[string]any
		if err := json.Unmarshal(in.State, &m); err != nil {
			panic(err)
		}
		f(m)
		in.State, _ = json.Marshal(m)
	}
}

func toldOf(m map[string]any) map[string]any { return m["Told"].(map[string]any) }
func ctrlOf(m map[string]any) map[string]any { return toldOf(m)["Ctrl"].(map[string]any) }

// grants makes the list of a queue's static grants bytes, which the caller may change.
func grants(m map[string]any, queue int) []byte {
	all := ctrlOf(m)["Grants"].([]any)
	b, err := base64.StdEncoding.DecodeString(all[queue].(string))
	if err != nil {
		panic(err)
	}
	all[queue] = b
	return b
}

// What no frontend can have told is refused, and the process that has the vif goes on with
// the table that it had.
func TestAWrongStateIsRefused(t *testing.T) {
	hash := func(key string, v any) func(map[string]any) {
		return func(m map[string]any) { ctrlOf(m)["Hash"].(map[string]any)[key] = v }
	}
	list := func(f func(b []byte) []byte) func(map[string]any) {
		return func(m map[string]any) {
			b := f(grants(m, 0))
			ctrlOf(m)["Grants"].([]any)[0] = b
		}
	}
	s := newTold(t, staticOnes)
	before := s.Ledger()
	for says, change := range map[string]func(map[string]any){
		"hash algorithm 2 is not known":    hash("Algorithm", 2),
		"cannot unmarshal number 300":      hash("Algorithm", 300),
		"unknown hash flags 0x10":          hash("Flags", 0x1f),
		"a hash key of 41 bytes":           hash("Key", make([]byte, 41)),
		"a hash mapping of 129 entries":    hash("Mapping", make([]int, 129)),
		"entry 2 of the hash mapping":      hash("Mapping", []int{0, 0, 1}),
		"cannot unmarshal number -1":       hash("Mapping", []int{-1}),
		"static grants of 2 queues":        func(m map[string]any) { ctrlOf(m)["Grants"] = []any{nil, nil} },
		"4104 bytes of static grants":      list(func(b []byte) []byte { return append(b, 0, 0, 0, 4, 0, 0, 0, 0) }),
		"4095 bytes of static grants":      list(func(b []byte) []byte { return b[:4095] }),
		"is named twice":                   list(func(b []byte) []byte { copy(b[8:], b[:4]); return b }),
		"has unknown flags 0x3":            list(func(b []byte) []byte { b[4] |= 2; return b }),
		"illegal base64":                   func(m map[string]any) { ctrlOf(m)["Grants"].([]any)[0] = "!" },
		"the control ring shows":           func(m map[string]any) { ctrlOf(m)["Answered"] = 9 },
		"in the multicast list is no":      func(m map[string]any) { toldOf(m)["Groups"] = []string{"01:00:5e:00:00"} },
		"a list of 65 multicast addresses": func(m map[string]any) { toldOf(m)["Groups"] = slices.Repeat([]string{"01:00:5e:00:00:01"}, 65) },
	} {
		log := new(logtest.Log)
		cfg := staticOnes
		cfg.Logger = log.Logger()
		next := s.process(s.bdom, pvnet.ServeConfig{Config: cfg, TakeOver: s.p.handsOver(changed(change))})
		soon(t, "refused: "+says, func() bool { return len(log.Lines("cannot take a vif over")) > 0 })
		if len(log.Lines(says)) != 1 {
			t.Errorf("nothing says %q: %s", says, log)
		}
		select {
		case <-next.came:
			t.Errorf("%q: the other process has the vif too", says)
		default:
		}
		next.end(context.Canceled)
		soon(t, fmt.Sprintf("as before: %q", says), func() bool { return s.Ledger() == before })
		s.wantCopies(false)
	}
	s.end()
}

// The multicast list passes with a vif: of two groups, the frontend gets the one that it has
// listed, whichever process sends the frames.
func TestTheMulticastListPassesWithItsVif(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	var back atomic.Pointer[pvnet.Device]
	p := l.plain(bdom, pvnet.ServeConfig{}, &back, listens)
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	await(t, wait(t, p.came), true)
	var came [4]atomic.Int64 // by the last byte of the address
	go front.Listen(context.Background(), func(f pvnet.Frame) { came[f.Bytes()[5]].Add(1) })
	if err := front.SetMulticast(ctx(t), []pvnet.MAC{groupMAC(1), groupMAC(3)}); err != nil {
		t.Fatal(err)
	}
	soon(t, "filtered", func() bool { return !passesTo(t, back.Load(), groupMAC(2)) })
	send := func(mac pvnet.MAC) {
		t.Helper()
		b, was := frame(100, 1), came[mac[5]].Load()
		copy(b, mac[:])
		if _, err := back.Load().Write(b); err != nil {
			t.Fatal(err)
		}
		soon(t, "a frame to a group came", func() bool { return came[mac[5]].Load() > was })
	}
	send(groupMAC(1))
	early1, early2 := came[1].Load(), came[2].Load()
	sent, done, over := [4]int64{}, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			b, mac := frame(100, 1), groupMAC(byte(1+i%2))
			copy(b, mac[:])
			if _, err := back.Load().Write(b); err == nil {
				sent[mac[5]]++
			} else if !errors.Is(err, pvnet.ErrHandover) {
				t.Errorf("a frame is not sent: %v", err)
				return
			}
		}
	}()
	for range 4 {
		was := came[1].Load()
		next := l.plain(bdom, pvnet.ServeConfig{TakeOver: p.handsOver(&back)}, &back, listens)
		await(t, wait(t, next.came), true)
		p.end(pvnet.ErrHandover)
		p = next
		soon(t, "frames to the group came", func() bool { return came[1].Load() > was+100 })
		send(groupMAC(3))
	}
	close(done)
	wait(t, over)
	soon(t, "all frames came", func() bool { return came[1].Load()-early1 == sent[1] })
	if n := came[2].Load() - early2; n != 0 || sent[2] == 0 {
		t.Errorf("%d of %d frames to a group that is not listed came", n, sent[2])
	}
	// The list goes on to change.
	if err := front.SetMulticast(ctx(t), []pvnet.MAC{groupMAC(2)}); err != nil {
		t.Fatal(err)
	}
	if passesTo(t, back.Load(), groupMAC(1)) || !passesTo(t, back.Load(), groupMAC(2)) {
		t.Error("a change of the list has no effect")
	}
	// A process that does not know the list says so to the next one.
	next := l.plain(bdom, pvnet.ServeConfig{TakeOver: func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
		return handed(back.Load(), func() {}, changed(func(m map[string]any) { toldOf(m)["Groups"] = nil }))
	}}, &back, listens)
	await(t, wait(t, next.came), true)
	p.end(pvnet.ErrHandover)
	p = next
	if !passesTo(t, back.Load(), groupMAC(1)) {
		t.Error("a list that is not known filters")
	}
	next = l.plain(bdom, pvnet.ServeConfig{TakeOver: p.handsOver(&back)}, &back, listens)
	await(t, wait(t, next.came), true)
	p.end(pvnet.ErrHandover)
	if !passesTo(t, back.Load(), groupMAC(1)) {
		t.Error("a list that is not known filters in the next process")
	}
	front.Disconnect()
	next.end(context.Canceled)
}

// A plainProcess is a Serve that stores its last device and runs use with it.
type plainProcess struct {
	*process
}

func (l *lab) plain(dom *emu.Domain, cfg pvnet.ServeConfig, back *atomic.Pointer[pvnet.Device], use func(*pvnet.Device)) *plainProcess {
	c, stop := context.WithCancelCause(context.Background())
	p := &plainProcess{&process{l: l, stop: stop, err: make(chan error, 1), came: make(chan *pvnet.Device, 16)}}
	cfg.Hotplug = true
	go func() {
		p.err <- pvnet.Serve(c, dom, cfg, func(d *pvnet.Device) {
			back.Store(d)
			go use(d)
			p.came <- d
			<-d.Done()
		})
	}()
	return p
}

// listens drops what a device receives.
func listens(d *pvnet.Device) { d.Listen(context.Background(), func(pvnet.Frame) {}) }

// handsOver is a TakeOver that asks for the device in back.
func (p *plainProcess) handsOver(back *atomic.Pointer[pvnet.Device]) func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
	return func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error) {
		return handed(back.Load(), func() {}, nil)
	}
}

// The hash passes with a vif: no frame comes without it or on another queue, whichever process
// sends it, and the frontend changes it in the next process as in the one before.
func TestTheHashPassesWithItsVif(t *testing.T) {
	l := newLabOn(t, emu.Config{Grants: 4096})
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	cfg := pvnet.ServeConfig{Config: pvnet.Config{Queues: 4}}
	var back atomic.Pointer[pvnet.Device]
	p := l.plain(bdom, cfg, &back, listens)
	key, table := []byte("thirty bytes, or thereabouts"), []int{3, 1, 2, 1, 0}
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 4, Hash: &pvnet.HashConfig{Key: key, Table: table}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(front.Disconnect)
	in := receiveAll(t, front)
	await(t, wait(t, p.came), true)
	ours := toeplitz.NewTable(key)
	soon(t, "hashed by the key and the table", func() bool { // one is set after the other
		for flow := range uint32(50) {
			f := ipv4(6, flow, 60)
			h, _, _ := ours.Frame(f, len(f), netif.HashFlagsAll)
			if back.Load().QueueFor(f) != table[h%uint32(len(table))] {
				return false
			}
		}
		return true
	})
	stop := make(chan struct{})
	sent := make(chan int, 1)
	go func() {
		n := 0
		defer func() { sent <- n }()
		for flow := uint32(0); ; flow++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := back.Load().Write(ipv4(6, flow%50, 60+int(flow%7)*300)); err == nil {
				n++
			} else if !errors.Is(err, pvnet.ErrHandover) {
				t.Errorf("a frame is not sent: %v", err)
				return
			}
		}
	}()
	came := make(chan int, 1)
	var count atomic.Int64
	go func() {
		for n, total := 0, -1; ; {
			if n == total {
				came <- n
				return
			}
			select {
			case total = <-sent:
			case a := <-in:
				n++
				count.Add(1)
				want, _, _ := ours.Frame(a.bytes, len(a.bytes), netif.HashFlagsAll)
				queue := table[want%uint32(len(table))]
				if !a.hashed || a.hash != (pvnet.FlowHash{Type: pvnet.HashIPv4TCP, Value: want}) || a.queue != queue {
					t.Errorf("a frame came on queue %d with %+v, %v; want queue %d and %#x", a.queue, a.hash, a.hashed, queue, want)
				}
			}
		}
	}()
	early := ipv4(6, 3, 100)
	h, _, _ := ours.Frame(early, len(early), netif.HashFlagsAll)
	for range 4 {
		was := count.Load()
		next := l.plain(bdom, pvnet.ServeConfig{Config: cfg.Config, TakeOver: p.handsOver(&back)}, &back, func(d *pvnet.Device) {
			if n := d.QueueFor(early); n != table[h%uint32(len(table))] { // the link may not be up yet
				t.Errorf("a frame is given queue %d before the link is up", n)
			}
			listens(d)
		})
		await(t, wait(t, next.came), true)
		p.end(pvnet.ErrHandover)
		p = next
		soon(t, "frames came", func() bool { return count.Load() > was+100 })
	}
	close(stop)
	if n := wait(t, came); n == 0 {
		t.Error("no frames")
	}
	if err := front.SetHash(ctx(t), &pvnet.HashConfig{Key: []byte{1}, Types: []pvnet.HashType{pvnet.HashIPv4}, Table: []int{2}}); err != nil {
		t.Fatal(err)
	}
	next := l.plain(bdom, pvnet.ServeConfig{Config: cfg.Config, TakeOver: p.handsOver(&back)}, &back, listens)
	await(t, wait(t, next.came), true)
	p.end(pvnet.ErrHandover)
	f := ipv4(6, 9, 60)
	want, _, _ := toeplitz.NewTable([]byte{1}).Frame(f, len(f), pvnet.HashIPv4.Flag())
	if _, err := back.Load().Write(f); err != nil {
		t.Fatal(err)
	}
	if a := wait(t, in); a.queue != 2 || a.hash != (pvnet.FlowHash{Type: pvnet.HashIPv4, Value: want}) {
		t.Errorf("queue %d, %+v, want %#x", a.queue, a.hash, want)
	}
	front.Disconnect()
	next.end(context.Canceled)
}

// A frame that lies in the frontend's page holds a hand-over up, while frames pass, since the
// frontend fills the page again after its answer. The vif stays if the frame is not released.
func TestALentFrameHoldsUpAHandOver(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	var back atomic.Pointer[pvnet.Device]
	p := l.plain(bdom, pvnet.ServeConfig{Config: staticOnes}, &back, func(*pvnet.Device) {})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{StaticGrants: true})
	if err != nil {
		t.Fatal(err)
	}
	d := wait(t, p.came)
	await(t, d, true)
	awaitStatic(t, front, d)
	rx, err := d.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	receive := func(seed int, lent bool) pvnet.Frame {
		t.Helper()
		if _, err := front.Write(frame(1000, seed)); err != nil {
			t.Fatal(err)
		}
		var f [1]pvnet.Frame
		if n, err := rx.Receive(f[:]); n != 1 || err != nil || f[0].ReadOnly() != lent || string(f[0].Bytes()) != string(frame(1000, seed)) {
			t.Fatal(n, err, f[0].ReadOnly())
		}
		return f[0]
	}
	held := receive(1, true)
	refused := make(chan error, 1)
	go func() {
		refused <- d.HandOver(func([]byte, []*os.File) error { t.Error("the vif was given"); return nil }, nil)
	}()
	copied := func() bool { // until it waits, frames are lent
		if _, err := front.Write(frame(1000, 2)); err != nil {
			t.Fatal(err)
		}
		var f [1]pvnet.Frame
		if n, err := rx.Receive(f[:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		defer rx.Release(f[:])
		return !f[0].ReadOnly()
	}
	soon(t, "frames passed while it waits", copied)
	if err := wait(t, refused); err == nil || !strings.Contains(err.Error(), "1 of the frontend's pages are in frames that were received and not released") {
		t.Errorf("a hand-over beside a lent frame: %v", err)
	}
	if string(held.Bytes()) != string(frame(1000, 1)) {
		t.Error("the frame has changed")
	}
	again := receive(3, true) // pages are lent again
	again.Release()
	given := make(chan struct{})
	go func() {
		refused <- d.HandOver(func([]byte, []*os.File) error { close(given); return errors.New("no") }, nil)
	}()
	soon(t, "frames passed while it waits", copied)
	select {
	case <-given:
		t.Error("the vif was given beside a lent frame")
	default:
	}
	if err := held.Release(); err != nil {
		t.Error(err)
	}
	wait(t, given)
	if err := wait(t, refused); err == nil || err.Error() != "no" {
		t.Errorf("it was refused: %v", err)
	}
	await(t, d, true)
	awaitStatic(t, d)
	last := receive(5, true)
	last.Release()
	front.Disconnect()
	p.end(context.Canceled)
}

// A slowStore is a domain whose connection to xenstore can be stopped.
type slowStore struct {
	*emu.Domain
	gate  sync.RWMutex // held while the connection is stopped
	looks atomic.Int64 // how often the frontend's state was read, and watched
}

func (s *slowStore) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := s.Domain.Store(ctx)
	return &slowConn{c, s}, err
}

type slowConn struct {
	io.ReadWriteCloser
	s *slowStore
}

func (c *slowConn) Write(b []byte) (int, error) {
	c.s.gate.RLock()
	defer c.s.gate.RUnlock()
	if bytes.Contains(b, []byte("/local/domain/1/device/vif/0/state")) {
		c.s.looks.Add(1)
	}
	return c.ReadWriteCloser.Write(b)
}

// A slowCounters is a store of counters that opens a mirror when it is let.
type slowCounters struct {
	may    chan struct{}
	opened chan struct{}
}

func (s *slowCounters) Open(telemetry.Info) (telemetry.Mirror, error) {
	<-s.may
	close(s.opened)
	return nil, errors.New("none")
}

// Between the stop of a vif and its first frame in the next process nothing waits for
// xenstore, or for the counters to be shown. The log says how long the vif stood still.
func TestATakeOverWaitsForNobody(t *testing.T) {
	s := newTold(t, staticOnes)
	dom, counters, log := &slowStore{Domain: s.bdom}, &slowCounters{make(chan struct{}), make(chan struct{})}, new(logtest.Log)
	cfg := staticOnes
	cfg.Counters, cfg.Logger = counters, log.Logger()
	next := s.lab.processIn(dom, pvnet.ServeConfig{Config: cfg, TakeOver: s.p.handsOver(func(*pvnet.TakenVif) {
		for range 2 { // the second look begins once the first is over: the frontend may have changed its keys
			n := dom.looks.Load()
			s.write("/local/domain/1/device/vif/0/state", "4")
			soon(t, "looked at", func() bool { return dom.looks.Load() > n })
		}
		dom.gate.Lock()
	})})
	d := wait(t, next.came)
	await(t, d, true)
	s.n = s.e.want(s.n, 1000)
	dom.gate.Unlock()
	s.p.end(pvnet.ErrHandover)
	s.p = next
	awaitStatic(t, d)
	s.wantCopies(false)
	close(counters.may)
	wait(t, counters.opened)
	for _, part := range []string{"msg=\"a vif was taken over\"", " still=", " hold=0s stop=", " pass=", " accept=", " bind=", " start="} {
		if len(log.Lines(part)) != 1 {
			t.Errorf("no line says %q: %s", part, log)
		}
	}
	if len(log.Lines("has to connect again")) != 0 {
		t.Error("the event channels were not free")
	}
	s.end()
}

// A vif that has just been taken over is handed on once its claim has the id of its process.
func TestAVifIsHandedOnWithItsClaim(t *testing.T) {
	s := newTold(t, staticOnes)
	dom := &slowStore{Domain: s.bdom}
	next := s.lab.processIn(dom, pvnet.ServeConfig{Config: staticOnes, TakeOver: s.p.handsOver(func(*pvnet.TakenVif) { dom.gate.Lock() })})
	await(t, wait(t, next.came), true)
	given := make(chan struct{})
	over := make(chan error, 1)
	go func() {
		over <- next.dev.HandOver(func(state []byte, _ []*os.File) error {
			close(given)
			if !strings.Contains(string(state), s.read("/local/domain/2/backend/vif/1/0/claim")[:32]) {
				t.Errorf("the claim is not in %.200s", state)
			}
			return errors.New("no")
		}, nil)
	}()
	s.n = s.e.want(s.n, 1000)
	select {
	case <-given:
		t.Error("the vif was given with a claim that is about to change")
	default:
	}
	dom.gate.Unlock()
	wait(t, given)
	if err := wait(t, over); err == nil || err.Error() != "no" {
		t.Error(err)
	}
	s.p.end(pvnet.ErrHandover)
	s.p = next
	s.end()
}

// A state with as much as a frontend can tell fits.
func TestTheLongestStateFits(t *testing.T) {
	const queues = 128
	keys := make(map[string]string)
	for i := range queues {
		for _, key := range []string{"tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx"} {
			keys[fmt.Sprintf("queue-%d/%s", i, key)] = "4294967295"
		}
	}
	state, err := json.Marshal(map[string]any{"Keys": keys, "Grants": slices.Repeat([][]byte{make([]byte, netif.GrefListMax*netif.GrefEntrySize)}, queues)})
	if err != nil || len(state) > pvnet.MaxHandoverState-16<<10 {
		t.Errorf("%d bytes of %d, %v", len(state), pvnet.MaxHandoverState, err)
	}
}
