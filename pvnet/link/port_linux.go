package link

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"barevif/pvnet"

	"golang.org/x/sys/unix"
)

// port is a descriptor that carries one frame, behind a struct virtio_net_hdr, per
// system call.
//
// System calls that cannot wait bypass Go's runtime (RawSyscall). The runtime hands the P
// of a call that lasts more than some 20 us to another thread. Calls with many frames last
// that long, and so do calls after which the kernel first runs the receiver of the frame.
// On a machine with one processor the frames would then move from thread to thread, which
// costs more than the calls themselves.
type port struct {
	info   Info
	file   *os.File
	conn   syscall.RawConn
	closed atomic.Bool
	shared atomic.Bool // another process has the descriptor too, and may have made it blocking
	mute   error       // returned if the poller reports an error that the next system call does not confirm
	fault  error       // returned for EFAULT from a read
	rd, wr half
}

// half is one direction. try is built once, because a closure per frame would allocate.
type half struct {
	mu     sync.Mutex // guards the rest
	vec    vector
	header [headerSize]byte
	try    func(fd uintptr) (done bool)
	once   func(fd uintptr) // calls try and ignores its result
	n      int              // result of the last try
	errno  syscall.Errno
}

// init takes over fd, also if it fails.
func (p *port) init(fd int, info Info, mute, fault error) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return err
	}
	p.info, p.mute, p.fault = info, mute, fault
	p.file = os.NewFile(uintptr(fd), info.Name)
	// SetReadDeadline fails on a descriptor for which the poller cannot wait.
	if err := p.file.SetReadDeadline(time.Time{}); err != nil {
		p.file.Close()
		return err
	}
	conn, err := p.file.SyscallConn()
	if err != nil {
		p.file.Close()
		return err
	}
	p.conn = conn
	p.rd.once = func(fd uintptr) { p.rd.try(fd) }
	p.wr.once = func(fd uintptr) { p.wr.try(fd) }
	p.wr.try = func(fd uintptr) bool {
		p.wr.n, p.wr.errno = again(fd, &p.shared, p.wr.vec.writev)
		return p.wr.errno != unix.EAGAIN
	}
	return nil
}

// again repeats a call while a signal interrupts it; Go's preemption sends such signals.
func again(fd uintptr, mayWait *atomic.Bool, call func(uintptr, bool) (int, syscall.Errno)) (n int, errno syscall.Errno) {
	for {
		if n, errno = call(fd, mayWait.Load()); errno != unix.EINTR {
			return n, errno
		}
	}
}

func (p *port) Name() string { return p.info.Name }
func (p *port) MTU() int     { return p.info.MTU }
func (p *port) MAC() [6]byte { return p.info.MAC }

// Info describes the link's interface.
func (p *port) Info() Info { return p.info }

func (p *port) SetReadDeadline(t time.Time) error {
	if err := p.file.SetReadDeadline(t); err != nil {
		return p.failure(err)
	}
	return nil
}

func (p *port) maxRead() int { return MaxFrame }

// setWriteDeadline ends a wait of WriteFrame at t.
func (p *port) setWriteDeadline(t time.Time) error { return p.file.SetWriteDeadline(t) }

func (p *port) Close() error {
	if p.closed.Swap(true) {
		return nil
	}
	return p.file.Close()
}

// File returns a second descriptor of the link, to be passed to another process. The
// caller owns it. It is non-blocking. A frame reaches one reader, of File or of the link.
func (p *port) File() (*os.File, error) {
	p.shared.Store(true)
	fd, dupErr := -1, error(nil)
	err := p.conn.Control(func(own uintptr) {
		fd, dupErr = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3)
	})
	if err != nil {
		return nil, p.failure(err)
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("fcntl", dupErr)
	}
	return os.NewFile(uintptr(fd), p.info.Name), nil
}

func (p *port) WriteFrame(off Offload, bufs [][]byte) (int, error) {
	if len(bufs) > MaxPieces {
		return 0, ErrTooManyPieces
	}
	w := &p.wr
	w.mu.Lock()
	defer w.mu.Unlock()
	off.encode(&w.header)
	w.vec.add(w.header[:])
	for _, b := range bufs {
		w.vec.add(b)
	}
	size := w.vec.size - headerSize
	if size < pvnet.MinFrame || size > MaxFrame {
		w.vec.clear()
		return 0, ErrSize
	}
	err := p.conn.Write(w.try)
	switch {
	case err != nil:
		err = p.stuck(err, w)
	case w.errno != 0:
		err = p.failed(w)
	}
	w.vec.clear()
	if err != nil {
		return 0, err
	}
	return size, nil
}

// receive calls rd.try until it is done, or just once if wait is false; then errNone means
// that there was no frame. The caller holds rd.mu.
func (p *port) receive(wait bool) error {
	if !wait {
		if err := p.conn.Control(p.rd.once); err != nil {
			return p.failure(err)
		}
		if p.rd.errno == unix.EAGAIN {
			return errNone
		}
	} else if err := p.conn.Read(p.rd.try); err != nil {
		return p.stuck(err, &p.rd)
	}
	if p.rd.errno != 0 {
		return p.failed(&p.rd)
	}
	return nil
}

// stuck tries h once more after err, with which the poller refused to wait, and returns the error of
// that try. The poller reports that the descriptor is in error, but not which: the kernel tells that.
func (p *port) stuck(err error, h *half) error {
	if p.ended(err) {
		return p.failure(err)
	}
	if err := p.conn.Control(h.once); err != nil {
		return p.failure(err)
	}
	switch h.errno {
	case 0:
		return nil // there was a frame, or room for one, after all
	case unix.EAGAIN:
		return p.mute
	}
	return p.failed(h)
}

// ended reports whether the poller returned err because of Close or a deadline.
func (p *port) ended(err error) bool {
	return p.closed.Load() || errors.Is(err, os.ErrDeadlineExceeded)
}

// failure maps an error of the os package to one of this package.
func (p *port) failure(err error) error {
	if p.closed.Load() {
		return net.ErrClosed
	}
	return err
}

// failed returns the error for the errno of the last try of h.
func (p *port) failed(h *half) error { return p.errorOf(h.errno, h == &p.rd) }

// errorOf maps the errors of drivers/net/tun.c and net/packet/af_packet.c for a read or a
// write. Most concern one frame. For example, a read returns EINVAL for a frame whose
// segmentation struct virtio_net_hdr cannot express; the next read returns the next frame.
func (p *port) errorOf(errno syscall.Errno, reading bool) error {
	switch errno {
	case unix.ENETDOWN, unix.EIO: // EIO: a TAP that is down does not take this frame
		return ErrDown
	case unix.EBADF, unix.EBADFD, unix.ENODEV, unix.ENXIO:
		return ErrGone
	case unix.ENOBUFS, unix.ENOMEM:
		return ErrNoBuffers
	case unix.EMSGSIZE:
		return ErrSize
	case unix.EINVAL, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EPROTO, unix.EBADMSG, unix.E2BIG:
		return ErrOffload
	case unix.EFAULT:
		if reading {
			return p.fault
		}
		return ErrOffload // the kernel could not use this frame's pages
	}
	if reading {
		return os.NewSyscallError("read", errno)
	}
	return os.NewSyscallError("write", errno)
}
