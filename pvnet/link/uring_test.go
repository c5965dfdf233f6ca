//go:build linux

package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// needURing skips the test if io_uring cannot be used, and says why.
func needURing(t testing.TB) {
	t.Helper()
	r, err := openURing()
	switch {
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		t.Skip("this machine gives no io_uring:", err)
	case err != nil:
		t.Fatal(err)
	}
	r.close()
}

// needNoWait skips the test if a TAP has no reads without waiting.
func needNoWait(t testing.TB) {
	t.Helper()
	needURing(t)
	tap := openTAP(t, TAPConfig{})
	defer tap.Close()
	r, err := tap.readBursts()
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("this kernel waits for frames in an io_uring:", err)
	} else if err != nil {
		t.Fatal(err)
	}
	r.close()
}

func readers(t testing.TB, tap *TAP) *tapReader {
	t.Helper()
	needNoWait(t)
	r, err := tap.readBursts()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r.(*tapReader)
}

func writers(t testing.TB, tap *TAP) *tapWriter {
	t.Helper()
	needURing(t)
	w, err := tap.writeBursts()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.close)
	return w.(*tapWriter)
}

// rooms adds n reads into the reader's own memory.
func rooms(r *tapReader, n int) {
	for i := range n {
		r.add([][]byte{r.room(i)})
	}
}

// workers returns the threads that the kernel has added to this process for requests that
// wait.
func workers(t testing.TB) (found []string) {
	t.Helper()
	names, err := filepath.Glob("/proc/self/task/*/comm")
	if err != nil || len(names) == 0 {
		t.Fatal("no threads: ", err)
	}
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(b), "iou-") {
			found = append(found, strings.TrimSpace(string(b)))
		}
	}
	return found
}

func TestABurstIsOneCallAndKeepsTheOrder(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	r, w := readers(t, tap), writers(t, tap)
	r.ring.calls, w.ring.calls = 0, 0
	const rounds = 20
	for round := range rounds {
		for i := range batch {
			f := testFrame(60 + 10*i)
			f[14], f[15] = byte(round), byte(i)
			if err := w.add(Offload{}, [][]byte{f[:20], nil, f[20:]}); err != nil {
				t.Fatal(err)
			}
		}
		errs := w.write()
		for i, err := range errs {
			if err != nil {
				t.Fatal(err)
			}
			if b, _ := receive(t, p); len(b) != 60+10*i || b[14] != byte(round) || b[15] != byte(i) {
				t.Fatalf("round %d, frame %d: %d bytes, % x", round, i, len(b), b[14:16])
			}
		}
		if len(errs) != batch {
			t.Fatalf("%d frames", len(errs))
		}

		const there = 20
		for i := range there {
			f := testFrame(60 + 10*i)
			f[14], f[15] = byte(round), byte(i)
			send(t, p, Offload{}, f)
		}
		rooms(r, batch)
		got, err := r.read(true)
		if err != nil || len(got) != batch {
			t.Fatalf("%d frames, %v", len(got), err)
		}
		for i := range got {
			b := r.room(i)
			switch {
			case i >= there && got[i].err != errNone:
				t.Fatalf("behind the last: %+v", got[i])
			case i < there && (got[i].err != nil || got[i].n != 60+10*i || b[14] != byte(round) || b[15] != byte(i)):
				t.Fatalf("round %d, frame %d: %+v, % x", round, i, got[i], b[14:16])
			}
		}
	}
	rooms(r, batch)
	if _, err := r.read(false); err != errNone {
		t.Fatalf("of an empty TAP: %v", err)
	}
	if w.ring.calls != rounds || r.ring.calls != rounds+1 {
		t.Errorf("%d calls wrote %d bursts, %d read %d", w.ring.calls, rounds, r.ring.calls, rounds+1)
	}
	if names := workers(t); len(names) != 0 {
		t.Errorf("the kernel had threads of its own take part: %q", names)
	}
}

// Each frame of a burst gets the same error as alone.
func TestFramesOfABurstFailAlone(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	w := writers(t, tap)
	good := testFrame(60)
	whole, off := partialTCP(4000)
	off.GSO, off.GSOSize, off.HeaderLen = GSOTCPv4, 1460, 54
	frames := []struct {
		off  Offload
		bufs [][]byte
	}{
		{Offload{}, [][]byte{good}},
		{Offload{Checksum: ChecksumPartial, SumStart: 60000}, [][]byte{testFrame(100)}},
		{Offload{}, [][]byte{good[:13]}},
		{Offload{}, [][]byte{testFrame(MaxFrame), {1}}},
		{Offload{}, nil},
		{off, [][]byte{whole}},
		{Offload{GSO: 0x1f, GSOSize: 10}, [][]byte{testFrame(100)}},
		{Offload{}, [][]byte{good}},
	}
	try := func(state string) {
		t.Helper()
		var want, got []error
		for _, f := range frames {
			_, err := tap.WriteFrame(f.off, f.bufs)
			want = append(want, err)
		}
		for _, f := range frames {
			got = append(got, w.add(f.off, f.bufs))
		}
		errs := w.write()
		for i := range got {
			if got[i] == nil {
				got[i], errs = errs[0], errs[1:]
			}
			if !errors.Is(got[i], want[i]) {
				t.Errorf("%s, frame %d: %v, alone %v", state, i, got[i], want[i])
			}
		}
		if w.bad != nil || len(errs) != 0 {
			t.Errorf("%s: %v, %d errors more", state, w.bad, len(errs))
		}
	}
	try("up")
	for range 2 {
		for _, want := range [][]byte{good, whole, good} {
			if b, _ := receive(t, p); !bytes.Equal(b, want) {
				t.Fatalf("%d bytes of %d", len(b), len(want))
			}
		}
	}
	setUpDown(t, tap.Name(), false)
	try("down")
	setUpDown(t, tap.Name(), true)
	remove(t, tap)
	try("gone")
	tap.Close()
	try("closed")
}

func TestReadingsOfABurstAreThoseOfReadFrame(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	if err := tap.setOffloads(true); err != nil {
		t.Fatal(err)
	}
	p := openPacket(t, tap.Name())
	r := readers(t, tap)
	whole, off := partialTCP(4000)
	off.GSO, off.GSOSize, off.HeaderLen = GSOTCPv4, 1460, 54
	part, partOff := partialTCP(146)
	send(t, p, Offload{}, testFrame(200))
	send(t, p, Offload{}, testFrame(201))
	send(t, p, off, whole)
	send(t, p, partOff, part)
	var bufs [4][]byte
	for i, n := range []int{200, 200, 5000, 200} {
		bufs[i] = make([]byte, n)
		r.add([][]byte{bufs[i][:1], nil, bufs[i][1:13], bufs[i][13:]})
	}
	got, err := r.read(false)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		b   []byte
		off Offload
		err error
	}{
		{testFrame(200), Offload{}, nil},
		{testFrame(201)[:200], Offload{}, ErrTruncated},
		{whole, off, nil},
		{part, partOff, nil},
	} {
		g := got[i]
		if g.off.Checksum == ChecksumVerified {
			g.off.Checksum = ChecksumNone
		}
		want.off.HeaderLen = g.off.HeaderLen // a hint, which this kernel makes up
		if g.err != want.err || g.off != want.off || !bytes.Equal(bufs[i][:g.n], want.b) {
			t.Errorf("frame %d: %d bytes, %+v, %v", i, g.n, g.off, g.err)
		}
	}
	p.Close()

	// A wait ends with a frame, a deadline or Close.
	wait1 := func() error {
		rooms(r, 2)
		got, err := r.read(true)
		if err == nil {
			err = got[0].err
		}
		return err
	}
	tap.SetReadDeadline(time.Now().Add(-1))
	if err := wait1(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	tap.SetReadDeadline(time.Time{})
	done := make(chan error)
	go func() { done <- wait1() }()
	tap.SetReadDeadline(time.Now())
	if err := next(t, done); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	tap.SetReadDeadline(time.Time{})
	go func() { done <- wait1() }()
	remove(t, tap)
	if err := next(t, done); err != ErrGone {
		t.Error(err)
	}
	tap.Close()
	if err := wait1(); err != net.ErrClosed {
		t.Error(err)
	}
}

// Close comes while the calls are under way, and again while the reader waits.
func TestCloseEndsABurst(t *testing.T) {
	for round := range 50 {
		tap := openTAP(t, TAPConfig{})
		r, w := readers(t, tap), writers(t, tap)
		ended := make(chan error, 2)
		go func() {
			for {
				rooms(r, batch)
				if _, err := r.read(true); err != nil {
					ended <- err
					return
				}
			}
		}()
		started := make(chan struct{})
		go func() {
			f := [][]byte{testFrame(60)}
			for i := 0; ; i++ {
				for range batch {
					if err := w.add(Offload{}, f); err != nil {
						t.Error(err)
					}
				}
				if err := w.write()[batch-1]; err != nil {
					ended <- err
					return
				}
				if i == round%3 {
					close(started)
				}
			}
		}()
		<-started
		tap.Close()
		for range 2 {
			if err := next(t, ended); err != net.ErrClosed {
				t.Fatal(err)
			}
		}
	}
}

// If requests wait in the kernel, the ring cancels them. A frame that comes later is not
// lost.
func TestRequestsThatWaitAreTakenBack(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	r := readers(t, tap)
	r.ring.nowait = 0
	send(t, p, Offload{}, testFrame(70))
	rooms(r, batch)
	tap.conn.Control(r.run)
	if !errors.Is(r.bad, errLate) {
		t.Fatal(r.bad)
	}
	if n, errno := r.answer(0); n != headerSize+70 || errno != 0 || !bytes.Equal(r.room(0)[:70], testFrame(70)) {
		t.Errorf("the frame that was there: %d bytes, %v", n, errno)
	}
	for i := 1; i < batch; i++ {
		if n, errno := r.answer(i); n != 0 || errno != unix.EAGAIN {
			t.Errorf("request %d: %d bytes, %v", i, n, errno)
		}
	}
	for i := range batch {
		clear(r.room(i)[:100])
	}
	send(t, p, Offload{}, testFrame(71))
	if b, _ := receive(t, tap); !bytes.Equal(b, testFrame(71)) {
		t.Errorf("%d bytes", len(b))
	}
	for i := range batch {
		if r.room(i)[0] != 0 {
			t.Errorf("room %d was written to afterwards", i)
		}
	}
}

// Linux before 6.4 cannot be told not to wait for a TAP's frames.
func TestAKernelThatMayWaitReadsBursts(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	r := readers(t, tap)
	r.ring.nowait, r.ring.mayWait = 0, true
	const rounds = 200
	empty := uint64(0)
	for round := range rounds {
		n := round % (batch + 1)
		for i := range n {
			f := testFrame(60 + i)
			f[14], f[15] = byte(round), byte(i)
			send(t, p, Offload{}, f)
		}
		next := 0
		for next < n {
			rooms(r, batch)
			got, err := r.read(true)
			if err != nil || r.bad != nil {
				t.Fatal(err, r.bad)
			}
			for _, g := range got {
				if g.err == errNone {
					continue
				}
				if b := r.room(g.slot); g.err != nil || g.n != 60+next || b[14] != byte(round) || b[15] != byte(next) {
					t.Fatalf("round %d, frame %d: %d bytes, %v, % x", round, next, g.n, g.err, b[14:16])
				}
				next++
			}
		}
		rooms(r, batch)
		r.ring.calls = 0
		if _, err := r.read(false); err != errNone || r.bad != nil {
			t.Fatal(err, r.bad)
		}
		empty += r.ring.calls
	}
	// One call submits, one cancels and brings all answers; a signal may interrupt a call.
	if empty < 2*rounds || empty > 2*rounds+rounds/4 {
		t.Errorf("%d reads without a frame took %d calls", rounds, empty)
	}
	if w := workers(t); len(w) > 0 {
		t.Errorf("threads of the kernel: %v", w)
	}
}

// Frames that come while requests are being cancelled are read in order.
func TestFramesThatComeMeanwhileKeepTheirOrder(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	r := readers(t, tap)
	r.ring.nowait, r.ring.mayWait = 0, true
	const total = 20000
	done, ended := make(chan struct{}), make(chan struct{})
	defer func() { close(done); <-ended }()
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			f := testFrame(60)
			binary.BigEndian.PutUint32(f[14:], uint32(i))
			if _, err := p.WriteFrame(Offload{}, [][]byte{f}); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	last, n := -1, 0
	tap.SetReadDeadline(time.Now().Add(2 * time.Minute))
	for last < total {
		rooms(r, 1+n%batch)
		got, err := r.read(true)
		if err != nil || r.bad != nil {
			t.Fatal(err, r.bad, last)
		}
		for _, g := range got {
			if g.err == errNone {
				continue
			}
			i := int(binary.BigEndian.Uint32(r.room(g.slot)[14:]))
			if g.err != nil || g.n != 60 || i <= last { // some may be lost: the card has a queue
				t.Fatalf("frame %d behind %d: %d bytes, %v", i, last, g.n, g.err)
			}
			last = i
			n++
		}
	}
	t.Logf("%d of %d frames, in %d calls", n, last+1, r.ring.calls)
}

func TestRequestsThatTheKernelRefuses(t *testing.T) {
	needURing(t)
	r, err := openURing()
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	// The kernel stops submitting at a malformed request; the ring submits the rest.
	const odd = 7
	for i := range batch {
		op := uint8(opNop)
		if i == odd {
			op = 250
		}
		r.put(op, 0, nil, 0)
	}
	r.calls = 0
	if err := r.run(); err != nil {
		t.Fatal(err)
	}
	for i := range batch {
		if want := map[bool]int32{true: -int32(unix.EINVAL)}[i == odd]; r.res[i] != want {
			t.Errorf("request %d: %d", i, r.res[i])
		}
	}
	if r.calls != 2 {
		t.Errorf("%d calls", r.calls)
	}

	// Requests that the kernel never saw must not run later.
	fd := r.fd
	for range 3 {
		r.put(opNop, 0, nil, 0)
	}
	r.fd = -1
	if err := r.run(); !errors.Is(err, unix.EBADF) {
		t.Fatal(err)
	}
	r.fd = fd
	for i := range 3 {
		if r.res[i] != -int32(unix.EAGAIN) {
			t.Errorf("request %d: %d", i, r.res[i])
		}
	}
	r.put(opNop, 0, nil, 0)
	if err := r.run(); err != nil || r.res[0] != 0 || r.answered != 1 {
		t.Errorf("%v, %d", err, r.res[0])
	}
}

// The indexes of a ring wrap, and a ring holds more answers than requests.
func TestRingGoesRound(t *testing.T) {
	needURing(t)
	r, err := openURing()
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	for i := range 10 * batch {
		n := 1 + i%batch
		for range n {
			r.put(opNop, 0, nil, 0)
		}
		clear(r.res[:])
		r.res[n-1] = 1
		if err := r.run(); err != nil || r.res[n-1] != 0 {
			t.Fatal(err)
		}
	}
}

func TestNoRingIsLeft(t *testing.T) {
	needTAP(t)
	needNoWait(t)
	tap := openTAP(t, TAPConfig{})
	mappings := func() (n int) {
		b, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(b, []byte("io_uring"))
	}
	round := func() {
		r, err := tap.readBursts()
		if err != nil {
			t.Fatal(err)
		}
		w, err := tap.writeBursts()
		if err != nil {
			t.Fatal(err)
		}
		if mappings() != 4 {
			t.Fatalf("%d mappings", mappings())
		}
		mem := r.(*tapReader).rooms
		r.close()
		if err := unix.Msync(mem, unix.MS_ASYNC); err != unix.ENOMEM {
			t.Fatalf("the rooms are still there: %v", err)
		}
		w.close()
		for _, call := range []uint32{unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER} {
			for _, errno := range []syscall.Errno{unix.ENOSYS, unix.EPERM} {
				var err error
				if denied := without(call, errno, func() { _, err = openURing() }); denied != nil {
					t.Skip("this machine denies no system call:", denied)
				}
				if !errors.Is(err, errno) {
					t.Fatalf("%v, want %v", err, errno)
				}
			}
		}
		runtime.GC() // panics if a pin was leaked
	}
	round()
	before, mapped := descriptors(t), mappings()
	for range 5 {
		round()
	}
	if after := descriptors(t); after != before || mappings() != 0 || mapped != 0 {
		t.Fatalf("%d descriptors before, %d after, %d mappings", before, after, mappings())
	}
}

// With a limited send buffer a frame may have to wait, and later frames must not pass it.
func TestTAPWithASendBufferIsWrittenOneByOne(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	needURing(t)
	fd := -1
	tap.conn.Control(func(own uintptr) { fd = int(own) })
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETSNDBUF, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := tap.writeBursts(); err != errSendBuffer {
		t.Fatal(err)
	}
}

// A ring whose layout is not the expected one is refused before anything is mapped.
func TestRingOfAnotherLayoutIsRefused(t *testing.T) {
	good := uringParams{features: featWanted, sqEntries: batch, cqEntries: 2 * batch}
	good.sq.array, good.cq.cqes = 1024, 64
	for name, change := range map[string]func(*uringParams){
		"before Linux 5.6": func(p *uringParams) { p.features &^= featRWCurPos },
		"fewer requests":   func(p *uringParams) { p.sqEntries /= 2 },
		"fewer answers":    func(p *uringParams) { p.cqEntries /= 2 },
		"outside":          func(p *uringParams) { p.cq.tail = 1 << 20 },
		"across words":     func(p *uringParams) { p.sq.head = 3 },
	} {
		p := good
		change(&p)
		r := &uring{fd: -1}
		if err := r.mmap(&p); !errors.Is(err, errors.ErrUnsupported) || r.rings != nil || r.slots != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := (&uring{fd: -1}).mmap(&good); !errors.Is(err, unix.EBADF) {
		t.Errorf("as ours: %v", err)
	}
}
