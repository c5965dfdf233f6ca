package emu

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"barevif/hypercall"
)

func TestResumeEndsEverythingOfBefore(t *testing.T) {
	m, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	peer, err := m.NewDomain(1)
	if err != nil {
		t.Fatal(err)
	}
	d, err := m.NewDomain(2)
	if err != nil {
		t.Fatal(err)
	}
	var died []hypercall.DomID
	m.OnDeath(func(id hypercall.DomID) { died = append(died, id) })

	private, err := d.Memory(1)
	if err != nil {
		t.Fatal(err)
	}
	private.Page(0)[0] = 7
	s, err := d.Share(1, 1, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	waiter := func(d *Domain) hypercall.Waiter {
		w, err := d.Waiter()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Close() })
		return w
	}
	w, pw := waiter(d), waiter(peer)
	old, err := w.Unbound(1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pw.Bind(2, old.ID()); err != nil {
		t.Fatal(err)
	}

	if err := m.Resume(2, 3); err != nil {
		t.Fatal(err)
	}
	if d.ID() != 3 || len(died) != 1 || died[0] != 2 {
		t.Errorf("the domain is %d; died: %v", d.ID(), died)
	}
	if private.Page(0)[0] != 7 {
		t.Error("the private memory is another")
	}
	copies := func(dom hypercall.DomID, ref hypercall.GrantRef) hypercall.Status {
		op := [1]hypercall.CopyOp{{Src: hypercall.Area{Dom: dom, Ref: ref}, Dst: hypercall.Area{Local: make([]byte, 1)}, Len: 1}}
		if err := peer.Copy(op[:]); err != nil {
			t.Fatal(err)
		}
		return op[0].Status
	}
	for _, dom := range []hypercall.DomID{2, 3} {
		if copies(dom, s.Refs[0]) == hypercall.OK {
			t.Errorf("the grant of before is one of domain %d", dom)
		}
	}
	if err := pw.Wait(time.Now().Add(time.Millisecond), true); err != nil { // the event of its binding
		t.Fatal(err)
	}

	// The number of the old port is given again. No call for the old port reaches it.
	nw := waiter(d)
	fresh, err := nw.Unbound(1)
	if err != nil {
		t.Fatal(err)
	}
	if fresh.ID() != old.ID() {
		t.Fatalf("the new port has number %d, the old one had %d", fresh.ID(), old.ID())
	}
	far, err := pw.Bind(3, fresh.ID())
	if err != nil {
		t.Fatal(err)
	}
	if err := pw.Wait(time.Now().Add(time.Second), true); err != nil {
		t.Fatal(err)
	}
	if err := old.Notify(); err != nil {
		t.Error("notify:", err)
	}
	if err := pw.Wait(time.Now().Add(10*time.Millisecond), true); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a notify on a port of before the resume reached another's:", err)
	}
	if old.(hypercall.JoinedPort).Joined() {
		t.Error("a port of before the resume is joined")
	}
	if err := w.Wait(time.Now().Add(time.Millisecond), true); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("wait on a waiter of before:", err)
	}
	if _, err := w.Unbound(1); !errors.Is(err, net.ErrClosed) {
		t.Error("a new port on a waiter of before:", err)
	}
	if err := errors.Join(old.Close(), w.Close(), s.End(), private.Release()); err != nil {
		t.Error(err)
	}
	if err := far.Notify(); err != nil {
		t.Error(err)
	}
	if err := nw.Wait(time.Now().Add(time.Second), true); err != nil {
		t.Error("the close of the old port closed the new one:", err)
	}
	if err := errors.Join(nw.Close(), pw.Close(), m.CheckClean()); err != nil {
		t.Error(err)
	}
}

func TestResumeOfNoDomain(t *testing.T) {
	m, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.NewDomain(1); err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(5, 6); !errors.Is(err, hypercall.ErrNoDomain) {
		t.Error(err)
	}
	if err := m.Resume(1, 1); !errors.Is(err, ErrDomainExists) {
		t.Error(err)
	}
	if n := m.Ledger().Domains; n != 1 {
		t.Errorf("%d domains", n)
	}
}

// resuming makes domain 2 and starts its Resume as domain 3. Resume has made the record of domain 3 and
// waits for the gate of domain 2, which the test holds for reading. result delivers the error of Resume.
func resuming(t *testing.T) (m *Machine, d *Domain, result <-chan error) {
	m, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	if d, err = m.NewDomain(2); err != nil {
		t.Fatal(err)
	}
	d.gate.RLock()
	c := make(chan error, 1)
	go func() { c <- m.Resume(2, 3) }()
	for there := false; !there; time.Sleep(time.Millisecond) {
		m.mu.Lock()
		there = m.guests[3] != nil
		m.mu.Unlock()
	}
	for d.gate.TryRLock() { // no reader enters while Resume waits
		d.gate.RUnlock()
		time.Sleep(time.Millisecond)
	}
	return m, d, c
}

// isDone fails unless the domain has ended soon.
func isDone(t *testing.T, d *Domain) {
	t.Helper()
	select {
	case <-d.Done():
	case <-time.After(time.Minute):
		t.Fatal("the domain goes on, or nobody is told of its end")
	}
}

// The number that a domain continues as may be destroyed before the domain has it.
func TestResumeAsADomainThatEnds(t *testing.T) {
	m, d, result := resuming(t)
	if err := m.Destroy(3); err != nil {
		t.Fatal(err)
	}
	d.gate.RUnlock()
	if err := <-result; !errors.Is(err, hypercall.ErrNoDomain) {
		t.Errorf("Resume: %v", err)
	}
	if d.ID() != 2 {
		t.Errorf("it is domain %d", d.ID())
	}
	m.Close()
	isDone(t, d)
}

// Destroy ends a domain also if it is resumed at that moment.
func TestDestroyDuringResume(t *testing.T) {
	m, d, result := resuming(t)
	defer m.Close()
	m.mu.Lock() // Resume waits for it next, and Destroy behind it
	d.gate.RUnlock()
	time.Sleep(20 * time.Millisecond)
	go d.Destroy()
	time.Sleep(20 * time.Millisecond)
	m.mu.Unlock()
	<-result
	isDone(t, d)
}

// Programs that begin at once are in one domain, and none is refused.
func TestProgramsThatBeginAtOnce(t *testing.T) {
	m, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	errs := make(chan error, 3)
	m.mu.Lock() // all wait for it, and then take turns
	for range cap(errs) {
		go func() {
			_, err := m.newProgram(1, true, func() {})
			errs <- err
		}()
	}
	time.Sleep(20 * time.Millisecond)
	m.mu.Unlock()
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// A slowBell stays in ring until may is closed.
type slowBell struct {
	bell
	ringing chan struct{}
	may     chan struct{}
}

func (b slowBell) ring() {
	close(b.ringing)
	<-b.may
	b.bell.ring()
}

// A far end that is replaced, or let go by Close, keeps its bell until a Notify that has made the event
// pending has rung it.
func TestFarEndStaysUntilItsBellHasRung(t *testing.T) {
	for name, replace := range map[string]func(*port){
		"replaced": func(p *port) { _ = p.findFar() },
		"closed":   func(p *port) { _ = p.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			m, err := New(Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			a, err := m.NewDomain(1)
			if err != nil {
				t.Fatal(err)
			}
			w, err := a.Waiter()
			if err != nil {
				t.Fatal(err)
			}
			near, err := w.Unbound(1)
			if err != nil {
				t.Fatal(err)
			}
			far, err := w.Bind(1, near.ID())
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Wait(time.Now().Add(time.Minute), true); err != nil { // the channel's first event
				t.Fatal(err)
			}
			if err := w.Wait(time.Now().Add(time.Millisecond), true); !errors.Is(err, os.ErrDeadlineExceeded) { // unmasks the port
				t.Fatal(err)
			}
			p, end := near.(*port), far.(*port)
			b := slowBell{w.(*waiter).bell, make(chan struct{}), make(chan struct{})}
			freed := make(chan struct{})
			p.far.Store(&farEnd{end.word, end.gen, b, func() { close(freed) }})
			notified, replaced := make(chan error, 1), make(chan struct{})
			go func() { notified <- p.Notify() }()
			<-b.ringing
			go func() { replace(p); close(replaced) }()
			select {
			case <-freed:
				t.Error("the bell is closed while it is about to be rung")
			case <-time.After(20 * time.Millisecond):
			}
			close(b.may)
			if err := <-notified; err != nil {
				t.Error(err)
			}
			<-freed
			<-replaced
			if err := w.Wait(time.Now().Add(time.Minute), true); err != nil {
				t.Error("no event:", err)
			}
		})
	}
}
