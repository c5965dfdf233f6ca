//go:build linux

package link

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"

	"github.com/vishvananda/netlink"
)

// wantLogged fails unless the log has exactly one line of the kind, and it contains all parts.
func wantLogged(t *testing.T, l *logtest.Log, kind int, parts ...string) {
	t.Helper()
	got := l.Lines(messages[kind].what)
	if len(got) != 1 {
		t.Fatalf("%d lines: %q", len(got), got)
	}
	for _, part := range append(parts, "next=") {
		if !strings.Contains(got[0], part) {
			t.Errorf("no %q in %q", part, got[0])
		}
	}
}

func logged(cfg pvnet.Config) (pvnet.Config, *logtest.Log) {
	l := new(logtest.Log)
	cfg.Logger = l.Logger()
	return cfg, l
}

// newHostWithLog is newHost with the log of the backend.
func newHostWithLog(t *testing.T) (*host, *logtest.Log) {
	cfg, log := logged(pvnet.Config{})
	return &host{pvnettest.New(t, toolstack.Vif{MAC: ourMAC, MTU: 1500}, pvnet.Config{}, cfg), t}, log
}

func setMTU(t testing.TB, name string, mtu int) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetMTU(l, mtu)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// arrives writes frames of the given sizes to a, and fails unless b reads each of them.
func arrives(t *testing.T, a, b Link, sizes ...int) {
	t.Helper()
	for _, size := range sizes {
		want := testFrame(size)
		send(t, a, Offload{}, want)
		if got, _ := receive(t, b); !bytes.Equal(got, want) {
			t.Fatalf("%d bytes of %d", len(got), size)
		}
	}
}

// sizesTo returns frame sizes around all limits up to an MTU.
func sizesTo(mtu int) (sizes []int) {
	for _, n := range []int{60, 1513, 1514, 1515, 1518, 1519, 2000, 3000, 4095, 4096, 4097, 8191, 8193, 9013, 9014,
		9015, 20000, 32768, 40000, 65013, 65014, 65535} {
		if n <= mtu+14 {
			sizes = append(sizes, n)
		}
	}
	return append(sizes, mtu+14)
}

// Two kernels are joined by a vif and raise the MTU of their cards, as an administrator
// does with "ip link set mtu" at both ends.
func TestMTURaisedAtBothEndsIsFollowed(t *testing.T) {
	for _, offload := range []bool{false, true} {
		t.Run(fmt.Sprintf("offload=%v", offload), func(t *testing.T) {
			cfg := pvnet.Config{Offload: offload}
			frontCfg, frontLog := logged(cfg)
			backCfg, backLog := logged(cfg)
			w := pvnettest.New(t, toolstack.Vif{MAC: ourMAC, MTU: 1500}, frontCfg, backCfg)
			h := &host{w, t}
			guest, driver := openTAP(t, TAPConfig{}), openTAP(t, TAPConfig{})
			pg, pd := openPacket(t, guest.Name()), openPacket(t, driver.Name())
			jf, endedFront := h.join(context.Background(), w.Front, guest)
			jb, endedBack := h.join(context.Background(), w.Back, driver)
			both := func(mtu int) {
				t.Helper()
				setMTU(t, guest.Name(), mtu)
				setMTU(t, driver.Name(), mtu)
				for _, size := range sizesTo(mtu) {
					arrives(t, pg, pd, size)
					arrives(t, pd, pg, size)
				}
			}
			for _, mtu := range []int{1500, 9000, 65000, 1500, 68, 65521, 1500} {
				both(mtu)
			}
			both(9000)
			// TCP segments may be as long as the MTU.
			b, off := partialTCP(60000)
			off.GSO, off.GSOSize, off.HeaderLen = GSOTCPv4, 9000-40, 54
			for _, way := range [][2]Link{{pg, pd}, {pd, pg}} {
				send(t, way[0], off, b)
				for total := 0; total < 60000; {
					got, left := receive(t, way[1])
					if left.GSO == GSONone && (len(got) > 9014 || left.Checksum != ChecksumPartial && !tcpGood(got)) {
						t.Fatalf("a segment of %d bytes, %+v", len(got), left)
					}
					total += len(got) - 54
				}
			}
			wantLogged(t, frontLog, raisedLink, "interface="+guest.Name(), "vif_mtu=1500", "interface_mtu=9000", "vif=0")
			wantLogged(t, backLog, raisedLink, "interface="+driver.Name(), "vif_mtu=1500", "interface_mtu=9000", "vif=0", "peer=2")
			for _, j := range []*Joint{jf, jb} {
				if st := j.Stats(); st.Dropped()+st.Unsent != 0 {
					t.Errorf("%+v", st)
				}
			}
			for _, ended := range []<-chan error{endedFront, endedBack} {
				select {
				case err := <-ended:
					t.Error(err)
				default:
				}
			}
		})
	}
}

// The MTU of a TAP from another process's network namespace cannot be read. The joint
// infers it from the frames.
func TestRaisedMTUOfATAPFromElsewhereIsFollowed(t *testing.T) {
	first := openTAP(t, TAPConfig{})
	f, err := first.File()
	if err != nil {
		t.Fatal(err)
	}
	tap, err := NewTAP(f, first.Info())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	if n := tap.mtuNow(); n != 0 {
		t.Fatalf("an MTU of %d", n)
	}
	p := openPacket(t, tap.Name())
	h, log := newHostWithLog(t)
	got := h.listen()
	h.join(context.Background(), h.Back, tap)
	send(t, p, Offload{}, testFrame(60))
	next(t, got) // the joint runs, and has turned segmentation offload on
	setMTU(t, tap.Name(), 9000)
	// Segments that come over a bridge may be longer than the interface's MTU, so the
	// joint infers nothing from them.
	b, off := partialTCP(20000)
	off.GSO, off.GSOSize, off.HeaderLen = GSOTCPv4, 4000, 54
	send(t, p, off, b)
	for _, size := range []int{60, 5014, 9014} {
		want := testFrame(size)
		send(t, p, Offload{}, want)
		if b := next(t, got); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes of %d", len(b), size)
		}
	}
	wantLogged(t, log, raisedLink, "interface_mtu=5000")
	wantLogged(t, log, beyondVif)
}

func TestRaisedMTUOfAPacketSocketIsFollowed(t *testing.T) {
	card, far := veth(t, 1500)
	h, log := newHostWithLog(t)
	got := h.listen()
	j, _ := h.join(context.Background(), h.Back, openPacket(t, far))
	p := openPacket(t, card)
	guest := func(size int) {
		t.Helper()
		if _, err := h.Front.Write(testFrame(size)); err != nil {
			t.Fatal(err)
		}
	}
	// The guest's MTU is raised first: the interface does not take its frames.
	guest(9014)
	guest(60)
	if b, _ := receive(t, p); len(b) != 60 {
		t.Fatalf("%d bytes", len(b))
	}
	guest(9014)
	settle(t, j, func(st JointStats) bool { return st.Unsent == 2 })
	setMTU(t, card, 9000)
	setMTU(t, far, 9000)
	wantLogged(t, log, beyondLink, "interface="+far, "frame=9014", "interface_mtu=1500")
	for _, size := range sizesTo(9000) {
		want := testFrame(size)
		guest(size)
		if b, _ := receive(t, p); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes of %d", len(b), size)
		}
		send(t, p, Offload{}, want)
		if b := next(t, got); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes of %d", len(b), size)
		}
	}
	wantLogged(t, log, raisedLink, "interface="+far, "interface_mtu=9000")

	// Segments that the joint cuts may be as long, and the frames behind them arrive.
	u := gsoFrame{}
	u.frame, u.off = partialTCP(60000)
	u.off.GSO, u.off.GSOSize, u.off.HeaderLen, u.off.ECN = GSOTCPv4, 9000-40, 54, true
	for range 3 {
		send(t, p, u.off, u.frame)
		for i, want := range cut(t, u) {
			if b := next(t, got); !bytes.Equal(b, want) {
				t.Fatalf("segment %d: %d bytes of %d", i, len(b), len(want))
			}
		}
		for _, size := range []int{100, 1518, 9014} {
			want := testFrame(size)
			send(t, p, Offload{}, want)
			if b := next(t, got); !bytes.Equal(b, want) {
				t.Fatalf("%d bytes of %d", len(b), size)
			}
		}
	}
	// Longer segments are dropped.
	u.off.GSOSize = 9001
	send(t, p, u.off, u.frame)
	settle(t, j, func(st JointStats) bool { return st.Oversize == 1 && st.Refused+st.Uncut == 0 })
	until(t, "the counters show what was not delivered", func() bool {
		st := h.Back.Stats()
		return st.RX.Get(telemetry.Undelivered) == 2
	})
}

// An interface's MTU that was larger before the joint ran does not raise the vif's.
func TestFramesBeyondTheVifAreLoggedOnceAndCounted(t *testing.T) {
	tap := openTAP(t, TAPConfig{MTU: 9000})
	p := openPacket(t, tap.Name())
	h, log := newHostWithLog(t)
	got := h.listen()
	j, _ := h.join(context.Background(), h.Back, tap)
	for _, size := range []int{1519, 5000, 9014, 60} {
		send(t, p, Offload{}, testFrame(size))
	}
	if b := next(t, got); len(b) != 60 {
		t.Fatalf("%d bytes", len(b))
	}
	wantLogged(t, log, beyondVif, "interface="+tap.Name(), "frame=1519", "vif_mtu=1500", "interface_mtu=9000")
	settle(t, j, func(st JointStats) bool { return st.Oversize == 3 })
	settle(t, j, func(JointStats) bool { return lostOf(h.Back, telemetry.DropTooLong) == 3 })

	// If the MTU is raised further, longer frames pass.
	setMTU(t, tap.Name(), 9100)
	for _, size := range []int{5000, 9114} {
		want := testFrame(size)
		send(t, p, Offload{}, want)
		if b := next(t, got); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes of %d", len(b), size)
		}
	}
	// No vif has longer frames than these.
	setMTU(t, tap.Name(), 65521)
	tagged := testFrame(65535 + 4)
	copy(tagged[12:], []byte{0x81, 0, 0, 7, testType >> 8, testType & 0xff})
	send(t, p, Offload{}, tagged)
	send(t, p, Offload{}, tagged[:65535])
	if b := next(t, got); !bytes.Equal(b, tagged[:65535]) {
		t.Fatalf("%d bytes", len(b))
	}
	send(t, p, Offload{}, tagged) // also now that the MTU is known
	settle(t, j, func(st JointStats) bool { return st.Oversize == 5 })
}

func lostOf(dev *pvnet.Device, r telemetry.Reason) uint64 {
	st := dev.Stats()
	return st.TX.Lost(r)
}

// The MTU of an interface does not count VLAN tags; 802.1ad frames have two.
func TestFramesWithTwoTagsPass(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	h, log := newHostWithLog(t)
	got := h.listen()
	l, j, _ := h.joinScripted(tap)
	b := testFrame(1523)
	copy(b[12:], []byte{0x88, 0xa8, 0, 7, 0x81, 0, 0, 8, testType >> 8, testType & 0xff})
	l.frame(b, Offload{})
	l.frame(b[:1522], Offload{})
	if b2 := next(t, got); !bytes.Equal(b2, b[:1522]) {
		t.Fatalf("%d bytes", len(b2))
	}
	settle(t, j, func(st JointStats) bool { return st.Oversize == 1 && st.FromLink == 1 })
	wantLogged(t, log, beyondVif, "frame=1523")
}

// If the other end takes only frames of one page, the joint logs that once for longer
// frames, and passes the others on.
func TestPeerThatTakesNoLongFramesIsLoggedOnce(t *testing.T) {
	lab := labtest.New(t, emu.Config{})
	lab.Domain(1)
	guest := lab.Domain(2)
	v := lab.Add(toolstack.Vif{Front: 2, Back: 1, MAC: ourMAC, MTU: 1500})
	write := func(key, value string) {
		t.Helper()
		if err := lab.Tools.Write(context.Background(), v.BackDir()+"/"+key, value); err != nil {
			t.Fatal(err)
		}
	}
	write("feature-rx-copy", "1")
	write("state", "2")
	cfg, log := logged(pvnet.Config{})
	connected := make(chan *pvnet.Device, 1)
	go func() {
		front, err := pvnet.Connect(context.Background(), guest, "0", cfg)
		if err != nil {
			t.Error(err)
		}
		connected <- front
	}()
	for state := ""; state != "3" && state != "4"; {
		state, _ = lab.Tools.Read(context.Background(), v.FrontDir()+"/state")
	}
	write("state", "4")
	front := next(t, connected)
	t.Cleanup(front.Disconnect)
	t.Cleanup(func() { write("state", "6") })
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	h := &host{&pvnettest.Wire{Front: front}, t}
	j, ended := h.join(context.Background(), front, tap)
	setMTU(t, tap.Name(), 9000)
	for _, size := range []int{5000, 60, 4097, 4096} {
		send(t, p, Offload{}, testFrame(size))
	}
	settle(t, j, func(st JointStats) bool { return st.Refused == 2 && st.FromLink == 2 })
	wantLogged(t, log, beyondPeer, "interface="+tap.Name(), "frame=5000", "vif_mtu=1500")
	settle(t, j, func(JointStats) bool { return lostOf(front, telemetry.DropTooLong) == 2 })
	select {
	case err := <-ended:
		t.Fatal(err)
	default:
	}
}
