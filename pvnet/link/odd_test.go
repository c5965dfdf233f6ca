//go:build linux

package link

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"barevif/pvnet"
	"barevif/telemetry"

	"golang.org/x/sys/unix"
)

// An errno of the kernel concerns either one frame or the interface.
func TestErrorsOfTheKernelAreSorted(t *testing.T) {
	tap, p := openTAP(t, TAPConfig{}), openPacket(t, "lo")
	for _, c := range []struct {
		errno       syscall.Errno
		read, write error
	}{
		{unix.EINVAL, ErrOffload, ErrOffload},
		{unix.EOPNOTSUPP, ErrOffload, ErrOffload},
		{unix.ENOTSUP, ErrOffload, ErrOffload},
		{unix.EPROTONOSUPPORT, ErrOffload, ErrOffload},
		{unix.EPROTO, ErrOffload, ErrOffload},
		{unix.EBADMSG, ErrOffload, ErrOffload},
		{unix.E2BIG, ErrOffload, ErrOffload},
		{unix.EMSGSIZE, ErrSize, ErrSize},
		{unix.ENOBUFS, ErrNoBuffers, ErrNoBuffers},
		{unix.ENOMEM, ErrNoBuffers, ErrNoBuffers},
		{unix.EIO, ErrDown, ErrDown},
		{unix.ENETDOWN, ErrDown, ErrDown},
		{unix.EBADF, ErrGone, ErrGone},
		{unix.EBADFD, ErrGone, ErrGone},
		{unix.ENODEV, ErrGone, ErrGone},
		{unix.ENXIO, ErrGone, ErrGone},
		{unix.EPERM, unix.EPERM, unix.EPERM},
	} {
		for _, l := range []*port{&tap.port, &p.port} {
			for _, h := range []*half{&l.rd, &l.wr} {
				want := c.read
				if h == &l.wr {
					want = c.write
				}
				h.errno = c.errno
				if err := l.failed(h); !errors.Is(err, want) {
					t.Errorf("%v: %v, want %v", c.errno, err, want)
				}
			}
		}
	}
	for l, want := range map[*port]error{&tap.port: ErrGone, &p.port: ErrOffload} {
		l.rd.errno, l.wr.errno = unix.EFAULT, unix.EFAULT
		if err := l.failed(&l.rd); err != want {
			t.Errorf("a read that faults: %v, want %v", err, want)
		}
		if err := l.failed(&l.wr); err != ErrOffload {
			t.Errorf("a write that faults: %v", err)
		}
	}
}

// indescribable returns frames whose segmentation a writer can request, but which the kernel
// cannot express in the struct virtio_net_hdr of a reader.
func indescribable() []gsoFrame {
	datagram := gsoFrames()[4]
	datagram.name, datagram.off.GSO = "a datagram to be cut into fragments", GSOUFO
	return []gsoFrame{datagram}
}

// Any neighbour on a bridge can send a frame that the kernel cannot describe to its reader.
func TestFrameTheKernelCannotDescribeIsLostAlone(t *testing.T) {
	card := openTAP(t, TAPConfig{})
	l := openPacket(t, card.Name())
	h := newHostOf(t, 1500, pvnet.Config{Offload: true}, pvnet.Config{})
	got := h.listen()
	j, ended := h.join(context.Background(), h.Back, l)
	for round := range 200 {
		for _, u := range indescribable() {
			if _, err := card.WriteFrame(u.off, [][]byte{u.frame}); errors.Is(err, ErrOffload) {
				t.Skip("this kernel takes no such frame:", u.name)
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if round%10 == 0 {
			want := testFrame(100 + round)
			send(t, card, Offload{}, want)
			if b := next(t, got); !bytes.Equal(b, want) {
				t.Fatalf("%d bytes", len(b))
			}
		}
	}
	lost := uint64(200 * len(indescribable()))
	settle(t, j, func(st JointStats) bool { return st.Uncut == lost })
	settle(t, j, func(JointStats) bool { return lostOf(h.Back, telemetry.DropBadGSO) == lost })
	select {
	case err := <-ended:
		t.Fatal(err)
	default:
	}
}

func TestReadsThatFailLoseOneFrameEach(t *testing.T) {
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	l, j, ended := h.joinScripted(openTAP(t, TAPConfig{}))
	fail := func(times int, err error) {
		for range times {
			l.script <- func([][]byte) (int, Offload, error) { return 0, Offload{}, err }
		}
	}
	works := func() {
		t.Helper()
		want := testFrame(100)
		l.frame(want, Offload{})
		select {
		case err := <-ended:
			t.Fatal(err)
		case b := <-got:
			if !bytes.Equal(b, want) {
				t.Fatalf("%d bytes", len(b))
			}
		}
	}
	odd := os.NewSyscallError("read", unix.ECOMM)
	// More failed reads in a row than the joint takes without a pause.
	fail(3*failLimit, ErrOffload)
	fail(2, ErrSize)
	fail(3, ErrTruncated)
	fail(2*failLimit, ErrNoBuffers)
	fail(1, odd)
	works()
	for range 3 {
		fail(failLimit, odd)
		works()
	}
	want := JointStats{FromLink: 4, Uncut: 3 * failLimit, Oversize: 5, Unread: 2*failLimit + 1 + 3*failLimit}
	settle(t, j, func(st JointStats) bool { return st == want })
	settle(t, j, func(JointStats) bool {
		st := h.Back.Stats()
		return st.TX.Lost(telemetry.DropBadGSO) == want.Uncut && st.TX.Lost(telemetry.DropTooLong) == want.Oversize &&
			st.TX.Get(telemetry.Undelivered) == want.Unread && st.TX.Get(telemetry.Packets) == 4 &&
			st.TX.Errors()+st.TX.Dropped() == want.Uncut+want.Oversize
	})
	if n := want.Dropped(); n != want.Uncut+want.Oversize+want.Unread {
		t.Errorf("%d dropped", n)
	}

	// An unknown error that does not go away ends the joint.
	fail(failLimit+1, odd)
	if err := next(t, ended); !errors.Is(err, unix.ECOMM) {
		t.Error(err)
	}
}

// A frame that is too short, or has an impossible checksum offset, is counted by its reason.
func TestLossesAreCountedByReason(t *testing.T) {
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	l, j, ended := h.joinScripted(openTAP(t, TAPConfig{}))
	l.frame(testFrame(100)[:13], Offload{})
	l.frame(testFrame(100), Offload{Checksum: ChecksumPartial, SumStart: 99})
	l.frame(testFrame(100), Offload{Checksum: ChecksumPartial, SumStart: 99})
	u := gsoFrames()[0]
	u.off.GSO = GSOUFO
	l.frame(u.frame, u.off)
	l.frame(u.frame, u.off)
	l.frame(u.frame, u.off)
	u = gsoFrames()[0]
	u.off.GSOSize = 1900
	l.frame(u.frame, u.off)
	u.off.GSO, u.off.ECN = GSOTCPv4, true
	l.frame(u.frame, u.off)
	l.frame(testFrame(60), Offload{})
	next(t, got)
	settle(t, j, func(st JointStats) bool { return st.Uncut == 6 && st.Oversize == 2 && st.FromLink == 1 })
	settle(t, j, func(JointStats) bool {
		st := h.Back.Stats()
		return st.TX.Lost(telemetry.DropTooShort) == 1 && st.TX.Lost(telemetry.DropBadCsum) == 2 &&
			st.TX.Lost(telemetry.DropBadGSO) == 3 && st.TX.Lost(telemetry.DropTooLong) == 2
	})
	l.end()
	if err := next(t, ended); err != net.ErrClosed {
		t.Error(err)
	}
}

// A refusing link takes no frame.
type refusing struct {
	Link
	answers chan error
}

func (l *refusing) WriteFrame(Offload, [][]byte) (int, error) { return 0, <-l.answers }

func TestWritesThatFailLoseOneFrameEach(t *testing.T) {
	h := newHost(t, 1500, pvnet.Config{})
	r := &refusing{openTAP(t, TAPConfig{}), make(chan error)}
	l, j, ended := h.joinScripted(r)
	answers := []error{ErrOffload, ErrSize, ErrNoBuffers, ErrDown, ErrTooManyPieces, os.NewSyscallError("write", unix.EPERM), io.ErrShortWrite}
	for _, err := range answers {
		if _, werr := h.Front.Write(testFrame(60)); werr != nil {
			t.Fatal(werr)
		}
		r.answers <- err
	}
	want := uint64(len(answers))
	settle(t, j, func(st JointStats) bool { return st.Unsent == want && st.ToLink == 0 })
	settle(t, j, func(JointStats) bool {
		st := h.Back.Stats()
		return st.RX.Get(telemetry.Undelivered) == want && st.RX.Get(telemetry.Packets) == want && st.RX.Errors()+st.RX.Dropped() == 0
	})
	if _, err := h.Front.Write(testFrame(60)); err != nil {
		t.Fatal(err)
	}
	l.script <- func([][]byte) (int, Offload, error) { return 0, Offload{}, errNone } // lets the reader run
	r.answers <- ErrGone
	l.script <- func([][]byte) (int, Offload, error) { return 0, Offload{}, ErrGone }
	if err := next(t, ended); err != ErrGone {
		t.Error(err)
	}
	// The frame whose error ended the joint is counted, too.
	settle(t, j, func(st JointStats) bool {
		now := h.Back.Stats()
		return st.Unsent == want+1 && now.RX.Get(telemetry.Undelivered) == want+1
	})
}

func TestTAPThatWasDownContinues(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	j, ended := h.join(context.Background(), h.Back, tap)
	for round := range uint64(3) {
		setUpDown(t, tap.Name(), false)
		for range 5 {
			if _, err := h.Front.Write(testFrame(60)); err != nil {
				t.Fatal(err)
			}
		}
		settle(t, j, func(st JointStats) bool { return st.Unsent == 5*(round+1) })
		setUpDown(t, tap.Name(), true)
		p := openPacket(t, tap.Name())
		want := testFrame(200 + int(round))
		if _, err := h.Front.Write(want); err != nil {
			t.Fatal(err)
		}
		if b, _ := receive(t, p); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes", len(b))
		}
		send(t, p, Offload{}, want)
		if b := next(t, got); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes", len(b))
		}
	}
	until(t, "the counters show what was not delivered", func() bool {
		st := h.Back.Stats()
		return st.RX.Get(telemetry.Undelivered) == 15
	})
	select {
	case err := <-ended:
		t.Fatal(err)
	default:
	}
}
