//go:build linux

package xenstored

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// The xenstore ring page (xen/include/public/io/xs_wire.h, struct
// xenstore_domain_interface; docs/misc/xenstore-ring.txt).
const (
	ringSize  = 1024
	reqBytes  = 0
	rspBytes  = 1024
	reqCons   = 2048
	reqProd   = 2052
	rspCons   = 2056
	rspProd   = 2060
	errorWord = 2072
)

// A ring is a domain's end of its xenstore ring. As a stream it may be read and
// written at once, by one goroutine each.
type ring struct {
	mapped   []byte
	page     []byte
	req, rsp half
	failed   shm.In
	doorbell *os.File
	bell     *os.File // bytes from the daemon: something moved
	port     [4]byte
	awake    chan struct{} // closed when listen has ended

	end    sync.Once
	mu     sync.Mutex
	moved  *sync.Cond // with mu
	closed bool       // guarded by mu; nothing moves any more
	busy   int        // guarded by mu; calls that use the page
}

// A half is one direction. We own mine and start where the last owner stopped.
type half struct {
	mine  uint32
	out   shm.Out // mine, as the daemon sees it
	other shm.In
	data  []byte
}

func (d *Daemon) openRing(dom hypercall.DomID) (_ *ring, err error) {
	file, err := os.OpenFile(d.ringFile(dom), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	page, err := syscall.Mmap(int(file.Fd()), 0, shm.PageSize, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	mem, err := shm.New(page)
	if err != nil {
		return nil, err
	}
	r := &ring{mapped: page, page: mem.Bytes(), failed: mem.In(errorWord), awake: make(chan struct{})}
	r.moved = sync.NewCond(&r.mu)
	binary.LittleEndian.PutUint32(r.port[:], port(dom))
	r.req = half{mem.In(reqProd).Load(), mem.Out(reqProd), mem.In(reqCons), r.page[reqBytes : reqBytes+ringSize]}
	r.rsp = half{mem.In(rspCons).Load(), mem.Out(rspCons), mem.In(rspProd), r.page[rspBytes : rspBytes+ringSize]}
	if r.doorbell, err = os.OpenFile(filepath.Join(d.dir, "doorbell"), os.O_RDWR|syscall.O_NONBLOCK, 0); err != nil {
		return nil, err
	}
	bell := filepath.Join(d.dir, fmt.Sprintf("port.%d", port(dom)))
	if r.bell, err = os.OpenFile(bell, os.O_RDWR|syscall.O_NONBLOCK, 0); err != nil {
		return nil, err
	}
	go r.listen()
	return r, nil
}

// listen turns what the daemon rings into broadcasts.
func (r *ring) listen() {
	defer close(r.awake)
	for buf := make([]byte, 256); ; {
		_, err := r.bell.Read(buf)
		r.mu.Lock()
		r.closed = r.closed || err != nil
		r.moved.Broadcast()
		r.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// begin waits until ready says there are bytes or room, and keeps the page mapped
// until done.
func (r *ring) begin(ready func() (int, error)) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if r.closed {
			return 0, net.ErrClosed
		}
		if n := r.failed.Load(); n != 0 {
			return 0, fmt.Errorf("xenstored reports error %d in the ring", n)
		}
		n, err := ready()
		if err != nil {
			return 0, err
		}
		if n > 0 {
			r.busy++
			return n, nil
		}
		r.moved.Wait()
	}
}

func (r *ring) done() error {
	r.mu.Lock()
	r.busy--
	r.moved.Broadcast()
	r.mu.Unlock()
	_, err := r.doorbell.Write(r.port[:])
	return err
}

func (r *ring) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := r.begin(func() (int, error) { return used(r.rsp.other.Load() - r.rsp.mine) })
	if err != nil {
		return 0, err
	}
	at := r.rsp.mine % ringSize
	n = copy(b, r.rsp.data[at:min(at+uint32(n), ringSize)])
	r.rsp.mine += uint32(n)
	r.rsp.out.Store(r.rsp.mine)
	return n, r.done()
}

func (r *ring) Write(b []byte) (written int, err error) {
	for written < len(b) {
		n, err := r.begin(func() (int, error) {
			n, err := used(r.req.mine - r.req.other.Load())
			return ringSize - n, err
		})
		if err != nil {
			return written, err
		}
		at := r.req.mine % ringSize
		n = copy(r.req.data[at:min(at+uint32(n), ringSize)], b[written:])
		written += n
		r.req.mine += uint32(n)
		r.req.out.Store(r.req.mine)
		if err := r.done(); err != nil {
			return written, err
		}
	}
	return written, nil
}

// used checks a distance between indices.
func used(n uint32) (int, error) {
	if n > ringSize {
		return 0, fmt.Errorf("%d bytes in a ring of %d: %w", n, ringSize, io.ErrUnexpectedEOF)
	}
	return int(n), nil
}

// Close leaves the ring as it is; the daemon does not notice.
func (r *ring) Close() error {
	err := net.ErrClosed
	r.end.Do(func() {
		r.bell.Close()
		<-r.awake // which has said closed
		r.mu.Lock()
		for r.busy > 0 {
			r.moved.Wait()
		}
		r.mu.Unlock()
		r.doorbell.Close()
		err = syscall.Munmap(r.mapped)
	})
	return err
}
