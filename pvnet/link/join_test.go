//go:build linux

package link

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"

	"golang.org/x/sys/unix"
)

// A host is an emulated machine with one vif, its backend in domain 1 and its
// frontend in domain 2.
type host struct {
	*pvnettest.Wire
	t testing.TB
}

func newHost(t testing.TB, mtu int, cfg pvnet.Config) *host { return newHostOf(t, mtu, cfg, cfg) }

func newHostOf(t testing.TB, mtu int, back, front pvnet.Config) *host {
	t.Helper()
	back.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	front.Logger = back.Logger
	return &host{pvnettest.New(t, toolstack.Vif{MAC: ourMAC, MTU: mtu}, front, back), t}
}

// join runs a Joint of the device until the test ends; ended gets the result of Run.
func (h *host) join(ctx context.Context, dev *pvnet.Device, links ...Link) (j *Joint, ended <-chan error) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	j = new(Joint)
	c := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c <- j.Run(ctx, dev, links...)
	}()
	h.t.Cleanup(func() { cancel(); <-done })
	if err := labtest.Comes(func() error {
		if !j.holds.begun() && len(c) == 0 {
			return errors.New("Run has not begun")
		}
		return nil
	}); err != nil {
		h.t.Fatal(err)
	}
	return j, c
}

// begun reports whether a Run can be held.
func (h *holds) begun() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ask != nil
}

// ownTX owns the transmit half of queue 0. No wait of it outlasts the limit of a test.
func ownTX(t testing.TB, dev *pvnet.Device) *pvnet.TX {
	t.Helper()
	tx, err := dev.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	tx.SetDeadline(time.Now().Add(wait))
	return tx
}

// ownRX is ownTX for the receive half.
func ownRX(t testing.TB, dev *pvnet.Device) *pvnet.RX {
	t.Helper()
	rx, err := dev.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	rx.SetDeadline(time.Now().Add(wait))
	return rx
}

// receiveAndRelease receives n frames, at most len(room) at once.
func receiveAndRelease(t testing.TB, rx *pvnet.RX, room []pvnet.Frame, n int) {
	t.Helper()
	for n > 0 {
		k, err := rx.Receive(room)
		if err != nil {
			t.Fatal(err)
		}
		rx.Release(room[:k])
		n -= k
	}
}

// listen returns copies of the frames that the guest receives, if their EtherType is
// testType or IP.
func (h *host) listen() <-chan []byte {
	c := make(chan []byte, 1024)
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.Front.Listen(context.Background(), func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			c <- b
		})
	}()
	h.t.Cleanup(func() { h.Front.Disconnect(); <-done })
	return c
}

func next[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(wait):
		buf := make([]byte, 1<<16)
		t.Fatalf("nothing came\n%s", buf[:runtime.Stack(buf, true)])
		panic("unreachable")
	}
}

// settle waits until ok accepts the joint's counters, which lag behind the frames.
func settle(t testing.TB, j *Joint, ok func(JointStats) bool) {
	t.Helper()
	for end := time.Now().Add(wait); !ok(j.Stats()); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("%+v", j.Stats())
		}
	}
}

func TestKernelPingsAGuest(t *testing.T) {
	ping := func(t *testing.T, mtu int, l Link, card string) {
		h := newHost(t, mtu, pvnet.Config{})
		j, ended := h.join(context.Background(), h.Back, l)
		listened := make(chan error, 1)
		go func() {
			listened <- h.Front.Listen(context.Background(), func(f pvnet.Frame) {
				b := make([]byte, f.Len())
				f.CopyTo(b)
				if reply(b) {
					if _, err := h.Front.Write(b); err != nil {
						t.Error(err)
					}
				}
			})
		}()
		addAddress(t, card)
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(s)
		unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(wait / time.Second)})
		for seq, size := range []int{0, 56, 1000, mtu - 28} {
			echo := make([]byte, 8+size)
			echo[0], echo[7] = 8, byte(seq)
			for i := range echo[8:] {
				echo[8+i] = byte(i)
			}
			binary.BigEndian.PutUint16(echo[2:], ^sum16(echo))
			if err := unix.Sendto(s, echo, 0, &unix.SockaddrInet4{Addr: ourIP}); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 20+len(echo)+1)
			n, _, err := recvFrom(s, got)
			if err != nil {
				t.Fatalf("%d bytes: no reply: %v; %+v", size, err, j.Stats())
			}
			if n != 20+len(echo) || got[20] != 0 || !bytes.Equal(got[28:n], echo[8:]) {
				t.Fatalf("%d bytes: % x", size, got[:n])
			}
		}
		h.Front.Disconnect()
		if err := next(t, listened); err != nil {
			t.Error(err)
		}
		select {
		case err := <-ended:
			t.Errorf("a frontend that goes ends the joint: %v", err)
		default:
		}
		h.Back.Disconnect()
		if err := next(t, ended); err != nil {
			t.Errorf("after Disconnect: %v", err)
		}
		if st := j.Stats(); st.ToLink < 5 || st.FromLink < 5 || st.Unsent+st.Oversize+st.Uncut+st.Refused != 0 {
			t.Errorf("%+v", st) // an ARP exchange and four pings
		}
	}
	for _, mtu := range []int{1500, 9000} {
		t.Run("tap", func(t *testing.T) {
			tap := openTAP(t, TAPConfig{MTU: mtu})
			ping(t, mtu, tap, tap.Name())
		})
		t.Run("packet", func(t *testing.T) {
			card, far := veth(t, mtu)
			ping(t, mtu, openPacket(t, far), card)
		})
	}
}

// A guest without offloads gets complete frames, whatever work a virtual card leaves.
func TestGuestGetsCompleteFrames(t *testing.T) {
	card, far := veth(t, 1500)
	p := openPacket(t, card)
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	j, _ := h.join(context.Background(), h.Back, openPacket(t, far))

	f, off := partialTCP(777)
	send(t, p, off, f)
	if b := next(t, got); len(b) != len(f) || !tcpGood(b) {
		t.Fatalf("%d bytes, checksum wrong", len(b))
	}
	segments, whole := 0, 0
	for _, u := range gsoFrames() {
		want := cut(t, u)
		if u.off.GSO == GSOUDP || u.off.ECN {
			segments += len(want)
		} else {
			whole++ // the vif cuts these
		}
		send(t, p, u.off, u.frame)
		for i := range want {
			if b := next(t, got); !bytes.Equal(b, want[i]) {
				t.Fatalf("%s: segment %d: %d bytes, want %d", u.name, i, len(b), len(want[i]))
			}
		}
	}
	// A frame whose segments are too long for the vif.
	u := gsoFrames()[0]
	u.off.GSOSize = 1900
	send(t, p, u.off, u.frame)
	f, off = partialTCP(10)
	send(t, p, off, f)
	if b := next(t, got); len(b) != len(f) || !tcpGood(b) {
		t.Fatalf("%d bytes", len(b))
	}
	settle(t, j, func(st JointStats) bool {
		return st.Oversize == 1 && st.Segments == uint64(segments) && st.FromLinkGSO == uint64(whole)
	})
}

// The kernel leaves tagged frames whole, too. Not every frontend takes tagged GSO frames, so
// the vif always cuts them.
func TestGuestGetsTaggedFramesComplete(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	h := newHost(t, 1500, pvnet.Config{Offload: true})
	got := h.listen()
	j, _ := h.join(context.Background(), h.Back, tap)
	send(t, p, Offload{}, testFrame(60))
	next(t, got) // the joint runs
	tag := func(b []byte) []byte { return append(append(bytes.Clone(b[:12]), 0x81, 0, 0x20, 7), b[12:]...) }
	whole := uint64(0)
	for _, u := range gsoFrames() {
		if u.off.GSO != GSOUDP && !u.off.ECN { // the kernel cuts those before a TAP
			whole++
		}
		u.frame = tag(u.frame)
		u.off.shift(4)
		want := cut(t, u)
		send(t, p, u.off, u.frame)
		for i := range want {
			if b := next(t, got); !bytes.Equal(b, want[i]) {
				t.Fatalf("%s: segment %d: %d bytes, want %d", u.name, i, len(b), len(want[i]))
			}
		}
	}
	f, off := partialTCP(300)
	off.shift(4)
	send(t, p, off, tag(f))
	if b := next(t, got); !bytes.Equal(b[12:16], []byte{0x81, 0, 0x20, 7}) || !tcpGood(append(bytes.Clone(b[:12]), b[16:]...)) {
		t.Fatalf("% x", b)
	}
	settle(t, j, func(st JointStats) bool { return st.FromLinkGSO == whole && st.Segments == 0 })
}

// A vif with few grants cuts a long frame in several steps.
func TestLongFramesAreCutForAVifWithoutGSO(t *testing.T) {
	for _, mtu := range []int{1500, 9000} {
		lab := labtest.New(t, emu.Config{Grants: 80})
		driver, guest := lab.Domain(1), lab.Domain(2)
		lab.Add(toolstack.Vif{Front: 2, Back: 1, MAC: ourMAC, MTU: mtu})
		serving, stop := context.WithCancel(context.Background())
		backs, served := make(chan *pvnet.Device, 1), make(chan error, 1)
		go func() {
			served <- pvnet.Serve(serving, driver, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) { backs <- d })
		}()
		t.Cleanup(func() { stop(); <-served })
		front, err := pvnet.Connect(serving, guest, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(front.Disconnect)
		rx := ownRX(t, next(t, backs))
		got := make(chan []byte, 1024)
		go func() {
			defer close(got)
			var frames [1]pvnet.Frame
			for {
				if _, err := rx.Receive(frames[:]); err != nil {
					return
				}
				b := make([]byte, frames[0].Len())
				frames[0].CopyTo(b)
				got <- b
				rx.Release(frames[:])
			}
		}()
		tap := openTAP(t, TAPConfig{MTU: mtu})
		p := openPacket(t, tap.Name())
		h := &host{&pvnettest.Wire{Front: front}, t}
		j, _ := h.join(context.Background(), front, tap)
		send(t, p, Offload{}, testFrame(60))
		next(t, got) // the joint runs
		var u gsoFrame
		u.frame, u.off = partialTCP(65000)
		u.off.GSO, u.off.GSOSize, u.off.HeaderLen = GSOTCPv4, uint16(mtu-52), 54
		want := cut(t, u)
		for range 10 {
			send(t, p, u.off, u.frame)
			send(t, p, Offload{}, testFrame(61))
			for i := range want {
				if b := next(t, got); !bytes.Equal(b, want[i]) {
					t.Fatalf("segment %d: %d bytes, want %d", i, len(b), len(want[i]))
				}
			}
			if b := next(t, got); len(b) != 61 {
				t.Fatalf("%d bytes", len(b))
			}
		}
		settle(t, j, func(st JointStats) bool { return st.Segments == 0 && st.FromLinkGSO == 10 })
	}
}

func TestFramesBeyondTheMTUOfTheVifAreDropped(t *testing.T) {
	tap := openTAP(t, TAPConfig{MTU: 9000})
	p := openPacket(t, tap.Name())
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	j, _ := h.join(context.Background(), h.Back, tap)
	for _, size := range []int{1519, 5000, 9014} {
		send(t, p, Offload{}, testFrame(size))
	}
	for _, size := range []int{14, 1514, 1518} {
		want := testFrame(size)
		send(t, p, Offload{}, want)
		if b := next(t, got); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes of %d", len(b), size)
		}
	}
	settle(t, j, func(st JointStats) bool { return st.Oversize == 3 && st.FromLink == 3 })
}

func TestFramesOfAGuestReachTheLinkWhole(t *testing.T) {
	tap := openTAP(t, TAPConfig{MTU: 65521})
	p := openPacket(t, tap.Name())
	h := newHost(t, 1500, pvnet.Config{})
	h.join(context.Background(), h.Back, tap)
	// A guest may send what its MTU forbids; a TAP takes it.
	for _, size := range []int{14, 60, 1514, 4096, 20000, 65535} {
		want := testFrame(size)
		if _, err := h.Front.Write(want); err != nil {
			t.Fatal(err)
		}
		if b, _ := receive(t, p); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes of %d", len(b), size)
		}
	}
}

// Work that a guest leaves is passed on to the kernel behind the link.
func TestWorkOfAGuestIsPassedOn(t *testing.T) {
	try := func(t *testing.T, l Link, far Link) {
		h := newHost(t, 1500, pvnet.Config{Offload: true})
		j, _ := h.join(context.Background(), h.Back, l)
		tx := ownTX(t, h.Front)
		guest := func(b []byte, says func(*pvnet.Frame)) {
			t.Helper()
			var f [1]pvnet.Frame
			if _, err := tx.AllocWait(f[:], len(b)); err != nil {
				t.Fatal(err)
			}
			f[0].CopyFrom(b)
			says(&f[0])
			if _, err := tx.SendWait(f[:]); err != nil {
				t.Fatal(err)
			}
		}
		long := uint64(0)
		for _, u := range gsoFrames() {
			g := pvnet.GSO{Type: pvnet.GSOTCPv4, Size: u.off.GSOSize}
			switch {
			case u.off.GSO == GSOUDP, u.name == "tcp6 options":
				continue
			case u.off.GSO == GSOTCPv6:
				g.Type = pvnet.GSOTCPv6
			}
			guest(u.frame, func(f *pvnet.Frame) {
				if err := f.SetGSO(g); err != nil {
					t.Fatal(err)
				}
			})
			long++
			got, off := receive(t, far)
			u.off.HeaderLen = off.HeaderLen // a hint, which this kernel makes up
			if !bytes.Equal(got, u.frame) || off != u.off {
				t.Errorf("%s: %d bytes of %d, %+v, want %+v", u.name, len(got), len(u.frame), off, u.off)
			}
		}
		want, off := partialTCP(700)
		guest(want, func(f *pvnet.Frame) { f.SetChecksum(pvnet.ChecksumPartial) })
		if got, left := receive(t, far); !bytes.Equal(got, want) || left != off {
			t.Errorf("%d bytes of %d, %+v, want %+v", len(got), len(want), left, off)
		}
		want = testFrame(99)
		guest(want, func(f *pvnet.Frame) { f.SetChecksum(pvnet.ChecksumVerified) })
		if got, left := receive(t, far); !bytes.Equal(got, want) || left.Checksum == ChecksumPartial {
			t.Errorf("%d bytes of %d, %+v", len(got), len(want), left)
		}
		settle(t, j, func(st JointStats) bool { return st.ToLink == long+2 && st.ToLinkGSO == long && st.Unsent == 0 })
	}
	t.Run("tap", func(t *testing.T) {
		tap := openTAP(t, TAPConfig{})
		try(t, tap, openPacket(t, tap.Name()))
	})
	t.Run("packet", func(t *testing.T) {
		card, far := veth(t, 1500)
		try(t, openPacket(t, far), openPacket(t, card))
	})
}

func TestPacketThatRefusesAFrameDropsItAlone(t *testing.T) {
	card, far := veth(t, 1500)
	p := openPacket(t, card)
	h := newHost(t, 1500, pvnet.Config{})
	j, _ := h.join(context.Background(), h.Back, openPacket(t, far))
	for _, size := range []int{4000, 100} {
		if _, err := h.Front.Write(testFrame(size)); err != nil {
			t.Fatal(err)
		}
	}
	if b, _ := receive(t, p); len(b) != 100 {
		t.Fatalf("%d bytes", len(b))
	}
	settle(t, j, func(st JointStats) bool { return st.Unsent == 1 && st.ToLink == 1 })
}

func TestJointEndsWithWhatEndedIt(t *testing.T) {
	cause := errors.New("enough")
	for _, c := range []struct {
		name string
		end  func(t *testing.T, h *host, tap *TAP, cancel context.CancelCauseFunc)
		want error
	}{
		{"cancel", func(_ *testing.T, _ *host, _ *TAP, cancel context.CancelCauseFunc) { cancel(cause) }, cause},
		{"link closed", func(_ *testing.T, _ *host, tap *TAP, _ context.CancelCauseFunc) { tap.Close() }, net.ErrClosed},
		{"interface removed", func(t *testing.T, _ *host, tap *TAP, _ context.CancelCauseFunc) { remove(t, tap) }, ErrGone},
		{"device", func(_ *testing.T, h *host, _ *TAP, _ context.CancelCauseFunc) { h.Back.Disconnect() }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			tap := openTAP(t, TAPConfig{})
			h := newHost(t, 1500, pvnet.Config{})
			got := h.listen()
			ctx, cancel := context.WithCancelCause(context.Background())
			_, ended := h.join(ctx, h.Back, tap)
			p := openPacket(t, tap.Name())
			send(t, p, Offload{}, testFrame(60))
			next(t, got) // both directions are parked, or about to park
			c.end(t, h, tap, cancel)
			if err := next(t, ended); err != c.want {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if c.name == "cancel" {
				// The link still works.
				send(t, p, Offload{}, testFrame(61))
				if b, _ := receive(t, tap); len(b) != 61 {
					t.Fatalf("%d bytes", len(b))
				}
				send(t, tap, Offload{}, testFrame(62))
				u := gsoFrames()[0]
				send(t, p, u.off, u.frame)
				for i, want := range cut(t, u) {
					if b, off := receive(t, tap); !bytes.Equal(b, want) || off.GSO != GSONone {
						t.Fatalf("segment %d: %d bytes, %+v", i, len(b), off)
					}
				}
			}
		})
	}
}

func TestJointOutlivesAGuestThatComesBack(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	h := newHost(t, 1500, pvnet.Config{})
	_, ended := h.join(context.Background(), h.Back, tap)
	for round := range 3 {
		if round > 0 {
			h.Front.Disconnect()
			h.Connect()
		}
		got := h.listen()
		// While the vif is down the joint may hold frames, but it loses none that it has
		// read.
		want := testFrame(100 + round)
		send(t, p, Offload{}, want)
		for b := next(t, got); !bytes.Equal(b, want); b = next(t, got) {
		}
		if _, err := h.Front.Write(want); err != nil {
			t.Fatal(err)
		}
		receive(t, p)
	}
	select {
	case err := <-ended:
		t.Fatal(err)
	default:
	}
}

func TestPacketJointSeesItsInterfaceGo(t *testing.T) {
	card, far := veth(t, 1500)
	p := openPacket(t, card)
	l := openPacket(t, far)
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	j, ended := h.join(context.Background(), h.Back, l)
	setUpDown(t, far, false)
	// The kernel may report ErrDown to the writer.
	for j.Stats().Unsent == 0 {
		if _, err := h.Front.Write(testFrame(60)); err != nil {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
	setUpDown(t, far, true)
	carrier(t, card)
	carrier(t, far)
	for arrived := false; !arrived; {
		send(t, p, Offload{}, testFrame(70))
		select {
		case <-got:
			arrived = true
		case <-time.After(10 * time.Millisecond): // the kernel dropped it
		}
	}
	remove(t, l)
	if err := next(t, ended); err != ErrGone {
		t.Fatal(err)
	}
}

func TestQueuesHaveLinksOfTheirOwn(t *testing.T) {
	needTAP(t)
	taps, err := OpenTAPQueues(TAPConfig{}, 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, tap := range taps {
		t.Cleanup(func() { tap.Close() })
	}
	p := openPacket(t, taps[0].Name())
	h := newHost(t, 1500, pvnet.Config{Queues: 2})
	got := h.listen()
	j, ended := h.join(context.Background(), h.Back, taps[0], taps[1])
	const frames = 64
	for i := range frames {
		f, _ := partialTCP(100)
		f[35] = byte(i) // another source port: another flow
		send(t, p, Offload{}, f)
		if _, err := h.Front.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	for range frames {
		next(t, got)
		receive(t, p)
	}
	settle(t, j, func(st JointStats) bool { return st.ToLink == frames && st.FromLink == frames })
	for _, tap := range taps {
		tap.Close()
	}
	if err := next(t, ended); err != net.ErrClosed {
		t.Error(err)
	}
	for _, n := range []int{0, 3} {
		if err := new(Joint).Run(context.Background(), h.Back, make([]Link, n)...); err == nil {
			t.Errorf("%d links for two queues", n)
		}
	}
}

func TestDeviceWithAnOwnerIsNotJoined(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	h := newHost(t, 1500, pvnet.Config{})
	if _, err := h.Back.OwnRX(0); err != nil {
		t.Fatal(err)
	}
	if err := Join(context.Background(), h.Back, tap); !errors.Is(err, pvnet.ErrOwned) {
		t.Fatal(err)
	}
}

// A device may end just before it is joined. That is no error, as it is none a moment later.
func TestADeviceThatHasEndedIsJoinedToNothing(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	h := newHost(t, 1500, pvnet.Config{})
	h.Back.Disconnect()
	if err := Join(context.Background(), h.Back, tap); err != nil {
		t.Errorf("Join returned %v", err)
	}
}

// A scripted link reads frames of a test, also frames that only a broken kernel would send.
type scripted struct {
	Link
	script chan func(bufs [][]byte) (int, Offload, error)
	end    func() // ends the script: the link is closed; idempotent
}

// joinScripted joins the backend to a link that reads a script and otherwise is link.
func (h *host) joinScripted(link Link) (l *scripted, j *Joint, ended <-chan error) {
	h.t.Helper()
	l = &scripted{Link: link, script: make(chan func([][]byte) (int, Offload, error))}
	l.end = sync.OnceFunc(func() { close(l.script) })
	j, ended = h.join(context.Background(), h.Back, l)
	h.t.Cleanup(l.end) // before join's, which waits for the reader
	return l, j, ended
}

func (l *scripted) ReadFrame(bufs [][]byte) (int, Offload, error) {
	f, ok := <-l.script
	if !ok {
		return 0, Offload{}, net.ErrClosed
	}
	return f(bufs)
}

// scatter copies b to bufs, in order, filling each before the next.
func scatter(bufs [][]byte, b []byte) {
	for ; len(b) > 0; bufs = bufs[1:] {
		b = b[copy(bufs[0], b):]
	}
}

// frame makes the link read b with the offload off.
func (l *scripted) frame(b []byte, off Offload) {
	l.script <- func(bufs [][]byte) (int, Offload, error) {
		scatter(bufs, b)
		return len(b), off, nil
	}
}

// An offload applies only to a frame whose headers agree with it.
func TestOffloadsThatContradictTheHeadersAreRefused(t *testing.T) {
	tcp, tcp6, udp := gsoFrames()[0], gsoFrames()[3], gsoFrames()[4]
	small, partial := partialTCP(300)
	change := func(u gsoFrame, f func(*gsoFrame)) gsoFrame {
		u.frame = bytes.Clone(u.frame)
		f(&u)
		return u
	}
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	l, j, ended := h.joinScripted(openTAP(t, TAPConfig{}))
	marker := testFrame(60)
	dropped := uint64(0)
	for name, u := range map[string]gsoFrame{
		"IPv6 said, IPv4 is":  change(tcp, func(u *gsoFrame) { u.off.GSO = GSOTCPv6 }),
		"IPv4 said, IPv6 is":  change(tcp6, func(u *gsoFrame) { u.off.GSO = GSOTCPv4 }),
		"TCP said, UDP is":    change(udp, func(u *gsoFrame) { u.off.GSO = GSOTCPv4 }),
		"UDP said, TCP is":    change(tcp, func(u *gsoFrame) { u.off.GSO = GSOUDP }),
		"a datagram to cut":   change(udp, func(u *gsoFrame) { u.off.GSO = GSOUFO }),
		"no kind there is":    change(tcp, func(u *gsoFrame) { u.off.GSO = 0x42 }),
		"segments of nothing": change(tcp, func(u *gsoFrame) { u.off.GSOSize = 0 }),
		"headers only":        change(tcp, func(u *gsoFrame) { u.frame = u.frame[:54] }),
		"half a header":       change(tcp, func(u *gsoFrame) { u.frame = u.frame[:40] }),
		"no header":           change(tcp, func(u *gsoFrame) { u.frame = u.frame[:14] }),
		"a TCP header of 60":  change(tcp, func(u *gsoFrame) { u.frame = u.frame[:94]; u.frame[46] = 0xf0 }),
		"a TCP header of 8":   change(tcp, func(u *gsoFrame) { u.frame[46] = 0x20 }),
		"a fragment":          change(tcp, func(u *gsoFrame) { u.frame[20] |= 0x20 }),
		"not IP":              change(tcp, func(u *gsoFrame) { u.frame[12] = 0x88 }),
		"a field outside":     {frame: small, off: Offload{Checksum: ChecksumPartial, SumStart: 34, SumOffset: uint16(len(small)) - 35}},
		"a field far outside": {frame: small, off: Offload{Checksum: ChecksumPartial, SumStart: 0xffff, SumOffset: 0xffff}},
		"less than a header":  {frame: small[:13], off: partial},
	} {
		l.frame(u.frame, u.off)
		l.frame(marker, Offload{})
		if b := next(t, got); !bytes.Equal(b, marker) {
			t.Errorf("%s: % x", name, b[:min(len(b), 80)])
			next(t, got)
			continue
		}
		dropped++
		settle(t, j, func(st JointStats) bool { return st.Uncut == dropped })
	}

	// If only the checksum's offset is wrong, the frame is still cut correctly.
	for name, u := range map[string]gsoFrame{
		"checksum elsewhere":        change(tcp, func(u *gsoFrame) { u.off.SumStart-- }),
		"field elsewhere":           change(tcp, func(u *gsoFrame) { u.off.SumOffset = 6 }),
		"checksum outside":          change(tcp, func(u *gsoFrame) { u.off.SumStart = 0xffff }),
		"no checksum left":          change(tcp, func(u *gsoFrame) { u.off.Checksum = ChecksumNone }),
		"verified, still to be cut": change(tcp6, func(u *gsoFrame) { u.off.Checksum = ChecksumVerified }),
		"headers elsewhere":         change(tcp, func(u *gsoFrame) { u.off.HeaderLen = 9999 }),
	} {
		want := cut(t, u)
		l.frame(u.frame, u.off)
		for i := range want {
			if b := next(t, got); !bytes.Equal(b, want[i]) {
				t.Errorf("%s: segment %d: % x, want % x", name, i, b[:min(len(b), 80)], want[i][:80])
			}
		}
	}

	// A checksum at an offset that is neither TCP's nor UDP's is completed all the same.
	other := bytes.Clone(small)
	other[23] = 47 // GRE
	want := bytes.Clone(other)
	off := Offload{Checksum: ChecksumPartial, SumStart: 38, SumOffset: 4}
	done := off
	if err := done.Complete(len(want), [][]byte{want}); err != nil {
		t.Fatal(err)
	}
	l.frame(other, off)
	if b := next(t, got); !bytes.Equal(b, want) {
		t.Errorf("% x, want % x", b[:80], want[:80])
	}
	l.end()
	if err := next(t, ended); err != net.ErrClosed {
		t.Error(err)
	}
}

func TestFramesThatCannotBeHandledAreDroppedAlone(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	l, j, ended := h.joinScripted(tap)
	frame := l.frame
	fail := func(err error) {
		l.script <- func([][]byte) (int, Offload, error) { return 9, Offload{}, err }
	}
	whole := gsoFrames()[0]
	whole.off.GSO = GSOUFO
	frame(whole.frame, whole.off)
	frame(testFrame(100), Offload{Checksum: ChecksumPartial, SumStart: 99})
	frame(testFrame(100)[:13], Offload{})
	fail(ErrTruncated)
	fail(ErrNoBuffers)
	fail(ErrDown)
	frame(testFrame(100), Offload{})
	if b := next(t, got); !bytes.Equal(b, testFrame(100)) {
		t.Fatalf("%d bytes", len(b))
	}
	l.end()
	if err := next(t, ended); err != net.ErrClosed {
		t.Error(err)
	}
	settle(t, j, func(st JointStats) bool { return st.Uncut == 3 && st.Oversize == 1 && st.FromLink == 1 })
}

// A plainLink hides all methods of a link beyond Link.
type plainLink struct{ Link }

func TestOtherLinksAreJoinedToo(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	h.join(context.Background(), h.Back, plainLink{tap})
	for i := range 100 {
		want := testFrame(60 + i)
		send(t, p, Offload{}, want)
		if b := next(t, got); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes", len(b))
		}
	}
}

func TestJointMakesNoGarbage(t *testing.T) {
	long, off := partialTCP(60000)
	off.GSO, off.GSOSize, off.HeaderLen = GSOTCPv4, 1448, 54
	for _, c := range []struct {
		name    string
		frame   []byte
		off     Offload
		offload bool
		arrive  int // frames at the guest
	}{
		{"small", testFrame(1514), Offload{}, false, 1},
		{"long", long, off, true, 1},
		{"long, to be cut", long, off, false, (60000 + 1447) / 1448},
	} {
		t.Run(c.name, func(t *testing.T) {
			tap := openTAP(t, TAPConfig{})
			p := openPacket(t, tap.Name())
			h := newHostOf(t, 1500, pvnet.Config{Offload: true}, pvnet.Config{Offload: c.offload})
			_, ended := h.join(context.Background(), h.Back, tap)
			tx := ownTX(t, h.Front)
			rx := ownRX(t, h.Front)
			limit := time.Now().Add(2 * wait)
			rx.SetDeadline(limit)
			tx.SetDeadline(limit)
			p.SetReadDeadline(limit)
			in, out := [][]byte{c.frame}, [][]byte{make([]byte, MaxFrame)}
			var frames [64]pvnet.Frame
			there := func(in [][]byte, off Offload, arrive int) {
				if _, err := p.WriteFrame(off, in); err != nil {
					t.Fatal(err)
				}
				receiveAndRelease(t, rx, frames[:], arrive)
			}
			there([][]byte{testFrame(60)}, Offload{}, 1) // the joint runs
			got := testing.AllocsPerRun(300, func() {
				there(in, c.off, c.arrive)
				if _, err := tx.AllocWait(frames[:1], len(c.frame)); err != nil {
					t.Fatal(err)
				}
				frames[0].CopyFrom(c.frame)
				if c.off.GSO != GSONone {
					if err := frames[0].SetGSO(pvnet.GSO{Type: pvnet.GSOTCPv4, Size: c.off.GSOSize}); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := tx.SendWait(frames[:1]); err != nil {
					t.Fatal(err)
				}
				if n, back, err := p.ReadFrame(out); err != nil || n != len(c.frame) || back.GSO != c.off.GSO {
					t.Fatalf("%d bytes, %+v, %v", n, back, err)
				}
			})
			if got != 0 {
				t.Errorf("%v allocations a frame", got)
			}
			until(t, "the counters show the frames", func() bool {
				st := h.Back.Stats()
				return st.RX.Get(telemetry.Packets) == 301
			})
			tap.Close()
			next(t, ended)
		})
	}
}

func BenchmarkJoint(b *testing.B) {
	needTAP(b)
	tap := openTAP(b, TAPConfig{})
	p := openPacket(b, tap.Name())
	h := newHost(b, 1500, pvnet.Config{})
	h.join(context.Background(), h.Back, tap)
	rx := ownRX(b, h.Front)
	f := [][]byte{testFrame(1514)}
	var wg sync.WaitGroup
	var frames [64]pvnet.Frame
	b.SetBytes(64 * 1514)
	for b.Loop() {
		const burst = 64
		wg.Go(func() {
			for range burst {
				if _, err := p.WriteFrame(Offload{}, f); err != nil {
					b.Error(err)
				}
			}
		})
		receiveAndRelease(b, rx, frames[:], burst)
		wg.Wait()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/frame")
}
