package pvnet_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// ipv4 returns a frame with an IPv4 packet of the protocol, whose addresses and ports depend
// on flow.
func ipv4(proto byte, flow uint32, size int) []byte {
	f := make([]byte, max(size, 54))
	copy(f, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45})
	binary.BigEndian.PutUint16(f[16:], uint16(len(f)-14))
	f[22], f[23] = 64, proto
	binary.BigEndian.PutUint32(f[26:], 0x0a000000+flow*7919)
	binary.BigEndian.PutUint32(f[30:], 0x0a090001)
	binary.BigEndian.PutUint16(f[34:], uint16(1024+flow))
	binary.BigEndian.PutUint16(f[36:], 443)
	f[46] = 0x50
	return f
}

var arp = append([]byte{255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 2, 8, 6}, make([]byte, 46)...)

// An arrival is a frame that came on a queue.
type arrival struct {
	queue  int
	bytes  []byte
	hash   pvnet.FlowHash
	hashed bool
}

// receiveAll gives what arrives on all queues of d.
func receiveAll(t testing.TB, d *pvnet.Device) <-chan arrival {
	t.Helper()
	c := make(chan arrival, 1024)
	var running sync.WaitGroup
	var owned []*pvnet.RX
	for i := range d.Queues() {
		rx, err := d.OwnRX(i)
		if err != nil {
			t.Fatal(err)
		}
		owned = append(owned, rx)
		running.Go(func() {
			var frames [32]pvnet.Frame
			for {
				n, err := rx.Receive(frames[:])
				if err != nil {
					return
				}
				for k := range frames[:n] {
					a := arrival{queue: i, bytes: make([]byte, frames[k].Len())}
					frames[k].CopyTo(a.bytes)
					a.hash, a.hashed = frames[k].Hash()
					c <- a
				}
				rx.Release(frames[:n])
			}
		})
	}
	t.Cleanup(func() {
		for _, rx := range owned {
			rx.SetDeadline(time.Unix(1, 0))
		}
		running.Wait()
	})
	return c
}

// A hashed vif has both ends of ours.
type hashedVif struct {
	t           testing.TB
	l           *lab
	front, back *pvnet.Device
	fdom        *emu.Domain
	cfg         pvnet.Config
	backs       <-chan *pvnet.Device
	in          <-chan arrival // at the frontend
	said        *logtest.Log   // by the frontend
}

func newHashed(t testing.TB, queues int, cfg pvnet.Config, back pvnet.Config) *hashedVif {
	t.Helper()
	l := newLabOn(t, emu.Config{Grants: 4096})
	v := &hashedVif{t: t, l: l, said: new(logtest.Log), fdom: l.domain(1)}
	bdom := l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	back.Queues = 4
	v.backs, _ = l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: back})
	cfg.Queues, cfg.Logger = queues, v.said.Logger()
	v.cfg = cfg
	v.connect()
	v.back = wait(t, v.backs)
	await(t, v.back, true)
	return v
}

func (v *hashedVif) connect() {
	v.t.Helper()
	var err error
	if v.front, err = pvnet.Connect(ctx(v.t), v.fdom, "0", v.cfg); err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(v.front.Disconnect)
	v.in = receiveAll(v.t, v.front)
}

// awaitHash waits until both ends show that frames are hashed, or not.
func (v *hashedVif) awaitHash(on bool) {
	v.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		f, b := v.front.Counters().Status().Features, v.back.Counters().Status().Features
		if (f&telemetry.FeatureHash != 0) == on && (b&telemetry.FeatureHash != 0) == on {
			return
		}
		if time.Now().After(end) {
			v.t.Fatalf("the features are %b and %b", f, b)
		}
	}
}

// send sends a frame from the backend and returns what arrives.
func (v *hashedVif) send(frame []byte) arrival {
	v.t.Helper()
	if _, err := v.back.Write(frame); err != nil {
		v.t.Fatal(err)
	}
	a := wait(v.t, v.in)
	if !bytes.Equal(a.bytes, frame) {
		v.t.Fatalf("%d bytes came as %d others", len(frame), len(a.bytes))
	}
	return a
}

func TestReceivedFramesAreHashed(t *testing.T) {
	key := []byte("forty bytes, or some fewer of them")
	table := []int{3, 1, 4, 1, 5, 0, 2}
	for _, lend := range []bool{false, true} {
		v := newHashed(t, 4, pvnet.Config{LendRx: lend, Hash: &pvnet.HashConfig{Key: key, Table: table}}, pvnet.Config{})
		v.awaitHash(true)
		ours := toeplitz.NewTable(key)
		hashed := uint64(0)
		for flow := range uint32(40) {
			for proto, typ := range map[byte]pvnet.HashType{6: pvnet.HashIPv4TCP, 17: pvnet.HashIPv4} {
				f := ipv4(proto, flow, 60+int(flow)*200)
				want, _, _ := ours.Frame(f, len(f), netif.HashFlagsAll)
				a := v.send(f)
				queue := table[want%uint32(len(table))] % 4
				if !a.hashed || a.hash != (pvnet.FlowHash{Type: typ, Value: want}) || a.queue != queue || v.back.QueueFor(f) != queue {
					t.Fatalf("flow %d came on queue %d with %+v, %v; want queue %d and %#x, %v", flow, a.queue, a.hash, a.hashed, queue, want, typ)
				}
				hashed++
			}
		}
		if a := v.send(arp); a.hashed || a.queue != 3 {
			t.Errorf("ARP came on queue %d with %+v, %v", a.queue, a.hash, a.hashed)
		}
		st := v.back.Stats()
		if n := st.TX.Get(telemetry.HashedPackets); n != hashed {
			t.Errorf("the backend counts %d frames with a hash, want %d", n, hashed)
		}
		if v.said.String() != "" && strings.Contains(v.said.String(), "WARN") {
			t.Errorf("it says\n%s", v.said)
		}
		v.front.Disconnect()
		if n := v.front.Stats().RX.Get(telemetry.HashedPackets); n != hashed {
			t.Errorf("the frontend counts %d frames with a hash, want %d", n, hashed)
		}
	}
}

// Without a hash that was asked for, the backend chooses the queue and sends none.
func TestFramesWithoutAHash(t *testing.T) {
	for name, c := range map[string]struct {
		queues int
		hash   *pvnet.HashConfig
		says   string
	}{
		"not asked for": {4, nil, ""},
		"one queue":     {1, new(pvnet.HashConfig), "received frames are not hashed"},
	} {
		v := newHashed(t, c.queues, pvnet.Config{Hash: c.hash}, pvnet.Config{})
		v.awaitHash(false)
		for flow := range uint32(8) {
			f := ipv4(6, flow, 60)
			if a := v.send(f); a.hashed || a.queue != v.back.QueueFor(f) {
				t.Errorf("%s: it came on queue %d, not %d, with %+v, %v", name, a.queue, v.back.QueueFor(f), a.hash, a.hashed)
			}
		}
		if said := v.said.String(); c.says != "" && strings.Count(said, c.says) != 1 || c.says == "" && strings.Contains(said, "WARN") {
			t.Errorf("%s: it says\n%s", name, said)
		}
		if err := v.front.SetHash(ctx(t), new(pvnet.HashConfig)); c.queues == 1 && !errors.Is(err, pvnet.ErrNoHash) || c.queues > 1 && err != nil {
			t.Errorf("%s: SetHash: %v", name, err)
		}
	}
}

// A random key is another one for each device, and stays the same in a device.
func TestTheKeyIsRandom(t *testing.T) {
	f := ipv4(6, 1, 60)
	seen := make(map[uint32]bool)
	for range 3 {
		v := newHashed(t, 2, pvnet.Config{Hash: new(pvnet.HashConfig)}, pvnet.Config{})
		v.awaitHash(true)
		a := v.send(f)
		if !a.hashed || a.queue != int(a.hash.Value%2) {
			t.Errorf("queue %d, %+v, %v", a.queue, a.hash, a.hashed)
		}
		if err := v.front.SetHash(ctx(t), &pvnet.HashConfig{Table: []int{1}}); err != nil {
			t.Fatal(err)
		}
		if b := v.send(f); b.hash != a.hash || b.queue != 1 {
			t.Errorf("%+v became %+v on queue %d", a.hash, b.hash, b.queue)
		}
		seen[a.hash.Value] = true
	}
	if len(seen) < 2 {
		t.Errorf("one hash for all devices: %v", seen)
	}
}

// SetHash changes types, key and table while frames move.
func TestSetHashWhileFramesMove(t *testing.T) {
	v := newHashed(t, 4, pvnet.Config{}, pvnet.Config{})
	done, sent := make(chan struct{}), make(chan int, 1)
	go func() {
		n := 0
		defer func() { sent <- n }()
		for i := uint32(0); ; i++ {
			select {
			case <-done:
				return
			default:
			}
			k, err := v.back.WriteBatch([][]byte{ipv4(6, i%50, 60), ipv4(17, i%50, 9000), ipv4(6, i%50, 1500), arp})
			if n += k; err != nil {
				t.Errorf("WriteBatch: %v", err)
				return
			}
		}
	}()
	arrived := make(chan int, 1)
	go func() { // as many frames as are sent
		for n, total := 0, -1; ; {
			if n == total {
				arrived <- n
				return
			}
			select {
			case <-v.in:
				n++
			case total = <-sent:
			}
		}
	}()
	for i := range 60 {
		c := &pvnet.HashConfig{Key: []byte(fmt.Sprint("key", i/7)), Table: []int{i, i + 1, i + 2}}
		switch i % 6 {
		case 3:
			c = nil
		case 4:
			c.Types = []pvnet.HashType{pvnet.HashIPv4}
		case 5:
			c.Table = make([]int, 128)
		}
		if err := v.front.SetHash(ctx(t), c); err != nil {
			t.Fatal(err)
		}
	}
	close(done)
	n := wait(t, arrived)
	if err := v.front.SetHash(ctx(t), &pvnet.HashConfig{Key: []byte{1}, Types: []pvnet.HashType{pvnet.HashIPv4}, Table: []int{2}}); err != nil {
		t.Fatal(err)
	}
	f := ipv4(6, 9, 60)
	want, _, _ := toeplitz.NewTable([]byte{1}).Frame(f, len(f), pvnet.HashIPv4.Flag())
	if a := v.send(f); a.queue != 2 || a.hash != (pvnet.FlowHash{Type: pvnet.HashIPv4, Value: want}) {
		t.Errorf("after %d frames: queue %d, %+v, want %#x", n, a.queue, a.hash, want)
	}
	if err := v.front.SetHash(ctx(t), nil); err != nil {
		t.Fatal(err)
	}
	v.awaitHash(false)
	if a := v.send(f); a.hashed {
		t.Errorf("a hash that was ended: %+v", a.hash)
	}
}

func TestHashConfigsThatCannotWork(t *testing.T) {
	v := newHashed(t, 2, pvnet.Config{}, pvnet.Config{})
	for want, c := range map[string]*pvnet.HashConfig{
		"Key":   {Key: make([]byte, 41)},
		"Types": {Types: []pvnet.HashType{4}},
		"Table": {Table: make([]int, 1025)},
		"is -1": {Table: []int{0, -1}},
	} {
		if err := v.front.SetHash(ctx(t), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", c, err)
		}
		if _, err := pvnet.Connect(ctx(t), v.fdom, "1", pvnet.Config{Hash: c}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Connect with %+v: %v", c, err)
		}
	}
	// The backend has a limit, too, and what it refuses changes nothing.
	err := v.front.SetHash(ctx(t), &pvnet.HashConfig{Table: make([]int, 129)})
	if err == nil || !strings.Contains(err.Error(), "refuses set-hash-mapping-size") {
		t.Errorf("129 entries: %v", err)
	}
	if err := v.front.SetHash(ctx(t), &pvnet.HashConfig{Table: make([]int, 128)}); err != nil {
		t.Errorf("128 entries: %v", err)
	}
	if err := v.back.SetHash(ctx(t), nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a backend's device: %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := v.front.SetHash(gone, nil); !errors.Is(err, context.Canceled) && err != nil {
		t.Errorf("with a context that has ended: %v", err)
	}
	if _, err := pvnet.Connect(ctx(t), v.fdom, "0", pvnet.Config{Queues: 2, Hash: new(pvnet.HashConfig)}); err == nil || !strings.Contains(err.Error(), "another Config") {
		t.Errorf("a second Connect with another hash: %v", err)
	}
}

// The settings hold for every connection: those of SetHash too, and also those made while
// there was none.
func TestTheHashOutlivesAConnection(t *testing.T) {
	v := newHashed(t, 4, pvnet.Config{Hash: &pvnet.HashConfig{Table: []int{2}}}, pvnet.Config{})
	v.awaitHash(true)
	f := ipv4(6, 1, 60)
	first := v.send(f)
	if first.queue != 2 {
		t.Errorf("queue %d", first.queue)
	}
	// The toolstack takes the vif away and gives another.
	id := toolstack.Vif{Front: 1, Back: 2}
	if err := toolstack.Remove(ctx(t), v.l.Tools, id); err != nil {
		t.Fatal(err)
	}
	wait(t, v.back.Done())
	await(t, v.front, false)
	if err := v.front.SetHash(ctx(t), &pvnet.HashConfig{Table: []int{3}}); err != nil {
		t.Fatal(err)
	}
	v.l.add(id)
	v.back = wait(t, v.backs)
	await(t, v.back, true)
	v.awaitHash(true)
	if a := v.send(f); a.queue != 3 || a.hash != first.hash {
		t.Errorf("queue %d, %+v, before %+v", a.queue, a.hash, first.hash)
	}
}

// A program that connects after another, without a hash, gets none, although the backend
// remembers the settings of the first. One with fewer queues gets frames on those it has.
func TestTheNextProgramIsNotHashedFor(t *testing.T) {
	v := newHashed(t, 4, pvnet.Config{Hash: &pvnet.HashConfig{Table: []int{3}}}, pvnet.Config{})
	v.awaitHash(true)
	for _, queues := range []int{4, 2, 1, 2} {
		v.front.Disconnect()
		await(t, v.back, false)
		v.cfg.Hash, v.cfg.Queues = nil, queues
		v.connect()
		await(t, v.back, true)
		v.awaitHash(false)
		if a := v.send(ipv4(6, 1, 60)); a.hashed || a.queue >= queues {
			t.Errorf("%d queues: queue %d, %+v, %v", queues, a.queue, a.hash, a.hashed)
		}
	}
}

// A frontend sends the hash of a frame if it says so, and a hash that came with a frame
// only then.
func TestAFrontendSendsAHash(t *testing.T) {
	v := newHashed(t, 2, pvnet.Config{Offload: true}, pvnet.Config{Offload: true})
	in := receiveAll(t, v.back)
	tx, err := v.front.OwnTX(1)
	if err != nil {
		t.Fatal(err)
	}
	want := pvnet.FlowHash{Type: pvnet.HashIPv6TCP, Value: 0xfedcba98}
	for _, size := range []int{60, 1500, 9000} {
		for _, hashed := range []bool{true, false} {
			var frames [3]pvnet.Frame // the second one has a hash
			if n, err := tx.AllocWait(frames[:], size); n != 3 || err != nil {
				t.Fatal(n, err)
			}
			for i := range frames {
				frames[i].CopyFrom(ipv4(6, uint32(i), size))
			}
			if err := frames[1].SetHash(want); err != nil {
				t.Fatal(err)
			}
			if h, ok := frames[1].Hash(); h != want || !ok {
				t.Errorf("%+v, %v", h, ok)
			}
			if !hashed {
				frames[1].ClearHash()
			}
			if n, err := tx.SendWait(frames[:]); n != 3 || err != nil {
				t.Fatal(n, err)
			}
			for i := range frames {
				a := wait(t, in)
				if a.hashed != (hashed && i == 1) || a.hashed && a.hash != want || a.queue != 1 || !bytes.Equal(a.bytes, ipv4(6, uint32(i), size)) {
					t.Errorf("frame %d of %d bytes came on queue %d with %+v, %v", i, size, a.queue, a.hash, a.hashed)
				}
			}
			if err := frames[1].SetHash(want); !errors.Is(err, pvnet.ErrStale) {
				t.Errorf("SetHash on a frame that was sent: %v", err)
			}
			if _, ok := frames[1].Hash(); ok {
				t.Error("a frame that was sent has a hash")
			}
		}
	}
	var f [1]pvnet.Frame
	tx.AllocWait(f[:], 60)
	if err := f[0].SetHash(pvnet.FlowHash{Type: 4}); !errors.Is(err, pvnet.ErrOffload) {
		t.Errorf("an undefined type: %v", err)
	}
	f[0].Retain()
	if err := f[0].SetHash(want); !errors.Is(err, pvnet.ErrShared) {
		t.Errorf("a frame with two holders: %v", err)
	}
	f[0].Release()
	f[0].Release()
}
