package xenbus_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"barevif/xenbus"
)

const lastState = xenbus.Reconfigured + 1 // a state that does not exist

// everyFact calls f with every combination of facts.
func everyFact(f func(xenbus.Role, xenbus.Facts)) {
	for _, role := range []xenbus.Role{xenbus.Frontend, xenbus.Backend} {
		for own := range lastState + 1 {
			for peer := range lastState + 1 {
				for bits := range 1 << 8 {
					for _, attached := range []uint32{0, 1, 2} {
						on := func(i int) bool { return bits>>i&1 == 1 }
						f(role, xenbus.Facts{
							Change: xenbus.Change{
								Own: own, Peer: peer, Generation: 2,
								Online: on(0), Hotplug: on(1), SawClosing: on(2),
								Vanished: on(3), Gone: on(4), Lost: on(5),
							},
							Attached: attached, Leaving: on(6), Adopt: on(7),
						})
					}
				}
			}
		}
	}
}

// apply does what a driver does with a step.
func apply(f *xenbus.Facts, s xenbus.Step) {
	switch s.Do {
	case xenbus.Connect:
		f.Attached = f.Generation
	case xenbus.Release:
		f.Attached = 0
	}
	if s.State != xenbus.Unknown {
		if s.State == xenbus.Initialising || s.State == xenbus.Connected {
			f.SawClosing = f.Peer == xenbus.Closing
		}
		f.Own = s.State
	}
}

func atRest(s xenbus.Step) bool {
	switch s.Do {
	case xenbus.Wait, xenbus.Run, xenbus.Drain, xenbus.Finish:
		return s.State == xenbus.Unknown
	}
	return false
}

func TestNextObeysItsRulesForEveryCombination(t *testing.T) {
	everyFact(func(role xenbus.Role, f xenbus.Facts) {
		s := xenbus.Next(role, f)
		fail := func(why string) { t.Fatalf("%v %+v: %v: %s", role, f, s, why) }
		attached := f.Attached != 0
		if s.State > xenbus.Reconfigured {
			fail("writes a state that does not exist")
		}
		if s.State != xenbus.Unknown && s.State == f.Own {
			fail("writes the state it is in")
		}
		if s.State != xenbus.Unknown && (f.Gone || f.Lost) {
			fail("writes into a directory that is not its own")
		}
		if s.Do == xenbus.Finish && (attached || s.State != xenbus.Unknown) {
			fail("finishes while something is left to do")
		}
		if s.Do == xenbus.Connect && (attached || f.Leaving || f.Vanished) {
			fail("connects when it must not")
		}
		if s.Do == xenbus.Release && !attached {
			fail("releases nothing")
		}
		if s.Do == xenbus.Run {
			if f.Attached != f.Generation || f.Leaving || f.Vanished || f.Gone || f.Lost {
				fail("moves frames when it must not")
			}
			up := f.Peer == xenbus.Connected || role == xenbus.Frontend &&
				(f.Peer == xenbus.Reconfiguring || f.Peer == xenbus.Reconfigured) ||
				role == xenbus.Backend && f.Peer == xenbus.Initialised
			if !up {
				fail("moves frames without a peer")
			}
			if role == xenbus.Frontend && f.SawClosing {
				fail("believes a Connected that covers a Closing")
			}
		}
		if attached && f.Attached != f.Generation && s != (xenbus.Step{Do: xenbus.Release}) {
			fail("keeps rings of an earlier generation")
		}
		if s.State == xenbus.Connected && !attached && s.Do != xenbus.Connect {
			fail("says Connected without rings")
		}
		if role == xenbus.Backend && s.State == xenbus.Connected && !f.Hotplug {
			fail("says Connected before the hotplug script")
		}
		if role == xenbus.Backend && s.State == xenbus.Closed && attached && s.Do != xenbus.Release {
			fail("says Closed while the frontend's pages are mapped")
		}
		if role == xenbus.Backend && s.State == xenbus.Closed && f.Own == xenbus.Connected {
			fail("leaves out Closing")
		}
		if role == xenbus.Frontend && (s.State == xenbus.InitWait || s.State > xenbus.Closed) {
			fail("writes a state frontends do not have")
		}
		if f.Leaving && (s.State == xenbus.Initialising || s.State == xenbus.InitWait || s.State == xenbus.Connected) {
			fail("starts again while leaving")
		}
	})
}

func TestNextComesToRestWithAPeerThatDoesNotMove(t *testing.T) {
	everyFact(func(role xenbus.Role, f xenbus.Facts) {
		start, s := f, xenbus.Next(role, f)
		for n := 0; !atRest(s); n++ {
			if n == 6 {
				t.Fatalf("%v %+v still does %v", role, start, s)
			}
			apply(&f, s)
			s = xenbus.Next(role, f)
		}
	})
}

func TestLeavingEndsOnceThePeerHasClosed(t *testing.T) {
	everyFact(func(role xenbus.Role, f xenbus.Facts) {
		f.Leaving, f.Peer = true, xenbus.Closed
		start := f
		for range 8 {
			s := xenbus.Next(role, f)
			if s.Do == xenbus.Finish {
				return
			}
			apply(&f, s)
		}
		t.Fatalf("%v %+v never finishes", role, start)
	})
}

// A driver is a peer of Next: it returns its next state, given its own and ours.
type driver interface {
	step(other xenbus.State)
	state() xenbus.State
	connected() bool
}

// ours is either end, driven by Next.
type ours struct {
	role xenbus.Role
	f    xenbus.Facts
	last xenbus.Step
}

func newOurs(role xenbus.Role, own xenbus.State) *ours {
	return &ours{role: role, f: xenbus.Facts{Change: xenbus.Change{
		Own: own, Generation: 1, Online: true, Hotplug: true}}}
}

func (o *ours) state() xenbus.State { return o.f.Own }
func (o *ours) connected() bool     { return o.last.Do == xenbus.Run }
func (o *ours) step(other xenbus.State) {
	o.f.Peer = other
	if other == xenbus.Closing {
		o.f.SawClosing = true
	}
	o.last = xenbus.Next(o.role, o.f)
	apply(&o.f, o.last)
}

// linuxBack is drivers/net/xen-netback/xenbus.c: it reacts to changes of the frontend's
// state, along the shortest path.
type linuxBack struct {
	own, saw xenbus.State
	started  bool
}

func (b *linuxBack) state() xenbus.State { return b.own }
func (b *linuxBack) connected() bool     { return b.own == xenbus.Connected }
func (b *linuxBack) step(front xenbus.State) {
	if !b.started {
		b.started, b.own = true, xenbus.InitWait // probe
		return
	}
	if front == b.saw {
		return
	}
	b.saw = front
	target := map[xenbus.State]xenbus.State{
		xenbus.Initialising: xenbus.InitWait, xenbus.Connected: xenbus.Connected,
		xenbus.Closing: xenbus.Closing, xenbus.Closed: xenbus.Closed,
	}[front]
	for target != xenbus.Unknown && b.own != target {
		switch {
		case b.own == xenbus.Closed && target == xenbus.Closing:
			b.own = xenbus.Closing
		case b.own == xenbus.Closed:
			b.own = xenbus.InitWait
		case b.own == xenbus.InitWait && target == xenbus.Connected:
			b.own = xenbus.Connected
		case b.own == xenbus.Closing:
			b.own = xenbus.Closed
		default:
			b.own = xenbus.Closing
		}
	}
}

// linuxFront is drivers/net/xen-netfront.c: bound once, and at its end when Closed.
type linuxFront struct{ own, saw xenbus.State }

func (l *linuxFront) state() xenbus.State { return l.own }
func (l *linuxFront) connected() bool {
	return l.own == xenbus.Connected && l.saw == xenbus.Connected
}
func (l *linuxFront) step(back xenbus.State) {
	if back == l.saw {
		return
	}
	l.saw = back
	switch {
	case back == xenbus.InitWait && l.own == xenbus.Initialising:
		l.own = xenbus.Connected
	case back == xenbus.Closing, back == xenbus.Closed && l.own == xenbus.Connected:
		l.own = xenbus.Closed
	}
}

// windowsFront is the close cycle of FrontendPrepare in win-xenvif, which runs before the
// first connect and spins until the backend answers.
type windowsFront struct {
	own, back xenbus.State
	prepared  bool
}

func (w *windowsFront) state() xenbus.State { return w.own }
func (w *windowsFront) connected() bool {
	return w.own == xenbus.Connected && w.back == xenbus.Connected
}
func (w *windowsFront) step(back xenbus.State) {
	w.back = back
	switch {
	case w.prepared && back == xenbus.InitWait && w.own == xenbus.Initialising:
		w.own = xenbus.Connected
	case w.prepared:
	case back == xenbus.Connected:
		w.own = xenbus.Closing
	case back == xenbus.Closing:
		w.own = xenbus.Closed
	case back == xenbus.Closed:
		w.own = xenbus.Initialising
	case back == xenbus.InitWait:
		w.own, w.prepared = xenbus.Initialising, true
	}
}

// meet makes both ends act in random turns. Each reads the other's state only in its
// turn, so that it may miss states in between.
func meet(t *testing.T, rng *rand.Rand, front, back driver) {
	t.Helper()
	trace := ""
	for range 200 {
		if rng.IntN(2) == 0 {
			front.step(back.state())
		} else {
			back.step(front.state())
		}
		trace += fmt.Sprintf("%d%d ", front.state(), back.state())
		if front.connected() && back.connected() {
			return
		}
	}
	t.Fatalf("they never meet (front, back): %s", trace)
}

func eachSeed(t *testing.T, f func(*testing.T, *rand.Rand, xenbus.State, xenbus.State)) {
	for own := range lastState {
		for peer := range lastState {
			t.Run(fmt.Sprintf("front=%v/back=%v", own, peer), func(t *testing.T) {
				for seed := range uint64(40) {
					f(t, rand.New(rand.NewPCG(seed, uint64(own)<<8|uint64(peer))), own, peer)
				}
			})
		}
	}
}

func TestOurEndsMeetWhateverWasLeftBehind(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand, own, peer xenbus.State) {
		meet(t, rng, newOurs(xenbus.Frontend, own), newOurs(xenbus.Backend, peer))
	})
}

func TestFrontendMeetsLinuxNetback(t *testing.T) {
	for own := range lastState {
		for seed := range uint64(40) {
			rng := rand.New(rand.NewPCG(seed, uint64(own)))
			meet(t, rng, newOurs(xenbus.Frontend, own), &linuxBack{own: xenbus.Initialising})
			// netback is still connected to a process that was killed
			meet(t, rng, newOurs(xenbus.Frontend, xenbus.Connected),
				&linuxBack{own: xenbus.Connected, saw: xenbus.Connected, started: true})
		}
	}
}

func TestBackendMeetsLinuxNetfront(t *testing.T) {
	for _, peer := range []xenbus.State{xenbus.Initialising, xenbus.InitWait, xenbus.Unknown} {
		for seed := range uint64(40) {
			rng := rand.New(rand.NewPCG(seed, uint64(peer)))
			meet(t, rng, &linuxFront{own: xenbus.Initialising}, newOurs(xenbus.Backend, peer))
		}
	}
}

func TestBackendThatAdoptsKeepsLinuxNetfrontConnected(t *testing.T) {
	for seed := range uint64(40) {
		front := &linuxFront{own: xenbus.Connected, saw: xenbus.Connected}
		back := newOurs(xenbus.Backend, xenbus.Connected) // left by a process that was killed
		back.f.Adopt = true
		meet(t, rand.New(rand.NewPCG(seed, 1)), front, back)
	}
}

func TestBackendAnswersTheWindowsCloseCycle(t *testing.T) {
	for peer := range lastState {
		for seed := range uint64(40) {
			rng := rand.New(rand.NewPCG(seed, uint64(peer)))
			meet(t, rng, &windowsFront{own: xenbus.Initialising}, newOurs(xenbus.Backend, peer))
			// the guest rebooted: the old connection is still up
			back := newOurs(xenbus.Backend, xenbus.Connected)
			back.f.Attached = 1
			meet(t, rng, &windowsFront{own: xenbus.Connected}, back)
		}
	}
}

func TestBackendAnswersClosingWhileTheHotplugScriptRuns(t *testing.T) {
	back := newOurs(xenbus.Backend, xenbus.InitWait)
	back.f.Hotplug = false
	back.step(xenbus.Connected)
	if back.f.Attached == 0 || back.state() != xenbus.InitWait {
		t.Fatalf("state %v, attached %d: want rings and InitWait", back.state(), back.f.Attached)
	}
	back.step(xenbus.Connected)
	if back.connected() || back.state() != xenbus.InitWait {
		t.Fatal("connected without the script")
	}
	back.step(xenbus.Closing)
	if back.state() != xenbus.Closing || back.f.Attached != 0 {
		t.Fatalf("state %v, attached %d after the frontend's Closing", back.state(), back.f.Attached)
	}
}

func TestFrontendClosesWhenConnectedCoversAClosing(t *testing.T) {
	// Linux netback after a failed connect: InitWait, Closing, Connected.
	front := newOurs(xenbus.Frontend, xenbus.Initialising)
	front.step(xenbus.InitWait)
	front.f.SawClosing = true
	front.step(xenbus.Connected)
	if front.state() != xenbus.Closing || front.last.Do != xenbus.Drain {
		t.Fatalf("%v in %v, want to drain and close", front.last, front.state())
	}
	front.step(xenbus.Closing)
	front.step(xenbus.Closed)
	if front.f.Attached != 0 {
		t.Fatal("rings kept although the backend is Closed")
	}
	front.step(xenbus.Closed)
	if front.state() != xenbus.Initialising {
		t.Fatalf("state %v, want Initialising to connect again", front.state())
	}
}

func TestReconfiguredCountsAsConnected(t *testing.T) {
	front := newOurs(xenbus.Frontend, xenbus.Initialising)
	front.step(xenbus.InitWait)
	front.step(xenbus.Reconfigured)
	if !front.connected() {
		t.Fatalf("%v with a backend that is Reconfigured", front.last)
	}
}

func TestUnplugThroughTheBackendsStateEndsBothEnds(t *testing.T) {
	// libxl sets online to 0 and writes Closing for the backend.
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 2))
		front, back := newOurs(xenbus.Frontend, xenbus.Initialising), newOurs(xenbus.Backend, xenbus.Initialising)
		meet(t, rng, front, back)
		back.f.Online, back.f.Own = false, xenbus.Closing
		front.f.Online = false
		for n := 0; back.last.Do != xenbus.Finish || front.state() != xenbus.Closed || front.f.Attached != 0; n++ {
			if n == 200 {
				t.Fatalf("front %v in %v, back %v in %v", front.last, front.state(), back.last, back.state())
			}
			if rng.IntN(2) == 0 {
				front.step(back.state())
			} else {
				back.step(front.state())
			}
		}
	}
}

func TestRandomWalksOfAHostilePeerNeverConnectTwice(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	for _, role := range []xenbus.Role{xenbus.Frontend, xenbus.Backend} {
		o := newOurs(role, xenbus.Initialising)
		for range 500_000 {
			if rng.IntN(50) == 0 {
				o.f.Vanished = !o.f.Vanished
			}
			before := o.f.Attached
			o.step(xenbus.State(rng.IntN(int(lastState) + 1)))
			if o.last.Do == xenbus.Connect && before != 0 {
				t.Fatalf("%v connects while attached", role)
			}
		}
	}
}

func TestNamesOfStates(t *testing.T) {
	for s, want := range map[fmt.Stringer]string{
		xenbus.Unknown: "Unknown", xenbus.Reconfigured: "Reconfigured", xenbus.State(9): "State(9)",
		xenbus.Wait: "Wait", xenbus.Finish: "Finish", xenbus.Action(7): "Action(7)",
		xenbus.Frontend: "frontend", xenbus.Backend: "backend",
		xenbus.Step{Do: xenbus.Drain, State: xenbus.Closed}: "Drain, then Closed",
		xenbus.Step{Do: xenbus.Run}:                         "Run",
	} {
		if got := s.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
