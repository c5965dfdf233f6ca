package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/server/labtest"
)

// A proxy is a faulty host process: it answers as the host does, but with other
// descriptors.
type proxy struct {
	t      testing.TB
	path   string
	listen *net.UnixListener
	wg     sync.WaitGroup

	mu    sync.Mutex
	swap  func(nth int, fd int) int // guarded by mu: the descriptor to send instead of the nth; nil: the nth itself
	sent  int                       // guarded by mu: descriptors sent
	kept  []*os.File                // guarded by mu: copies of the descriptors of memory
	conns []*net.UnixConn           // guarded by mu
}

// newProxy makes a proxy in front of the host at path.
func newProxy(t testing.TB, path string) *proxy {
	t.Helper()
	p := &proxy{t: t, path: path + "-middle"}
	var err error
	if p.listen, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: p.path, Net: "unixpacket"}); err != nil {
		t.Fatal(err)
	}
	p.wg.Go(func() {
		for {
			c, err := p.listen.AcceptUnix()
			if err != nil {
				return
			}
			h, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				c.Close()
				return
			}
			p.mu.Lock()
			p.conns = append(p.conns, c, h)
			p.mu.Unlock()
			p.wg.Go(func() { p.forward(h, c, false) })
			p.wg.Go(func() { p.forward(c, h, true) })
		}
	})
	t.Cleanup(func() {
		p.listen.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
		p.closeKept()
	})
	return p
}

// closeKept closes the copies.
func (p *proxy) closeKept() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.kept {
		f.Close()
	}
	p.kept = nil
}

func (p *proxy) forward(to, from *net.UnixConn, fromHost bool) {
	defer to.Close()
	buf, oob := make([]byte, 256<<10), make([]byte, 256)
	for {
		n, oobn, _, _, err := from.ReadMsgUnix(buf, oob)
		if err != nil || n == 0 {
			return
		}
		var fds []int
		if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for i := range msgs {
				got, _ := unix.ParseUnixRights(&msgs[i])
				fds = append(fds, got...)
			}
		}
		out := make([]int, len(fds))
		for i, fd := range fds {
			out[i] = fd
			if fromHost {
				out[i] = p.substitute(fd)
			}
		}
		var rights []byte
		if len(out) > 0 {
			rights = unix.UnixRights(out...)
		}
		_, _, err = to.WriteMsgUnix(buf[:n], rights, nil)
		for _, fd := range fds {
			unix.Close(fd)
		}
		if err != nil {
			return
		}
	}
}

// substitute keeps a copy of fd and returns the descriptor to send in its place.
func (p *proxy) substitute(fd int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent++
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err == nil {
		if copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			p.kept = append(p.kept, os.NewFile(uintptr(copied), "memory"))
		}
	}
	if p.swap == nil {
		return fd
	}
	return p.swap(p.sent, fd)
}

// setSwap starts a new count.
func (p *proxy) setSwap(swap func(nth, fd int) int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent, p.swap = 0, swap
}

// A socketLab is a host with two guests and their backend. The host treats one of the guests
// badly.
type socketLab struct {
	t         testing.TB
	host      *emu.Host
	tools     *xenstore.Client
	proxy     *proxy
	devs      chan *pvnet.Device
	neighbour *pvnet.Device // the honest guest's device
}

func newSocketLab(t testing.TB) *socketLab {
	t.Helper()
	s := &socketLab{t: t, devs: make(chan *pvnet.Device, 64)}
	st := server.New(server.Config{})
	path := filepath.Join(emutest.SocketDir(t), "host")
	var err error
	s.host, err = emu.Listen(path, emu.Config{Grants: 2048, Store: func(dom hypercall.DomID, conn io.ReadWriteCloser) {
		st.ServeConn(conn, dom)
	}})
	if err != nil {
		t.Fatal(err)
	}
	dom0, err := s.host.NewDomain(0)
	if err != nil {
		t.Fatal(err)
	}
	drv, err := s.host.NewDomain(backID)
	if err != nil {
		t.Fatal(err)
	}
	if s.tools, err = xenstore.Dial(ctx(t), dom0.Store, xenstore.Config{}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []hypercall.DomID{0, frontID, backID, 3} {
		st.Introduce(id)
		if err := toolstack.Home(ctx(t), s.tools, id); err != nil {
			t.Fatal(err)
		}
	}
	c, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(c, drv, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Buffers: 64}}, func(d *pvnet.Device) {
			s.devs <- d
			d.Listen(context.Background(), func(f pvnet.Frame) {
				b := make([]byte, f.Len())
				f.CopyTo(b)
				d.Write(b)
			})
		})
	}()
	neighbour, err := emu.Join(ctx(t), path, 3)
	if err != nil {
		t.Fatal(err)
	}
	s.addVif(toolstack.Vif{Front: 3, Back: backID})
	if s.neighbour, err = pvnet.Connect(ctx(t), neighbour, "0", pvnet.Config{Buffers: 64}); err != nil {
		t.Fatal(err)
	}
	wait(t, s.devs)
	s.proxy = newProxy(t, path)
	t.Cleanup(func() {
		s.neighbour.Disconnect()
		cancel()
		if err := wait(t, served); !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
		neighbour.Destroy()
		s.tools.Close()
		if err := labtest.Comes(s.host.CheckClean); err != nil {
			t.Error(err)
		}
		s.host.Close()
		st.Close()
	})
	return s
}

func (s *socketLab) addVif(v toolstack.Vif) toolstack.Vif {
	s.t.Helper()
	v.MAC = [6]byte{0, 0x16, 0x3e, 0, byte(v.Front), byte(v.ID)}
	if err := toolstack.Add(ctx(s.t), s.tools, v); err != nil {
		s.t.Fatal(err)
	}
	return v
}

// requireNeighbourTraffic requires that the neighbour's frames pass both ways.
func (s *socketLab) requireNeighbourTraffic() {
	s.t.Helper()
	c, stop := context.WithCancel(ctx(s.t))
	defer stop()
	lengths := make(chan int, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- s.neighbour.Listen(c, func(f pvnet.Frame) {
			select {
			case lengths <- f.Len():
			default:
			}
		})
	}()
	if _, err := s.neighbour.Write(pattern(300, 0)); err != nil {
		s.t.Fatal(err)
	}
	if n := wait(s.t, lengths); n != 300 {
		s.t.Errorf("a neighbour's frame came back with %d bytes", n)
	}
	stop()
	wait(s.t, ended)
}

// T34: a descriptor that is not sealed memory of the right size is refused. One in place
// of an event or of the connection to xenstore harms only its own vif.
func TestT34DescriptorsThatAreNotWhatTheyShouldBe(t *testing.T) {
	s := newSocketLab(t)
	memfd := func(size int64, seals int) int {
		fd, err := unix.MemfdCreate("fake", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	const all = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(1 << 22); err != nil {
		t.Fatal(err)
	}
	fakes := []struct {
		name string
		like func(size int64) int // the descriptor to send instead of one of size bytes
	}{
		{"a pipe", func(int64) int { return pipe[0] }},
		{"an ordinary file", func(int64) int { return int(file.Fd()) }},
		{"memory that can shrink", func(n int64) int { return memfd(n, unix.F_SEAL_GROW|unix.F_SEAL_SEAL) }},
		{"memory without seals", func(n int64) int { return memfd(n, 0) }},
		{"less memory", func(n int64) int { return memfd(max(n-4096, 0), all) }},
		{"no memory", func(int64) int { return memfd(0, all) }},
	}
	id := uint32(0)
	// try reports whether the guest failed with the nth descriptor replaced, and the size of
	// that: -1 if there is none, 0 if it is no memory. Without an event the guest may wait in
	// vain, and it does so for a moment.
	try := func(nth int, like func(int64) int) (refused bool, size int64) {
		size = -1
		defer s.proxy.closeKept()
		c, cancel := context.WithTimeout(context.Background(), waitLimit)
		defer cancel()
		opened := -1
		s.proxy.setSwap(func(n, fd int) int {
			if n != nth {
				return fd
			}
			var st unix.Stat_t
			unix.Fstat(fd, &st)
			if size = st.Size; size == 0 {
				time.AfterFunc(500*time.Millisecond, cancel)
			}
			opened = like(size)
			return opened
		})
		v := s.addVif(toolstack.Vif{Front: frontID, Back: backID, ID: id})
		id++
		d, err := emu.Join(c, s.proxy.path, frontID)
		if err == nil {
			var dev *pvnet.Device
			if dev, err = pvnet.Connect(c, d, fmt.Sprint(v.ID), pvnet.Config{Buffers: 64}); err == nil {
				dev.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
				dev.Write(pattern(100, 0))
				dev.Disconnect()
			}
			d.Destroy()
		}
		s.proxy.setSwap(nil)
		eventually(t, "the guest gone", func() bool { return s.host.Ledger().Domains == 3 })
		s.requireNeighbourTraffic()
		if err := toolstack.Remove(ctx(t), s.tools, v); err != nil {
			t.Fatal(err)
		}
		wait(t, wait(t, s.devs).Done())
		if opened > 0 && opened != pipe[0] && opened != int(file.Fd()) {
			unix.Close(opened)
		}
		return err != nil && !errors.Is(err, context.DeadlineExceeded), size
	}
	memory := 0
	for nth := 1; ; nth++ {
		refused, size := try(nth, fakes[0].like)
		if size < 0 {
			break
		}
		if size == 0 {
			continue // an event, or the connection to xenstore: the vif hears nothing, fails, or is up by other means
		}
		memory++
		for i, fake := range fakes {
			if i > 0 {
				refused, _ = try(nth, fake.like)
			}
			if !refused {
				t.Errorf("descriptor %d: %s was taken", nth, fake.name)
			}
		}
	}
	if memory < 5 { // two tables and three shares
		t.Errorf("only %d descriptors were memory", memory)
	}
	unix.Close(pipe[0])
	unix.Close(pipe[1])
}

// T34: seals do not prevent hole punching, which makes memory zeros. The vif with these
// rings ends, at both ends, and nothing else does.
func TestT34MemoryThatIsPunched(t *testing.T) {
	s := newSocketLab(t)
	v := s.addVif(toolstack.Vif{Front: frontID, Back: backID})
	d, err := emu.Join(ctx(t), s.proxy.path, frontID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Destroy()
	front, err := pvnet.Connect(ctx(t), d, "0", pvnet.Config{Buffers: 64})
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, s.devs)
	sink := listen(front)
	for i := range 10 {
		want := pattern(100+i, i)
		if _, err := front.Write(want); err != nil {
			t.Fatal(err)
		}
		sink.requireFrame(t, want)
	}
	s.requireNeighbourTraffic()
	punched := 0
	s.proxy.mu.Lock()
	for _, f := range s.proxy.kept {
		var st unix.Stat_t
		if unix.Fstat(int(f.Fd()), &st) == nil && st.Size > 0 && st.Size <= 1<<20 { // not the tables
			if unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, st.Size) == nil {
				punched++
			}
		}
	}
	s.proxy.mu.Unlock()
	if punched != 3 {
		t.Fatalf("%d shares punched", punched)
	}
	front.SetWriteDeadline(deadline())
	for err == nil { // until it reads an index again
		_, err = front.Write(pattern(100, 0))
	}
	var pe *pvnet.PeerError
	if !errors.As(err, &pe) {
		t.Errorf("Write ended with %v", err)
	}
	wait(t, front.Done())
	wait(t, sink.ended)
	s.requireNeighbourTraffic()
	if err := toolstack.Remove(ctx(t), s.tools, v); err != nil {
		t.Error(err)
	}
	wait(t, back.Done())
	s.requireNeighbourTraffic()
}
