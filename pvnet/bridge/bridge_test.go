package bridge

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// until waits until ok.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(labtest.Limit); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<16)
			t.Fatalf("%s never came\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

func next[T any](t testing.TB, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(labtest.Limit):
		buf := make([]byte, 1<<16)
		t.Fatalf("nothing came\n%s", buf[:runtime.Stack(buf, true)])
	}
	return v
}

// A lan is a bridge with a guest at each port. Guest i has the address mac(i).
type lan struct {
	*pvnettest.Hub
	*Bridge
	t     testing.TB
	ports []*Port
	got   []chan []byte // copies of what each guest receives
}

// mac returns the address of guest i.
func mac(i int) pvnet.MAC { return pvnet.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)} }

var everybody = pvnet.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// newLAN makes a bridge with a port for each config. Guests in deaf receive nothing.
func newLAN(t testing.TB, cfg Config, serve pvnet.ServeConfig, ports []PortConfig, deaf ...int) *lan {
	t.Helper()
	return newLANOf(t, false, cfg, serve, ports, deaf...)
}

// newLANOf is newLAN; pooled: a pool of one goroutine receives for all ports.
func newLANOf(t testing.TB, pooled bool, cfg Config, serve pvnet.ServeConfig, ports []PortConfig, deaf ...int) *lan {
	t.Helper()
	guest := pvnet.Config{Queues: serve.Queues, Offload: serve.Offload, StaticGrants: serve.StaticGrants}
	l := &lan{Hub: pvnettest.NewHub(t, len(ports), toolstack.Vif{}, func(int) pvnet.Config { return guest }, serve), t: t}
	var err error
	if pooled {
		if cfg.Pool, err = forward.NewPool(l.Driver, 1); errors.Is(err, errors.ErrUnsupported) {
			t.Skip("this system cannot wait for many events:", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cfg.Pool.Close() })
	}
	if l.Bridge, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Bridge.Close() })
	l.got = make([]chan []byte, len(ports))
	for i, pc := range ports {
		p, err := l.Add(l.Backs[i], pc)
		if err != nil {
			t.Fatal(err)
		}
		l.ports = append(l.ports, p)
	}
	for i := range ports {
		if !slices.Contains(deaf, i) {
			l.listen(i)
		}
	}
	return l
}

// listen has a guest receive.
func (l *lan) listen(i int) {
	c, done := make(chan []byte, 4096), make(chan struct{})
	l.got[i] = c
	ctx, cancel := context.WithCancel(context.Background())
	dev := l.Fronts[i]
	go func() {
		defer close(done)
		dev.Listen(ctx, func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			select {
			case c <- b:
			case <-ctx.Done():
			}
		})
	}()
	l.t.Cleanup(func() { cancel(); <-done })
}

// frame makes a frame with a number.
func frame(dst, src pvnet.MAC, number int) []byte {
	b := make([]byte, 200)
	for i := range b {
		b[i] = byte(i*7 + number)
	}
	copy(b, dst[:])
	copy(b[6:], src[:])
	b[12], b[13] = 0x88, 0xb5
	binary.BigEndian.PutUint32(b[14:], uint32(number))
	return b
}

// send has guest i send a frame.
func (l *lan) send(i int, b []byte) {
	l.t.Helper()
	if _, err := l.Fronts[i].Write(b); err != nil {
		l.t.Fatal(err)
	}
}

// want fails unless these guests receive the frame next. What others receive, quiet finds.
func (l *lan) want(what string, sent []byte, guests ...int) {
	l.t.Helper()
	for _, i := range guests {
		if b := next(l.t, l.got[i]); string(b) != string(sent) {
			l.t.Errorf("%s: guest %d got another frame: % x…", what, i, b[:18])
		}
	}
}

// quiet fails if a guest has received something that no want has taken. It waits until each
// port has sent all that it has.
func (l *lan) quiet(what string) {
	l.t.Helper()
	for i, c := range l.got {
		if c == nil {
			continue
		}
		until(l.t, "the last frame", func() bool {
			return l.Fronts[i].Stats().RX.Get(telemetry.Packets) >= l.ports[i].Stats().Out.Sent
		})
		select {
		case b := <-c:
			l.t.Errorf("%s: guest %d got a frame: % x…", what, i, b[:18])
		default:
		}
	}
}

// stat waits until a counter of a port has a value.
func (l *lan) stat(i int, what string, get func(PortStats) uint64, want uint64) {
	l.t.Helper()
	for end := time.Now().Add(labtest.Limit); get(l.ports[i].Stats()) != want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("%s: %+v", what, l.ports[i].Stats())
		}
	}
}

func same(n int, p PortConfig) []PortConfig {
	list := make([]PortConfig, n)
	for i := range list {
		list[i] = p
	}
	return list
}

func TestTheBridgeLearns(t *testing.T) {
	for _, c := range []struct{ lent, pooled bool }{{false, false}, {true, false}, {false, true}} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			lent := c.lent
			l := newLANOf(t, c.pooled, Config{}, pvnet.ServeConfig{Config: pvnet.Config{StaticGrants: lent, LendRx: lent}}, same(4, PortConfig{}))
			unknown := frame(mac(1), mac(0), 1)
			l.send(0, unknown)
			l.want("to an unknown station", unknown, 1, 2, 3)
			back := frame(mac(0), mac(1), 2)
			l.send(1, back)
			l.want("to a station that has sent", back, 0)
			again := frame(mac(1), mac(0), 3)
			l.send(0, again)
			l.want("to a station that has answered", again, 1)
			all := frame(everybody, mac(2), 4)
			l.send(2, all)
			l.want("to everybody", all, 0, 1, 3)
			group := frame(pvnet.MAC{1, 0, 0x5e, 0, 0, 1}, mac(3), 5)
			l.send(3, group)
			l.want("to a group", group, 0, 1, 2)
			l.send(0, frame(mac(0), mac(0), 6))
			l.stat(0, "to a station behind the port itself", func(s PortStats) uint64 { return s.Local }, 1)
			l.quiet("in the end")
			if n := len(l.Stations()); n != 4 {
				t.Errorf("%d stations", n)
			}
			if s := l.ports[0].Stats(); s.Received != 3 || s.Flooded != 1 || s.Unicast != 1 || s.Local != 1 || s.Out.Sent != 3 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// Frames of a flow reach a port in their order, also where some of them go to all ports.
func TestABatchStaysInOrder(t *testing.T) {
	l := newLAN(t, Config{}, pvnet.ServeConfig{}, same(3, PortConfig{}))
	l.send(1, frame(everybody, mac(1), 0))
	next(t, l.got[0])
	next(t, l.got[2])
	const (
		frames = 400
		part   = 100 // on their way at once: a guest's ring has room for them, however late it is
	)
	var batch [][]byte
	for i := range frames {
		dst := mac(1)
		switch i % 5 {
		case 1:
			dst = everybody
		case 3:
			dst = mac(77)
		}
		batch = append(batch, frame(dst, mac(0), i))
	}
	for i := range frames {
		if i%part == 0 {
			if _, err := l.Fronts[0].WriteBatch(batch[i : i+part]); err != nil {
				t.Fatal(err)
			}
		}
		if b := next(t, l.got[1]); string(b) != string(batch[i]) {
			t.Fatalf("guest 1: frame %d came, want %d", binary.BigEndian.Uint32(b[14:]), i)
		}
		if i%5 == 1 || i%5 == 3 {
			if b := next(t, l.got[2]); string(b) != string(batch[i]) {
				t.Fatalf("guest 2: frame %d came, want %d", binary.BigEndian.Uint32(b[14:]), i)
			}
		}
	}
	l.quiet("in the end")
}

func TestStationsMoveAndAge(t *testing.T) {
	l := newLAN(t, Config{}, pvnet.ServeConfig{}, same(3, PortConfig{}))
	roamer := mac(50)
	for from, guests := range [][]int{{1, 2}, {0, 2}} {
		hello := frame(everybody, roamer, from)
		l.send(from, hello)
		l.want("hello", hello, guests...)
		to := frame(roamer, mac(2), 10+from)
		l.send(2, to)
		l.want("to the station", to, from)
	}
	if s := l.ports[1].Stats(); s.Moved != 1 {
		t.Errorf("%+v", s)
	}
	for range ages + 1 {
		if n := len(l.Stations()); n != 2 {
			t.Fatalf("%d stations", n)
		}
		l.Bridge.table.step()
	}
	if list := l.Stations(); len(list) != 0 || l.Bridge.table.learned != 0 || l.ports[1].learned != 0 {
		t.Errorf("%v is known after its age", list)
	}
	to := frame(roamer, mac(2), 20)
	l.send(2, to)
	l.want("to a station that was forgotten", to, 0, 1)
	for range ages { // a station that sends stays
		l.Bridge.table.step()
		to := frame(everybody, mac(2), 30)
		l.send(2, to)
		l.want("to everybody", to, 0, 1)
	}
	l.Bridge.table.step()
	if list := l.Stations(); len(list) != 1 || list[0].MAC != mac(2) || list[0].Port != l.ports[2] {
		t.Errorf("%+v", list)
	}
}

// A tenant can neither send from another's address nor take its frames.
func TestAGuardKeepsStationsApart(t *testing.T) {
	l := newLAN(t, Config{}, pvnet.ServeConfig{}, []PortConfig{
		{Guard: []pvnet.MAC{mac(0)}}, {Guard: []pvnet.MAC{mac(1), mac(101)}}, {},
	})
	spoofed := func(s PortStats) uint64 { return s.Spoofed }
	l.send(0, frame(everybody, mac(1), 1)) // another tenant's
	l.stat(0, "another's address", spoofed, 1)
	l.send(0, frame(everybody, mac(9), 2)) // nobody's
	l.stat(0, "an address beside the guard", spoofed, 2)
	l.send(2, frame(everybody, mac(1), 3)) // a guarded one, from a port without guard
	l.stat(2, "a guarded address", spoofed, 1)
	l.quiet("spoofed frames")
	for i, own := range []pvnet.MAC{mac(0), mac(101), mac(2)} {
		ok := frame(everybody, own, 10+i)
		l.send(i, ok)
		l.want("from its own address", ok, (i+1)%3, (i+2)%3)
	}
	first := frame(mac(1), mac(0), 20) // from the guard, it was never sent from
	l.send(0, first)
	l.want("to a guarded station", first, 1)
	unknown := frame(mac(200), mac(2), 21)
	l.send(2, unknown)
	l.send(0, frame(mac(200), mac(0), 22)) // goes to port 2 alone
	l.stat(2, "to an unknown station, from the router", func(s PortStats) uint64 { return s.Alone }, 1)
	if b := next(t, l.got[2]); binary.BigEndian.Uint32(b[14:]) != 22 {
		t.Errorf("another frame: % x", b[:18])
	}
	l.quiet("in the end")
	for range 2 * ages {
		l.Bridge.table.step()
	}
	if n := len(l.Stations()); n != 3 {
		t.Errorf("%d guarded stations", n)
	}
	l.ports[1].Close()
	if n := len(l.Stations()); n != 1 {
		t.Errorf("%d stations after a guarded port is gone", n)
	}
}

func TestBadPortsAreRefused(t *testing.T) {
	h := pvnettest.NewHub(t, 3, toolstack.Vif{}, func(int) pvnet.Config { return pvnet.Config{} }, pvnet.ServeConfig{})
	for _, c := range []Config{{Stations: -1}, {PerPort: -1}, {Ports: 1}, {Ports: 5000}, {Age: time.Millisecond}} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
	b, err := New(Config{Ports: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for _, c := range []PortConfig{
		{Guard: []pvnet.MAC{everybody}}, {Guard: []pvnet.MAC{{}}}, {Guard: []pvnet.MAC{mac(1), mac(1)}},
		{Guard: make([]pvnet.MAC, 300)}, {Pages: -1}, {Frames: -1},
	} {
		if _, err := b.Add(h.Backs[0], c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
	if _, err := b.Add(h.Backs[0], PortConfig{Guard: []pvnet.MAC{mac(1)}}); err != nil {
		t.Fatal(err) // a port that failed has left nothing behind
	}
	if _, err := b.Add(h.Backs[1], PortConfig{Guard: []pvnet.MAC{mac(2), mac(1)}}); err == nil || !strings.Contains(err.Error(), mac(1).String()) {
		t.Errorf("one address at two ports: %v", err)
	}
	if _, err := b.Add(h.Backs[0], PortConfig{}); !errors.Is(err, pvnet.ErrOwned) {
		t.Errorf("one device at two ports: %v", err)
	}
	if _, err := b.Add(h.Backs[1], PortConfig{Guard: []pvnet.MAC{mac(2)}}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Add(h.Backs[2], PortConfig{}); err == nil || !strings.Contains(err.Error(), "Config.Ports") {
		t.Errorf("too many ports: %v", err)
	}
	b.Close()
	if _, err := b.Add(h.Backs[2], PortConfig{}); err != ErrClosed {
		t.Errorf("after Close: %v", err)
	}
}

func TestIsolatedPortsReachOnlyOthers(t *testing.T) {
	l := newLAN(t, Config{}, pvnet.ServeConfig{}, []PortConfig{{Isolated: true}, {Isolated: true}, {}, {}})
	for i, guests := range [][]int{{2, 3}, {2, 3}, {0, 1, 3}, {0, 1, 2}} {
		all := frame(everybody, mac(i), i)
		l.send(i, all)
		l.want("to everybody", all, guests...)
	}
	l.send(0, frame(mac(1), mac(0), 10))
	l.stat(0, "between isolated ports", func(s PortStats) uint64 { return s.Isolated }, 1)
	up, down := frame(mac(2), mac(0), 11), frame(mac(0), mac(2), 12)
	l.send(0, up)
	l.want("up", up, 2)
	l.send(2, down)
	l.want("down", down, 0)
	unknown := frame(mac(99), mac(1), 13)
	l.send(1, unknown)
	l.want("to an unknown station", unknown, 2, 3)
	l.quiet("in the end")
}

func TestSomeFramesGoNowhere(t *testing.T) {
	l := newLAN(t, Config{}, pvnet.ServeConfig{}, same(2, PortConfig{}))
	for last := range 17 {
		l.send(0, frame(pvnet.MAC{1, 0x80, 0xc2, 0, 0, byte(last)}, mac(0), last))
	}
	if b := next(t, l.got[1]); b[5] != 16 { // the first group that is not reserved
		t.Errorf("a reserved group passed: % x", b[:6])
	}
	l.stat(0, "reserved groups", func(s PortStats) uint64 { return s.Reserved }, 16)
	l.send(0, frame(mac(1), everybody, 20))
	l.send(0, frame(mac(1), pvnet.MAC{}, 21))
	l.stat(0, "invalid sources", func(s PortStats) uint64 { return s.Invalid }, 2)
	l.ports[1].Close()
	l.send(0, frame(everybody, mac(0), 22))
	l.send(0, frame(mac(1), mac(0), 23))
	l.stat(0, "alone", func(s PortStats) uint64 { return s.Alone }, 2)
	if n := len(l.Stations()); n != 1 {
		t.Errorf("%d stations", n)
	}
}

// A port that invents addresses fills its own share of the table only.
func TestTheTableIsBounded(t *testing.T) {
	l := newLAN(t, Config{Stations: 10, PerPort: 8}, pvnet.ServeConfig{}, same(3, PortConfig{}))
	l.send(1, frame(everybody, mac(1), 0))
	next(t, l.got[0])
	next(t, l.got[2])
	for i := range 100 {
		l.send(0, frame(mac(1), mac(1000+i), i))
		next(t, l.got[1])
	}
	l.stat(0, "unlearned", func(s PortStats) uint64 { return s.Unlearned }, 92)
	if n := len(l.Stations()); n != 9 {
		t.Errorf("%d stations", n)
	}
	for i := range 3 { // two more fit the table, one of which is there
		l.send(2, frame(mac(1), mac(2000+i), i))
		next(t, l.got[1])
	}
	l.stat(2, "unlearned", func(s PortStats) uint64 { return s.Unlearned }, 2)
	if n := len(l.Stations()); n != 10 {
		t.Errorf("%d stations", n)
	}
	to := frame(mac(1), mac(1000), 200) // nobody was pushed out
	l.send(0, to)
	l.want("to the first station", to, 1)
	l.quiet("in the end")
}

// Ports come and go while frames move. What a port that is gone had is forgotten, and nothing
// of it is left.
func TestPortsComeAndGo(t *testing.T) {
	for _, pooled := range []bool{false, true} {
		t.Run(fmt.Sprintf("pool=%t", pooled), func(t *testing.T) { portsComeAndGo(t, pooled) })
	}
}

func portsComeAndGo(t *testing.T, pooled bool) {
	l := newLANOf(t, pooled, Config{}, pvnet.ServeConfig{}, same(3, PortConfig{}))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { // guest 0 talks to everybody, and to guest 2
		for i := 0; ctx.Err() == nil; i++ {
			l.Fronts[0].WriteBatch([][]byte{frame(everybody, mac(0), i), frame(mac(2), mac(0), i)})
			time.Sleep(time.Millisecond)
		}
	})
	wg.Go(func() {
		for {
			select {
			case <-l.got[1]:
			case <-ctx.Done():
				return
			}
		}
	})
	for range 4 {
		next(t, l.got[2])
		l.send(2, frame(mac(0), mac(2), 1))
		next(t, l.got[0])
		until(t, "the station", func() bool { return len(l.Stations()) == 2 })
		old := l.ports[2]
		l.Unplug(2)
		next(t, old.Done())
		if err := old.Err(); !errors.Is(err, pvnet.ErrDisconnected) {
			t.Errorf("the port ended with %v", err)
		}
		if n := len(l.Stations()); n != 1 {
			t.Errorf("%d stations after the port is gone", n)
		}
		if n := len(l.Ports()); n != 2 {
			t.Errorf("%d ports", n)
		}
		l.Plug(2)
		p, err := l.Add(l.Backs[2], PortConfig{})
		if err != nil {
			t.Fatal(err)
		}
		if l.ports[2] = p; p.number != old.number {
			t.Errorf("the port is number %d, was %d", p.number, old.number)
		}
		l.listen(2)
	}
	l.ports[2].Close()
	l.ports[2].Close()
	if err := l.ports[2].Err(); err != ErrRemoved {
		t.Errorf("the port ended with %v", err)
	}
	if err := l.ports[0].Err(); err != nil {
		t.Errorf("a port that is there: %v", err)
	}
	cancel()
	wg.Wait()
	l.Bridge.Close()
	if err := l.ports[0].Err(); err != ErrClosed {
		t.Errorf("the port ended with %v", err)
	}
}

// A guest that connects again keeps its port, and its stations are learned anew.
func TestAGuestConnectsAgain(t *testing.T) {
	l := newLAN(t, Config{}, pvnet.ServeConfig{}, same(3, PortConfig{}))
	l.send(1, frame(everybody, mac(1), 0))
	next(t, l.got[0])
	next(t, l.got[2])
	l.Disconnect(1)
	until(t, "an empty table", func() bool { return len(l.Stations()) == 0 })
	l.Hub.Connect(1)
	l.listen(1)
	to := frame(mac(1), mac(0), 1)
	l.send(0, to)
	l.want("to a station that was forgotten", to, 1, 2)
}

// A guest that takes no frames does not keep others from getting theirs, floods included.
func TestADeafGuestHoldsUpNobody(t *testing.T) {
	l := newLAN(t, Config{}, pvnet.ServeConfig{DrainTimeout: -1}, same(3, PortConfig{}), 1)
	// At most so many frames are on their way, which find room wherever they wait, so that only
	// the deaf guest's are dropped.
	const frames, underway = 2000, 32
	for i := range frames + underway {
		if i < frames {
			l.send(0, frame(everybody, mac(0), i))
		}
		if i < underway {
			continue
		}
		if n, want := int(binary.BigEndian.Uint32(next(t, l.got[2])[14:])), i-underway; n != want {
			t.Fatalf("frame %d came, want %d", n, want)
		}
	}
	until(t, "the last count", func() bool {
		s := l.ports[1].Stats().Out
		return int(s.Sent+s.Full)+s.Waiting == frames
	})
	if s := l.ports[1].Stats().Out; s.Full == 0 || s.Waiting > 64+forward.Batch {
		t.Errorf("%+v", s)
	}
}

func TestBridgingDoesNotAllocate(t *testing.T) {
	for _, c := range []struct{ group, pooled bool }{{false, false}, {true, false}, {false, true}} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			group := c.group
			l := newLANOf(t, c.pooled, Config{}, pvnet.ServeConfig{}, same(3, PortConfig{}), 0, 1, 2)
			var txs []*pvnet.TX
			var rxs []*pvnet.RX
			for i := range 3 {
				tx, err := l.Fronts[i].OwnTX(0)
				if err != nil {
					t.Fatal(err)
				}
				rx, err := l.Fronts[i].OwnRX(0)
				if err != nil {
					t.Fatal(err)
				}
				rx.SetDeadline(time.Now().Add(labtest.Limit))
				txs, rxs = append(txs, tx), append(rxs, rx)
			}
			var out, in [32]pvnet.Frame
			receive := func(i, n int) {
				for n > 0 {
					k, err := rxs[i].Receive(in[:])
					if err != nil {
						t.Fatal(err)
					}
					rxs[i].Release(in[:k])
					n -= k
				}
			}
			send := func(i int, b []byte, n int) {
				if k, err := txs[i].AllocWait(out[:n], len(b)); k != n || err != nil {
					t.Fatal(k, err)
				}
				for j := range out[:n] {
					out[j].CopyFrom(b)
				}
				if k, err := txs[i].SendWait(out[:n]); k != n || err != nil {
					t.Fatal(k, err)
				}
			}
			send(1, frame(everybody, mac(1), 0), 1)
			receive(0, 1)
			receive(2, 1)
			to := mac(1)
			if group {
				to = everybody
			}
			b := frame(to, mac(0), 1)
			cycle := func() {
				send(0, b, 32)
				receive(1, 32)
				if group {
					receive(2, 32)
				}
			}
			for range 20 {
				cycle()
			}
			least := 1e9
			for range 5 { // what runs beside the test allocates now and then
				least = min(least, testing.AllocsPerRun(20, cycle))
			}
			if least >= 1 {
				t.Errorf("a batch allocates %v times", least)
			}
		})
	}
}
