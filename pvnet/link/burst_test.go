//go:build linux

package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"

	"golang.org/x/sys/unix"
)

// A counted TAP counts the bursts that a joint moves through it, and their frames. A single
// TAP refuses bursts.
type counted struct {
	*TAP
	single                       bool
	in, inFrames, out, outFrames atomic.Uint64
}

type countedReader struct {
	burstReader
	c *counted
}

type countedWriter struct {
	burstWriter
	c *counted
}

func (c *counted) readBursts() (burstReader, error) {
	if c.single {
		return nil, unix.ENOSYS
	}
	r, err := c.TAP.readBursts()
	return countedReader{r, c}, err
}

func (c *counted) writeBursts() (burstWriter, error) {
	if c.single {
		return nil, unix.ENOSYS
	}
	w, err := c.TAP.writeBursts()
	return countedWriter{w, c}, err
}

func (r countedReader) read(wait bool) ([]reading, error) {
	got, err := r.burstReader.read(wait)
	n := uint64(0)
	for i := range got {
		if got[i].err == nil {
			n++
		}
	}
	r.c.in.Add(1)
	r.c.inFrames.Add(n)
	return got, err
}

func (w countedWriter) write() []error {
	errs := w.burstWriter.write()
	w.c.out.Add(1)
	w.c.outFrames.Add(uint64(len(errs)))
	return errs
}

// both runs f with and without bursts.
func both(t *testing.T, f func(t *testing.T, tap *counted)) {
	for _, single := range []bool{false, true} {
		t.Run(map[bool]string{false: "bursts", true: "one by one"}[single], func(t *testing.T) {
			if !single {
				needNoWait(t)
			}
			f(t, &counted{TAP: openTAP(t, TAPConfig{MTU: 9000}), single: single})
		})
	}
}

// numbered returns a frame that carries its number.
func numbered(n, size int) []byte {
	f := testFrame(size)
	f[14], f[15] = byte(n>>8), byte(n)
	return f
}

// A window bounds how many frames of a test are under way. The queue of a TAP holds 500 and the
// buffer of a packet socket 250 at least, and the kernel drops what comes while they are full: a
// joint may be kept from reading for as long as the machine has other work.
type window chan struct{}

func newWindow() window { return make(window, 200) }

// enter waits until one more frame may be sent, and reports false if ctx ends first.
func (w window) enter(ctx context.Context) bool {
	select {
	case w <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// leave says that a frame has arrived.
func (w window) leave() { <-w }

// A joint moves the same frames in the same order with bursts and without.
func TestJointMovesBurstsInOrder(t *testing.T) {
	both(t, func(t *testing.T, tap *counted) {
		p := openPacket(t, tap.Name())
		h := newHostOf(t, 1500, pvnet.Config{Offload: true}, pvnet.Config{})
		got := h.listen()
		j, ended := h.join(context.Background(), h.Back, tap)
		long := gsoFrames()[0]
		segments := cut(t, long)
		bad := Offload{Checksum: ChecksumPartial, SumStart: 34, SumOffset: 4} // in a frame that is not IP
		const frames = 2000
		var want [][]byte
		var offs []Offload
		for i := range frames {
			size := 60 + i*37%1455
			want, offs = append(want, numbered(i, size)), append(offs, Offload{})
		}
		done, way := make(chan struct{}), newWindow()
		go func() {
			defer close(done)
			for i := range frames {
				if !way.enter(t.Context()) {
					return
				}
				switch i % 100 {
				case 20:
					send(t, p, long.off, long.frame)
				case 40:
					send(t, p, Offload{}, numbered(i, 1519)) // longer than the vif takes, as testFrame has no tag
				case 60:
					_, _ = p.WriteFrame(bad, [][]byte{numbered(i, 1516)})
				}
				send(t, p, offs[i], want[i])
			}
		}()
		for i := range frames {
			if i%100 == 20 {
				for k := range segments {
					if b := next(t, got); !bytes.Equal(b, segments[k]) {
						t.Fatalf("before frame %d: segment %d: %d bytes", i, k, len(b))
					}
				}
			}
			b := next(t, got)
			if i%100 == 60 && len(b) == 1516 { // a bad frame whose checksum the joint could complete
				b = next(t, got)
			}
			if !bytes.Equal(b, want[i]) {
				t.Fatalf("frame %d: %d bytes of %d: % x", i, len(b), len(want[i]), b[:16])
			}
			way.leave()
		}
		<-done
		if st := j.Stats(); st.Unread+st.Refused+st.Unfed != 0 {
			t.Errorf("%+v", st)
		}

		sendFromGuest(t, h, p, want)
		if tap.single {
			if n := tap.in.Load() + tap.out.Load(); n != 0 {
				t.Errorf("%d bursts", n)
			}
		} else if tap.inFrames.Load() == 0 || tap.outFrames.Load() == 0 {
			t.Errorf("%d frames read in bursts, %d written", tap.inFrames.Load(), tap.outFrames.Load())
		} else {
			t.Logf("read %d in %d bursts, written %d in %d", tap.inFrames.Load(), tap.in.Load(), tap.outFrames.Load(), tap.out.Load())
		}
		if names := workers(t); len(names) != 0 {
			t.Errorf("the kernel had threads of its own take part: %q", names)
		}
		tap.Close()
		if err := next(t, ended); err != net.ErrClosed {
			t.Error(err)
		}
	})
}

// sendFromGuest sends frames in batches, and wants each of them at p, in order.
func sendFromGuest(t *testing.T, h *host, p *Packet, want [][]byte) {
	t.Helper()
	read, way := make(chan []byte, len(want)), newWindow()
	reading, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for range want {
			b, _ := receive(t, p)
			read <- b
			way.leave()
		}
	}()
	tx := ownTX(t, h.Front)
	var out [batch]pvnet.Frame
	for i := 0; i < len(want); {
		n, err := tx.AllocWait(out[:min(batch, len(want)-i)], 1514)
		if err != nil {
			t.Fatal(err)
		}
		for k := range out[:n] {
			out[k].Truncate(out[k].CopyFrom(want[i+k]))
			if !way.enter(reading) {
				t.FailNow() // the reader has said why
			}
		}
		if _, err := tx.SendWait(out[:n]); err != nil {
			t.Fatal(err)
		}
		i += n
	}
	for i := range want {
		if b := next(t, read); !bytes.Equal(b, want[i]) {
			t.Fatalf("frame %d: %d bytes of %d", i, len(b), len(want[i]))
		}
	}
}

// A joint that moves frames one by one logs so once, at level debug.
func TestWhyThereAreNoBurstsIsLoggedOnce(t *testing.T) {
	both(t, func(t *testing.T, tap *counted) {
		cfg, log := logged(pvnet.Config{})
		cfg.Logger = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		h := &host{pvnettest.New(t, toolstack.Vif{MAC: ourMAC, MTU: 1500}, pvnet.Config{}, cfg), t}
		got := h.listen()
		h.join(context.Background(), h.Back, tap)
		p := openPacket(t, tap.Name())
		send(t, p, Offload{}, testFrame(60))
		next(t, got)
		want := 0
		if tap.single {
			want = 1
		}
		settleLog(t, log, want)
	})
}

func settleLog(t *testing.T, log *logtest.Log, want int) {
	t.Helper()
	for end := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		got := log.Lines("takes a system call")
		if len(got) == want && (want == 0 || bytes.Contains([]byte(got[0]), []byte("level=DEBUG"))) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%q", got)
		}
	}
}

// scriptedBursts is a TAP whose bursts come from a test's script.
type scriptedBursts struct {
	*TAP
	r *scriptedReader
	w burstWriter
}

func (s *scriptedBursts) readBursts() (burstReader, error) {
	if s.r == nil {
		return nil, unix.ENOSYS
	}
	return s.r, nil
}

func (s *scriptedBursts) writeBursts() (burstWriter, error) {
	if s.w == nil {
		return nil, unix.ENOSYS
	}
	return s.w, nil
}

// A step is what one burst reads, with errNone for a missing frame, and the error that
// breaks the reader after it.
type step struct {
	frames []scriptedFrame
	broken error
}

type scriptedFrame struct {
	b   []byte
	off Offload
	err error
}

type scriptedReader struct {
	t      testing.TB
	script chan step
	asked  chan int // how many each burst asked for
	bufs   [][][]byte
	rooms  [batch][]byte
	why    error
	closed atomic.Bool

	backwards bool // fills the buffers from the last one to the first
	costly    int  // result of minBurst; 0 means 2
}

func newScriptedReader(t testing.TB) *scriptedReader {
	r := &scriptedReader{t: t, script: make(chan step), asked: make(chan int, 1024)}
	for i := range r.rooms {
		r.rooms[i] = make([]byte, MaxFrame)
	}
	return r
}

func (r *scriptedReader) add(bufs [][]byte)         { r.bufs = append(r.bufs, slices.Clone(bufs)) }
func (r *scriptedReader) room(i int) []byte         { return r.rooms[i] }
func (r *scriptedReader) minBurst() int             { return max(r.costly, 2) }
func (r *scriptedReader) broken() error             { return r.why }
func (r *scriptedReader) close()                    { r.closed.Store(true) }
func (s *scriptedReader) frames(f ...scriptedFrame) { s.script <- step{frames: f} }

func (r *scriptedReader) read(wait bool) ([]reading, error) {
	asked := r.bufs
	r.bufs = nil
	r.asked <- len(asked)
	var s step
	select {
	case s = <-r.script:
	case <-r.t.Context().Done(): // the test has failed
		return nil, net.ErrClosed
	}
	if len(s.frames) > len(asked) {
		return nil, fmt.Errorf("a script of %d frames for a burst of %d", len(s.frames), len(asked))
	}
	r.why = s.broken
	got := make([]reading, len(asked))
	for i := range got {
		slot := i
		if r.backwards {
			slot = len(got) - 1 - i
		}
		got[i] = reading{slot: slot, err: errNone}
		if i < len(s.frames) {
			f := &s.frames[i]
			got[i] = reading{slot, len(f.b), f.off, f.err}
			scatter(asked[slot], f.b)
		}
	}
	return got, nil
}

// Bursts with missing frames, errors and frames that need longer buffers: every good frame
// arrives, in order, and the others are counted.
func TestWhatABurstBringsIsSortedOut(t *testing.T) {
	t.Run("in order", func(t *testing.T) { sortOut(t, false) })
	t.Run("backwards", func(t *testing.T) { sortOut(t, true) })
}

func sortOut(t *testing.T, backwards bool) {
	tap := openTAP(t, TAPConfig{MTU: 9000})
	p := openPacket(t, tap.Name())
	r := newScriptedReader(t)
	r.backwards = backwards
	h := newHostOf(t, 1500, pvnet.Config{Offload: true}, pvnet.Config{})
	got := h.listen()
	l := &scriptedBursts{TAP: tap, r: r}
	j, ended := h.join(context.Background(), h.Back, l)
	asks := func(want int) {
		t.Helper()
		if n := next(t, r.asked); n != want {
			t.Fatalf("asked for %d, want %d", n, want)
		}
	}
	number := 0
	var want [][]byte
	plain := func() scriptedFrame {
		f := scriptedFrame{b: numbered(number, 60+number%1000)}
		number++
		want = append(want, f.b)
		return f
	}
	none := scriptedFrame{err: errNone}
	arrive := func() {
		t.Helper()
		for i := range want {
			if b := next(t, got); !bytes.Equal(b, want[i]) {
				t.Fatalf("frame %d: %d bytes of %d: % x", i, len(b), len(want[i]), b[:16])
			}
		}
		want = nil
	}
	full := func(n int) {
		t.Helper()
		asks(n)
		var s step
		for range n {
			s.frames = append(s.frames, plain())
		}
		r.script <- s
	}
	// The feeder reads the first frame alone, then looks for more.
	send(t, p, Offload{}, testFrame(60))
	want = append(want, testFrame(60))
	asks(2)
	r.frames()
	arrive()
	// While a burst is full, the next one asks for twice as many, up to the empty frames
	// that the feeder has. A last empty frame is read alone. After that the feeder
	// allocates as many as it asks for.
	full(2)
	full(4)
	full(8)
	full(16)
	arrive()
	send(t, p, Offload{}, testFrame(61))
	want = append(want, testFrame(61))
	arrive()
	for n := fewEmpty; n < batch; n *= 2 {
		full(n)
		arrive()
	}
	asks(batch)
	// The next burst asks for as many as there were, and one more.
	r.frames(none, none, plain(), none, plain(), none)
	arrive()
	full(3)
	full(6)
	asks(12)

	long := gsoFrames()[0]
	dgram := gsoFrames()[4]
	big := scriptedFrame{b: numbered(1, 3000)}
	f := []scriptedFrame{
		plain(),
		{err: ErrOffload},
		{b: testFrame(20)[:13]},
		plain(),
		{b: testFrame(100), off: Offload{Checksum: ChecksumPartial, SumStart: 99}},
		plain(),
		{b: long.frame, off: long.off},
		plain(),
		{b: testFrame(20)[:13]},
		big,
		{b: dgram.frame, off: dgram.off},
		plain(),
	}
	last := want[len(want)-1]
	want = want[:len(want)-2]
	want = append(want, cut(t, long)...)
	want = append(want, f[7].b)
	want = append(want, cut(t, dgram)...)
	want = append(want, last)
	r.frames(f...)
	arrive()
	settle(t, j, func(st JointStats) bool {
		return st.Uncut == 4 && st.Oversize == 1 && st.Unfed == 0 && st.FromLinkGSO == 1
	})

	// After a long frame the feeder reads one frame alone.
	send(t, p, Offload{}, testFrame(61))
	want = append(want, testFrame(61))
	asks(2)
	r.frames()
	arrive()
	asks(2)
	// A ring that breaks is closed, and the frames it has read are not lost.
	r.script <- step{frames: []scriptedFrame{plain(), plain()}, broken: errLate}
	arrive()
	send(t, p, Offload{}, testFrame(62))
	want = append(want, testFrame(62))
	arrive()
	if !r.closed.Load() {
		t.Error("the ring is still there")
	}
	tap.Close()
	if err := next(t, ended); err != net.ErrClosed {
		t.Error(err)
	}
}

// rowsTAP is a TAP whose single reads return frames of a test: rows of frames that are
// available at once.
type rowsTAP struct {
	scriptedBursts
	rows chan [][]byte
	row  [][]byte // the rest of the current row
}

func (l *rowsTAP) read(bufs [][]byte, wait bool) (n int, off Offload, err error) {
	if len(l.row) == 0 {
		if !wait {
			return 0, off, errNone
		}
		select {
		case l.row = <-l.rows:
		case <-l.r.t.Context().Done():
			return 0, off, net.ErrClosed
		}
	}
	b := l.row[0]
	l.row = l.row[1:]
	scatter(bufs, b)
	return len(b), off, nil
}

// If a burst costs more than a few single reads, a few frames take single reads, such as the
// two or three acknowledgements of a TCP stream. Many frames still take bursts.
func TestFewFramesAreReadOneByOne(t *testing.T) {
	const worth = 8
	r := newScriptedReader(t)
	r.costly = worth
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	l := &rowsTAP{scriptedBursts: scriptedBursts{TAP: openTAP(t, TAPConfig{}), r: r}, rows: make(chan [][]byte)}
	h.join(context.Background(), h.Back, l)
	number := 0
	row := func(n int) (row [][]byte) {
		for range n {
			row = append(row, numbered(number, 60))
			number++
		}
		return row
	}
	arrive := func(want [][]byte) {
		t.Helper()
		for i := range want {
			if b := next(t, got); !bytes.Equal(b, want[i]) {
				t.Fatalf("frame %d: % x", i, b[:16])
			}
		}
	}
	for _, n := range [...]int{1, 2, 3, 4, 5, 6, 5, 6} { // sum to a batch, so that the next read has room for a burst
		few := row(n)
		l.rows <- few
		arrive(few)
	}
	if n := len(r.asked); n != 0 {
		t.Fatalf("%d bursts for rows of less than %d frames", n, worth)
	}
	many := row(worth - 1)
	l.rows <- many
	if n := next(t, r.asked); n != worth {
		t.Fatalf("behind %d frames in a row a burst asked for %d", len(many), n)
	}
	more := row(worth)
	var s step
	for _, b := range more {
		s.frames = append(s.frames, scriptedFrame{b: b})
	}
	r.script <- s
	if n := next(t, r.asked); n != 2*worth {
		t.Fatalf("behind a burst that was full one asked for %d", n)
	}
	r.frames()
	arrive(append(many, more...))

	few := row(3) // again
	l.rows <- few
	arrive(few)
	if n := len(r.asked); n != 0 {
		t.Fatalf("%d bursts for a row of 3 frames", n)
	}
}

// joinBursts joins the backend to a TAP whose bursts r scripts, and waits for its first
// frame, which is read alone.
func (h *host) joinBursts(r *scriptedReader, got <-chan []byte) (j *Joint, ended <-chan error) {
	h.t.Helper()
	tap := openTAP(h.t, TAPConfig{})
	p := openPacket(h.t, tap.Name())
	j, ended = h.join(context.Background(), h.Back, &scriptedBursts{TAP: tap, r: r})
	send(h.t, p, Offload{}, testFrame(60))
	r.frames()
	next(h.t, got)
	return j, ended
}

// A final error of the link ends the joint, after the frames that were read before it.
func TestBurstThatEndsTheLink(t *testing.T) {
	h, r := newHost(t, 1500, pvnet.Config{}), newScriptedReader(t)
	got := h.listen()
	_, ended := h.joinBursts(r, got)
	r.frames(scriptedFrame{b: testFrame(70)}, scriptedFrame{err: ErrGone})
	if b := next(t, got); len(b) != 70 {
		t.Errorf("%d bytes", len(b))
	}
	if err := next(t, ended); err != ErrGone {
		t.Error(err)
	}
	if !r.closed.Load() {
		t.Error("the ring is still there")
	}
}

// Frames that a burst has read, but that are unsent when the device ends, are counted.
func TestBurstThatIsNotSentIsCounted(t *testing.T) {
	h, r := newHost(t, 1500, pvnet.Config{}), newScriptedReader(t)
	j, ended := h.joinBursts(r, h.listen())
	h.Back.Disconnect()
	long := gsoFrames()[0]
	r.frames(scriptedFrame{b: long.frame, off: long.off}, scriptedFrame{b: testFrame(70)})
	if err := next(t, ended); err != nil {
		t.Error(err)
	}
	if st := j.Stats(); st.Unfed != 1 {
		t.Errorf("%+v", st)
	}
}

// A scriptedWriter answers each frame with the next of its answers.
type scriptedWriter struct {
	t       testing.TB
	answers chan error
	n       int
	errs    []error
	why     error
	closed  atomic.Bool
}

func (w *scriptedWriter) add(Offload, [][]byte) error { w.n++; return nil }
func (w *scriptedWriter) broken() error               { return w.why }
func (w *scriptedWriter) close()                      { w.closed.Store(true) }
func (w *scriptedWriter) write() []error {
	w.errs = w.errs[:0]
	for range w.n {
		var err error
		select {
		case err = <-w.answers:
		case <-w.t.Context().Done(): // the test has failed
			err = net.ErrClosed
		}
		if err == errWait {
			w.why = err
		}
		w.errs = append(w.errs, err)
	}
	w.n = 0
	return w.errs
}

func TestWritesOfABurstThatFailLoseOneFrameEach(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	w := &scriptedWriter{t: t, answers: make(chan error)}
	h := newHost(t, 1500, pvnet.Config{})
	j, ended := h.join(context.Background(), h.Back, &scriptedBursts{TAP: tap, w: w})
	tx := ownTX(t, h.Front)
	burst := func(n int) {
		t.Helper()
		var f [batch]pvnet.Frame
		for k := 0; k < n; {
			m, err := tx.AllocWait(f[k:n], 100)
			if err != nil {
				t.Fatal(err)
			}
			k += m
		}
		for i := range f[:n] {
			f[i].CopyFrom(numbered(i, 100))
		}
		if _, err := tx.SendWait(f[:n]); err != nil {
			t.Fatal(err)
		}
	}
	// A single frame takes no burst.
	burst(1)
	receive(t, p)
	burst(6)
	for _, err := range []error{nil, ErrOffload, ErrSize, ErrNoBuffers, ErrDown, nil} {
		select {
		case w.answers <- err:
		case <-time.After(wait):
			t.Fatal("the frames did not come in one burst")
		}
	}
	settle(t, j, func(st JointStats) bool { return st.Unsent == 4 && st.ToLink == 3 })
	// Frames that have to wait are written one by one, and so are all later frames.
	burst(4)
	for _, err := range []error{nil, errWait, ErrOffload, errWait} {
		w.answers <- err
	}
	for _, n := range []byte{1, 3} {
		if b, _ := receive(t, p); b[15] != n {
			t.Errorf("frame %d", b[15])
		}
	}
	settle(t, j, func(st JointStats) bool { return st.Unsent == 5 && st.ToLink == 6 })
	if !w.closed.Load() {
		t.Error("the ring is still there")
	}
	burst(3)
	for n := range byte(3) {
		if b, _ := receive(t, p); b[15] != n {
			t.Errorf("frame %d", b[15])
		}
	}
	tap.Close()
	if err := next(t, ended); err != net.ErrClosed {
		t.Error(err)
	}
}

func TestBurstsMakeNoGarbage(t *testing.T) {
	both(t, func(t *testing.T, tap *counted) {
		p := openPacket(t, tap.Name())
		h := newHost(t, 1500, pvnet.Config{})
		h.join(context.Background(), h.Back, tap)
		rx := ownRX(t, h.Front)
		tx := ownTX(t, h.Front)
		limit := time.Now().Add(2 * wait)
		rx.SetDeadline(limit)
		tx.SetDeadline(limit)
		p.SetReadDeadline(limit)
		in, out := [][]byte{testFrame(64)}, [][]byte{make([]byte, 2000)}
		var frames [batch]pvnet.Frame
		round := func() {
			for range batch {
				if _, err := p.WriteFrame(Offload{}, in); err != nil {
					t.Fatal(err)
				}
			}
			receiveAndRelease(t, rx, frames[:], batch)
			n, err := tx.AllocWait(frames[:batch], 64)
			if err != nil {
				t.Fatal(err)
			}
			for i := range frames[:n] {
				frames[i].CopyFrom(in[0])
			}
			if _, err := tx.SendWait(frames[:n]); err != nil {
				t.Fatal(err)
			}
			for range n {
				if _, _, err := p.ReadFrame(out); err != nil {
					t.Fatal(err)
				}
			}
		}
		round()
		if got := testing.AllocsPerRun(100, round); got != 0 {
			t.Errorf("%v allocations a round", got)
		}
		if !tap.single && tap.outFrames.Load() == 0 {
			t.Error("no bursts")
		}
	})
}

func TestJointsLeaveNothing(t *testing.T) {
	needNoWait(t)
	for round := range 4 {
		h := newHost(t, 1500, pvnet.Config{})
		tap := openTAP(t, TAPConfig{})
		p := openPacket(t, tap.Name())
		got := h.listen()
		ctx, cancel := context.WithCancel(context.Background())
		_, ended := h.join(ctx, h.Back, tap)
		send(t, p, Offload{}, testFrame(60))
		next(t, got)
		if _, err := h.Front.Write(testFrame(60)); err != nil {
			t.Fatal(err)
		}
		receive(t, p) // both directions run
		open := descriptors(t)
		cancel()
		if err := next(t, ended); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if n := open - descriptors(t); n != 2 {
			t.Errorf("round %d: %d descriptors given back, want those of two rings", round, n)
		}
		tap.Close()
		p.Close()
	}
}

// BenchmarkTAP64 moves frames of 64 bytes, directly and through a joint.
func BenchmarkTAP64(b *testing.B) {
	for _, dir := range []string{"write", "read", "vif-to-tap", "tap-to-vif"} {
		for _, single := range []bool{true, false} {
			way := map[bool]string{true: "plain", false: "batched"}[single]
			b.Run(dir+"/"+way, func(b *testing.B) {
				needNoWait(b)
				tap := &counted{TAP: openTAP(b, TAPConfig{}), single: single}
				switch dir {
				case "write":
					benchWrite(b, tap)
				case "read":
					benchRead(b, tap)
				case "vif-to-tap":
					benchToTAP(b, tap)
				default:
					benchFromTAP(b, tap)
				}
			})
		}
	}
}

func perFrame(b *testing.B, frames int, lost uint64) {
	n := float64(b.N) * float64(frames)
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/n, "ns/frame")
	b.ReportMetric(n/b.Elapsed().Seconds(), "frames/s")
	b.ReportMetric(float64(lost)/n, "loss")
}

func benchWrite(b *testing.B, tap *counted) {
	f := [][]byte{testFrame(64)}
	w, err := tap.TAP.writeBursts()
	if err != nil {
		b.Fatal(err)
	}
	defer w.close()
	for b.Loop() {
		if tap.single {
			for range batch {
				if _, err := tap.WriteFrame(Offload{}, f); err != nil {
					b.Fatal(err)
				}
			}
			continue
		}
		for range batch {
			if err := w.add(Offload{}, f); err != nil {
				b.Fatal(err)
			}
		}
		for _, err := range w.write() {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	perFrame(b, batch, 0)
}

// generator writes bursts to a packet socket, so that the cost is the kernel's path to a
// TAP, not the system calls.
func generator(b *testing.B, p *Packet) *tapWriter {
	w := new(tapWriter)
	if err := w.open(&p.port, opWritev); err != nil {
		b.Fatal(err)
	}
	w.try = func(fd uintptr) bool { w.run(fd); return true }
	b.Cleanup(w.close)
	return w
}

func (w *tapWriter) generate(b *testing.B, f [][]byte, n int) {
	for ; n > 0; n -= batch {
		for range batch {
			if err := w.add(Offload{}, f); err != nil {
				b.Fatal(err)
			}
		}
		for _, err := range w.write() {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
}

// queued is how many frames wait in a TAP at most: its queue holds 500 or 1000.
const queued = 3 * batch

func benchRead(b *testing.B, tap *counted) {
	gen, f := generator(b, openPacket(b, tap.Name())), [][]byte{testFrame(64)}
	rd, err := tap.TAP.readBursts()
	if err != nil {
		b.Fatal(err)
	}
	defer rd.close()
	buf := [][]byte{make([]byte, 2000)}
	for b.Loop() {
		b.StopTimer()
		gen.generate(b, f, queued)
		b.StartTimer()
		for n := 0; n < queued; {
			if tap.single {
				if _, _, err := tap.read(buf, false); err != nil {
					b.Fatal(err)
				}
				n++
				continue
			}
			for i := range batch {
				rd.add([][]byte{rd.room(i)[:2000]})
			}
			got, err := rd.read(false)
			if err != nil {
				b.Fatal(err)
			}
			for i := range got {
				if got[i].err == nil {
					n++
				}
			}
		}
	}
	perFrame(b, queued, 0)
}

func benchToTAP(b *testing.B, tap *counted) {
	h := newHost(b, 1500, pvnet.Config{})
	j, _ := h.join(context.Background(), h.Back, tap)
	tx := ownTX(b, h.Front)
	var frames [batch]pvnet.Frame
	f := testFrame(64)
	sent := uint64(0)
	for b.Loop() {
		for left := queued; left > 0; {
			n, err := tx.AllocWait(frames[:min(batch, left)], 64)
			if err != nil {
				b.Fatal(err)
			}
			for i := range frames[:n] {
				frames[i].CopyFrom(f)
			}
			if _, err := tx.SendWait(frames[:n]); err != nil {
				b.Fatal(err)
			}
			left -= n
			sent += uint64(n)
		}
	}
	settle(b, j, func(st JointStats) bool { return st.ToLink+st.Unsent >= sent })
	perFrame(b, queued, j.Stats().Unsent)
	if n := tap.out.Load(); n > 0 {
		b.ReportMetric(float64(tap.outFrames.Load())/float64(n), "frames/burst")
	}
}

func benchFromTAP(b *testing.B, tap *counted) {
	gen, f := generator(b, openPacket(b, tap.Name())), [][]byte{testFrame(64)}
	h := newHost(b, 1500, pvnet.Config{})
	h.join(context.Background(), h.Back, tap)
	rx := ownRX(b, h.Front)
	var frames [64]pvnet.Frame
	var wg sync.WaitGroup
	for b.Loop() {
		wg.Go(func() { gen.generate(b, f, queued) })
		receiveAndRelease(b, rx, frames[:], queued)
		wg.Wait()
	}
	perFrame(b, queued, 0)
	if n := tap.in.Load(); n > 0 {
		b.ReportMetric(float64(tap.inFrames.Load())/float64(n), "frames/burst")
	}
}
