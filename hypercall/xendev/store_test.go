//go:build linux

package xendev

import (
	"errors"
	"io"
	"io/fs"
	"maps"
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

// testStore makes a store on one end of a stream; the other end stands for the kernel. more gets the
// kernel's end of each further file; nil: none can be opened.
func testStore(t testing.TB, more chan<- *os.File) (*store, *os.File) {
	return storeOn(t, more, func(f *os.File) io.ReadWriteCloser { return f })
}

// storeOn is testStore with a first file that wrap makes.
func storeOn(t testing.TB, more chan<- *os.File, wrap func(*os.File) io.ReadWriteCloser) (*store, *os.File) {
	t.Helper()
	xendevtest.CheckFiles(t)
	pair := func() (*os.File, *os.File, error) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, nil, err
		}
		far := os.NewFile(uintptr(fds[1]), "kernel")
		t.Cleanup(func() { far.Close() })
		return os.NewFile(uintptr(fds[0]), "xenbus"), far, nil
	}
	near, far, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	s := newStore(wrap(near), func() (io.ReadWriteCloser, error) {
		if more == nil {
			return nil, unix.EMFILE
		}
		near, far, err := pair()
		if err == nil {
			more <- far
		}
		return near, err
	})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
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
	s, far := testStore(t, nil)
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
	s, far := testStore(t, nil)
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
	send(t, s, tooLong)
	receive(t, s, wire.Error, 9, "E2BIG\x00")
	send(t, far, reply[20:])
	receive(t, s, wire.Read, 10, "payload")
}

func TestStoreTakesWholeMessagesOnly(t *testing.T) {
	s, far := testStore(t, nil)
	b := message(t, wire.Header{Op: wire.Read}, "a\x00")
	defer func() { // nothing of them has reached the kernel
		send(t, s, message(t, wire.Header{Op: wire.Read, ReqID: 5}, "b\x00"))
		receive(t, far, wire.Read, 5, "b\x00")
	}()
	for name, b := range map[string][]byte{
		"nothing":      nil,
		"half":         b[:len(b)-1],
		"a header":     b[:10],
		"one and half": append(slices.Clone(b), b[:len(b)-1]...),
	} {
		if _, err := s.Write(b); err == nil {
			t.Errorf("%s was written", name)
		}
	}
}

func TestStoreBoundsItsOwnAnswers(t *testing.T) {
	s, _ := testStore(t, nil)
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
	s, far := testStore(t, nil)
	b := message(t, wire.Header{Op: wire.Read}, "a")
	b[12], b[13], b[15] = 1, 0x10, 0xff
	send(t, far, b)
	if _, err := s.Read(make([]byte, 10)); !errors.Is(err, wire.ErrTooLong) {
		t.Errorf("a reply of 4 GiB: %v", err)
	}
}

func TestStoreCloseEndsRead(t *testing.T) {
	s, _ := testStore(t, nil)
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
	s, far := testStore(t, nil)
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(make([]byte, 10)); err != io.EOF {
		t.Errorf("Read: %v", err)
	}
	s2, far2 := testStore(t, nil)
	send(t, far2, []byte{1, 2, 3})
	if err := far2.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s2.Read(make([]byte, 10)); err != io.EOF {
		t.Errorf("Read of half a message: %v", err)
	}
}

// request is a message with the id id and, as its payload, a path.
func request(t testing.TB, op wire.Op, id, tx uint32) []byte {
	return message(t, wire.Header{Op: op, ReqID: id, TxID: tx}, "a\x00")
}

// silent fails the test if f has something to read.
func silent(t testing.TB, f *os.File) {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil { // one in the past hides what is there
		t.Fatal(err)
	}
	if n, err := f.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes, and %v", n, err)
	}
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
}

func TestStoreReadsOnSeveralLanes(t *testing.T) {
	more := make(chan *os.File, maxLanes)
	s, first := testStore(t, more)
	var all []byte // in one write, as a client sends them
	for id := range uint32(maxLanes + 1) {
		all = append(all, request(t, wire.Read, id, 0)...)
	}
	send(t, s, all)
	far := []*os.File{first}
	for range maxLanes - 1 {
		far = append(far, <-more)
	}
	for i, f := range far {
		receive(t, f, wire.Read, uint32(i), "a\x00")
		silent(t, f)
	}
	// The answers come in whatever order, and the one that had no lane follows on the first.
	for i := maxLanes - 1; i >= 0; i-- {
		send(t, far[i], message(t, wire.Header{Op: wire.Read, ReqID: uint32(i)}, "v"))
		receive(t, s, wire.Read, uint32(i), "v")
	}
	receive(t, first, wire.Read, maxLanes, "a\x00")
	// Lanes are used again.
	for id := range uint32(100) {
		send(t, s, request(t, wire.Read, id, 0))
		f := far[1] // the first is busy
		receive(t, f, wire.Read, id, "a\x00")
		send(t, f, message(t, wire.Header{Op: wire.Read, ReqID: id}, "v"))
		receive(t, s, wire.Read, id, "v")
	}
	if len(more) > 0 {
		t.Errorf("%d lanes more", len(more))
	}
}

func TestStoreKeepsTheOrderOfRequestsThatChangeSomething(t *testing.T) {
	more := make(chan *os.File, maxLanes)
	s, far := testStore(t, more)
	ordered := [][]byte{ // all on the first lane
		request(t, wire.Write, 0, 0), request(t, wire.Watch, 1, 0), request(t, wire.TransactionStart, 2, 0),
		request(t, wire.Read, 3, 7), request(t, wire.Directory, 4, 7), request(t, wire.TransactionEnd, 5, 7),
		request(t, wire.Mkdir, 6, 0), request(t, wire.Rm, 7, 0), request(t, wire.SetPerms, 8, 0),
		request(t, wire.Unwatch, 9, 0), request(t, wire.ResetWatches, 10, 0), request(t, wire.Introduce, 11, 0),
	}
	for _, b := range ordered {
		send(t, s, b)
	}
	for i, b := range ordered {
		receive(t, far, wire.Op(b[0]), uint32(i), "a\x00")
		silent(t, far)
		send(t, far, message(t, wire.Header{Op: wire.WatchEvent}, "path\x00", "token\x00"))
		receive(t, s, wire.WatchEvent, 0, "path\x00token\x00")
		silent(t, far) // an event answers nothing
		send(t, far, message(t, wire.Header{Op: wire.Op(b[0]), ReqID: uint32(i)}, "OK\x00"))
		receive(t, s, wire.Op(b[0]), uint32(i), "OK\x00")
	}
	if len(more) > 0 {
		t.Errorf("%d lanes more", len(more))
	}
}

func TestStoreEndsWithAnyOfItsLanes(t *testing.T) {
	more := make(chan *os.File, maxLanes)
	s, _ := testStore(t, more)
	send(t, s, request(t, wire.Read, 0, 0))
	send(t, s, request(t, wire.Read, 1, 0))
	second := <-more
	receive(t, second, wire.Read, 1, "a\x00")
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(make([]byte, 10)); err != io.EOF {
		t.Errorf("Read: %v", err)
	}
	if _, err := s.Write(request(t, wire.Read, 2, 0)); err != io.EOF {
		t.Errorf("Write: %v", err)
	}
}

// A refusing file takes its first request. Like the driver, it refuses all others by the errno of write(2).
type refusing struct {
	*os.File
	writes int
}

func (f *refusing) Write(b []byte) (int, error) {
	if f.writes++; f.writes > 1 {
		return 0, &fs.PathError{Op: "write", Path: "xenbus", Err: unix.EACCES}
	}
	return f.File.Write(b)
}

func TestStoreGoesOnAfterARefusal(t *testing.T) {
	s, far := storeOn(t, nil, func(f *os.File) io.ReadWriteCloser { return &refusing{File: f} })
	want := map[uint32]wire.Op{0: wire.Write}
	for id := range uint32(5) {
		send(t, s, request(t, wire.Write, id, 0))
		if id > 0 {
			want[id] = wire.Error
		}
	}
	receive(t, far, wire.Write, 0, "a\x00")
	send(t, far, message(t, wire.Header{Op: wire.Write, ReqID: 0}, "OK\x00"))
	answers := make(map[uint32]wire.Op)
	for range want {
		h, _, err := wire.ReadMessage(s, make([]byte, wire.HeaderSize+wire.MaxPayload))
		if err != nil {
			t.Fatal(err)
		}
		answers[h.ReqID] = h.Op
	}
	if !maps.Equal(answers, want) {
		t.Errorf("answers %v, not %v", answers, want)
	}
	send(t, s, request(t, wire.Write, 5, 0)) // its lane is free
	receive(t, s, wire.Error, 5, "EACCES\x00")
}
