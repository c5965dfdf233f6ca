//go:build linux

package link

import (
	"bytes"
	"log/slog"
	"os"
	"os/signal"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/packet"
	"barevif/pvnet/pvnettest"
	"barevif/xenbus/toolstack"
)

// A bare link stands for the rest of a scripted link that has no interface.
type bare struct{ Link }

func (bare) SetReadDeadline(time.Time) error { return nil }
func (bare) MTU() int                        { return 1500 }
func (bare) Name() string                    { return "bare" }

// FuzzFrameAndHeader reads any frame with any offload. The guest must get whole frames that
// differ from the input only as the offload demands.
func FuzzFrameAndHeader(f *testing.F) {
	// The fuzzing engine calls Notify, which starts a goroutine. Start it now, so that it
	// does not count as a leak of the test.
	c := make(chan os.Signal, 1)
	signal.Notify(c, os.Interrupt)
	signal.Stop(c)
	quiet := pvnet.Config{Logger: slog.New(slog.DiscardHandler)}
	w := pvnettest.New(f, toolstack.Vif{MAC: ourMAC, MTU: 1500}, quiet, quiet)
	h := &host{w, f}
	l, j, _ := h.joinScripted(bare{})
	rx := ownRX(f, w.Front)
	var header [headerSize]byte
	for _, u := range gsoFrames() {
		u.off.encode(&header)
		f.Add(header[:], u.frame)
	}
	b, off := partialTCP(100)
	off.encode(&header)
	f.Add(header[:], b)
	off.SumStart, off.SumOffset = 20, 7
	off.encode(&header)
	f.Add(header[:], b)
	f.Add([]byte{flagDataValid}, b)
	b, off = partialTCP(3000)
	off.GSO, off.GSOSize = GSOTCPv4, 2 // 1500 pieces
	off.encode(&header)
	f.Add(header[:], b)
	f.Add([]byte{}, testFrame(1518))
	f.Add([]byte{}, testFrame(14)[:13])
	marker := testFrame(60)
	copy(marker, "the end of this round")

	f.Fuzz(func(t *testing.T, header, frame []byte) {
		var raw [headerSize]byte
		copy(raw[:], header)
		var off Offload
		off.decode(&raw)
		frame = frame[:min(len(frame), MaxFrame)]
		before := j.Stats()
		go func() { // the frame may be cut into more pieces than the rings hold
			l.frame(frame, off)
			l.frame(marker, Offload{})
		}()
		rx.SetDeadline(time.Now().Add(wait))
		var out [][]byte
		for {
			var one [1]pvnet.Frame
			if _, err := rx.Receive(one[:]); err != nil {
				t.Fatal(err, j.Stats())
			}
			b := make([]byte, one[0].Len())
			one[0].CopyTo(b)
			if one[0].Checksum() == pvnet.ChecksumPartial || one[0].GSO().Size != 0 || len(b) > 1518 {
				t.Fatalf("%d bytes, not whole", len(b))
			}
			rx.Release(one[:])
			if bytes.Equal(b, marker) {
				break
			}
			out = append(out, b)
		}
		if len(out) == 0 {
			settle(t, j, func(st JointStats) bool { return st.Uncut+st.Oversize == before.Uncut+before.Oversize+1 })
			return
		}
		if off.GSO == GSONone {
			if len(out) != 1 {
				t.Fatalf("%d frames of one", len(out))
			}
			sameBut(t, out[0], frame, off)
			return
		}
		h, ok := packet.Parse(frame, len(frame))
		if !ok || h.End != len(frame) {
			return // the bytes behind the packet have no defined fate
		}
		if h.L5 != 0 && len(frame)-h.L5 <= int(off.GSOSize) {
			if len(out) != 1 {
				t.Fatalf("%d frames of one segment", len(out))
			}
			return
		}
		want := cut(t, gsoFrame{"", frame, off})
		if len(out) != len(want) {
			t.Fatalf("%d segments, want %d", len(out), len(want))
		}
		for i := range want {
			if !bytes.Equal(out[i], want[i]) {
				t.Fatalf("segment %d of %d:\n% x, want\n% x", i, len(want), out[i], want[i])
			}
		}
	})
}

// sameBut fails unless b equals the frame except for the checksum field of off.
func sameBut(t *testing.T, b, frame []byte, off Offload) {
	t.Helper()
	if len(b) == len(frame) && off.Checksum == ChecksumPartial {
		at := int(off.SumStart) + int(off.SumOffset)
		b = bytes.Clone(b)
		copy(b[at:at+2], frame[at:])
		if off.SumOffset == 8 { // SCTP's checksum has four bytes
			copy(b[at:at+4], frame[at:])
		}
	}
	if !bytes.Equal(b, frame) {
		t.Fatalf("% x, want % x", b, frame)
	}
}
