package emu_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/domaintest"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
)

// childEnv makes the test binary play a part in another process's test.
const childEnv = "BAREVIF_EMU_CHILD"

func TestMain(m *testing.M) {
	if role := os.Getenv(childEnv); role != "" {
		if err := child(role, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A process is a child and its output.
type process struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func spawn(t testing.TB, role string, args ...string) *process {
	t.Helper()
	return spawnWith(t, nil, role, args...)
}

// spawnWith is spawn with another user or other namespaces.
func spawnWith(t testing.TB, attr *syscall.SysProcAttr, role string, args ...string) *process {
	t.Helper()
	// Another user may not enter the directory of the program, but /proc/self/exe works.
	p := &process{Cmd: exec.Command("/proc/self/exe", args...)}
	p.Env = append(os.Environ(), childEnv+"="+role)
	p.Stderr = os.Stderr
	p.SysProcAttr = attr
	var err error
	if p.in, err = p.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewScanner(out)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

// says waits for a line of the child.
func (p *process) says(t testing.TB) string {
	t.Helper()
	if !p.out.Scan() {
		t.Fatalf("the child said nothing: %v", p.out.Err())
	}
	return p.out.Text()
}

// kill kills the child and waits for its end.
func (p *process) kill() {
	_ = p.Process.Kill()
	_ = p.Wait()
}

func child(role string, args []string) error {
	switch role {
	case "host":
		return childHost(args[0])
	case "echo":
		return childEcho(args[0], args[1])
	case "fds":
		return childFDs()
	case "private":
		return childPrivate(args[0], args[1])
	case "visit":
		return childVisit(args[0])
	case "knock":
		return childKnock(args[0])
	}
	return fmt.Errorf("no role %q", role)
}

// childHost is a host until its standard input ends. It answers every line with the
// ledger.
func childHost(path string) error {
	h, err := emu.Listen(path, emu.Config{Store: func(_ hypercall.DomID, c io.ReadWriteCloser) { _, _ = io.Copy(c, c) }})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		l, err := json.Marshal(h.Ledger())
		if err != nil {
			return err
		}
		fmt.Println(string(l))
	}
	return h.Close()
}

func hostProcess(t testing.TB) (*process, string) {
	t.Helper()
	path := filepath.Join(emutest.SocketDir(t), "xen")
	p := spawn(t, "host", path)
	p.says(t)
	return p, path
}

func (p *process) ledger(t testing.TB) (l emu.Ledger) {
	t.Helper()
	if _, err := fmt.Fprintln(p.in); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(p.says(t)), &l); err != nil {
		t.Fatal(err)
	}
	return l
}

// The pages of a front end's share: a word to count in, a page to read, a page to answer
// in.
const echoPages = 3

// echoOffer is the offer of a front end to the child, one line of JSON.
type echoOffer struct {
	Front hypercall.DomID
	Refs  []hypercall.GrantRef
	Port  hypercall.PortID
}

// childEcho is a domain that copies a page back for every event. It also grants a page,
// and prints its ref.
func childEcho(path, id string) error {
	n, err := strconv.Atoi(id)
	if err != nil {
		return err
	}
	d, err := emu.Join(context.Background(), path, hypercall.DomID(n))
	if err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	if !in.Scan() {
		return in.Err()
	}
	var o echoOffer
	if err := json.Unmarshal(in.Bytes(), &o); err != nil {
		return err
	}
	own, err := d.Share(o.Front, 1, hypercall.ReadWrite)
	if err != nil {
		return err
	}
	copy(own.Bytes(), "of the child")
	count, err := d.Map(o.Front, o.Refs[:1], hypercall.ReadWrite)
	if err != nil {
		return err
	}
	w, err := d.Waiter()
	if err != nil {
		return err
	}
	port, err := w.Bind(o.Front, o.Port)
	if err != nil {
		return err
	}
	fmt.Println(own.Refs[0])
	buf := make([]byte, shm.PageSize)
	asked, answered := count.In(0), count.Out(4)
	for last := uint32(0); ; {
		if err := w.Wait(time.Time{}, true); err != nil {
			return err
		}
		now := asked.Load()
		if now == last {
			continue
		}
		last = now
		ops := []hypercall.CopyOp{
			{Src: hypercall.Area{Dom: o.Front, Ref: o.Refs[1]}, Dst: hypercall.Area{Local: buf}, Len: shm.PageSize},
			{Src: hypercall.Area{Local: buf}, Dst: hypercall.Area{Dom: o.Front, Ref: o.Refs[2]}, Len: shm.PageSize},
		}
		if err := d.Copy(ops); err != nil {
			return err
		}
		if ops[0].Status != hypercall.OK || ops[1].Status != hypercall.OK {
			return fmt.Errorf("copy: %v, %v", ops[0].Status, ops[1].Status)
		}
		answered.Store(now)
		if err := port.Notify(); err != nil {
			return err
		}
	}
}

// echoFront is our front end for a child.
type echoFront struct {
	d      hypercall.Domain
	s      *hypercall.Share
	w      hypercall.Waiter
	port   hypercall.Port
	asked  uint32
	theirs hypercall.GrantRef
}

func startEcho(t testing.TB, path string, d hypercall.Domain, id hypercall.DomID) (*echoFront, *process) {
	t.Helper()
	p := spawn(t, "echo", path, fmt.Sprint(id))
	f := &echoFront{d: d, s: share(t, d, id, echoPages, hypercall.ReadWrite), w: waiter(t, d)}
	var err error
	if f.port, err = f.w.Unbound(id); err != nil {
		t.Fatal(err)
	}
	offer, err := json.Marshal(echoOffer{d.ID(), f.s.Refs, f.port.ID()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.in.Write(append(offer, '\n')); err != nil {
		t.Fatal(err)
	}
	ref, err := strconv.Atoi(p.says(t))
	if err != nil {
		t.Fatal(err)
	}
	f.theirs = hypercall.GrantRef(ref)
	return f, p
}

// echo sends a page and reports whether it came back in time.
func (f *echoFront) echo(wait time.Duration) bool {
	f.asked++
	for i, b := 0, f.s.Page(1); i < len(b); i += 64 {
		b[i] = byte(f.asked) + byte(i>>6)
	}
	f.s.Out(0).Store(f.asked)
	if f.port.Notify() != nil {
		return false
	}
	deadline := time.Now().Add(wait)
	for f.s.In(4).Load() != f.asked {
		if f.w.Wait(deadline, true) != nil {
			return false
		}
	}
	return slices.Equal(f.s.Page(1), f.s.Page(2))
}

func TestNoWakeupIsLostOverEventfds(t *testing.T) {
	_, path := hostProcess(t)
	testNoWakeupIsLost(t, join(t, path, 1), join(t, path, 2), 20000)
}

func TestANudgedWaitNeedsNoPoller(t *testing.T) {
	_, path := hostProcess(t)
	_, wb, pa, _ := channel(t, join(t, path, 1), join(t, path, 2))
	domaintest.CheckNudge(t, wb.(hypercall.Nudger), func() {
		if err := pa.Notify(); err != nil {
			t.Fatal(err)
		}
	})
}

// A Wait that is nudged without an event waits on, and does not look again and again.
func TestANudgedWaitSleeps(t *testing.T) {
	_, path := hostProcess(t)
	_, wb, pa, _ := channel(t, join(t, path, 1), join(t, path, 2))
	for _, deadline := range []time.Time{{}, time.Now().Add(time.Minute)} {
		done := make(chan error, 1)
		go func() { done <- wb.Wait(deadline, true) }()
		time.Sleep(2 * time.Millisecond) // Wait has begun
		const pause = 200 * time.Millisecond
		used := pause
		for i := 0; i < 5 && used > pause/4; i++ { // what else the process does takes time too, but not in each of them
			wb.(hypercall.Nudger).Nudge()
			began := processorTime(t)
			time.Sleep(pause)
			used = processorTime(t) - began
		}
		if used > pause/4 {
			t.Errorf("%v of processor time in %v", used, pause)
		}
		if err := pa.Notify(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(soon):
			t.Fatal("no event")
		}
	}
}

func processorTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func TestDomainsInThreeProcesses(t *testing.T) {
	hp, path := hostProcess(t)
	d := join(t, path, 1)
	f, p := startEcho(t, path, d, 2)
	for i := range 2000 {
		if !f.echo(soon) {
			t.Fatalf("echo %d did not come", i)
		}
	}
	buf := make([]byte, 12)
	if st := copyFrom(t, d, 2, f.theirs, 0, buf); st != hypercall.OK || string(buf) != "of the child" {
		t.Errorf("%v, %q", st, buf)
	}
	if l := hp.ledger(t); l != (emu.Ledger{
		Domains: 2, Grants: 4, Pages: 4, Mappings: 1, Ports: 2, Waiters: 2,
	}) {
		t.Errorf("%+v", l)
	}
	p.kill()
	for until := time.Now().Add(soon); hp.ledger(t).Domains != 1; { // the host notices the end soon
		if time.Now().After(until) {
			t.Fatal("the host did not notice")
		}
	}
	end(t, f.s)
	_ = f.w.Close()
}

// The host is stopped while echoes go on, because they do not involve it.
func TestFramesNeedNoHost(t *testing.T) {
	hp, path := hostProcess(t)
	d := join(t, path, 1)
	f, _ := startEcho(t, path, d, 2)
	if !f.echo(soon) { // the first use of a grant and of a port involves the host
		t.Fatal("no echo")
	}
	_, w, alone, gone := channel(t, d, d)
	if err := alone.Notify(); err != nil {
		t.Fatal(err)
	}
	fires(t, w)
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	if err := hp.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for i := range 500 {
		if !f.echo(soon) {
			t.Errorf("echo %d did not come", i)
			break
		}
	}
	notified := make(chan error, 1)
	go func() { notified <- alone.Notify() }() // no port is bound to this one
	select {
	case err := <-notified:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(soon):
		t.Error("Notify of a peer that has gone asks the host")
	}
	if err := hp.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	_ = f.w.Close()
}

// A process that joins at once after the one that was its domain was killed waits until the host has noticed that.
func TestTheNextProcessOfAKilledDomainJoins(t *testing.T) {
	_, path := host(t, emu.Config{})
	d := join(t, path, 1)
	for range 10 {
		_, p := startEcho(t, path, d, 2)
		p.kill()
		next, err := emu.Join(t.Context(), path, 2)
		if err != nil {
			t.Fatal(err)
		}
		next.Destroy()
	}
}

// A domain is killed again and again, in the middle of its work. The others keep what
// they map, get an event, and work with its successor.
func TestKilledDomainIsGone(t *testing.T) {
	h, path := host(t, emu.Config{})
	died := make(chan hypercall.DomID, 1)
	h.OnDeath(func(id hypercall.DomID) { died <- id })
	d, err := emu.Join(t.Context(), path, 1)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 8 {
		f, p := startEcho(t, path, d, 2)
		kept := mapped(t, d, 2, []hypercall.GrantRef{f.theirs}, hypercall.ReadWrite)
		buf := make([]byte, 12)
		if st := copyFrom(t, d, 2, f.theirs, 0, buf); st != hypercall.OK {
			t.Fatal(st)
		}
		killed := make(chan struct{})
		go func() {
			defer close(killed)
			time.Sleep(time.Duration(round) * 3 * time.Millisecond) // at any point of the traffic
			p.kill()
		}()
		for n := 0; f.echo(200 * time.Millisecond); n++ {
		}
		<-killed
		select {
		case id := <-died:
			if id != 2 {
				t.Fatalf("domain %d died", id)
			}
		case <-time.After(soon):
			t.Fatal("the host did not notice")
		}
		if string(kept.Bytes()[:12]) != "of the child" {
			t.Error("mapped memory is gone")
		}
		if st := copyFrom(t, d, 2, f.theirs, 0, buf); st != hypercall.BadDomain {
			t.Errorf("copy from the dead: %v", st)
		}
		if err := f.port.Notify(); err != nil {
			t.Error(err)
		}
		end(t, f.s) // the dead domain no longer maps it
		_ = f.w.Close()
		release(t, kept)
		if err := h.CheckClean(); err != nil {
			t.Error(err)
		}
	}
	d.Destroy()
	if id := <-died; id != 1 {
		t.Errorf("domain %d died", id)
	}
}

func TestHostDeathEndsItsDomains(t *testing.T) {
	hp, path := hostProcess(t)
	d := join(t, path, 1)
	s := share(t, d, 2, 1, hypercall.ReadWrite)
	w := waiter(t, d)
	if _, err := w.Unbound(2); err != nil {
		t.Fatal(err)
	}
	c, err := d.Store(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() { waited <- w.Wait(time.Time{}, true) }()
	hp.kill()
	select {
	case <-d.Done():
	case <-time.After(soon):
		t.Fatal("not noticed")
	}
	if err := <-waited; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("read from a dead store")
	}
	_ = c.Close()
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	end(t, s)
	d.Destroy()
	if _, err := emu.Join(t.Context(), path, 2); err == nil {
		t.Error("joined a dead host")
	}
}

func TestStoreOfAnotherProcess(t *testing.T) {
	ends := make(chan error, 2)
	h, path := host(t, emu.Config{Store: echoStore(ends)})
	testStore(t, h.Machine, join(t, path, 3), ends)
}

func TestJoinIsRefused(t *testing.T) {
	h, path := host(t, emu.Config{})
	join(t, path, 1)
	if _, err := emu.Join(t.Context(), path, 1); !errors.Is(err, emu.ErrDomainExists) {
		t.Errorf("a second domain 1: %v", err)
	}
	if _, err := emu.Join(t.Context(), path, hypercall.DomSelf); !errors.Is(err, hypercall.ErrNoDomain) {
		t.Errorf("DOMID_SELF: %v", err)
	}
	if _, err := emu.Listen(path, emu.Config{}); err == nil {
		t.Error("two hosts at one path")
	}
	if _, err := emu.Listen(path+"2", emu.Config{Grants: 5000}); err == nil {
		t.Error("more grants than a packet can tell")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := emu.Join(ctx, path, 2); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled Join: %v", err)
	}
	// A host that does not answer.
	mute := filepath.Join(emutest.SocketDir(t), "mute")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: mute, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := emu.Join(ctx, mute, 2); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a mute host: %v", err)
	}
	var rest []*emu.Domain
	for id := hypercall.DomID(2); ; id++ {
		d, err := h.NewDomain(id)
		if errors.Is(err, emu.ErrTooManyDomains) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		rest = append(rest, d)
	}
	if len(rest) != 255 {
		t.Errorf("%d domains beside ours", len(rest))
	}
	for _, d := range rest {
		d.Destroy()
	}
}

// The host closes a connection that sends nonsense, and no domain is affected.
func TestHostSurvivesNonsense(t *testing.T) {
	h, path := host(t, emu.Config{})
	d := join(t, path, 1)
	for _, msgs := range [][][]byte{
		{{}}, {{0}}, {make([]byte, 1000)}, {[]byte(strings.Repeat("\xff", 24))},
	} {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range msgs {
			if _, err := c.Write(m); err != nil {
				t.Fatal(err)
			}
		}
		_ = c.CloseWrite()
		if _, err := c.Read(make([]byte, 100)); err == nil {
			t.Errorf("%q was answered", msgs)
		}
		_ = c.Close()
	}
	silent, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close() // closed late: the host's Close must not wait for it
	end(t, share(t, d, 2, 1, hypercall.ReadOnly))
	if l := h.Ledger(); l.Domains != 1 {
		t.Errorf("%+v", l)
	}
}

func TestManyPagesInAnyOrderThroughAHost(t *testing.T) {
	const pages = 4096 // the largest share, backwards and twice: the largest request and reply
	_, path := host(t, emu.Config{Grants: pages})
	a, b := join(t, path, 1), join(t, path, 2)
	s := share(t, a, 2, pages, hypercall.ReadWrite)
	refs := slices.Clone(s.Refs)
	slices.Reverse(refs)
	refs = append(refs, refs...)
	for i := range pages {
		s.Out(i * shm.PageSize).Store(uint32(i))
	}
	p := mapped(t, b, 1, refs, hypercall.ReadOnly)
	for i := range refs {
		if got, want := p.In(i*shm.PageSize).Load(), uint32(pages-1-i%pages); got != want {
			t.Fatalf("page %d says %d, not %d", i, got, want)
		}
	}
	release(t, p)
	if _, err := b.Map(1, append(refs, refs[0]), hypercall.ReadOnly); err == nil {
		t.Error("more refs than a packet holds")
	}
	end(t, s)
}

// descriptors lists the open descriptors of this process.
func descriptors(t testing.TB) []string {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, n := range names {
		if to, err := os.Readlink("/proc/self/fd/" + n.Name()); err == nil { // skips the descriptor of ReadDir itself
			all = append(all, n.Name()+" "+to)
		}
	}
	return all
}

func TestNothingLeaks(t *testing.T) {
	use := func() {
		dir := emutest.SocketDir(t)
		ends := make(chan error, 1)
		h, err := emu.Listen(filepath.Join(dir, "xen"), emu.Config{Store: echoStore(ends)})
		if err != nil {
			t.Fatal(err)
		}
		a, err := emu.Join(t.Context(), filepath.Join(dir, "xen"), 1)
		if err != nil {
			t.Fatal(err)
		}
		b, err := h.NewDomain(2)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			s := share(t, a, 2, 4, hypercall.ReadWrite)
			p := mapped(t, b, 1, []hypercall.GrantRef{s.Refs[2], s.Refs[0]}, hypercall.ReadWrite)
			bs := share(t, b, 1, 4, hypercall.ReadOnly)
			bp := mapped(t, a, 2, []hypercall.GrantRef{bs.Refs[2], bs.Refs[0]}, hypercall.ReadOnly)
			buf := make([]byte, 8)
			copyFrom(t, b, 1, s.Refs[0], 0, buf)
			copyFrom(t, a, 2, bs.Refs[0], 0, buf)
			wa, wb, pa, pb := channel(t, a, b)
			if pa.Notify() != nil || pb.Notify() != nil {
				t.Fatal("Notify")
			}
			c, err := a.Store(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_ = c.Close()
			<-ends
			release(t, p)
			release(t, bp)
			end(t, s)
			end(t, bs)
			_ = wa.Close()
			_ = wb.Close()
		}
		if err := h.CheckClean(); err != nil {
			t.Error(err)
		}
		a.Destroy()
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
	}
	use() // the runtime's poller opens its own descriptors
	fds, routines := descriptors(t), started()
	for range 3 {
		use()
	}
	if after := descriptors(t); len(after) > len(fds) {
		t.Errorf("descriptors before:\n%s\nafter:\n%s", strings.Join(fds, "\n"), strings.Join(after, "\n"))
	}
	for end := time.Now().Add(soon); started() > routines; runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, %d before", started(), routines)
		}
	}
}

// started returns how many goroutines of this module's there are, but for those of tests. The runtime
// starts others when it likes.
func started() int {
	buf := make([]byte, 1<<20)
	return strings.Count(string(buf[:runtime.Stack(buf, true)]), "\ncreated by barevif/")
}

func TestMachineOfOneProcessHasNoGoroutines(t *testing.T) {
	before := started()
	m := machine(t, emu.Config{})
	a, b := domain(t, m, 1), domain(t, m, 2)
	wa, wb, pa, _ := channel(t, a, b)
	if err := pa.Notify(); err != nil {
		t.Fatal(err)
	}
	if after := started(); after > before {
		t.Errorf("%d goroutines, %d before", after, before)
	}
	_ = wa.Close()
	_ = wb.Close()
}

// childFDs prints the descriptors that it inherited besides the standard three.
func childFDs() error {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, n := range names {
		if to, err := os.Readlink("/proc/self/fd/" + n.Name()); err == nil &&
			(strings.Contains(to, "memfd:") || strings.Contains(to, "eventfd") || strings.HasPrefix(to, "socket:")) {
			fmt.Println(n.Name(), to)
		}
	}
	return nil
}

func TestNoDescriptorSurvivesExec(t *testing.T) {
	h, path := host(t, emu.Config{Store: func(_ hypercall.DomID, c io.ReadWriteCloser) { _, _ = io.Copy(c, c) }})
	a, b := join(t, path, 1), domain(t, h.Machine, 2)
	s := share(t, a, 2, 1, hypercall.ReadOnly)
	wa, wb, pa, pb := channel(t, a, b)
	if pa.Notify() != nil || pb.Notify() != nil {
		t.Fatal("Notify")
	}
	c, err := a.Store(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	open := 0
	for _, fd := range descriptors(t) {
		n, to, _ := strings.Cut(fd, " ")
		if !strings.Contains(to, "memfd:") && !strings.Contains(to, "eventfd") && !strings.HasPrefix(to, "socket:") {
			continue
		}
		open++
		num, err := strconv.Atoi(n)
		if err != nil {
			t.Fatal(err)
		}
		if flags, err := unix.FcntlInt(uintptr(num), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %s: flags %#x, %v", fd, flags, err)
		}
	}
	if open < 8 {
		t.Errorf("only %d descriptors to look at", open)
	}
	p := spawn(t, "fds")
	for p.out.Scan() {
		t.Errorf("a child has descriptor %s", p.out.Text())
	}
	_ = c.Close()
	_ = wa.Close()
	_ = wb.Close()
	end(t, s)
}

func BenchmarkCopyBetweenProcesses(b *testing.B) {
	_, path := hostProcess(b)
	front, back := join(b, path, 1), join(b, path, 2)
	for _, size := range []int{64, 1500} {
		b.Run(fmt.Sprintf("size=%d/batch=32", size), func(b *testing.B) { benchmarkCopy(b, front, back, size) })
	}
}

func BenchmarkRoundTripOverEventfds(b *testing.B) {
	_, path := hostProcess(b)
	benchmarkRoundTrip(b, join(b, path, 1), join(b, path, 2))
}

func BenchmarkRoundTripBetweenProcesses(b *testing.B) {
	_, path := hostProcess(b)
	d := join(b, path, 1)
	f, p := startEcho(b, path, d, 2)
	for b.Loop() {
		if !f.echo(soon) {
			b.Fatal("no echo")
		}
	}
	p.kill()
	_ = f.w.Close()
}
