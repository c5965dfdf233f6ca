package link

import (
	"errors"
	"math"
	"os"
	"runtime"
	"syscall"

	"barevif/arena/shm"
	"barevif/pvnet"

	"golang.org/x/sys/unix"
)

// burstVector is how many iovec entries a frame takes at most: the header, the pieces, the
// room behind them and the spare byte.
const burstVector = vifPieces + 3

// A burst reads or writes up to batch frames of a TAP in one system call.
type burst struct {
	p    *port
	ring *uring
	op   uint8
	bad  error // why the ring can no longer be used, or nil

	// iov refers to the buffers by pointers that the garbage collector sees. The array
	// itself is pinned, because the collector does not see the ring's pointers to it.
	iov     *[batch * burstVector]unix.Iovec
	headers *[batch][headerSize]byte
	pin     runtime.Pinner
	used    int            // entries of iov in use
	begin   [batch + 1]int // frame i is iov[begin[i]:begin[i+1]]
	size    [batch]int     // size[i] is the total size of frame i's buffers
	n       int            // number of frames
	done    bool           // the added frames have run; the next add starts anew

	try  func(fd uintptr) (done bool) // runs the added frames; built once, since a closure for each burst would allocate
	once func(fd uintptr)             // calls try and ignores its result
}

func (b *burst) open(p *port, op uint8) (err error) {
	if b.ring, err = openURing(); err != nil {
		return err
	}
	ctlErr := p.conn.Control(func(fd uintptr) { err = b.ring.dontWait(fd) })
	if ctlErr == nil && b.ring.res[0] == -int32(unix.EOPNOTSUPP) {
		err = nil
		b.ring.mayWait = op == opReadv // writes never wait: see writeBursts
	}
	if err = errors.Join(ctlErr, err); err != nil {
		b.ring.close()
		return err
	}
	b.p, b.op = p, op
	b.iov, b.headers = new([batch * burstVector]unix.Iovec), new([batch][headerSize]byte)
	b.pin.Pin(b.iov)
	b.pin.Pin(b.headers)
	b.once = func(fd uintptr) { b.try(fd) }
	return nil
}

func (b *burst) close() {
	b.ring.close()
	b.pin.Unpin()
}

func (b *burst) broken() error { return b.bad }

// addFrame begins a frame: its header, then bufs.
func (b *burst) addFrame(bufs [][]byte) {
	if b.done {
		b.done, b.n, b.used = false, 0, 0
	}
	b.size[b.n] = 0
	b.addBytes(b.headers[b.n][:])
	for _, p := range bufs {
		b.addBytes(p)
	}
}

func (b *burst) addBytes(p []byte) {
	if len(p) > 0 {
		b.iov[b.used].Base = &p[0]
		b.iov[b.used].SetLen(len(p))
		b.used++
		b.size[b.n] += len(p)
	}
}

func (b *burst) endFrame() {
	b.n++
	b.begin[b.n] = b.used
}

// run makes the kernel read or write the added frames.
func (b *burst) run(fd uintptr) {
	for i := range b.n {
		b.ring.put(b.op, fd, &b.iov[b.begin[i]], b.begin[i+1]-b.begin[i])
	}
	b.bad = b.ring.run()
}

// end drops the references to the buffers.
func (b *burst) end() {
	clear(b.iov[:b.used])
	b.done = true
}

// answer returns the kernel's result for frame i.
func (b *burst) answer(i int) (n int, errno syscall.Errno) {
	if res := int(b.ring.res[i]); res >= 0 {
		return res, 0
	} else if errno = syscall.Errno(-res); errno == unix.EINTR || errno == unix.ECANCELED {
		errno = unix.EAGAIN // the frame had to wait, and cancel ended that
	}
	return 0, errno
}

// any reports whether any frame has an answer other than EAGAIN.
func (b *burst) any() bool {
	for i := range b.n {
		if _, errno := b.answer(i); errno != unix.EAGAIN {
			return true
		}
	}
	return false
}

// A tapReader is the burstReader of a TAP.
type tapReader struct {
	burst
	spare [1]byte // as TAP.spare
	got   [batch]reading
	rooms []byte // mapped, so that a page takes memory only once it was used
}

// roomSize is MaxFrame in whole pages.
const roomSize = (MaxFrame + shm.PageSize - 1) &^ (shm.PageSize - 1)

func (t *TAP) readBursts() (burstReader, error) {
	rooms, err := unix.Mmap(-1, 0, batch*roomSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	r := &tapReader{rooms: rooms}
	if err := r.open(&t.port, opReadv); err != nil {
		_ = unix.Munmap(rooms)
		return nil, err
	}
	r.try = func(fd uintptr) bool {
		r.run(fd)
		return r.bad != nil || r.any()
	}
	return r, nil
}

func (r *tapReader) close() {
	r.burst.close()
	_ = unix.Munmap(r.rooms)
}

// If reads wait in the ring, those that find no frame have to be cancelled, which takes
// another system call. The acknowledgements of a TCP stream come two or three at a time,
// too few for that.
func (r *tapReader) minBurst() int {
	if r.ring.mayWait {
		return 8
	}
	return 2
}

func (r *tapReader) room(i int) []byte { return r.rooms[i*roomSize:][:MaxFrame:MaxFrame] }

func (r *tapReader) add(bufs [][]byte) {
	r.addFrame(bufs)
	r.addBytes(r.spare[:])
	r.endFrame()
}

func (r *tapReader) read(wait bool) ([]reading, error) {
	defer r.end()
	var err error
	if wait {
		err = r.p.conn.Read(r.try)
		if err != nil && !r.p.ended(err) { // see stuck
			if err = r.p.conn.Control(r.once); err == nil && r.bad == nil && !r.any() {
				return nil, r.p.mute
			}
		}
	} else {
		err = r.p.conn.Control(r.once)
	}
	if err != nil {
		return nil, r.p.failure(err)
	}
	if !wait && !r.any() {
		return nil, errNone
	}
	for k := range r.n {
		g, i := &r.got[k], int(r.ring.order[k])
		*g = reading{slot: i}
		n, errno := r.answer(i)
		room := r.size[i] - len(r.spare)
		switch {
		case errno == unix.EAGAIN:
			g.err = errNone
			continue
		case errno != 0:
			g.err = r.p.errorOf(errno, true)
			continue
		case n > room:
			n, g.err = room, ErrTruncated
		}
		g.n = max(n-headerSize, 0)
		g.off.decode(&r.headers[i])
	}
	return r.got[:r.n], nil
}

// A tapWriter is the burstWriter of a TAP.
type tapWriter struct {
	burst
	errs [batch]error
}

// errSendBuffer is why frames of a TAP with a limited send buffer are written one by one:
// each may have to wait for room, and the frames behind it must not pass it.
var errSendBuffer = errors.New("link: the TAP has a send buffer of limited size")

func (t *TAP) writeBursts() (burstWriter, error) {
	size, err := uint32(0), error(nil)
	if ctlErr := t.conn.Control(func(fd uintptr) { size, err = unix.IoctlGetUint32(int(fd), unix.TUNGETSNDBUF) }); ctlErr != nil {
		return nil, ctlErr
	}
	if err != nil {
		return nil, os.NewSyscallError("TUNGETSNDBUF", err)
	}
	if size != math.MaxInt32 { // the kernel's default is INT_MAX, which never fills
		return nil, errSendBuffer
	}
	w := new(tapWriter)
	if err := w.open(&t.port, opWritev); err != nil {
		return nil, err
	}
	w.try = func(fd uintptr) bool {
		w.run(fd)
		return true
	}
	return w, nil
}

func (w *tapWriter) add(off Offload, bufs [][]byte) error {
	size := 0
	for _, p := range bufs {
		size += len(p)
	}
	if size < pvnet.MinFrame || size > MaxFrame {
		return ErrSize
	}
	w.addFrame(bufs)
	off.encode(&w.headers[w.n])
	w.endFrame()
	return nil
}

func (w *tapWriter) write() []error {
	if w.done || w.n == 0 {
		return nil
	}
	defer w.end()
	err := w.p.conn.Write(w.try)
	if err != nil && !w.p.ended(err) { // see stuck
		err = w.p.conn.Control(w.once)
	}
	for i := range w.n {
		if err != nil {
			w.errs[i] = w.p.failure(err)
			continue
		}
		switch _, errno := w.answer(i); errno {
		case 0:
			w.errs[i] = nil
		case unix.EAGAIN:
			w.errs[i] = errWait
			if w.bad == nil {
				w.bad = errSendBuffer
			}
		default:
			w.errs[i] = w.p.errorOf(errno, false)
		}
	}
	return w.errs[:w.n]
}
