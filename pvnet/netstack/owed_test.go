package netstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A neighbour is the station at the other end of a stack. It says its MAC address when it is
// told to.
type neighbour struct {
	dev *pvnet.Device

	mu     sync.Mutex
	asked  [][]byte // guarded by mu; requests for its address that are not answered
	echoed []byte   // guarded by mu; sequence numbers
}

func neighbourOf(t *testing.T, dev *pvnet.Device) *neighbour {
	n := &neighbour{dev: dev}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		dev.Listen(ctx, n.hear)
	}()
	t.Cleanup(func() {
		stop()
		<-ended
	})
	return n
}

func (n *neighbour) hear(f pvnet.Frame) {
	b := make([]byte, f.Len())
	f.CopyTo(b)
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case binary.BigEndian.Uint16(b[12:]) == 0x0806 && b[21] == 1 && bytes.Equal(b[38:42], stationIP):
		n.asked = append(n.asked, b)
	case binary.BigEndian.Uint16(b[12:]) == 0x0800 && b[23] == 1 && b[34] == 0:
		n.echoed = append(n.echoed, b[41])
	}
}

// say answers what the stack has asked, once it has.
func (n *neighbour) say(t *testing.T) {
	t.Helper()
	var asked [][]byte
	eventually(t, "the stack asks for an address", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		asked = n.asked
		return len(asked) > 0
	})
	for _, b := range asked {
		if _, err := n.dev.Write(arpAnswer(b)); err != nil {
			t.Fatal(err)
		}
	}
}

// requireAnswers waits until the echo requests with these numbers are answered, in this order, and
// no other is.
func (n *neighbour) requireAnswers(t *testing.T, want ...byte) {
	t.Helper()
	got := func() []byte {
		n.mu.Lock()
		defer n.mu.Unlock()
		return slices.Clone(n.echoed)
	}
	eventually(t, "answers come", func() bool { return len(got()) >= len(want) })
	if got := got(); !slices.Equal(got, want) {
		t.Fatalf("answered: %v, want %v", got, want)
	}
}

func (n *neighbour) ping(t *testing.T, seqs ...byte) {
	t.Helper()
	for _, seq := range seqs {
		if _, err := n.dev.Write(request(seq)); err != nil {
			t.Fatal(err)
		}
	}
}

// eventually waits until is reports true.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// held starts a Hold, whose error comes.
func held(s *Stack) <-chan error {
	err := make(chan error, 1)
	go func() { err <- s.Hold(context.Background()) }()
	return err
}

// requireWaiting requires that a Hold does not end by itself.
func requireWaiting(t *testing.T, held <-chan error) {
	t.Helper()
	select {
	case err := <-held:
		t.Fatalf("it is held too early, %v", err)
	case <-time.After(2 * quietMost):
	}
}

func requireHeld(t *testing.T, held <-chan error) {
	t.Helper()
	select {
	case err := <-held:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(limit):
		t.Fatal("it is not held")
	}
}

// patient returns a stack whose Hold waits for answers as long as it takes, and the station at
// the other end.
func patient(t *testing.T) (*Stack, *neighbour, *pvnettest.Wire) {
	w := newWire(t, 1500, pvnet.Config{})
	n := neighbourOf(t, w.Back)
	s := newStack(t, w.Front, Config{Addr: frontIP})
	s.patience = limit
	return s, n, w
}

// Packets that wait for a neighbour's address are answers that the process would take with it.
func TestAHoldWaitsForANeighboursAddress(t *testing.T) {
	s, n, _ := patient(t)
	n.ping(t, 1, 2, 3)
	eventually(t, "they wait", s.resolves)
	hold := held(s)
	requireWaiting(t, hold)
	n.say(t)
	requireHeld(t, hold)
	n.requireAnswers(t, 1, 2, 3)
	n.ping(t, 4)
	s.Resume()
	n.requireAnswers(t, 1, 2, 3, 4)
}

// It may be one of the last frames that needs a neighbour's address.
func TestAHoldReceivesAgainForANeighboursAddress(t *testing.T) {
	s, n, _ := patient(t)
	b := blockStack(s)
	n.ping(t, 1)
	<-b.came
	hold := held(s)
	eventually(t, "the receivers are to rest", s.card.holds.asked.Load)
	close(b.gate)
	n.say(t)
	requireHeld(t, hold)
	n.requireAnswers(t, 1)
}

// logged returns a vif of which the frontend logs to text.
func logged(t *testing.T) (*pvnettest.Wire, *logtest.Log) {
	text := new(logtest.Log)
	return pvnettest.New(t, toolstack.Vif{MAC: frontMAC, MTU: 1500}, pvnet.Config{Logger: text.Logger()}, pvnet.Config{}), text
}

func requireLogged(t *testing.T, log *logtest.Log, want string) {
	t.Helper()
	if !strings.Contains(log.String(), want) {
		t.Errorf("no %q in: %s", want, log)
	}
}

// A neighbour that never answers does not keep the stack from being held.
func TestAHoldGivesUpASilentNeighbour(t *testing.T) {
	w, log := logged(t)
	n := neighbourOf(t, w.Back)
	s := newStack(t, w.Front, Config{Addr: frontIP})
	n.ping(t, 1)
	eventually(t, "it waits", s.resolves)
	requireHeld(t, held(s))
	requireLogged(t, log, "a neighbour has not said its MAC address")
}

// The stack does some work in goroutines of its own, as timers that are due at once.
func TestAHoldWaitsForWhatIsDue(t *testing.T) {
	s, _, _ := patient(t)
	gate := make(chan struct{})
	s.due.AfterFunc(0, func() { <-gate })
	hold := held(s)
	requireWaiting(t, hold)
	close(gate)
	requireHeld(t, hold)
}

// A timer counts from when it is made until its function has ended, it is stopped or it is to
// run later.
func TestTimersThatAreDueAreCounted(t *testing.T) {
	c := &dueClock{Clock: tcpip.NewStdClock()}
	none := func() bool { return c.n.Load() == 0 }
	late := c.AfterFunc(time.Hour, func() {})
	defer late.Stop()
	if !none() {
		t.Error("a timer for later counts")
	}
	gate := make(chan struct{})
	c.AfterFunc(0, func() { <-gate })
	if none() {
		t.Error("a timer that is due does not count")
	}
	close(gate)
	eventually(t, "it has ended", none)
	var mu sync.Mutex
	mu.Lock()
	var again tcpip.Timer
	reset := make(chan struct{})
	again = c.AfterFunc(0, func() {
		mu.Lock()
		defer mu.Unlock()
		again.Reset(time.Hour)
		close(reset)
	})
	mu.Unlock()
	<-reset
	eventually(t, "it is for later", none)
	if !again.Stop() || !none() {
		t.Errorf("stopped, %d are due", c.n.Load())
	}
	stopped := (&dueClock{Clock: c}).AfterFunc(0, func() {}).(*dueTimer)
	stopped.Stop()
	eventually(t, "stopped or run", func() bool { return stopped.clock.n.Load() == 0 })
}

// A program has answered all that came before the stack is held, however long it needs.
func TestAHoldWaitsForPrograms(t *testing.T) {
	front, back := two(t, 1500, pvnet.Config{})
	front.patience = limit
	c := listenEcho(t, front)
	client := dialEcho(t, back)
	gate := make(chan struct{})
	go func() {
		b := make([]byte, 100)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			<-gate
			c.WriteTo(b[:n], from)
		}
	}()
	const datagrams = 8
	for i := range datagrams {
		if _, err := client.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all have come", func() bool { return c.came.PacketsReceived.Value() == datagrams })
	hold := held(front)
	for range datagrams {
		requireWaiting(t, hold)
		gate <- struct{}{}
	}
	requireHeld(t, hold)
	requireEchoes(t, client, datagrams)
}

// A program that hands its datagrams to another goroutine has some time, too.
func TestAHoldWaitsForAQuietCard(t *testing.T) {
	s, _, _ := patient(t)
	c := listenEcho(t, s)
	go c.ReadFrom(make([]byte, 100))
	eventually(t, "it reads", c.wasRead.Load)
	began := time.Now()
	requireHeld(t, held(s))
	if took := time.Since(began); took < quietTime {
		t.Errorf("it took %v", took)
	}
	before := s.card.written()
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(make([]byte, 60))})
	defer p.DecRef()
	s.card.tx[0].write([]*stack.PacketBuffer{p})
	p.TransportProtocolNumber = header.TCPProtocolNumber
	s.card.tx[0].write([]*stack.PacketBuffer{p})
	if n := s.card.written() - before; n != 1 {
		t.Errorf("%d packets keep the card from being quiet, want 1: TCP's do not", n)
	}
}

// A program that does not answer does not keep the stack from being held. One that never reads
// its socket, or has closed it, holds up nothing.
func TestAHoldGivesUpASlowProgram(t *testing.T) {
	w, log := logged(t)
	front, back := newStack(t, w.Front, Config{Addr: frontIP}), newStack(t, w.Back, Config{Addr: backIP})
	c := listenEcho(t, front)
	client := dialEcho(t, back)
	client.Write([]byte{1})
	eventually(t, "it has come", func() bool { return c.came.PacketsReceived.Value() == 1 })
	front.patience = limit
	requireHeld(t, held(front))
	front.Resume()
	if _, _, err := c.ReadFrom(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	hold := held(front)
	requireWaiting(t, hold)
	c.Close()
	requireHeld(t, hold)
	front.Resume()

	front.patience = time.Millisecond
	c = listenEcho(t, front)
	client.Write([]byte{1})
	if _, _, err := c.ReadFrom(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	requireHeld(t, held(front))
	requireLogged(t, log, "a program has not answered a datagram")
}

// listenEcho opens port 7 of a stack.
func listenEcho(t *testing.T, s *Stack) *packetConn {
	t.Helper()
	c, err := s.ListenPacket("udp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*packetConn)
}

// dialEcho dials port 7 of the stack at the frontend.
func dialEcho(t *testing.T, from *Stack) net.Conn {
	t.Helper()
	c, err := from.Dial("udp", frontIP.Addr().String()+":7")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// requireEchoes requires that n datagrams come.
func requireEchoes(t *testing.T, c net.Conn, n int) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(limit))
	b := make([]byte, 100)
	for i := range n {
		if _, err := c.Read(b); err != nil {
			t.Fatalf("%d of %d datagrams were answered: %v", i, n, err)
		}
	}
}

// A blockedStack gives a card's stack nothing before its gate is open.
type blockedStack struct {
	stack.NetworkDispatcher
	came, gate chan struct{}
}

func (b *blockedStack) DeliverNetworkPacket(protocol tcpip.NetworkProtocolNumber, p *stack.PacketBuffer) {
	select {
	case b.came <- struct{}{}:
	default:
	}
	<-b.gate
	b.NetworkDispatcher.DeliverNetworkPacket(protocol, p)
}

// blockStack makes the receivers of s wait for the gate.
func blockStack(s *Stack) *blockedStack {
	b := &blockedStack{*s.card.stack.Load(), make(chan struct{}, 1), make(chan struct{})}
	s.card.Attach(b)
	return b
}

// While the stack has what it has received, more frames come. They stay in the ring.
func TestAHoldTakesNoMoreFrames(t *testing.T) {
	s, n, w := patient(t)
	n.ping(t, 1)
	n.say(t)
	n.requireAnswers(t, 1)
	b := blockStack(s)
	n.ping(t, 2)
	<-b.came
	hold := held(s)
	eventually(t, "the receivers are to rest", s.card.holds.asked.Load)
	want := []byte{1, 2}
	for i := range byte(100) {
		n.ping(t, 100+i)
		want = append(want, 100+i)
	}
	close(b.gate)
	requireHeld(t, hold)
	n.requireAnswers(t, 1, 2)
	st := w.Front.Stats()
	if got := st.RX.Get(telemetry.Packets); got != 3 { // two pings, and an address
		t.Errorf("%d frames were taken off the ring", got)
	}
	s.Resume()
	n.requireAnswers(t, want...)
}

// A Hold waits for room in the ring for what the stack has sent, and fails rather than lose it.
func TestAHoldSendsWhatWaits(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	s := newStack(t, w.Front, Config{Addr: frontIP})
	rx, err := w.Back.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	rx.SetDeadline(time.Now().Add(limit))
	const packets = 1000 // more than the ring has room for
	for i := range packets {
		write(s, i)
	}
	if err := <-held(s); err == nil || !strings.Contains(err.Error(), "wait for room") {
		t.Fatalf("held although packets wait: %v", err)
	}
	hold := held(s)
	requireWaiting(t, hold)
	received(t, rx, 0, packets)
	requireHeld(t, hold)
	write(s, packets)
	if n, err := rx.Poll(make([]pvnet.Frame, 1)); n != 0 || err != nil {
		t.Errorf("%d frames while it is held, %v", n, err)
	}
	s.Resume()
	received(t, rx, packets, 1)
}

// Packets that wait for the link do not keep the vif from being handed over, and go out if it
// stays.
func TestAStackIsHeldWithoutALink(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	s := newStack(t, w.Front, Config{Addr: frontIP})
	w.Back.Disconnect()
	eventually(t, "the link is down", s.card.down.Load)
	for i := range 5 {
		write(s, i)
	}
	requireHeld(t, held(s))
	s.Resume()
	w.Plug(frontMAC, 1500)
	rx, err := w.Back.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	rx.SetDeadline(time.Now().Add(limit))
	received(t, rx, 0, 5)
	if st := s.Stats(); st.Unsent != 0 {
		t.Errorf("%+v", st)
	}
}

// write has the card send packet number i to the station.
func write(s *Stack, i int) {
	b := make([]byte, 100)
	copy(b, stationMAC[:])
	binary.BigEndian.PutUint32(b[14:], uint32(i))
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	defer p.DecRef()
	s.card.tx[0].write([]*stack.PacketBuffer{p})
}

// received receives n packets of write, the first of which has number first.
func received(t *testing.T, rx *pvnet.RX, first, n int) {
	t.Helper()
	var frames [32]pvnet.Frame
	for want := first; want < first+n; {
		k, err := rx.Receive(frames[:])
		if err != nil {
			t.Fatalf("after %d of %d: %v", want-first, n, err)
		}
		for i := range frames[:k] {
			b := frames[i].Bytes()
			if !bytes.Equal(b[:6], stationMAC[:]) {
				continue // what the stack says by itself
			}
			if got := int(binary.BigEndian.Uint32(b[14:])); got != want {
				t.Fatalf("packet %d came as number %d", got, want)
			}
			want++
		}
		rx.Release(frames[:k])
	}
}

// A receiver that goes on may meet the next Hold before it has begun to receive.
func TestAStackIsHeldAgainAtOnce(t *testing.T) {
	s, _, _ := patient(t)
	for range 500 {
		requireHeld(t, held(s))
		s.Resume()
	}
}
