package forward_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

func newHub(t testing.TB, guests int, front pvnet.Config, cfg pvnet.ServeConfig) *pvnettest.Hub {
	t.Helper()
	return pvnettest.NewHub(t, guests, toolstack.Vif{}, func(int) pvnet.Config { return front }, cfg)
}

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

// join runs Join until the test ends, and returns what it returns.
func join(t testing.TB, ctx context.Context, a, b *pvnet.Device) <-chan error {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	ended, done := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(done)
		ended <- forward.Join(ctx, a, b)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return ended
}

// listen returns copies of what the device receives.
func listen(t testing.TB, dev *pvnet.Device) <-chan []byte {
	c, done := make(chan []byte, 4096), make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
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
	t.Cleanup(func() { cancel(); <-done })
	return c
}

func ownTX(t testing.TB, dev *pvnet.Device, i int) *pvnet.TX {
	t.Helper()
	tx, err := dev.OwnTX(i)
	if err != nil {
		t.Fatal(err)
	}
	tx.SetDeadline(time.Now().Add(labtest.Limit))
	return tx
}

func ownRX(t testing.TB, dev *pvnet.Device, i int) *pvnet.RX {
	t.Helper()
	rx, err := dev.OwnRX(i)
	if err != nil {
		t.Fatal(err)
	}
	rx.SetDeadline(time.Now().Add(labtest.Limit))
	return rx
}

func newSender(t testing.TB, dev *pvnet.Device, cfg forward.Config) *forward.Sender {
	t.Helper()
	s, err := forward.NewSender(dev, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newInput(t testing.TB, s *forward.Sender, src *forward.Source) *forward.Input {
	t.Helper()
	in, err := s.Input(src)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// packet makes an Ethernet frame of an unknown type. Its bytes depend on its number and its
// length.
func packet(size, number int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i*7 + i>>8 + number)
	}
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5})
	if size >= 18 {
		binary.BigEndian.PutUint32(b[14:], uint32(number))
	}
	return b
}

func numberOf(b []byte) int { return int(binary.BigEndian.Uint32(b[14:])) }

// udp makes a UDP packet of a flow, with a number in its payload.
func udp(flow, number int) []byte {
	b := make([]byte, 14+20+8+8)
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0})
	header.IPv4(b[14:]).Encode(&header.IPv4Fields{TotalLength: uint16(len(b) - 14), TTL: 64, Protocol: 17})
	copy(b[26:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	header.IPv4(b[14:]).SetChecksum(^header.IPv4(b[14:]).CalculateChecksum())
	header.UDP(b[34:]).Encode(&header.UDPFields{SrcPort: uint16(1000 + flow), DstPort: 53, Length: 16})
	binary.BigEndian.PutUint32(b[42:], uint32(flow))
	binary.BigEndian.PutUint32(b[46:], uint32(number))
	return b
}

// tcp makes a TCP segment of so many bytes of payload, with the sum of the pseudo-header in
// its checksum field.
func tcp(payload int) []byte {
	b := make([]byte, 14+40+payload)
	for i := range b {
		b[i] = byte(i*3 + i>>8)
	}
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0})
	ip := header.IPv4(b[14:])
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(b) - 14), TTL: 64, Protocol: 6})
	copy(b[26:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	ip.SetChecksum(^ip.CalculateChecksum())
	seg := header.TCP(b[34:])
	seg.Encode(&header.TCPFields{SrcPort: 1, DstPort: 2, SeqNum: 1000, DataOffset: 20, Flags: header.TCPFlagAck, WindowSize: 5})
	seg.SetChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(20+payload)))
	return b
}

// payloadOf returns the payload of a TCP segment whose checksums are correct.
func payloadOf(b []byte) ([]byte, error) {
	ip := header.IPv4(b[14:])
	if !ip.IsValid(len(b)-14) || !ip.IsChecksumValid() {
		return nil, errors.New("a bad IP header")
	}
	seg := header.TCP(ip.Payload())
	if !seg.IsChecksumValid(ip.SourceAddress(), ip.DestinationAddress(), checksum.Checksum(seg.Payload(), 0), uint16(len(seg.Payload()))) {
		return nil, errors.New("a wrong TCP checksum")
	}
	return seg.Payload(), nil
}

func TestJoinMovesFramesBothWays(t *testing.T) {
	sizes := []int{14, 15, 60, 64, 1514, 1518, 4096, 4097, 9014, 9018}
	run := func(t *testing.T, a, b, farA, farB *pvnet.Device) {
		ended := join(t, context.Background(), a, b)
		for _, way := range []struct{ from, to *pvnet.Device }{{farA, farB}, {farB, farA}} {
			got := listen(t, way.to)
			for i := range 300 {
				if _, err := way.from.Write(packet(sizes[i%len(sizes)], i)); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 300 {
				want := packet(sizes[i%len(sizes)], i)
				if b := next(t, got); string(b) != string(want) {
					t.Fatalf("frame %d: %d bytes, want %d, or other ones", i, len(b), len(want))
				}
			}
		}
		a.Disconnect()
		if err := next(t, ended); err != nil {
			t.Errorf("Join returned %v after Disconnect", err)
		}
	}
	mtu := toolstack.Vif{MTU: 9000}
	t.Run("backends", func(t *testing.T) {
		h := pvnettest.NewHub(t, 2, mtu, func(int) pvnet.Config { return pvnet.Config{} }, pvnet.ServeConfig{})
		run(t, h.Backs[0], h.Backs[1], h.Fronts[0], h.Fronts[1])
	})
	t.Run("frontends", func(t *testing.T) {
		v, w := pvnettest.New(t, mtu, pvnet.Config{}, pvnet.Config{}), pvnettest.New(t, mtu, pvnet.Config{}, pvnet.Config{})
		run(t, v.Front, w.Front, v.Back, w.Back)
	})
	t.Run("lent pages", func(t *testing.T) {
		h := pvnettest.NewHub(t, 2, mtu, func(int) pvnet.Config { return pvnet.Config{StaticGrants: true} },
			pvnet.ServeConfig{Config: pvnet.Config{StaticGrants: true, LendRx: true}})
		for _, b := range h.Backs {
			until(t, "static grants", func() bool { return b.Features()&telemetry.FeatureStaticGrants != 0 })
		}
		run(t, h.Backs[0], h.Backs[1], h.Fronts[0], h.Fronts[1])
	})
}

func TestJoinSaysWhyItEnds(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{})
	if err := forward.Join(context.Background(), h.Backs[0], h.Backs[0]); err == nil {
		t.Error("a device was joined to itself")
	}
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(context.Background())
	ended := join(t, ctx, h.Backs[0], h.Backs[1])
	cancel(why)
	if err := next(t, ended); err != why {
		t.Errorf("Join returned %v, want the cause of its context", err)
	}
	if err := forward.Join(context.Background(), h.Backs[0], h.Backs[1]); !errors.Is(err, pvnet.ErrOwned) {
		t.Errorf("a second Join returned %v", err)
	}
}

// A device may end just before it is joined. That is no error, as it is none a moment later.
func TestJoinTakesADeviceThatHasEnded(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{})
	dev := h.Backs[0]
	h.Unplug(0)
	if err := forward.Join(context.Background(), dev, h.Backs[1]); err != nil {
		t.Errorf("Join of an ended vif and another returned %v", err)
	}
	h = newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{})
	dev = h.Backs[0]
	h.Unplug(0)
	if err := forward.Join(context.Background(), h.Backs[1], dev); err != nil {
		t.Errorf("Join of a vif and an ended one returned %v", err)
	}
}

// What waits for an end that takes nothing does not keep Join from ending.
func TestJoinEndsWhileFramesWait(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
	ctx, cancel := context.WithCancel(context.Background())
	ended := join(t, ctx, h.Backs[0], h.Backs[1])
	tx := ownTX(t, h.Fronts[0], 0)
	flood(t, tx, 1500)
	until(t, "a full ring", func() bool { return h.Backs[1].Stats().TX.Get(telemetry.RingFull) > 0 })
	cancel()
	if err := next(t, ended); err != context.Canceled {
		t.Error(err)
	}
}

// flood sends frames until the ring is full and nobody takes any more.
func flood(t testing.TB, tx *pvnet.TX, size int) (sent int) {
	t.Helper()
	var frames [32]pvnet.Frame
	for idle := 0; idle < 50; {
		n := tx.AllocSize(frames[:], size)
		for i := range frames[:n] {
			frames[i].CopyFrom(packet(size, sent+i))
		}
		k, err := tx.Send(frames[:n])
		if err != nil && err != pvnet.ErrFull {
			t.Fatal(err)
		}
		for i := k; i < n; i++ {
			frames[i].Release()
		}
		if sent += k; k > 0 {
			idle = 0
		} else {
			idle++
			time.Sleep(time.Millisecond)
		}
	}
	return sent
}

// A frame keeps its GSO on the way to an end that takes it, and is cut for one that does not.
// Either way the far end gets all bytes, with correct checksums.
func TestJoinKeepsOffloads(t *testing.T) {
	const payload, mss = 20000, 1400
	for _, takes := range []bool{true, false} {
		t.Run(fmt.Sprintf("taken=%t", takes), func(t *testing.T) {
			h := pvnettest.NewHub(t, 2, toolstack.Vif{}, func(i int) pvnet.Config { return pvnet.Config{Offload: i == 0 || takes} },
				pvnet.ServeConfig{Config: pvnet.Config{Offload: true}})
			join(t, context.Background(), h.Backs[0], h.Backs[1])
			tx, rx := ownTX(t, h.Fronts[0], 0), ownRX(t, h.Fronts[1], 0)
			whole := tcp(payload)
			var f [1]pvnet.Frame
			if _, err := tx.AllocWait(f[:], len(whole)); err != nil {
				t.Fatal(err)
			}
			f[0].CopyFrom(whole)
			if err := f[0].SetGSO(pvnet.GSO{Type: pvnet.GSOTCPv4, Size: mss}); err != nil {
				t.Fatal(err)
			}
			if _, err := tx.SendWait(f[:]); err != nil {
				t.Fatal(err)
			}
			var got []byte
			count := 0
			for len(got) < payload {
				var in [32]pvnet.Frame
				n, err := rx.Receive(in[:])
				if err != nil {
					t.Fatal(err)
				}
				for i := range in[:n] {
					if takes {
						if g := in[i].GSO(); g.Size != mss || in[i].Checksum() != pvnet.ChecksumPartial {
							t.Errorf("GSO %v, checksum state %d", g, in[i].Checksum())
						}
						in[i].CompleteChecksum()
					}
					b := make([]byte, in[i].Len())
					in[i].CopyTo(b)
					part, err := payloadOf(b)
					if err != nil {
						t.Fatal(err)
					}
					got = append(got, part...)
					count++
				}
				rx.Release(in[:n])
			}
			if string(got) != string(whole[54:]) {
				t.Error("other bytes arrived")
			}
			if want := (payload + mss - 1) / mss; !takes && count != want || takes && count != 1 {
				t.Errorf("%d frames arrived", count)
			}
		})
	}
}

// Frames of a flow stay in order over several queues, and use more than one.
func TestJoinKeepsTheOrderOfFlows(t *testing.T) {
	const flows, each = 16, 200
	h := newHub(t, 2, pvnet.Config{Queues: 4}, pvnet.ServeConfig{Config: pvnet.Config{Queues: 4}})
	join(t, context.Background(), h.Backs[0], h.Backs[1])
	got := listen(t, h.Fronts[1])
	go func() {
		for i := range each {
			var batch [][]byte
			for flow := range flows {
				batch = append(batch, udp(flow, i))
			}
			if _, err := h.Fronts[0].WriteBatch(batch); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	var seen [flows]int
	for range flows * each {
		b := next(t, got)
		flow, number := binary.BigEndian.Uint32(b[42:]), int(binary.BigEndian.Uint32(b[46:]))
		if seen[flow] != number {
			t.Fatalf("flow %d: frame %d came, want %d", flow, number, seen[flow])
		}
		seen[flow]++
	}
	if n := h.Fronts[1].Active(); n != 4 {
		t.Fatalf("%d queues", n)
	}
	used := 0
	for i := range 4 {
		if h.Backs[1].Stats().Queues[i].TX.Get(telemetry.Packets) > 0 {
			used++
		}
	}
	if used < 2 {
		t.Errorf("%d queues were used", used)
	}
}

// A link that goes down and comes back loses nothing while the policy is to wait.
func TestJoinWaitsForALink(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{})
	join(t, context.Background(), h.Backs[0], h.Backs[1])
	h.Disconnect(1)
	const frames = 100
	for i := range frames {
		if _, err := h.Fronts[0].Write(packet(100, i)); err != nil {
			t.Fatal(err)
		}
	}
	h.Connect(1)
	got := listen(t, h.Fronts[1])
	for i := range frames {
		if n := numberOf(next(t, got)); n != i {
			t.Fatalf("frame %d came, want %d", n, i)
		}
	}
}

// A receiver takes frames of a vif by itself and gives them to inputs.
type receiver struct {
	tx *pvnet.TX // the guest's
	rx *pvnet.RX // the backend's
}

func newReceiver(t testing.TB, front, back *pvnet.Device) *receiver {
	return &receiver{ownTX(t, front, 0), ownRX(t, back, 0)}
}

// frames has n frames of so many bytes received, numbered from first on.
func (r *receiver) frames(t testing.TB, n, size, first int) []pvnet.Frame {
	t.Helper()
	out := make([]pvnet.Frame, n)
	if k, err := r.tx.AllocWait(out, size); k != n || err != nil {
		t.Fatal(k, err)
	}
	for i := range out {
		out[i].CopyFrom(packet(size, first+i))
	}
	if k, err := r.tx.SendWait(out); k != n || err != nil {
		t.Fatal(k, err)
	}
	for have := 0; have < n; {
		k, err := r.rx.Receive(out[have:])
		if err != nil {
			t.Fatal(err)
		}
		have += k
	}
	return out
}

// fill gives frames to an input until its queue is full.
func (r *receiver) fill(t testing.TB, in *forward.Input, size int) (given int) {
	t.Helper()
	for {
		frames := r.frames(t, 16, size, given)
		lost, err := in.Send(frames)
		if err != nil {
			t.Fatal(err)
		}
		given += len(frames)
		if lost > 0 {
			return given
		}
		if given > 10000 {
			t.Fatal("the queue is never full")
		}
	}
}

// total returns how many frames the counts have.
func total(s forward.Stats) int { return int(s.Sent+s.Lost()) + s.Waiting }

// A guest that takes no frames fills only its own queues: those of other guests, from the same
// source, are as before. When it takes frames again, it gets those that waited.
func TestAStalledGuestHoldsUpNobody(t *testing.T) {
	h := newHub(t, 3, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
	r := newReceiver(t, h.Fronts[0], h.Backs[0])
	src := forward.NewSource(0)
	stalled := newSender(t, h.Backs[1], forward.Config{})
	in := newInput(t, stalled, src)
	given := r.fill(t, in, 1000)
	st := in.Stats()
	if total(st) != given || st.Full == 0 || st.Waiting < 64 {
		t.Errorf("%d given: %+v", given, st)
	}
	if held := src.Held(); held != st.Waiting || held > 64+forward.Batch {
		t.Errorf("%d pages are held, %d frames wait", held, st.Waiting)
	}
	live := newInput(t, newSender(t, h.Backs[2], forward.Config{}), src)
	got := listen(t, h.Fronts[2])
	for i := range 20 {
		if lost, err := live.Send(r.frames(t, 16, 1000, 16*i)); lost != 0 || err != nil {
			t.Fatal(lost, err)
		}
		for k := range 16 {
			if n := numberOf(next(t, got)); n != 16*i+k {
				t.Fatalf("frame %d came, want %d", n, 16*i+k)
			}
		}
	}
	late := listen(t, h.Fronts[1])
	for i := range int(st.Sent) + st.Waiting {
		if n := numberOf(next(t, late)); n != i {
			t.Fatalf("frame %d came, want %d", n, i)
		}
	}
	until(t, "the last count", func() bool { return in.Stats().Waiting == 0 && src.Held() == 0 })
}

// Guests that take nothing cannot use up a source's pages: each queue gets fewer than are still
// free, so there are always some for the next one.
func TestStalledGuestsLeaveASourcePagesForOthers(t *testing.T) {
	const stalled, pages = 3, 256
	h := newHub(t, stalled+1, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
	r := newReceiver(t, h.Fronts[0], h.Backs[0])
	src := forward.NewSource(pages)
	for i := range stalled {
		in := newInput(t, newSender(t, h.Backs[1+i], forward.Config{Frames: 4096}), src)
		r.fill(t, in, 500)
		// 16 are next, those for which the ring had no room, and the others are in the queue.
		if n := in.Stats().Waiting; n <= 16 || n > 16+pages/2 {
			t.Errorf("%d frames wait for stalled guest %d", n, i)
		}
	}
	if held := src.Held(); held > pages {
		t.Errorf("%d pages are held", held)
	}
}

// Frames for a queue that the next connection does not have are dropped, since nobody will ever
// take them.
func TestQueuesThatAreGone(t *testing.T) {
	queues := 4
	h := pvnettest.NewHub(t, 2, toolstack.Vif{}, func(guest int) pvnet.Config { return pvnet.Config{Queues: []int{1, queues}[guest]} },
		pvnet.ServeConfig{Config: pvnet.Config{Queues: 4}, DrainTimeout: -1})
	r := newReceiver(t, h.Fronts[0], h.Backs[0])
	src := forward.NewSource(0)
	in := newInput(t, newSender(t, h.Backs[1], forward.Config{Full: forward.Wait}), src)
	given := 0
	for in.Stats().Waiting < 80 { // of 16 flows, over 4 queues: each queue has room for more than that
		frames := r.frames(t, 16, 50, 0)
		for flow := range frames {
			frames[flow].CopyFrom(udp(flow, given))
		}
		in.Send(frames)
		given += 16
	}
	h.Disconnect(1)
	queues = 1
	h.Connect(1)
	listen(t, h.Fronts[1])
	until(t, "an empty queue", func() bool { return in.Stats().Waiting == 0 && src.Held() == 0 })
	if st := in.Stats(); st.Down == 0 || total(st) != given {
		t.Errorf("%d given: %+v", given, st)
	}
}

// Inputs with frames waiting take turns by bytes, whoever came first and whatever the size.
func TestInputsTakeTurnsByBytes(t *testing.T) {
	h := newHub(t, 3, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
	long, short := newReceiver(t, h.Fronts[0], h.Backs[0]), newReceiver(t, h.Fronts[1], h.Backs[1])
	s := newSender(t, h.Backs[2], forward.Config{})
	first, second := newInput(t, s, forward.NewSource(0)), newInput(t, s, forward.NewSource(0))
	long.fill(t, first, 1500)
	sent := int(first.Stats().Sent)
	if lost, err := second.Send(short.frames(t, 60, 100, 1<<20)); lost != 0 || err != nil {
		t.Fatal(lost, err)
	}
	got := listen(t, h.Fronts[2])
	before, between := 0, 0 // long frames before the first short one, and before the last
	for shorts := 0; shorts < 60; {
		switch n := numberOf(next(t, got)); {
		case n >= 1<<20:
			shorts++
		case shorts == 0:
			before++
		default:
			between++
		}
	}
	// Those in the ring come first, then a batch that was next, and at most one turn.
	if before < sent || before > sent+forward.Batch+3 {
		t.Errorf("%d long frames came before the first short one, %d of which were in the ring", before, sent)
	}
	// 60 short frames are two turns, and a turn is three long ones at most.
	if between == 0 || between > 6 {
		t.Errorf("%d long frames came between 60 short ones", between)
	}
}

func TestDropWhileTheLinkIsDown(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{})
	r := newReceiver(t, h.Fronts[0], h.Backs[0])
	src := forward.NewSource(0)
	in := newInput(t, newSender(t, h.Backs[1], forward.Config{}), src)
	h.Disconnect(1)
	if lost, err := in.Send(r.frames(t, 20, 100, 0)); lost != 20 || err != nil {
		t.Errorf("%d frames lost, %v", lost, err)
	}
	if st := in.Stats(); st.Down != 20 || src.Held() != 0 {
		t.Errorf("%+v, %d pages held", st, src.Held())
	}
	h.Connect(1)
	got := listen(t, h.Fronts[1])
	if lost, err := in.Send(r.frames(t, 20, 100, 0)); lost != 0 || err != nil {
		t.Errorf("%d frames lost, %v", lost, err)
	}
	for range 20 {
		next(t, got)
	}
}

// Frames that wait when the link goes down are dropped, unless the policy is to wait.
func TestALinkThatGoesDownWhileFramesWait(t *testing.T) {
	for _, policy := range []forward.Policy{forward.Drop, forward.Wait} {
		t.Run(policy.String(), func(t *testing.T) {
			h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
			r := newReceiver(t, h.Fronts[0], h.Backs[0])
			src := forward.NewSource(0)
			s := newSender(t, h.Backs[1], forward.Config{Full: policy})
			in := newInput(t, s, src)
			given := 0
			for in.Stats().Waiting < 40 {
				in.Send(r.frames(t, 8, 100, given))
				given += 8
			}
			waited := in.Stats().Waiting
			h.Disconnect(1)
			if policy == forward.Drop {
				until(t, "an empty queue", func() bool { return in.Stats().Waiting == 0 && src.Held() == 0 })
				if st := in.Stats(); int(st.Down) != waited {
					t.Errorf("%d frames waited: %+v", waited, st)
				}
			}
			h.Connect(1)
			got := listen(t, h.Fronts[1])
			if policy == forward.Wait {
				for range waited {
					next(t, got)
				}
			}
			if lost, err := in.Send(r.frames(t, 8, 100, 1<<20)); lost != 0 || err != nil {
				t.Fatal(lost, err)
			}
			for range 8 {
				if n := numberOf(next(t, got)); n < 1<<20 {
					t.Fatalf("frame %d came, which waited before", n)
				}
			}
			if st := s.Stats(); total(st) != given+8 {
				t.Errorf("%d frames given: %+v", given+8, st)
			}
		})
	}
}

// Whichever end goes while frames wait, their pages come back; the lab checks that none is
// left.
func TestPagesComeBackWhenAnEndGoes(t *testing.T) {
	for _, out := range []bool{true, false} {
		t.Run(fmt.Sprintf("out=%t", out), func(t *testing.T) {
			h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
			r := newReceiver(t, h.Fronts[0], h.Backs[0])
			src := forward.NewSource(0)
			s := newSender(t, h.Backs[1], forward.Config{})
			in := newInput(t, s, src)
			given := r.fill(t, in, 1000)
			if !out {
				h.Unplug(0)
				st := in.Stats() // as long as nothing is received
				got := listen(t, h.Fronts[1])
				for i := range int(st.Sent) + st.Waiting {
					if n := numberOf(next(t, got)); n != i {
						t.Fatalf("frame %d came, want %d", n, i)
					}
				}
				until(t, "an empty queue", func() bool { return src.Held() == 0 })
				return
			}
			h.Unplug(1)
			next(t, s.Done())
			if err := s.Err(); !errors.Is(err, pvnet.ErrDisconnected) {
				t.Errorf("the sender ended with %v", err)
			}
			until(t, "an empty queue", func() bool { st := in.Stats(); return src.Held() == 0 && st.Waiting == 0 && st.Down+st.Ended > 0 }) // the link goes down first
			if lost, err := in.Send(r.frames(t, 4, 100, 0)); lost != 4 || !errors.Is(err, pvnet.ErrDisconnected) {
				t.Errorf("%d frames lost, %v", lost, err)
			}
			if st := s.Stats(); total(st) != given+4 {
				t.Errorf("%d frames given: %+v", given+4, st)
			}
			if _, err := s.Input(src); !errors.Is(err, pvnet.ErrDisconnected) {
				t.Errorf("a new input: %v", err)
			}
		})
	}
}

// A call that waits for room ends with the room, the input and the sender.
func TestWaitingCallsEnd(t *testing.T) {
	for _, end := range []string{"room", "input", "sender", "device"} {
		t.Run(end, func(t *testing.T) {
			h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
			r := newReceiver(t, h.Fronts[0], h.Backs[0])
			src := forward.NewSource(0)
			s := newSender(t, h.Backs[1], forward.Config{Full: forward.Wait, Frames: 8})
			in := newInput(t, s, src)
			for in.Stats().Waiting < 16 { // 8 that are next, since the ring has no room for them, and 8 behind them
				in.Send(r.frames(t, 8, 100, 0))
			}
			type result struct {
				lost int
				err  error
			}
			ended := make(chan result, 1)
			more := r.frames(t, 16, 100, 1<<20)
			go func() {
				lost, err := in.Send(more)
				ended <- result{lost, err}
			}()
			select {
			case r := <-ended:
				t.Fatalf("the call did not wait: %+v", r)
			case <-time.After(20 * time.Millisecond):
			}
			want := result{16, forward.ErrClosed}
			switch end {
			case "room":
				got := listen(t, h.Fronts[1])
				want = result{}
				for n := 0; n != 1<<20+15; n = numberOf(next(t, got)) {
				}
			case "input":
				in.Close()
				in.Close()
			case "sender":
				s.Close()
				s.Close()
			case "device":
				h.Unplug(1)
				if r := next(t, ended); r.lost != 16 || !errors.Is(r.err, pvnet.ErrDisconnected) {
					t.Errorf("the call returned %+v", r)
				}
				return
			}
			if r := next(t, ended); r != want {
				t.Errorf("the call returned %+v, want %+v", r, want)
			}
		})
	}
}

// What waits in an input that is closed is dropped at once, but for the batch that is next. Frames
// of other inputs stay.
func TestAClosedInputDropsWhatWaits(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
	r := newReceiver(t, h.Fronts[0], h.Backs[0])
	src := forward.NewSource(0)
	s := newSender(t, h.Backs[1], forward.Config{})
	first, second := newInput(t, s, src), newInput(t, s, src)
	given := r.fill(t, first, 100)
	if lost, err := second.Send(r.frames(t, 16, 100, 1<<20)); lost != 0 || err != nil {
		t.Fatal(lost, err)
	}
	first.Close()
	st := first.Stats()
	if st.Waiting > forward.Batch || st.Ended < 64 || total(st) != given || src.Held() != st.Waiting+16 {
		t.Errorf("%d frames given, %d pages held: %+v", given, src.Held(), st)
	}
	if lost, err := first.Send(r.frames(t, 1, 100, 0)); lost != 1 || err != forward.ErrClosed {
		t.Errorf("%d lost, %v", lost, err)
	}
	got := listen(t, h.Fronts[1])
	for want := 0; want < 16; {
		if n := numberOf(next(t, got)); n >= 1<<20 {
			if n != 1<<20+want {
				t.Errorf("frame %d came, want %d", n-1<<20, want)
			}
			want++
		}
	}
}

// A frame that the vif cannot send costs that frame alone, and is counted at the device too.
func TestBadFramesAreRefusedAlone(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{})
	r := newReceiver(t, h.Fronts[0], h.Backs[0])
	s := newSender(t, h.Backs[1], forward.Config{})
	in := newInput(t, s, forward.NewSource(0))
	got := listen(t, h.Fronts[1])
	frames := r.frames(t, 6, 100, 0)
	frames[1].SetChecksum(pvnet.ChecksumPartial) // of a frame without IP
	if err := frames[3].Release(); err != nil {
		t.Fatal(err)
	}
	frames[4].Truncate(3)
	if lost, err := in.Send(frames); lost != 0 || err != nil {
		t.Errorf("%d frames lost, %v", lost, err)
	}
	for _, want := range []int{0, 2, 5} {
		if n := numberOf(next(t, got)); n != want {
			t.Errorf("frame %d came, want %d", n, want)
		}
	}
	if st := in.Stats(); st.Refused != 3 || st.Sent != 3 {
		t.Errorf("%+v", st)
	}
	until(t, "the device's count", func() bool { return h.Backs[1].Stats().TX.Get(telemetry.Undelivered) == 3 })
}

// Frames beyond the vif's MTU are dropped, those of its size with a tag are not. The segments
// of a long frame count, not the frame.
func TestLongFramesAreDropped(t *testing.T) {
	h := pvnettest.NewHub(t, 2, toolstack.Vif{}, func(int) pvnet.Config { return pvnet.Config{Offload: true} },
		pvnet.ServeConfig{Config: pvnet.Config{Offload: true}})
	r := newReceiver(t, h.Fronts[0], h.Backs[0])
	in := newInput(t, newSender(t, h.Backs[1], forward.Config{}), forward.NewSource(0))
	got := listen(t, h.Fronts[1])
	for _, c := range []struct {
		size int
		fits bool
	}{{1518, true}, {1519, false}, {4000, false}, {60, true}} {
		want := 1
		if c.fits {
			want = 0
		}
		if lost, err := in.Send(r.frames(t, 1, c.size, 0)); lost != want || err != nil {
			t.Errorf("%d bytes: %d lost, %v", c.size, lost, err)
		}
		if c.fits && len(next(t, got)) != c.size {
			t.Errorf("%d bytes: another frame came", c.size)
		}
	}
	for _, c := range []struct {
		mss  int
		lost int
	}{{1460, 0}, {1464, 0}, {1465, 1}, {8000, 1}} {
		whole := tcp(9000)
		var f [1]pvnet.Frame
		if _, err := r.tx.AllocWait(f[:], len(whole)); err != nil {
			t.Fatal(err)
		}
		f[0].CopyFrom(whole)
		if err := f[0].SetGSO(pvnet.GSO{Type: pvnet.GSOTCPv4, Size: uint16(c.mss)}); err != nil {
			t.Fatal(err)
		}
		r.tx.SendWait(f[:])
		if _, err := r.rx.Receive(f[:]); err != nil {
			t.Fatal(err)
		}
		if lost, err := in.Send(f[:]); lost != c.lost || err != nil {
			t.Errorf("segments of %d bytes: %d lost, %v", c.mss, lost, err)
		}
		if c.lost == 0 {
			next(t, got)
		}
	}
	if st := in.Stats(); st.Oversize != 4 {
		t.Errorf("%+v", st)
	}
}

// A frame with several holders goes to several vifs without a copy of its own for each.
func TestSharedFramesReachEveryVif(t *testing.T) {
	h := newHub(t, 4, pvnet.Config{}, pvnet.ServeConfig{})
	r := newReceiver(t, h.Fronts[0], h.Backs[0])
	src := forward.NewSource(0)
	var ins []*forward.Input
	var got []<-chan []byte
	for i := range 3 {
		ins = append(ins, newInput(t, newSender(t, h.Backs[1+i], forward.Config{}), src))
		got = append(got, listen(t, h.Fronts[1+i]))
	}
	frames := r.frames(t, 10, 1000, 0)
	for i := range frames {
		frames[i].Retain()
		frames[i].Retain()
	}
	for _, in := range ins {
		var room [10]pvnet.Frame
		copy(room[:], frames)
		if lost, err := in.Send(room[:]); lost != 0 || err != nil {
			t.Fatal(lost, err)
		}
	}
	for i := range 10 {
		for _, c := range got {
			if b := next(t, c); string(b) != string(packet(1000, i)) {
				t.Errorf("frame %d has other bytes", i)
			}
		}
	}
	for i := range frames {
		if frames[i].Valid() {
			t.Errorf("frame %d is still held", i)
		}
	}
}

// A receive is Receive, or that of a pool.
type receive func(context.Context, *pvnet.Device, func(int, []pvnet.Frame) (int, error)) error

// eachReceive runs a test with each way to receive from the vifs of a hub.
func eachReceive(t *testing.T, guests int, serve pvnet.ServeConfig, test func(*testing.T, *pvnettest.Hub, receive)) {
	t.Run("goroutines", func(t *testing.T) { test(t, newHub(t, guests, pvnet.Config{}, serve), forward.Receive) })
	t.Run("pool", func(t *testing.T) {
		h := newHub(t, guests, pvnet.Config{}, serve)
		test(t, h, newPool(t, h, 1).Receive)
	})
}

func newPool(t testing.TB, h *pvnettest.Hub, goroutines int) *forward.Pool {
	t.Helper()
	p, err := forward.NewPool(h.Driver, goroutines)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip("this system cannot wait for many events:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// Receive goes on when all pages that it receives into have come back.
func TestReceiveWaitsForPages(t *testing.T) {
	eachReceive(t, 1, pvnet.ServeConfig{Config: pvnet.Config{Buffers: 17}}, receiveWaitsForPages)
}

func receiveWaitsForPages(t *testing.T, h *pvnettest.Hub, receive receive) {
	var mu sync.Mutex
	var held []pvnet.Frame
	seen := 0
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- receive(ctx, h.Backs[0], func(_ int, frames []pvnet.Frame) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			held = append(held, frames...)
			seen += len(frames)
			return 0, nil
		})
	}()
	for i := range 60 {
		if _, err := h.Fronts[0].Write(packet(100, i)); err != nil {
			t.Fatal(err)
		}
	}
	for want := 17; want < 60; want += 17 {
		until(t, "the next frames", func() bool { mu.Lock(); defer mu.Unlock(); return seen >= want })
		mu.Lock()
		for i := range held {
			held[i].Release()
		}
		held = nil
		mu.Unlock()
	}
	until(t, "the last frames", func() bool { mu.Lock(); defer mu.Unlock(); return seen == 60 })
	cancel()
	if err := next(t, ended); err != context.Canceled {
		t.Error(err)
	}
	for i := range held {
		held[i].Release()
	}
}

// What fn loses is counted as undelivered, and its error ends Receive.
func TestReceiveCountsAndEnds(t *testing.T) {
	eachReceive(t, 1, pvnet.ServeConfig{}, receiveCountsAndEnds)
}

func receiveCountsAndEnds(t *testing.T, h *pvnettest.Hub, receive receive) {
	why := errors.New("enough")
	ended := make(chan error, 1)
	go func() {
		ended <- receive(context.Background(), h.Backs[0], func(_ int, frames []pvnet.Frame) (lost int, err error) {
			for i := range frames {
				b := frames[i].Bytes()
				if numberOf(b) == 9 {
					err = why
				}
				frames[i].Release()
			}
			return len(frames), err
		})
	}()
	for i := range 10 {
		if _, err := h.Fronts[0].Write(packet(100, i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := next(t, ended); err != why {
		t.Errorf("Receive returned %v", err)
	}
	until(t, "the count", func() bool { return h.Backs[0].Stats().RX.Get(telemetry.Undelivered) == 10 })
	if err := receive(context.Background(), h.Backs[0], nil); !errors.Is(err, pvnet.ErrOwned) {
		t.Errorf("a second Receive returned %v", err)
	}
}

// A device may end just before its receiver begins. That is no error, as it is none a moment later.
func TestReceiveTakesADeviceThatHasEnded(t *testing.T) {
	eachReceive(t, 1, pvnet.ServeConfig{}, func(t *testing.T, h *pvnettest.Hub, receive receive) {
		dev := h.Backs[0]
		h.Unplug(0)
		if err := receive(context.Background(), dev, nil); err != nil {
			t.Errorf("Receive returned %v", err)
		}
	})
}

// A pool receives for many vifs. One that goes, by whatever way, leaves the others as they are.
func TestAPoolReceivesForMany(t *testing.T) {
	const guests = 4
	h := newHub(t, guests, pvnet.Config{}, pvnet.ServeConfig{})
	p := newPool(t, h, 2)
	got := make([]chan int, guests)
	ended := make([]chan error, guests)
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(context.Background())
	for i := range guests {
		got[i], ended[i] = make(chan int, 100), make(chan error, 1)
		c := context.Background()
		if i == 1 {
			c = ctx
		}
		go func() {
			ended[i] <- p.Receive(c, h.Backs[i], func(_ int, frames []pvnet.Frame) (int, error) {
				for k := range frames {
					got[i] <- numberOf(frames[k].Bytes())
					frames[k].Release()
				}
				return 0, nil
			})
		}()
	}
	say := func(number int, guests ...int) {
		t.Helper()
		for _, i := range guests {
			if _, err := h.Fronts[i].Write(packet(100, number)); err != nil {
				t.Fatal(err)
			}
			if n := next(t, got[i]); n != number {
				t.Errorf("guest %d: frame %d came, want %d", i, n, number)
			}
		}
	}
	say(1, 0, 1, 2, 3)
	cancel(why)
	if err := next(t, ended[1]); err != why {
		t.Errorf("a cancelled Receive returned %v", err)
	}
	say(2, 0, 2, 3)
	h.Unplug(2)
	if err := next(t, ended[2]); err != nil {
		t.Errorf("that of a device which ended returned %v", err)
	}
	h.Disconnect(3)
	h.Connect(3)
	say(3, 0, 3)
	p.Close()
	for _, i := range []int{0, 3} {
		if err := next(t, ended[i]); err != forward.ErrClosed {
			t.Errorf("after Close it returned %v", err)
		}
	}
	h.Plug(2)
	if err := p.Receive(context.Background(), h.Backs[2], nil); err != forward.ErrClosed {
		t.Errorf("a later Receive returned %v", err)
	}
	for _, n := range []int{0, 2000} {
		if _, err := forward.NewPool(h.Driver, n); err == nil {
			t.Errorf("a pool of %d goroutines was made", n)
		}
	}
}

// One input whose queue is always full leaves the others their share of what the vif takes.
func TestAFlooderLeavesOthersTheirShare(t *testing.T) {
	const others, size, each = 3, 1000, 48
	h := newHub(t, others+2, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
	s := newSender(t, h.Backs[others+1], forward.Config{Frames: 256})
	flooding := newReceiver(t, h.Fronts[others], h.Backs[others])
	flooder := newInput(t, s, forward.NewSource(512))
	flooding.fill(t, flooder, size)
	for i := range others {
		r := newReceiver(t, h.Fronts[i], h.Backs[i])
		if lost, err := newInput(t, s, forward.NewSource(0)).Send(r.frames(t, each, size, (1+i)<<20)); lost != 0 || err != nil {
			t.Fatal(lost, err)
		}
	}
	got := listen(t, h.Fronts[others+1])
	var seen [others + 1]int // 0: the flooder's, from the first frame of another on
	for seen[1] < each || seen[2] < each || seen[3] < each {
		from := numberOf(next(t, got)) >> 20
		if from > 0 || seen[1]+seen[2]+seen[3] > 0 {
			seen[from]++
		}
	}
	// A turn is four frames of this size at most, so the flooder may be one ahead.
	if most := each + 4; seen[0] > most {
		t.Errorf("the flooder got %d frames through while each of the others got %d", seen[0], each)
	}
}

func TestBadConfigsAreRefused(t *testing.T) {
	h := newHub(t, 1, pvnet.Config{}, pvnet.ServeConfig{})
	for _, c := range []forward.Config{{Full: 7}, {Frames: -1}, {Frames: 1 << 20}} {
		if _, err := forward.NewSender(h.Backs[0], c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
	newSender(t, h.Backs[0], forward.Config{}) // nothing was owned by those that failed
	if _, err := forward.NewSender(h.Backs[0], forward.Config{}); !errors.Is(err, pvnet.ErrOwned) {
		t.Errorf("a second sender: %v", err)
	}
}

// Many goroutines share a sender while inputs are closed. Every frame is sent, lost or counted,
// and none is left.
func TestManyInputsAtOnce(t *testing.T) {
	for _, policy := range []forward.Policy{forward.Drop, forward.Wait} {
		t.Run(policy.String(), func(t *testing.T) {
			const guests, rounds = 4, 60
			h := newHub(t, guests+1, pvnet.Config{}, pvnet.ServeConfig{})
			s := newSender(t, h.Backs[guests], forward.Config{Full: policy, Frames: 16})
			done := make(chan struct{})
			go func() {
				defer close(done)
				h.Fronts[guests].Listen(context.Background(), func(pvnet.Frame) {})
			}()
			var wg sync.WaitGroup
			var sources [guests]*forward.Source
			var mu sync.Mutex
			given := 0
			for i := range guests {
				r := newReceiver(t, h.Fronts[i], h.Backs[i])
				sources[i] = forward.NewSource(40)
				in := newInput(t, s, sources[i])
				wg.Go(func() {
					for k := range rounds {
						if k%20 == 19 {
							in.Close()
							var err error
							if in, err = s.Input(sources[i]); err != nil {
								t.Error(err)
								return
							}
						}
						in.Send(r.frames(t, 8, 100+100*i, k))
						mu.Lock()
						given += 8
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			until(t, "the last frame", func() bool { return s.Stats().Waiting == 0 })
			for i, src := range sources {
				until(t, fmt.Sprint("no page of source ", i), func() bool { return src.Held() == 0 })
			}
			if st := s.Stats(); total(st) != given || policy == forward.Wait && st.Full != 0 {
				t.Errorf("%d frames given: %+v", given, st)
			}
			h.Fronts[guests].Disconnect()
			<-done
		})
	}
}

func TestForwardingDoesNotAllocate(t *testing.T) {
	for _, queues := range []int{1, 4} {
		t.Run(fmt.Sprintf("queues=%d", queues), func(t *testing.T) {
			cfg := pvnet.Config{Queues: queues}
			h := newHub(t, 2, cfg, pvnet.ServeConfig{Config: cfg})
			var txs []*pvnet.TX
			var rxs, ends []*pvnet.RX
			for q := range queues {
				txs, rxs, ends = append(txs, ownTX(t, h.Fronts[0], q)), append(rxs, ownRX(t, h.Backs[0], q)), append(ends, ownRX(t, h.Fronts[1], q))
			}
			in := newInput(t, newSender(t, h.Backs[1], forward.Config{}), forward.NewSource(0))
			var out, mid, end [forward.Batch]pvnet.Frame
			var samples [forward.Batch][]byte
			for i := range samples {
				samples[i] = udp(i, i)
			}
			cycle := func() {
				n := txs[0].AllocSize(out[:], len(samples[0]))
				for i := range out[:n] {
					out[i].CopyFrom(samples[i])
				}
				if k, err := txs[0].Send(out[:n]); k != n || err != nil || n == 0 {
					t.Fatal(k, n, err)
				}
				for left := n; left > 0; {
					k, err := rxs[0].Poll(mid[:])
					if err != nil {
						t.Fatal(err)
					}
					if lost, err := in.Send(mid[:k]); lost != 0 || err != nil {
						t.Fatal(lost, err)
					}
					left -= k
				}
				for left := n; left > 0; {
					for _, rx := range ends {
						k, err := rx.Poll(end[:])
						if err != nil {
							t.Fatal(err)
						}
						rx.Release(end[:k])
						left -= k
					}
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
