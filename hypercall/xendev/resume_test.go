//go:build linux

package xendev

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/xendev/xendevtest"
)

// A fakeKernel stands for Xen's event channels and Linux's evtchn driver, with what Linux
// does to them on a resume.
type fakeKernel struct {
	t     *testing.T
	fixed bool // the driver refuses a number that it has, and keeps its list

	mu    sync.Mutex
	id    hypercall.DomID
	ends  []int                          // of all files
	files map[uint64]*fakeFile           // by inode
	ports map[hypercall.PortID]*fakeFile // Xen's; nil: the kernel's own
	far   map[hypercall.PortID]hypercall.PortID
	stale []hypercall.PortID // of notifies for dead ports

	silent  bool               // events are withheld until speak
	asked   int                // how many events were sent
	pending []hypercall.PortID // withheld
}

// speak delivers what was withheld.
func (k *fakeKernel) speak() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.silent = false
	for _, p := range k.pending {
		k.fire(p)
	}
	k.pending = nil
}

func (k *fakeKernel) sent() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.asked
}

type fakeFile struct {
	list map[hypercall.PortID]bool
	end  int // the driver's end
}

func newFakeKernel(t *testing.T) (*fakeKernel, *Domain) {
	xendevtest.CheckFiles(t)
	k := &fakeKernel{t: t, id: 3, files: make(map[uint64]*fakeFile)}
	k.reset(5)
	d := newDomain(Config{}, 3)
	d.evtchn = k
	t.Cleanup(k.endProcess)
	return k, d
}

// endProcess closes the descriptors that stay open until the process ends.
func (k *fakeKernel) endProcess() {
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		k.t.Fatal(err)
	}
	for _, e := range dir {
		fd, err := strconv.Atoi(e.Name())
		var st unix.Stat_t
		if err == nil && unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK && k.files[st.Ino] != nil {
			unix.Close(fd)
		}
	}
	for _, end := range k.ends {
		unix.Close(end)
	}
}

// reset closes all ports. The kernel itself then uses the first ones.
func (k *fakeKernel) reset(kernels hypercall.PortID) {
	k.ports = make(map[hypercall.PortID]*fakeFile)
	k.far = make(map[hypercall.PortID]hypercall.PortID)
	for p := range kernels {
		k.ports[p] = nil // 0 is never valid
	}
}

// resume resumes the domain as domain id.
func (k *fakeKernel) resume(id hypercall.DomID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.id = id
	k.reset(4)
}

func (k *fakeKernel) fileOf(fd int) *fakeFile {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		k.t.Error("a call for a closed descriptor:", err)
		return &fakeFile{}
	}
	return k.files[st.Ino]
}

func (k *fakeKernel) ownID(Config) (hypercall.DomID, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.id, nil
}

func (k *fakeKernel) open(Config) (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fds[0], &st); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ends = append(k.ends, fds[1])
	k.files[st.Ino] = &fakeFile{list: make(map[hypercall.PortID]bool), end: fds[1]}
	return os.NewFile(uintptr(fds[0]), "evtchn"), nil
}

// bind gives a file the lowest free number, as evtchn_bind_to_user does.
func (k *fakeKernel) bind(f *fakeFile) (hypercall.PortID, error) {
	k.reap()
	for p := hypercall.PortID(1); ; p++ {
		if _, used := k.ports[p]; used {
			continue
		}
		if f.list[p] {
			if !k.fixed {
				clear(f.list)
			}
			return 0, unix.EEXIST
		}
		k.ports[p], f.list[p] = f, true
		return p, nil
	}
}

func (k *fakeKernel) bindUnbound(fd int, peer hypercall.DomID) (hypercall.PortID, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.bind(k.fileOf(fd))
}

func (k *fakeKernel) bindPeer(fd int, peer hypercall.DomID, remote hypercall.PortID) (hypercall.PortID, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	p, err := k.bind(k.fileOf(fd))
	if err == nil {
		k.far[p], k.far[remote] = remote, p
		k.fire(p)
	}
	return p, err
}

func (k *fakeKernel) fire(p hypercall.PortID) {
	if _, err := unix.Write(k.ports[p].end, binary.NativeEndian.AppendUint32(nil, uint32(p))); err != nil {
		k.t.Error(err)
	}
}

func (k *fakeKernel) unbind(fd int, p hypercall.PortID) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.fileOf(fd)
	if !f.list[p] {
		return unix.ENOTCONN
	}
	if k.ports[p] != f {
		k.t.Errorf("kernel BUG: unbind of the dead port %d", p)
	}
	delete(f.list, p)
	delete(k.ports, p)
	return nil
}

func (k *fakeKernel) notify(fd int, p hypercall.PortID) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.fileOf(fd)
	switch {
	case !f.list[p]:
		return unix.ENOTCONN
	case k.ports[p] != f:
		k.stale = append(k.stale, p)
	case k.far[p] != 0:
		if k.asked++; k.silent {
			k.pending = append(k.pending, k.far[p])
			return nil
		}
		k.fire(k.far[p])
	}
	return nil
}

// requireNoBug requires that the process could end now: what is open has no dead ports.
func (k *fakeKernel) requireNoBug() {
	k.t.Helper()
	if n := k.remembered(); n > 0 {
		k.t.Errorf("kernel BUG at the end of the process: the driver has %d dead ports", n)
	}
}

// remembered counts the dead ports in the driver's lists.
func (k *fakeKernel) remembered() (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reap()
	for _, f := range k.files {
		for p := range f.list {
			if k.ports[p] != f {
				n++
			}
		}
	}
	return n
}

// closed reports whether every descriptor of a file is closed.
func (f *fakeFile) closed() bool {
	p := []unix.PollFd{{Fd: int32(f.end)}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents&unix.POLLHUP != 0
}

// reap unbinds the ports of closed files, as evtchn_release does.
func (k *fakeKernel) reap() {
	for ino, f := range k.files {
		if !f.closed() {
			continue
		}
		delete(k.files, ino)
		for p := range f.list {
			if k.ports[p] != f {
				k.t.Errorf("kernel BUG: a file is closed that has the dead port %d", p)
				continue
			}
			delete(k.ports, p)
		}
	}
}

func openWaiter(t *testing.T, d *Domain, ports int) (w *waiter, opened []hypercall.Port) {
	t.Helper()
	hw, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	w = hw.(*waiter)
	t.Cleanup(func() { w.Close() })
	for range ports {
		p, err := w.Unbound(0)
		if err != nil {
			t.Fatal(err)
		}
		opened = append(opened, p)
	}
	return w, opened
}

func (k *fakeKernel) fileFor(w *waiter) (f *fakeFile) {
	if err := w.raw.Control(func(fd uintptr) { f = k.fileOf(int(fd)) }); err != nil {
		k.t.Fatal(err)
	}
	return f
}

func TestNoCallTouchesAPortOfBeforeAResume(t *testing.T) {
	for name, touch := range map[string]func(*Domain, *waiter, []hypercall.Port) error{
		"close of a port":   func(_ *Domain, _ *waiter, p []hypercall.Port) error { return p[1].Close() },
		"close of a waiter": func(_ *Domain, w *waiter, _ []hypercall.Port) error { return w.Close() },
		"a new port": func(d *Domain, _ *waiter, _ []hypercall.Port) error {
			w, err := d.Waiter()
			if err != nil {
				return err
			}
			_, err = w.Unbound(0)
			return errors.Join(err, w.Close())
		},
		"a port on an old waiter": func(_ *Domain, w *waiter, _ []hypercall.Port) error {
			if _, err := w.Unbound(0); !errors.Is(err, errResumed) {
				return errors.New("it opened: " + err.Error())
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			k, d := newFakeKernel(t)
			a, ports := openWaiter(t, d, 3)
			b, _ := openWaiter(t, d, 1)
			fired := slices.Clone(ports)
			k.resume(4)
			if err := touch(d, a, ports); err != nil {
				t.Fatal(err)
			}
			if d.ID() != 4 {
				t.Errorf("our domid is %d", d.ID())
			}
			k.requireNoBug()
			probes := len(k.stale)
			for _, p := range fired {
				if err := p.Notify(); err != nil && !errors.Is(err, net.ErrClosed) {
					t.Error("notify:", err)
				}
				if err := p.Close(); err != nil {
					t.Error("close:", err)
				}
			}
			if len(k.stale) != probes {
				t.Errorf("calls for the dead ports %v", k.stale[probes:])
			}
			if err := errors.Join(a.Close(), b.Close()); err != nil {
				t.Error(err)
			}
			c, more := openWaiter(t, d, 2)
			if more[0].ID() != 6 { // the probe has the first two
				t.Errorf("the next port is %d", more[0].ID())
			}
			f := k.fileFor(c)
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			if !f.closed() {
				t.Error("the file of the second life stays open")
			}
			k.requireNoBug()
			if len(k.ports) != 4 {
				t.Errorf("open ports at the end: %v", k.ports)
			}
		})
	}
}

func TestCheckpointLeavesPortsAlone(t *testing.T) {
	k, d := newFakeKernel(t)
	w, ports := openWaiter(t, d, 2)
	f := k.fileFor(w)
	if err := ports[0].Close(); err != nil {
		t.Fatal(err)
	}
	if err := ports[1].Notify(); err != nil || w.dead.Load() || len(f.list) != 1 {
		t.Errorf("notify: %v; dead: %v; the driver has %v", err, w.dead.Load(), f.list)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	k.requireNoBug()
	if !f.closed() || len(k.ports) != 5 {
		t.Errorf("closed: %v; open ports at the end: %v", f.closed(), k.ports)
	}
}

// A migration may find the same domid free.
func TestResumeWithTheSameDomid(t *testing.T) {
	k, d := newFakeKernel(t)
	w, ports := openWaiter(t, d, 2)
	k.resume(3)
	begin := time.Now()
	if err := ports[0].Close(); err != nil {
		t.Error(err)
	}
	if !w.dead.Load() || time.Since(begin) < probeLate {
		t.Errorf("dead: %v, after %v", w.dead.Load(), time.Since(begin))
	}
	k.requireNoBug()
}

// Nothing can be done for a file whose only number is in use again. It must stay open.
func TestDeadNumberInUse(t *testing.T) {
	for _, fixed := range []bool{false, true} {
		k, d := newFakeKernel(t)
		k.fixed = fixed
		w, ports := openWaiter(t, d, 1)
		f := k.fileFor(w)
		k.resume(4)
		if !fixed {
			k.ports[ports[0].ID()] = nil
		}
		if err := errors.Join(ports[0].Close(), w.Close()); err != nil {
			t.Error(err)
		}
		if f.closed() {
			t.Error("the file is closed, which is a kernel BUG")
		}
		if k.remembered() == 0 {
			t.Error("the test's kernel has forgotten the port")
		}
	}
}

// The control domain needs no probe.
func TestNoProbeInTheControlDomain(t *testing.T) {
	k, d := newFakeKernel(t)
	k.id = 0
	d.id.Store(0)
	w, ports := openWaiter(t, d, 1)
	if len(k.ports) != 5+1 || ports[0].ID() != 5 {
		t.Errorf("open ports: %v", k.ports)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	k.requireNoBug()
}

// A port that fired before the resume is not unmasked after it: its number may be another's.
func TestDeadPortIsNotUnmasked(t *testing.T) {
	for _, resumed := range []bool{false, true} {
		k, d := newFakeKernel(t)
		w, ports := openWaiter(t, d, 1)
		f := k.fileFor(w)
		k.mu.Lock()
		k.fire(ports[0].ID())
		k.mu.Unlock()
		if err := w.Wait(time.Now().Add(soon), true); err != nil {
			t.Fatal(err)
		}
		if resumed {
			k.resume(4)
		}
		openWaiter(t, d, 1) // notices it
		if err := w.Wait(time.Now().Add(time.Millisecond), true); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		_, err := unix.Read(f.end, make([]byte, 64))
		if wrote := err == nil; wrote == resumed {
			t.Errorf("resumed: %v; the port was unmasked: %v", resumed, wrote)
		}
	}
}

// An event that is long under way holds up those who open and close ports, of all devices, once
// and not one after the other: they share its answer.
func TestASilentProbeIsWaitedForOnce(t *testing.T) {
	k, d := newFakeKernel(t)
	d.life.late, d.life.fresh = time.Minute, time.Minute
	var ports []hypercall.Port
	for range 8 {
		_, p := openWaiter(t, d, 1)
		ports = append(ports, p...)
	}
	k.mu.Lock()
	k.silent = true
	before := k.asked
	k.mu.Unlock()
	var closing sync.WaitGroup
	closes := func(p hypercall.Port) {
		closing.Go(func() {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	// The first probe is nobody else's: these come after it was sent.
	closes(ports[0])
	until(t, "the first probe", func() bool { return k.sent() > before })
	for _, p := range ports[1:] {
		closes(p)
	}
	until(t, "the others wait for it", func() bool { return waiting(t) >= 7 })
	// The second one is silent, too, and answers all of them.
	k.mu.Lock()
	for _, p := range k.pending {
		k.fire(p)
	}
	k.pending = nil
	k.mu.Unlock()
	until(t, "the second probe", func() bool { return k.sent() > before+1 })
	time.Sleep(2 * probeSoon) // an event that comes sooner is not late
	k.speak()
	closing.Wait()
	if n := k.sent() - before; n != 2 {
		t.Errorf("%d probes for 8 ports that were closed at once", n)
	}
	// A caller that comes later asks for itself.
	openWaiter(t, d, 1)
	if n := k.sent() - before; n < 3 {
		t.Error("an answer from before a call was enough for it")
	}
	if d.ID() != 3 {
		t.Error("the domain counts as resumed")
	}
}

// waiting counts the goroutines that wait for the life.
func waiting(t *testing.T) (n int) {
	t.Helper()
	all := make([]byte, 1<<20)
	for g := range strings.SplitSeq(string(all[:runtime.Stack(all, true)]), "\n\n") {
		if strings.Contains(g, "xendev.(*Domain).begin") && strings.Contains(g, "sync.(*Mutex).Lock") {
			n++
		}
	}
	return n
}
