//go:build linux

package xendev

// Tests that need a real Xen. A domain can grant to itself, and a PV domain can also map
// its own grants, so one domain is enough. That Xen refuses another domain is a test for
// the lab.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/xendev/privcmd"
	"barevif/hypercall/xendev/xendevtest"
	"barevif/xenbus/xenstore/wire"
)

// childEnv makes the test program play a part in another test: a child of this domain
// that shares memory and waits to be killed, one that maps a page while signals interrupt it, or
// the peer of another domain.
const childEnv = "XENDEV_TEST_CHILD"

func TestMain(m *testing.M) {
	role := map[string]func() error{"child": child, "peer": peer, interrupted: mapInterrupted}[os.Getenv(childEnv)]
	if role == nil {
		os.Exit(m.Run())
	}
	if err := role(); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

const soon = 2 * time.Minute

// until waits until ok reports true.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(soon); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: ", what)
		}
	}
}

// onXen opens this domain, or skips the test if this is no Xen domain. At the end of the
// test as many files must be open as before.
func onXen(t testing.TB, cfg Config) *Domain {
	t.Helper()
	xendevtest.OnXen(t)
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error("Close:", err)
		}
	})
	return d
}

// onPV skips the test if the domain cannot map its own grants.
func onPV(t testing.TB, cfg Config) *Domain {
	t.Helper()
	d := onXen(t, cfg)
	if kind := sysfs(t, "guest_type"); kind != "PV" {
		t.Skipf("a %s domain cannot map its own grants", kind)
	}
	return d
}

// sysfs returns the text of a file in /sys/hypervisor.
func sysfs(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("/sys/hypervisor/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func shareOf(t testing.TB, d *Domain, pages int, access hypercall.Access) *hypercall.Share {
	t.Helper()
	s, err := d.Share(hypercall.DomSelf, pages, access)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.End(); err != nil {
			t.Error("End:", err)
		}
	})
	return s
}

func channelOf(t testing.TB, d *Domain) (wa, wb hypercall.Waiter, a, b hypercall.Port) {
	t.Helper()
	open := func() hypercall.Waiter {
		w, err := d.Waiter()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := w.Close(); err != nil {
				t.Error("Close:", err)
			}
		})
		return w
	}
	wa, wb = open(), open()
	a, err := wa.Unbound(hypercall.DomSelf)
	if err != nil {
		t.Fatal(err)
	}
	b, err = wb.Bind(hypercall.DomSelf, a.ID())
	if err != nil {
		t.Fatal(err)
	}
	if err := wb.Wait(time.Now().Add(soon), true); err != nil {
		t.Fatal("the binder's own event:", err)
	}
	return wa, wb, a, b
}

func TestXenSharedPagesAreOneMemory(t *testing.T) {
	d := onPV(t, Config{})
	s := shareOf(t, d, 3, hypercall.ReadWrite)
	if !bytes.Equal(s.Bytes(), make([]byte, 3*shm.PageSize)) {
		t.Error("shared pages are not zero")
	}
	m, err := d.Map(hypercall.DomSelf, []hypercall.GrantRef{s.Refs[2], s.Refs[0]}, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	s.Out(2*shm.PageSize + 4).Store(0xabcd)
	m.Out(shm.PageSize).Store(0x1234)
	if a, b := m.In(4).Load(), s.In(0).Load(); a != 0xabcd || b != 0x1234 {
		t.Errorf("the other side sees %#x and %#x", a, b)
	}
	if err := m.Release(); err != nil {
		t.Error(err)
	}
}

func TestXenMapNamesTheBadRef(t *testing.T) {
	d := onPV(t, Config{})
	ro, rw := shareOf(t, d, 1, hypercall.ReadOnly), shareOf(t, d, 2, hypercall.ReadWrite)
	const unknown hypercall.GrantRef = 1<<31 - 1
	for _, c := range []struct {
		name   string
		dom    hypercall.DomID
		refs   []hypercall.GrantRef
		bad    hypercall.GrantRef
		status hypercall.Status
	}{
		{"unknown", d.ID(), []hypercall.GrantRef{rw.Refs[0], unknown, rw.Refs[1]}, unknown, hypercall.BadGntref},
		{"read-only", d.ID(), []hypercall.GrantRef{rw.Refs[0], rw.Refs[1], ro.Refs[0]}, ro.Refs[0], hypercall.GeneralError},
		{"no such domain", 0x7000, rw.Refs, rw.Refs[0], hypercall.BadDomain},
	} {
		_, err := d.Map(c.dom, c.refs, hypercall.ReadWrite)
		var ge *hypercall.GrantError
		if !errors.As(err, &ge) {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if want := (hypercall.GrantError{Op: "map", Dom: c.dom, Ref: c.bad, Status: c.status}); *ge != want {
			t.Errorf("%s: %+v, not %+v", c.name, *ge, want)
		}
	}
	m, err := d.Map(d.ID(), ro.Refs, hypercall.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Release(); err != nil {
		t.Error(err)
	}
}

func TestXenCopyTakesEveryKindOfMemory(t *testing.T) {
	d := onPV(t, Config{LockMemory: true})
	s, dst := shareOf(t, d, 1, hypercall.ReadWrite), shareOf(t, d, 1, hypercall.ReadWrite)
	private, err := d.Memory(2)
	if err != nil {
		t.Fatal(err)
	}
	defer private.Release()
	mapped, err := d.Map(hypercall.DomSelf, dst.Refs, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer mapped.Release()
	other := shareOf(t, d, 1, hypercall.ReadOnly)
	for i := range s.Bytes() {
		s.Bytes()[i] = byte(i * 3)
	}
	for name, local := range map[string][]byte{
		"the heap":        make([]byte, 1000),
		"private pages":   private.Bytes()[shm.PageSize-500 : shm.PageSize+500], // across a page boundary
		"a share of ours": other.Page(0)[96:1096],
		"a mapped grant":  mapped.Page(0)[:1000],
	} {
		ops := []hypercall.CopyOp{{
			Src: hypercall.Area{Dom: hypercall.DomSelf, Ref: s.Refs[0], Offset: 17},
			Dst: hypercall.Area{Local: local},
			Len: 1000,
		}}
		if err := d.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
			t.Errorf("into %s: %v, %v", name, err, ops[0].Status)
			continue
		}
		if !bytes.Equal(local, s.Page(0)[17:1017]) {
			t.Errorf("into %s: other bytes", name)
		}
	}
}

func TestXenCopyOfManyOperations(t *testing.T) {
	d := onXen(t, Config{})
	const pages = 8
	s := shareOf(t, d, pages, hypercall.ReadWrite)
	for _, n := range []int{1, fewCopies, fewCopies + 1, copyBatch, copyBatch + 1, 3*copyBatch + 7} {
		ops := make([]hypercall.CopyOp, n)
		from := make([]byte, 8*n)
		for i := range ops {
			binary.LittleEndian.PutUint64(from[8*i:], uint64(i+1)*0x0101)
			ops[i] = hypercall.CopyOp{
				Src: hypercall.Area{Local: from[8*i : 8*i+8]},
				Dst: hypercall.Area{Dom: d.ID(), Ref: s.Refs[i%pages], Offset: uint16(8 * (i / pages))},
				Len: 8,
			}
		}
		bad := n / 2
		ops[bad].Dst.Offset = shm.PageSize - 4
		if err := d.Copy(ops); err != nil {
			t.Fatal(n, err)
		}
		for i, op := range ops {
			want := hypercall.OK
			if i == bad {
				want = hypercall.BadCopyArg
			}
			if op.Status != want {
				t.Fatalf("%d of %d: %v", i, n, op.Status)
			}
			if got := binary.LittleEndian.Uint64(s.Page(i % pages)[8*(i/pages):]); i != bad && got != uint64(i+1)*0x0101 {
				t.Fatalf("%d of %d: %#x", i, n, got)
			}
		}
	}
}

func TestXenCopyFromManyGoroutines(t *testing.T) {
	d := onXen(t, Config{})
	const workers = 4
	var wg sync.WaitGroup
	for w := range workers {
		s := shareOf(t, d, 1, hypercall.ReadWrite)
		wg.Go(func() {
			local := make([]byte, 64)
			ops := []hypercall.CopyOp{{
				Src: hypercall.Area{Dom: d.ID(), Ref: s.Refs[0]},
				Dst: hypercall.Area{Local: local},
				Len: 64,
			}}
			for i := range 200 {
				s.Out(0).Store(uint32(w<<16 | i))
				if err := d.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
					t.Error(err, ops[0].Status)
					return
				}
				if got := binary.LittleEndian.Uint32(local); got != uint32(w<<16|i) {
					t.Errorf("worker %d sees %#x", w, got)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestXenLimitOfSharedPages(t *testing.T) {
	limit, err := GrantLimit(Config{})
	if err != nil && (Config{}).onXen() {
		t.Fatal(err)
	}
	d := onXen(t, Config{})
	_, err = d.Share(hypercall.DomSelf, limit+1, hypercall.ReadOnly)
	if !errors.Is(err, hypercall.ErrNoGrants) || !strings.Contains(err.Error(), limitFile) ||
		!strings.Contains(err.Error(), fmt.Sprint(limit)) {
		t.Fatalf("over the limit: %v", err)
	}

	raised := onXen(t, Config{GrantLimit: limit + 64})
	s, err := raised.Share(hypercall.DomSelf, limit+1, hypercall.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.End(); err != nil {
		t.Error(err)
	}
	if n, err := GrantLimit(Config{}); err != nil || n != limit+64 {
		t.Errorf("the limit is %d, %v", n, err)
	}
	if err := writeFile("/"+limitFile, fmt.Sprint(limit)); err != nil {
		t.Error(err)
	}
	// The limit is never lowered, and ended grants no longer count.
	lower := onXen(t, Config{GrantLimit: 1})
	for range 3 {
		s, err := lower.Share(hypercall.DomSelf, limit, hypercall.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.End(); err != nil {
			t.Error(err)
		}
	}
}

// TestXenEndWhileMapped shows what the kernel does where an emulator returns ErrInUse:
// the page stays mapped for the peer, and nobody else gets it.
func TestXenEndWhileMapped(t *testing.T) {
	d := onPV(t, Config{})
	s, err := d.Share(hypercall.DomSelf, 2, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	m, err := d.Map(hypercall.DomSelf, s.Refs, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Release()
	s.Out(shm.PageSize).Store(0x5a5a5a5a)
	if err := s.End(); err != nil {
		t.Fatal(err)
	}
	if err := s.End(); err != nil {
		t.Fatal("second End:", err)
	}
	for range 4 {
		fresh := shareOf(t, d, 64, hypercall.ReadWrite)
		for i := range fresh.Bytes() {
			fresh.Bytes()[i] = 0xff
		}
	}
	if v := m.In(shm.PageSize).Load(); v != 0x5a5a5a5a {
		t.Errorf("the page the peer still maps says %#x", v)
	}
}

func TestXenCloseBeforeEnd(t *testing.T) {
	d := onPV(t, Config{})
	s, err := d.Share(hypercall.DomSelf, 1, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	m, err := d.Map(hypercall.DomSelf, s.Refs, hypercall.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	s.Out(0).Store(3) // we still have the page
	if err := errors.Join(m.Release(), s.End()); err != nil {
		t.Error(err)
	}
	if _, err := d.Share(hypercall.DomSelf, 1, hypercall.ReadWrite); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Share after Close: %v", err)
	}
	if err := d.Copy(make([]hypercall.CopyOp, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Copy after Close: %v", err)
	}
}

func TestXenEventsBothWays(t *testing.T) {
	for _, bell := range []Doorbell{DoorbellIoctl, DoorbellHypercall} {
		t.Run(bell.String(), func(t *testing.T) {
			d := onXen(t, Config{Doorbell: bell})
			if bell == DoorbellHypercall {
				needHypercalls(t)
			}
			wa, wb, a, b := channelOf(t, d)
			for range 100 {
				if err := a.Notify(); err != nil {
					t.Fatal(err)
				}
				if err := wb.Wait(time.Now().Add(soon), true); err != nil {
					t.Fatal(err)
				}
				if err := b.Notify(); err != nil {
					t.Fatal(err)
				}
				if err := wa.Wait(time.Now().Add(soon), true); err != nil {
					t.Fatal(err)
				}
			}
			if n := testing.AllocsPerRun(100, func() {
				if a.Notify() != nil || wb.Wait(time.Time{}, true) != nil {
					t.Fatal("no event")
				}
			}); n != 0 {
				t.Errorf("%v allocations", n)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			if err := b.Notify(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Notify of a closed port: %v", err)
			}
			if err := a.Notify(); err != nil {
				t.Errorf("Notify of a peer that has gone: %v", err)
			}
		})
	}
}

func needHypercalls(t testing.TB) *privcmd.Conn {
	t.Helper()
	c, err := privcmd.Open("/dev/xen")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, _, err := c.Version(); errors.Is(err, privcmd.ErrRestricted) {
		d, derr := Open(Config{Doorbell: DoorbellHypercall})
		if derr != nil {
			t.Fatal(derr)
		}
		defer d.Close()
		w, derr := d.Waiter()
		if derr != nil {
			t.Fatal(derr)
		}
		defer w.Close()
		if _, derr := w.Unbound(0); !errors.Is(derr, privcmd.ErrRestricted) {
			t.Error("a port whose doorbell is not permitted:", derr)
		}
		t.Skip("the kernel allows this domain no hypercalls: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestXenManyPortsOfOneWaiter fires more ports than one read takes.
func TestXenManyPortsOfOneWaiter(t *testing.T) {
	d := onXen(t, Config{})
	wa, wb, a, _ := channelOf(t, d)
	far := []hypercall.Port{a}
	const ports = 150
	for range ports - 1 {
		a, err := wa.Unbound(hypercall.DomSelf)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wb.Bind(hypercall.DomSelf, a.ID()); err != nil {
			t.Fatal(err)
		}
		far = append(far, a)
	}
	w := wb.(*waiter)
	for w.Wait(time.Now().Add(50*time.Millisecond), true) == nil { // events of the bindings
	}
	for range 3 {
		for _, a := range far {
			if err := a.Notify(); err != nil {
				t.Fatal(err)
			}
		}
		seen := map[hypercall.PortID]int{}
		for len(seen) < ports {
			if err := w.Wait(time.Now().Add(soon), true); err != nil {
				t.Fatalf("%d of %d ports fired, then %v", len(seen), ports, err)
			}
			for _, p := range w.masked.Fired() {
				seen[p.id]++
			}
		}
		if err := w.Wait(time.Now(), true); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("one event too many: %v", err)
		}
	}
}

func TestXenBindSaysWhy(t *testing.T) {
	d := onXen(t, Config{})
	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Bind(hypercall.DomSelf, 1<<30); !errors.Is(err, hypercall.ErrNoPort) {
		t.Errorf("a port that is not there: %v", err)
	}
	if _, err := w.Bind(0x7000, 1); !errors.Is(err, hypercall.ErrNoDomain) {
		t.Errorf("a domain that is not there: %v", err)
	}
}

func TestXenPortsRunOut(t *testing.T) {
	d := onXen(t, Config{})
	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	// A domain has at most 131072 ports, and one that the toolstack makes has 1023 by
	// default: too many to use up here.
	for range 1100 {
		if _, err := w.Unbound(hypercall.DomSelf); errors.Is(err, hypercall.ErrNoPorts) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
	t.Log("more than 1100 ports to be had")
}

// sharePage opens this domain and shares a page with it, for a child process.
func sharePage() (*Domain, *hypercall.Share, error) {
	d, err := Open(Config{})
	if err != nil {
		return nil, nil, err
	}
	s, err := d.Share(hypercall.DomSelf, 1, hypercall.ReadWrite)
	return d, s, err
}

// child shares a page and opens a port for the parent, and prints their numbers.
func child() error {
	d, s, err := sharePage()
	if err != nil {
		return err
	}
	w, err := d.Waiter()
	if err != nil {
		return err
	}
	p, err := w.Unbound(hypercall.DomSelf)
	if err != nil {
		return err
	}
	s.Out(0).Store(77)
	fmt.Println("ready", s.Refs[0], p.ID())
	return w.Wait(time.Now().Add(time.Minute), true)
}

func TestXenPageOfAKilledProcessStays(t *testing.T) {
	d := onPV(t, Config{})
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=child")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var ref hypercall.GrantRef
	var port hypercall.PortID
	if _, err := fmt.Sscan(strings.TrimPrefix(line, "ready"), &ref, &port); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	m, err := d.Map(hypercall.DomSelf, []hypercall.GrantRef{ref}, hypercall.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Release()
	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	p, err := w.Bind(hypercall.DomSelf, port)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() // its error is the signal
	if err := p.Notify(); err != nil {
		t.Errorf("notify of the dead: %v", err)
	}
	if v := m.In(0).Load(); v != 77 {
		t.Errorf("the page of the dead says %d", v)
	}
}

// A talker is a xenstore client with one request in flight.
type talker struct {
	io.ReadWriteCloser
	id  uint32
	buf [wire.HeaderSize + wire.MaxPayload]byte
}

func talk(d *Domain) (*talker, error) {
	c, err := d.Store(context.Background())
	return &talker{ReadWriteCloser: c}, err
}

func (c *talker) ask(op wire.Op, parts ...string) (wire.Header, string, error) {
	c.id++
	b, err := wire.Append(nil, wire.Header{Op: op, ReqID: c.id}, parts...)
	if err != nil {
		return wire.Header{}, "", err
	}
	if _, err := c.Write(b); err != nil {
		return wire.Header{}, "", err
	}
	for {
		h, p, err := wire.ReadMessage(c, c.buf[:])
		switch {
		case err != nil:
			return h, "", err
		case h.Op == wire.WatchEvent: // a hint; each change sends another one
		case h.ReqID != c.id:
			return h, "", fmt.Errorf("answer to request %d", h.ReqID)
		default:
			return h, string(p), nil
		}
	}
}

// event waits for the next watch event.
func (c *talker) event() error {
	h, _, err := wire.ReadMessage(c, c.buf[:])
	if err == nil && h.Op != wire.WatchEvent {
		err = fmt.Errorf("answer to nothing: %+v", h)
	}
	return err
}

func TestXenStoreAnswersAndRefuses(t *testing.T) {
	d := onXen(t, Config{})
	c, err := talk(d)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(op wire.Op, parts ...string) (wire.Header, string) {
		t.Helper()
		h, v, err := c.ask(op, parts...)
		if err != nil {
			t.Fatal(err)
		}
		return h, v
	}
	if h, v := ask(wire.Read, "domid\x00"); h.Op != wire.Read || v != fmt.Sprint(d.ID()) {
		t.Errorf("domid: %+v %q", h, v)
	}
	if h, v := ask(wire.Watch, "/a bad path\x00", "token\x00"); h.Op != wire.Error || v != "EINVAL\x00" {
		t.Errorf("watch of a bad path: %+v %q", h, v)
	}
	if h, v := ask(wire.Write, "data/xendev\x00", strings.Repeat("x", maxRequest)); h.Op != wire.Error || v != "E2BIG\x00" {
		t.Errorf("a value too long: %+v %q", h, v)
	}
	if h, _ := ask(wire.Read, "domid\x00"); h.Op != wire.Read {
		t.Errorf("out of step after refusals: %+v", h)
	}

	done := make(chan error, 1)
	go func() {
		done <- c.event()
	}()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read ended with %v", err)
		}
	case <-time.After(soon):
		t.Error("Close did not end Read")
	}
}

func TestXenRawHypercalls(t *testing.T) {
	d := onXen(t, Config{})
	c := needHypercalls(t)
	major, minor, err := c.Version()
	if err != nil {
		t.Fatal(err)
	}
	want := sysfs(t, "version/major") + "." + sysfs(t, "version/minor")
	if got := fmt.Sprintf("%d.%d", major, minor); got != want {
		t.Errorf("hypercalls say %s, sysfs %s", got, want)
	}
	if g, err := c.GrantTable(hypercall.DomSelf); err != nil || g.Frames < 1 || g.MaxFrames < g.Frames {
		t.Errorf("%+v, %v", g, err)
	}

	_, wb, a, b := channelOf(t, d)
	p, err := c.Port(hypercall.DomSelf, a.ID())
	if err != nil || p.Kind != privcmd.PortInterdomain || p.Peer != d.ID() || p.Remote != b.ID() {
		t.Errorf("%+v, %v", p, err)
	}
	bell, err := c.Doorbell(a.ID())
	if err != nil {
		t.Fatal(err)
	}
	defer bell.Close()
	if err := bell.Ring(); err != nil {
		t.Error(err)
	}
	if err := wb.Wait(time.Now().Add(soon), true); err != nil {
		t.Error("no event from EVTCHNOP_send:", err)
	}
}

func TestXenNodesAreNotInherited(t *testing.T) {
	d := onXen(t, Config{})
	c, err := privcmd.Open("/dev/xen")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	shareOf(t, d, 1, hypercall.ReadWrite)
	if err := d.Copy([]hypercall.CopyOp{}); err != nil {
		t.Fatal(err)
	}
	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s, err := d.Store(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	var nodes []string
	for _, fd := range fds {
		to, _ := os.Readlink(fd)
		if !strings.HasPrefix(to, "/dev/xen/") {
			continue
		}
		nodes = append(nodes, filepath.Base(to))
		info, err := os.ReadFile("/proc/self/fdinfo/" + filepath.Base(fd))
		if err != nil {
			t.Fatal(err)
		}
		f := strings.Fields(string(info)) // pos: 0 flags: 02100002 ...
		if len(f) < 4 || f[2] != "flags:" {
			t.Fatalf("fdinfo %q", info)
		}
		if flags, err := strconv.ParseInt(f[3], 8, 64); err != nil || flags&unix.O_CLOEXEC == 0 {
			t.Errorf("%s is inherited", to)
		}
	}
	slices.Sort(nodes)
	if want := []string{"evtchn", "gntalloc", "gntdev", "hypercall", "privcmd", "xenbus"}; !slices.Equal(nodes, want) {
		t.Errorf("open nodes %q, not %q", nodes, want)
	}
}

func BenchmarkXenNotify(b *testing.B) {
	for _, bell := range []Doorbell{DoorbellIoctl, DoorbellHypercall} {
		b.Run("bell="+bell.String(), func(b *testing.B) {
			d := onXen(b, Config{Doorbell: bell})
			if bell == DoorbellHypercall {
				needHypercalls(b)
			}
			_, _, a, _ := channelOf(b, d)
			b.ReportAllocs()
			for b.Loop() {
				if err := a.Notify(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkXenRoundTrip(b *testing.B) {
	for _, bell := range []Doorbell{DoorbellIoctl, DoorbellHypercall} {
		b.Run("bell="+bell.String(), func(b *testing.B) {
			d := onXen(b, Config{Doorbell: bell})
			if bell == DoorbellHypercall {
				needHypercalls(b)
			}
			_, wb, a, _ := channelOf(b, d)
			b.ReportAllocs()
			for b.Loop() {
				if err := a.Notify(); err != nil {
					b.Fatal(err)
				}
				if err := wb.Wait(time.Time{}, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkXenCopy(b *testing.B) {
	for _, n := range []int{1, 16, 64, 256} {
		b.Run(fmt.Sprintf("size=1500/batch=%d", n), func(b *testing.B) {
			d := onXen(b, Config{})
			s := shareOf(b, d, 64, hypercall.ReadWrite)
			mem, err := d.Memory(64)
			if err != nil {
				b.Fatal(err)
			}
			defer mem.Release()
			ops := make([]hypercall.CopyOp, n)
			for i := range ops {
				ops[i] = hypercall.CopyOp{
					Src: hypercall.Area{Dom: d.ID(), Ref: s.Refs[i%64]},
					Dst: hypercall.Area{Local: mem.Page(i % 64)},
					Len: 1500,
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				if err := d.Copy(ops); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/frame")
		})
	}
}

// interrupted is the childEnv of mapInterrupted.
const interrupted = "interrupted"

// The kernel gives a timer's signals to the main thread, so that is where mapInterrupted runs.
func init() {
	if os.Getenv(childEnv) == interrupted {
		runtime.LockOSThread()
	}
}

// mapInterrupted maps a page for the first time in this process, which has so many areas of
// memory that the kernel needs longer to lock them than until the next signal. The signals
// cease after a while.
func mapInterrupted() error {
	d, s, err := sharePage()
	if err != nil {
		return err
	}
	s.Out(0).Store(77)
	const areas = 20000
	b, err := unix.Mmap(-1, 0, 2*areas*shm.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	for i := range areas {
		if err := unix.Mprotect(b[2*i*shm.PageSize:][:shm.PageSize], unix.PROT_READ); err != nil {
			return err
		}
	}
	signal.Notify(make(chan os.Signal, 1), unix.SIGALRM)
	often := unix.NsecToTimeval(200_000)
	if _, err := unix.Setitimer(unix.ITIMER_REAL, unix.Itimerval{Interval: often, Value: often}); err != nil {
		return err
	}
	disarmed := make(chan error, 1)
	time.AfterFunc(time.Second, func() {
		_, err := unix.Setitimer(unix.ITIMER_REAL, unix.Itimerval{})
		disarmed <- err
	})
	m, err := d.Map(hypercall.DomSelf, s.Refs, hypercall.ReadOnly)
	if err != nil {
		return err
	}
	if v := m.In(0).Load(); v != 77 {
		return fmt.Errorf("the page says %d", v)
	}
	return errors.Join(<-disarmed, m.Release(), s.End(), d.Close())
}

// A signal that arrives during a process's first map does not make it fail.
func TestXenMapWhileSignalsArrive(t *testing.T) {
	onPV(t, Config{})
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+interrupted)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
