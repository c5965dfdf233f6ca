// Package domaintest checks that an implementation of hypercall.Domain grants,
// maps, copies and notifies as Xen does.
//
// The suite uses only the interfaces of package hypercall. Where implementations may differ,
// it accepts each: for a bad reference /dev/xen/gntdev refuses the whole batch of copies,
// and another implementation may refuse one operation by its status.
package domaintest

import (
	"errors"
	"path"
	"testing"
	"time"

	"barevif/hypercall"
)

// Run runs the suite. If the domains are [hypercall.ThreadDomain]s, it runs the event tests
// once more on their ThreadWaiters, except the storm, which takes seconds and is delayed in a
// layer above the Waiters. mk returns two domains that live at least as long as the test for
// which it was called; it may return the same two again. Both may be the same domain, which is
// then its own peer; tests that need a foreign domain are skipped.
//
// Where there are no threads to block, ThreadWaiter and a Group for a locked goroutine may fail
// with errors.ErrUnsupported; then what needs them is skipped. [Cases] lists what there is, so
// that a port can check what ran.
func Run(t *testing.T, mk func(testing.TB) (front, back hypercall.Domain)) {
	runSections(t, mk, sections)
}

// Cases returns the names of the tests that [Run] runs, in its order, below the name of the
// test that calls it: "PingPong", "Group/CloseEndsWait".
func Cases() []string { return appendNames(nil, "", sections) }

// A section is cases that run on the same domains. With a name it is a test of its own.
type section struct {
	name  string
	cases []suiteCase
	below []section
	on    func(testing.TB, hypercall.Domain) hypercall.Domain // nil: the domains as they are
}

var sections = []section{
	{cases: memoryCases},
	{cases: eventCases},
	{name: "Group", cases: groupsOf(false)},
	{name: "GroupOnThread", cases: groupsOf(true)},
	{cases: []suiteCase{{"StormIsDelayedButNotWakeNorDeadline", stormIsDelayedButNotWakeNorDeadline}}},
	{name: "Threads", on: blocking, cases: eventCases, below: []section{
		{name: "GroupOnThread", cases: groupsOf(true)},
	}},
}

func runSections(t *testing.T, mk func(testing.TB) (front, back hypercall.Domain), all []section) {
	for _, s := range all {
		on := mk
		if s.on != nil {
			on = func(t testing.TB) (front, back hypercall.Domain) {
				front, back = mk(t)
				return s.on(t, front), s.on(t, back)
			}
		}
		f := func(t *testing.T) {
			run(t, on, s.cases)
			runSections(t, on, s.below)
		}
		if s.name == "" {
			f(t)
		} else {
			t.Run(s.name, f)
		}
	}
}

func appendNames(names []string, above string, all []section) []string {
	for _, s := range all {
		at := path.Join(above, s.name)
		for _, c := range s.cases {
			names = append(names, path.Join(at, c.name))
		}
		names = appendNames(names, at, s.below)
	}
	return names
}

// A blockingDomain is a domain whose Waiters all block threads.
type blockingDomain struct{ hypercall.ThreadDomain }

func (d blockingDomain) Waiter() (hypercall.Waiter, error) { return d.ThreadWaiter() }

func blocking(t testing.TB, d hypercall.Domain) hypercall.Domain {
	td, ok := d.(hypercall.ThreadDomain)
	if !ok {
		t.Skipf("a %T cannot block a thread", d)
	}
	w, err := td.ThreadWaiter()
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return blockingDomain{td}
}

func run(t *testing.T, mk func(testing.TB) (front, back hypercall.Domain), cases []suiteCase) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			front, back := mk(t)
			c.f(t, pair{front, back})
		})
	}
}

type suiteCase struct {
	name string
	f    func(*testing.T, pair)
}

var (
	memoryCases = []suiteCase{
		{"MemoryIsZeroedAndOurs", memoryIsZeroedAndOurs},
		{"ShareGivesOneUsableRefPerPage", shareGivesOneUsableRefPerPage},
		{"MapSeesWhatTheGranterWrites", mapSeesWhatTheGranterWrites},
		{"MapIsAllOrNone", mapIsAllOrNone},
		{"MapOfReadOnlyGrantCannotBeWritable", mapOfReadOnlyGrantCannotBeWritable},
		{"EndWhileMappedSaysInUse", endWhileMappedSaysInUse},
		{"EndedGrantCannotBeUsed", endedGrantCannotBeUsed},
		{"ReusedRefsAreNewPages", reusedRefsAreNewPages},
		{"CopyMovesBytesBothWays", copyMovesBytesBothWays},
		{"CopyBetweenTwoGrants", copyBetweenTwoGrants},
		{"CopyChecksEveryOperation", copyChecksEveryOperation},
		{"CopyStaysInItsPage", copyStaysInItsPage},
		{"CopyOfNothingIsFine", copyOfNothingIsFine},
		{"CopyFromLocalToLocalIsAnError", copyFromLocalToLocalIsAnError},
		{"CopyDoesNotAllocate", copyDoesNotAllocate},
	}
	eventCases = []suiteCase{
		{"BindFiresTheBinder", bindFiresTheBinder},
		{"BindFiresWhoWaitsAlready", bindFiresWhoWaitsAlready},
		{"OnlyOnePeerBindsOnce", onlyOnePeerBindsOnce},
		{"NotifyWakesTheOtherEnd", notifyWakesTheOtherEnd},
		{"EventsFromBeforeWaitCount", eventsFromBeforeWaitCount},
		{"WakeFromBeforeWaitCounts", wakeFromBeforeWaitCounts},
		{"WaitKeepsItsDeadline", waitKeepsItsDeadline},
		{"NudgeEndsNoWait", nudgeEndsNoWait},
		{"CloseEndsWait", closeEndsWait},
		{"PeerMayGoSilently", peerMayGoSilently},
		{"ReusedPortHearsNothingOld", reusedPortHearsNothingOld},
		{"TwoPortsShareAWaiter", twoPortsShareAWaiter},
		{"SpuriousEventsDelayTheirPort", spuriousEventsDelayTheirPort},
		{"NotifyDoesNotAllocate", notifyDoesNotAllocate},
		{"PingPong", pingPong},
	}
)

type pair struct{ front, back hypercall.Domain }

func (p pair) loopback() bool { return p.front.ID() == p.back.ID() }

// soon bounds the wait for an event that should come at once.
const soon = 2 * time.Minute

// atEnd calls f when the test ends; f must not fail.
func atEnd(t testing.TB, what string, f func() error) {
	t.Cleanup(func() {
		if err := f(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	})
}

func share(t testing.TB, d hypercall.Domain, peer hypercall.DomID, pages int, access hypercall.Access) *hypercall.Share {
	t.Helper()
	s, err := d.Share(peer, pages, access)
	if err != nil {
		t.Fatal(err)
	}
	atEnd(t, "End", s.End)
	return s
}

func mapRefs(t testing.TB, d hypercall.Domain, peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) *hypercall.Mapping {
	t.Helper()
	m, err := d.Map(peer, refs, access)
	if err != nil {
		t.Fatal(err)
	}
	atEnd(t, "Release", m.Release)
	return m
}

func memory(t testing.TB, d hypercall.Domain, pages int) *hypercall.Mapping {
	t.Helper()
	m, err := d.Memory(pages)
	if err != nil {
		t.Fatal(err)
	}
	atEnd(t, "Release", m.Release)
	return m
}

func waiter(t testing.TB, d hypercall.Domain) hypercall.Waiter {
	t.Helper()
	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	atEnd(t, "Close", w.Close)
	return w
}

// channel makes two waiters and a channel between them. It consumes the event that binding
// leaves pending on b.
func channel(t testing.TB, p pair) (wa, wb hypercall.Waiter, a, b hypercall.Port) {
	t.Helper()
	wa, wb = waiter(t, p.front), waiter(t, p.back)
	a, err := wa.Unbound(p.back.ID())
	if err != nil {
		t.Fatal(err)
	}
	b, err = wb.Bind(p.front.ID(), a.ID())
	if err != nil {
		t.Fatal(err)
	}
	wait(t, wb)
	return wa, wb, a, b
}

// wait waits for one event, and says that the last one brought work.
func wait(t testing.TB, w hypercall.Waiter) {
	t.Helper()
	if err := w.Wait(time.Now().Add(soon), true); err != nil {
		t.Fatal("Wait:", err)
	}
}

// quiet fails if an event comes.
func quiet(t testing.TB, w hypercall.Waiter, d time.Duration) {
	t.Helper()
	if err := w.Wait(time.Now().Add(d), true); !errors.Is(err, hypercall.ErrDeadlineExceeded) {
		t.Fatalf("Wait without an event: %v", err)
	}
}

func notify(t testing.TB, p hypercall.Port) {
	t.Helper()
	if err := p.Notify(); err != nil {
		t.Fatal("Notify:", err)
	}
}

// ends requires that the Wait whose result comes in done ends soon, with the error want.
// If it does not end, the test fails with the message late.
func ends(t testing.TB, done <-chan error, want error, late string) {
	t.Helper()
	select {
	case err := <-done:
		if !errors.Is(err, want) {
			t.Fatalf("Wait ended with %v", err)
		}
	case <-time.After(soon):
		t.Fatal(late)
	}
}

// closes fails unless done soon receives net.ErrClosed.
func closes(t testing.TB, done <-chan error) {
	t.Helper()
	ends(t, done, hypercall.ErrClosed, "Wait did not end")
}
