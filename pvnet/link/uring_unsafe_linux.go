package link

import (
	"errors"
	"fmt"
	"os"
	"structs"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sqe is struct io_uring_sqe of linux/io_uring.h.
type sqe struct {
	_        structs.HostLayout
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64
	addr     uint64
	len      uint32
	rwFlags  uint32
	userData uint64
	_        [24]byte
}

// cqe is struct io_uring_cqe.
type cqe struct {
	_        structs.HostLayout
	userData uint64
	res      int32
	flags    uint32
}

// uringParams is struct io_uring_params, with struct io_sqring_offsets and struct
// io_cqring_offsets.
type uringParams struct {
	_         structs.HostLayout
	sqEntries uint32
	cqEntries uint32
	flags     uint32
	cpu, idle uint32
	features  uint32
	wq        uint32
	_         [3]uint32
	sq        struct{ head, tail, mask, entries, flags, dropped, array, _, _, _ uint32 }
	cq        struct{ head, tail, mask, entries, overflow, cqes, flags, _, _, _ uint32 }
}

var (
	_ [64]byte  = [unsafe.Sizeof(sqe{})]byte{}
	_ [32]byte  = [unsafe.Offsetof(sqe{}.userData)]byte{}
	_ [16]byte  = [unsafe.Sizeof(cqe{})]byte{}
	_ [8]byte   = [unsafe.Offsetof(cqe{}.res)]byte{}
	_ [120]byte = [unsafe.Sizeof(uringParams{})]byte{}
	_ [40]byte  = [unsafe.Offsetof(uringParams{}.sq)]byte{}
	_ [80]byte  = [unsafe.Offsetof(uringParams{}.cq)]byte{}
)

// Constants of linux/io_uring.h. Linux has all these features from 5.6 on.
const (
	opNop    = 0
	opReadv  = 1
	opWritev = 2
	opCancel = 14 // IORING_OP_ASYNC_CANCEL

	enterGetEvents = 1

	featSingleMmap   = 1 << 0
	featNoDrop       = 1 << 1
	featSubmitStable = 1 << 2
	featRWCurPos     = 1 << 3
	featWanted       = featSingleMmap | featNoDrop | featSubmitStable | featRWCurPos

	offRings = 0
	offSQEs  = 0x10000000
)

// A uring runs up to batch requests in one system call. It belongs to one goroutine.
//
// It is for requests that the kernel answers at once: see dontWait. Such requests run in
// order in the thread that submits them, never in a worker thread of the kernel, and when
// run returns the kernel no longer uses the memory they name. If the kernel cannot be told
// not to wait (mayWait), run cancels the requests that wait; then requests may have run in
// another order.
type uring struct {
	fd    int
	rings []byte // mapped: the indexes and the completion queue
	slots []byte // mapped: the submission queue entries

	sqHead, sqTail *atomic.Uint32 // in rings; the kernel writes head, we tail
	cqHead, cqTail *atomic.Uint32 // in rings; we write head, the kernel tail
	sqes           *[batch]sqe
	cqes           *[2 * batch]cqe
	n              uint32 // requests put since the last run
	nowait         uint32 // rw_flags of reads and writes: see dontWait
	mayWait        bool   // requests may wait; run cancels them without an error

	answered uint32       // number of requests of the last run that have answers
	has      [batch]bool  // has[i]: the answer to request i is in res[i]
	res      [batch]int32 // of the last run: a count, or a negated errno
	order    [batch]uint8 // of the last run: the requests in the order of their answers
	calls    uint64       // number of calls of io_uring_enter
}

var _ [256 - batch]struct{} // order can hold them

// errLate is the error of run if some requests had no answer after run had submitted them
// all. All have one by the time run returns, but the kernel may have run them out of order.
var errLate = errors.New("link: io_uring did not complete requests at once")

// openURing makes a ring and tries it. The error is the kernel's: ENOSYS (no io_uring in
// this kernel), EPERM (kernel.io_uring_disabled, or a system call filter), ENOMEM.
func openURing() (*uring, error) {
	var p uringParams
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, batch, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	r := &uring{fd: int(fd)}
	err := r.mmap(&p)
	if err == nil {
		err = r.try()
	}
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// mmap maps the rings. It checks all offsets against the mappings; every index is reduced
// modulo the size of its array.
func (r *uring) mmap(p *uringParams) (err error) {
	if p.features&featWanted != featWanted || p.sqEntries != batch || p.cqEntries != 2*batch {
		return fmt.Errorf("io_uring of features %#x with %d and %d entries: %w", p.features, p.sqEntries, p.cqEntries, errors.ErrUnsupported)
	}
	array, cqes := uintptr(p.sq.array), uintptr(p.cq.cqes)
	size := max(array+batch*4, cqes+unsafe.Sizeof(*r.cqes))
	for _, off := range []uint32{p.sq.head, p.sq.tail, p.cq.head, p.cq.tail, p.sq.array, p.cq.cqes} {
		if off%4 != 0 || uintptr(off)+4 > size {
			return fmt.Errorf("io_uring with an offset of %d: %w", off, errors.ErrUnsupported)
		}
	}
	if r.rings, err = unix.Mmap(r.fd, offRings, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map the rings of an io_uring: %w", err)
	}
	if r.slots, err = unix.Mmap(r.fd, offSQEs, int(unsafe.Sizeof(*r.sqes)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map the requests of an io_uring: %w", err)
	}
	word := func(off uint32) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqHead, r.sqTail = word(p.sq.head), word(p.sq.tail)
	r.cqHead, r.cqTail = word(p.cq.head), word(p.cq.tail)
	r.sqes = (*[batch]sqe)(unsafe.Pointer(unsafe.SliceData(r.slots)))
	r.cqes = (*[2 * batch]cqe)(unsafe.Pointer(&r.rings[cqes]))
	index := (*[batch]uint32)(unsafe.Pointer(&r.rings[array]))
	for i := range index {
		index[i] = uint32(i)
	}
	return nil
}

// try submits a request: a system call filter may allow io_uring_setup only.
func (r *uring) try() error {
	r.put(opNop, 0, nil, 0)
	if err := r.run(); err != nil {
		return err
	}
	if r.res[0] != 0 {
		return fmt.Errorf("io_uring: %w", syscall.Errno(-r.res[0]))
	}
	return nil
}

// close frees the ring. Requests are in flight only inside run, so there are none.
func (r *uring) close() {
	for _, m := range [][]byte{r.rings, r.slots} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
	_ = unix.Close(r.fd)
	*r = uring{fd: -1}
}

// put adds a request to the next run, which takes at most batch. iov has len entries. The
// caller keeps them and their buffers reachable, and pinned, until run returns.
func (r *uring) put(op uint8, fd uintptr, iov *unix.Iovec, len int) {
	s := sqe{opcode: op, fd: int32(fd), addr: uint64(uintptr(unsafe.Pointer(iov))), len: uint32(len), userData: uint64(r.n)}
	if op != opNop {
		s.rwFlags = r.nowait
	}
	r.slot(r.n, s)
	r.n++
}

// dontWait makes the kernel answer EAGAIN if a read or write of fd would wait. A
// non-blocking fd is not enough: the request would stay in the ring until there is a frame.
// dontWait fails with EOPNOTSUPP if the file has no FMODE_NOWAIT, like TAPs before Linux
// 6.4. It tries a read without buffers, which takes no frame.
func (r *uring) dontWait(fd uintptr) error {
	r.nowait = unix.RWF_NOWAIT
	r.put(opReadv, fd, nil, 0)
	err := r.run()
	if err == nil && r.res[0] < 0 && r.res[0] != -int32(unix.EAGAIN) {
		err = os.NewSyscallError("read without waiting", syscall.Errno(-r.res[0]))
	}
	if err != nil {
		r.nowait = 0
	}
	return err
}

func (r *uring) slot(i uint32, s sqe) { r.sqes[(r.sqTail.Load()+i)%batch] = s }

// run submits the requests and collects their answers in res. If it fails, a request that
// the kernel never saw has the answer EAGAIN.
func (r *uring) run() error {
	n := r.n
	r.n, r.answered, r.has = 0, 0, [batch]bool{}
	for i := range n { // stays so for requests that the kernel never sees
		r.order[i] = uint8(i)
	}
	err := r.submit(n, enterGetEvents)
	if err != nil {
		for i := range n {
			r.res[i] = -int32(unix.EAGAIN)
		}
		n -= r.withdraw() // the last ones
	}
	for r.reap(); r.answered < n; r.reap() {
		r.cancel(n)
		if !r.mayWait {
			err = errLate
		}
	}
	return err
}

// submit passes n requests to the kernel. With enterGetEvents the kernel also completes
// work that it deferred to this thread, without waiting.
func (r *uring) submit(n, flags uint32) error {
	r.sqTail.Add(n)
	for n > 0 {
		k, errno := r.enter(n, 0, flags)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return fmt.Errorf("io_uring_enter: %w", errno)
		case k == 0:
			return fmt.Errorf("io_uring_enter took none of %d requests: %w", n, unix.EAGAIN)
		default:
			n -= min(k, n) // k < n: the kernel stopped at a malformed request
		}
	}
	return nil
}

func (r *uring) enter(submit, complete, flags uint32) (uint32, syscall.Errno) {
	r.calls++
	var k uintptr
	var errno syscall.Errno
	if complete > 0 { // it waits
		k, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), uintptr(complete), uintptr(flags), 0, 0)
	} else { // see port
		k, _, errno = unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), uintptr(complete), uintptr(flags), 0, 0)
	}
	return uint32(k), errno
}

// withdraw takes back the requests that the kernel did not take, and returns how many. It
// may move the tail back because the kernel reads the tail only in io_uring_enter.
func (r *uring) withdraw() uint32 {
	left := r.sqTail.Load() - r.sqHead.Load()
	r.sqTail.Add(-left)
	return left
}

// reap collects the answers that are there. Each is taken once, in the order of arrival.
func (r *uring) reap() {
	head := r.cqHead.Load()
	for tail := r.cqTail.Load(); head != tail; head++ {
		if c := r.cqes[head%(2*batch)]; c.userData < batch && !r.has[c.userData] {
			r.order[r.answered] = uint8(c.userData)
			r.has[c.userData] = true
			r.answered++
			r.res[c.userData] = c.res
		}
	}
	r.cqHead.Store(head)
}

// cancelled is the userData of requests to cancel; reap ignores their answers.
const cancelled = 1 << 32

// cancel cancels the requests of the last run that have no answers, and collects answers.
// Such requests wait in the kernel for a frame or for room: because of mayWait, or because
// another holder of the descriptor made it a blocking one. They must not outlive run,
// because the kernel would write to memory that has another use by then.
//
// The call that cancels also brings the answers, as a rule. Only without them cancel makes a
// call that waits, and tells Go's runtime of it: with one processor that costs more than the
// call (see port). The runtime's monitor thread took a seventh of a guest's processor when
// each burst of reads ended so.
func (r *uring) cancel(all uint32) {
	n := uint32(0)
	for i := range all {
		if !r.has[i] {
			r.slot(n, sqe{opcode: opCancel, fd: -1, addr: uint64(i), userData: cancelled})
			n++
		}
	}
	if r.submit(n, enterGetEvents) != nil && r.withdraw() == n {
		time.Sleep(time.Millisecond) // until there is memory for it
		return
	}
	if r.reap(); r.answered < all {
		_, _ = r.enter(0, 1, enterGetEvents)
	}
}
