package pvnet_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// names is a telemetry store that only remembers the names of its mirrors.
type names struct {
	mu   sync.Mutex
	open []string         // guarded by mu: names of the open mirrors
	ever []string         // guarded by mu
	last telemetry.Status // guarded by mu
}

func (n *names) Open(info telemetry.Info) (telemetry.Mirror, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open = append(n.open, info.Name())
	n.ever = append(n.ever, info.Name())
	return &nameless{n: n}, nil
}

func (n *names) now() (open []string, ever int, last telemetry.Status) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.open...), len(n.ever), n.last
}

// nameless is the mirror of a device. It keeps only the status.
type nameless struct {
	n    *names
	last telemetry.Status
}

func (m *nameless) Words(int, telemetry.Dir) (words, base []uint64) {
	return make([]uint64, telemetry.BlockWords), nil
}
func (m *nameless) Kind() string           { return "names" }
func (m *nameless) Reason() string         { return "" }
func (m *nameless) Record(telemetry.Event) {}

// Update is slow with a new status, so that a test fails if the link event comes before it. On a
// tick it is not: the ticker's goroutine holds the lifecycle's lock meanwhile, and the virtual time
// of a test stands still as long as the lifecycle waits for that.
func (m *nameless) Update(s telemetry.Status, _ telemetry.Reset) {
	if s != m.last {
		time.Sleep(time.Millisecond)
	}
	m.last = s
	m.n.mu.Lock()
	defer m.n.mu.Unlock()
	m.n.last = s
}
func (m *nameless) Close() error {
	m.n.mu.Lock()
	defer m.n.mu.Unlock()
	m.n.open = m.n.open[:len(m.n.open)-1]
	return nil
}

// A vif that is unplugged and plugged again may have another MAC and MTU, and another
// backend domain.
func TestAVifThatIsPluggedAgainIsAnotherCard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		fdom := l.domain(1)
		var fronts, backends names
		var stops []func()
		served := make(map[int]<-chan *pvnet.Device)
		for _, id := range []int{2, 3} {
			cfg := pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Counters: &backends}}
			devs, stop := l.serve(l.domain(hypercall.DomID(id)), cfg)
			served[id] = devs
			stops = append(stops, stop)
		}
		v := l.add(toolstack.Vif{Front: 1, Back: 2, MAC: [6]byte{0, 0x16, 0x3e, 1, 1, 1}})
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Counters: &fronts})
		if err != nil {
			t.Fatal(err)
		}
		events := make(chan pvnet.LinkEvent, 64)
		go func() {
			for ev := range front.Links(context.Background()) {
				events <- ev
			}
			close(events)
		}()
		next := func(up bool) pvnet.LinkEvent {
			for ev := range events {
				if ev.Up == up {
					return ev
				}
			}
			t.Fatal("no such event")
			panic("unreachable")
		}
		check := func(v toolstack.Vif) {
			t.Helper()
			mtu := 1500
			if v.MTU != 0 {
				mtu = v.MTU
			}
			ev := next(true)
			if ev.MAC != pvnet.MAC(v.MAC) || ev.MTU != mtu || front.MAC() != ev.MAC || front.MTU() != mtu {
				t.Errorf("the event says %v, %d, the device %v, %d; xenstore %v, %d",
					ev.MAC, ev.MTU, front.MAC(), front.MTU(), pvnet.MAC(v.MAC), mtu)
			}
			back := wait(t, served[int(v.Back)])
			if ev := await(t, back, true); ev.MTU != mtu || back.MTU() != mtu || ev.MAC != back.MAC() {
				t.Errorf("the backend's event says %+v", ev)
			}
			open, _, status := fronts.now()
			if want := fmt.Sprintf("front-1-%d-0", v.Back); len(open) != 1 || open[0] != want {
				t.Errorf("counters are shown as %q, not %s", open, want)
			}
			if status.MAC != v.MAC || int(status.MTU) != mtu || !status.Up {
				t.Errorf("beside the counters: %+v", status)
			}
		}
		check(v)
		for _, w := range []toolstack.Vif{
			{Front: 1, Back: 2, MAC: [6]byte{0, 0x16, 0x3e, 2, 2, 2}, MTU: 9000},
			{Front: 1, Back: 2, MAC: [6]byte{0, 0x16, 0x3e, 2, 2, 2}, MTU: 1280},
			{Front: 1, Back: 3, MAC: [6]byte{0, 0x16, 0x3e, 3, 3, 3}},
			{Front: 1, Back: 2, MAC: v.MAC},
		} {
			was := front.MAC()
			if err := toolstack.Remove(ctx(t), l.tools, v); err != nil {
				t.Fatal(err)
			}
			if ev := next(false); ev.MAC != was { // the MAC of the connection that ended
				t.Errorf("%+v", ev)
			}
			if _, _, status := fronts.now(); status.Up {
				t.Errorf("a link that is down is shown as %+v", status)
			}
			v = l.add(w)
			check(v)
		}
		if _, ever, _ := fronts.now(); ever != 3 { // once more each time the backend's domain changed
			t.Errorf("the counters were opened %d times", ever)
		}
		front.Disconnect()
		for _, stop := range stops {
			stop()
		}
		if f, _, _ := fronts.now(); len(f) != 0 {
			t.Errorf("still shown: %q", f)
		}
	})
}

// A MAC that no station can have is refused. The frontend then reads the backend's
// directory, and if that has no usable MAC either, it makes one, which the device keeps.
func TestAddressesThatNoStationHasAreNotTaken(t *testing.T) {
	good := pvnet.MAC{0, 0x16, 0x3e, 9, 9, 9}
	for _, bad := range []string{"ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "01:00:5e:00:00:01", "33:33:00:00:00:01", "03:16:3e:00:00:01", "nonsense", ""} {
		for _, backend := range []string{good.String(), bad} {
			t.Run(bad+" "+backend, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					log := new(logtest.Log)
					l := newLab(t)
					fdom, bdom := l.domain(1), l.domain(2)
					v := l.add(toolstack.Vif{Front: 1, Back: 2})
					for dir, mac := range map[string]string{v.FrontDir(): bad, v.BackDir(): backend} {
						if err := l.tools.Write(ctx(t), dir+"/mac", mac); err != nil {
							t.Fatal(err)
						}
					}
					_, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
					front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Logger: log.Logger()})
					if err != nil {
						t.Fatal(err)
					}
					mac := front.MAC()
					if backend == bad && (mac[0]&3 != 2 || len(log.Lines("made one")) != 1) || backend != bad && mac != good {
						t.Errorf("%v", mac)
					}
					if len(log.Lines("key=device/vif/0/mac")) != 1 || bad != "" && len(log.Lines("value="+bad)) == 0 {
						t.Errorf("the log names neither key nor value:\n%s", log)
					}
					stop()
					await(t, front, false)
					_, stop = l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
					if ev := await(t, front, true); ev.MAC != mac {
						t.Errorf("%v, then %v", mac, ev.MAC)
					}
					front.Disconnect()
					stop()
				})
			})
		}
	}
}

// An earlier program left the keys of more queues. A backend that read them would map
// rings that no longer exist.
func TestQueuesOfAProgramBeforeUsAreRemoved(t *testing.T) {
	for _, queues := range []int{1, 2} {
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		v := l.add(toolstack.Vif{Front: 1, Back: 2})
		for _, key := range []string{"queue-0/tx-ring-ref", "queue-1/rx-ring-ref", "queue-7/tx-ring-ref", "multi-queue-num-queues"} {
			if err := l.tools.Write(ctx(t), v.FrontDir()+"/"+key, "8"); err != nil {
				t.Fatal(err)
			}
		}
		_, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: queues}})
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: queues})
		if err != nil {
			t.Fatal(err)
		}
		left, err := l.tools.Directory(ctx(t), v.FrontDir())
		if err != nil {
			t.Fatal(err)
		}
		left = slices.DeleteFunc(left, func(key string) bool { return !strings.HasPrefix(key, "queue-") })
		slices.Sort(left)
		if want := []string{"queue-0", "queue-1"}[:queues/2*2]; !slices.Equal(left, want) {
			t.Errorf("%d queues: %q are there, want %q", queues, left, want)
		}
		front.Disconnect()
		stop()
	}
}

// A backend's own address is the one of Linux's netback, whatever the vif's is: no card has a
// higher one, so that a bridge never takes its address from it.
func TestABackendHasNetbacksAddress(t *testing.T) {
	l := newLinked(t, toolstack.Vif{MAC: [6]byte{0, 0x16, 0x3e, 1, 2, 3}})
	defer l.end()
	if mac := l.back.MAC(); mac != (pvnet.MAC{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}) {
		t.Errorf("the backend's address is %v", mac)
	}
	if mac := l.front.MAC(); mac != (pvnet.MAC{0, 0x16, 0x3e, 1, 2, 3}) {
		t.Errorf("the frontend's address is %v", mac)
	}
}
