//go:build linux

package xendev

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall/xendev/xendevtest"
	"barevif/xenbus/xenstore/wire"
)

// newStore makes a store on one end of a stream; the other end stands for the kernel.
func newStore(t testing.TB) (*store, *os.File) {
	t.Helper()
	xendevtest.CheckFiles(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &store{file: os.NewFile(uintptr(fds[0]), "xenbus")}
	far := os.NewFile(uintptr(fds[1]), "kernel")
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		far.Close()
	})
	return s, far
}

func message(t testing.TB, h wire.Header, parts ...string) []byte {
	t.Helper()
	b, err := wire.Append(nil, h, parts...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func send(t testing.TB, w io.Writer, b []byte) {
	t.Helper()
	if n, err := w.Write(b); err != nil || n != len(b) {
		t.Fatalf("wrote %d of %d: %v", n, len(b), err)
	}
}

func receive(t testing.TB, r io.Reader, op wire.Op, id uint32, payload string) {
	t.Helper()
	h, p, err := wire.ReadMessage(r, make([]byte, wire.HeaderSize+wire.MaxPayload))
	if err != nil {
		t.Fatal(err)
	}
	if h.Op != op || h.ReqID != id || string(p) != payload {
		t.Errorf("message %+v %q, not %d of %d %q", h, p, op, id, payload)
	}
}

func TestStorePassesMessagesThrough(t *testing.T) {
	s, far := newStore(t)
	send(t, s, message(t, wire.Header{Op: wire.Read, ReqID: 7}, "a\x00"))
	receive(t, far, wire.Read, 7, "a\x00")

	// One message in pieces, two in one write, and one without a payload.
	b := message(t, wire.Header{Op: wire.Read, ReqID: 7}, strings.Repeat("v", wire.MaxPayload))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for piece := range slices.Chunk(b, 1000) {
			send(t, far, piece)
		}
		b := message(t, wire.Header{Op: wire.WatchEvent}, "path\x00", "token\x00")
		send(t, far, append(b, message(t, wire.Header{Op: wire.Read, ReqID: 8})...))
	}()
	receive(t, s, wire.Read, 7, strings.Repeat("v", wire.MaxPayload))
	receive(t, s, wire.WatchEvent, 0, "path\x00token\x00")
	receive(t, s, wire.Read, 8, "")
	<-done
}

func TestStoreAnswersWhatTheDeviceWouldRefuse(t *testing.T) {
	s, far := newStore(t)
	tooLong := message(t, wire.Header{Op: wire.Write, ReqID: 9, TxID: 3}, strings.Repeat("x", maxRequest+1))
	done := make(chan struct{})
	go func() {
		defer close(done)
		receive(t, s, wire.Error, 9, "E2BIG\x00") // the Read waits and is woken
	}()
	send(t, s, tooLong)
	<-done

	send(t, s, message(t, wire.Header{Op: wire.Write, ReqID: 10}, strings.Repeat("x", maxRequest)))
	receive(t, far, wire.Write, 10, strings.Repeat("x", maxRequest))

	// The answer comes between two messages, not inside one.
	reply := message(t, wire.Header{Op: wire.Read, ReqID: 10}, "payload")
	send(t, far, reply[:20])
	if err := s.file.SetReadDeadline(time.Time{}); err != nil { // refuse has moved the deadline
		t.Fatal(err)
	}
	var head [1]byte
	if n, err := s.file.Read(head[:]); n != 1 || err != nil { // part of the message has been read
		t.Fatal(n, err)
	}
	s.buf[0], s.have = head[0], 1
	send(t, s, tooLong)
	send(t, far, reply[20:])
	receive(t, s, wire.Read, 10, "payload")
	receive(t, s, wire.Error, 9, "E2BIG\x00")
	send(t, far, reply)
	receive(t, s, wire.Read, 10, "payload")
}

func TestStoreTakesWholeMessagesOnly(t *testing.T) {
	s, _ := newStore(t)
	b := message(t, wire.Header{Op: wire.Read}, "a\x00")
	for name, b := range map[string][]byte{
		"nothing":      nil,
		"half":         b[:len(b)-1],
		"a header":     b[:10],
		"two messages": append(slices.Clone(b), b...),
	} {
		if _, err := s.Write(b); err == nil {
			t.Errorf("%s was written", name)
		}
	}
}

func TestStoreBoundsItsOwnAnswers(t *testing.T) {
	s, _ := newStore(t)
	b := message(t, wire.Header{Op: wire.Write}, strings.Repeat("x", wire.MaxPayload))
	for range 10000 {
		if _, err := s.Write(b); err != nil {
			if !errors.Is(err, unix.E2BIG) {
				t.Error(err)
			}
			return
		}
	}
	t.Error("a client that never reads is answered for ever")
}

func TestStoreRefusesAnImpossibleLength(t *testing.T) {
	s, far := newStore(t)
	b := message(t, wire.Header{Op: wire.Read}, "a")
	b[12], b[13], b[15] = 1, 0x10, 0xff
	send(t, far, b)
	if _, err := s.Read(make([]byte, 10)); !errors.Is(err, wire.ErrTooLong) {
		t.Errorf("a reply of 4 GiB: %v", err)
	}
}

func TestStoreCloseEndsRead(t *testing.T) {
	s, _ := newStore(t)
	done := make(chan error, 1)
	go func() {
		_, err := s.Read(make([]byte, 10))
		done <- err
	}()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read: %v", err)
	}
	b := message(t, wire.Header{Op: wire.Read}, "a\x00")
	if _, err := s.Write(b); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write: %v", err)
	}
	big := message(t, wire.Header{Op: wire.Read}, strings.Repeat("x", wire.MaxPayload))
	if _, err := s.Write(big); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write of too much: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error("second Close:", err)
	}
}

func TestStoreReportsTheEndOfTheDevice(t *testing.T) {
	s, far := newStore(t)
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(make([]byte, 10)); err != io.EOF {
		t.Errorf("Read: %v", err)
	}
	s2, far2 := newStore(t)
	send(t, far2, []byte{1, 2, 3})
	if err := far2.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s2.Read(make([]byte, 10)); err != io.EOF {
		t.Errorf("Read of half a message: %v", err)
	}
}
