package xenbus_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"barevif/xenbus"
)

// This file searches every interleaving of two ends of a vif, up to a number of faults:
// each end reads the other's state late or not at all, does a step, and writes its state,
// while programs die, users leave, and the toolstack takes the vif away and adds it again.
// In every world that can come about no end may write a state it must not, none may keep
// or take away memory that the other uses, and both must be able to meet again.

// missing is the state of a node that does not exist.
const missing = xenbus.State(15)

// A kind is a driver.
type kind uint8

const (
	ourFront kind = iota
	ourBack
	linuxNetfront   // drivers/net/xen-netfront.c
	linuxNetback    // drivers/net/xen-netback/xenbus.c
	windowsXenvif   // FrontendPrepare and FrontendClose of win-xenvif's frontend.c
	freeBSDNetfront // FreeBSD's sys/dev/xen/netfront/netfront.c
	freeBSDNetback  // its sys/dev/xen/netback/netback.c, and sys/xen/xenbus/xenbusb_back.c
	miniOSNetfront  // Mini-OS's netfront.c
)

var kindNames = [...]string{"our front", "our back", "Linux netfront", "Linux netback", "Windows xenvif", "FreeBSD netfront", "FreeBSD netback", "Mini-OS netfront"}

func (k kind) String() string { return kindNames[k] }

func (k kind) ours() bool { return k <= ourBack }

// A party is one end and what it knows.
type party struct {
	kind  kind
	alive bool
	own   xenbus.State // as it wrote it, or found it
	peer  xenbus.State // at its last look; missing: Vanished
	news  bool         // the peer has written since
	write xenbus.State // what its step writes next; Unknown: nothing
	rings bool         // it has rings

	// Of our ends.
	closing bool // Change.SawClosing
	gone    bool // Change.Gone
	offline bool // Change.Online is false
	stale   bool // the rings are of an earlier generation
	leaving bool
	failed  bool // a connect failed, and nothing has changed since
	reread  bool // the peer has written since the rings were set up, or compared with its keys
	another bool // of a backend: the directory is not the one it served
	remade  bool // the toolstack has made its directory again since its last look

	phase uint8 // of other drivers
}

// What the frontend's keys name, and what the backend has mapped.
const (
	noRings uint8 = iota
	presentRings
	oldRings // which the frontend no longer has
)

// A world is everything that a search tells apart.
type world struct {
	front, back  party
	fnode, bnode xenbus.State
	online       bool
	hotplug      bool
	prompt       bool  // our ends read what they watch before each step
	published    uint8 // rings, by the frontend's keys
	mapped       uint8 // rings
	faults       uint8 // that may still happen
}

// A rules is xenbus.Next, or what a test makes of it.
type rules func(xenbus.Role, xenbus.Facts) xenbus.Step

// A move is what may happen next in a world.
type move struct {
	name [2]string // joined
	to   world
	bad  string // the rule that the move breaks
}

func facts(w *world, p *party) xenbus.Facts {
	f := xenbus.Facts{Leaving: p.leaving, Adopt: !p.leaving}
	f.Own, f.Peer, f.Generation = p.own, p.peer, 2
	if f.Vanished = p.peer == missing; f.Vanished {
		f.Peer = xenbus.Unknown
	}
	f.Online, f.Hotplug, f.SawClosing, f.Gone = !p.offline, w.hotplug, p.closing, p.gone
	if p.rings {
		f.Attached = 2
		if p.stale {
			f.Attached = 1
		}
	}
	return f
}

func role(k kind) xenbus.Role {
	if k == ourFront {
		return xenbus.Frontend
	}
	return xenbus.Backend
}

// ends returns one end of w, its node, the other end and that one's node.
func (w *world) ends(front bool) (p *party, node *xenbus.State, other *party, otherNode *xenbus.State) {
	if front {
		return &w.front, &w.fnode, &w.back, &w.bnode
	}
	return &w.back, &w.bnode, &w.front, &w.fnode
}

// freeRings is the end of the frontend's rings.
func (w *world) freeRings() {
	if w.front.rings {
		w.front.rings = false
		w.published, w.mapped = outdated(w.published), outdated(w.mapped)
	}
}

func outdated(rings uint8) uint8 {
	if rings == presentRings {
		return oldRings
	}
	return rings
}

// makeRings makes rings and publishes them.
func (w *world) makeRings() {
	w.freeRings()
	w.front.rings, w.published = true, presentRings
}

// mapRings maps what the frontend published, and reports whether it is there.
func (w *world) mapRings() bool {
	if w.published != presentRings {
		return false
	}
	w.mapped, w.back.rings = presentRings, true
	return true
}

func (w *world) unmap() { w.mapped, w.back.rings = noRings, false }

// set writes the state of an end.
func (w *world) set(front bool, s xenbus.State) {
	p, node, other, _ := w.ends(front)
	p.own, *node, other.news = s, s, true
}

// look makes an end read what it watches.
func (w *world) look(front bool) {
	p, node, _, otherNode := w.ends(front)
	was := *p
	p.gone = *node == missing
	if !p.gone && p.remade {
		p.remade, p.own, p.closing = false, *node, false
		p.stale, p.another = p.rings, !front
	}
	p.peer = *otherNode
	p.closing = p.closing || p.peer == xenbus.Closing
	p.offline = !w.online
	if front { // it asks a backend that is Closed
		p.offline = p.offline && w.bnode == xenbus.Closed
	} else if p.offline && !p.gone { // the toolstack writes its state for it
		p.own = *node
	}
	p.reread = p.reread || p.news && p.rings
	p.news, was.news, was.reread = false, false, p.reread
	if was != *p {
		p.failed = false
	}
}

// step does one step of our end up to, but without, the write of its state, as
// lifecycle.step and lifecycle.do of package pvnet.
func (w *world) step(next rules, front bool) (bad string) {
	p, _, _, _ := w.ends(front)
	if w.prompt {
		w.look(front)
	}
	if p.another { // this device ends, and another begins
		w.unmap()
		w.restart(front)
		return ""
	}
	s := next(role(p.kind), facts(w, p))
	if p.reread && p.rings && (s.Do == xenbus.Run || s.Do == xenbus.Wait) { // lifecycle.verify
		p.reread = false
		if !front && (w.mapped != presentRings || w.published != presentRings) {
			w.unmap()
		}
		return ""
	}
	switch s.Do {
	case xenbus.Connect:
		p.reread = false
		if front && (w.fnode == missing || p.remade) { // its keys have no place
			p.failed = true
			s.State = xenbus.Unknown
		} else if front {
			w.makeRings()
		} else if !p.rings && !w.mapRings() { // lifecycle.connect
			p.failed = true
			s.State = xenbus.Closing
		}
	case xenbus.Release:
		if front {
			if w.mapped == presentRings && w.back.alive && p.peer != missing && !p.gone && !p.stale && !p.news {
				bad = "takes back pages that the backend has mapped"
			}
			w.freeRings()
			p.stale = false
		} else {
			w.unmap()
		}
	case xenbus.Finish:
		p.alive = false
		if p.rings {
			bad = "finishes with rings"
		}
	}
	p.write = s.State
	return bad
}

// commit writes the state of our end, unless its directory is no longer there.
func (w *world) commit(front bool) (bad string) {
	p, node, _, _ := w.ends(front)
	s := p.write
	p.write = xenbus.Unknown
	if *node == missing || p.remade || p.another { // Device.guard
		return ""
	}
	switch {
	case front && s != xenbus.Initialising && s != xenbus.Connected && s != xenbus.Closing && s != xenbus.Closed,
		!front && s != xenbus.InitWait && s != xenbus.Connected && s != xenbus.Closing && s != xenbus.Closed:
		bad = fmt.Sprintf("writes %v", s)
	case !front && s == xenbus.Closed && w.mapped != noRings:
		bad = "writes Closed with pages mapped"
	case !front && s == xenbus.Closed && (p.own == xenbus.Connected || p.own == xenbus.InitWait):
		bad = "leaves out Closing"
	case s == xenbus.Connected && !p.rings:
		bad = "writes Connected without rings"
	case !front && s == xenbus.Connected && !w.hotplug:
		bad = "writes Connected before the hotplug script"
	}
	if s == xenbus.Initialising || s == xenbus.Connected {
		p.closing = p.peer == xenbus.Closing
	}
	w.set(front, s)
	return bad
}

// joined reports whether frames move both ways.
func (w *world) joined(next rules) bool {
	return w.runs(next, true) && w.runs(next, false) && w.mapped == presentRings
}

func (w *world) runs(next rules, front bool) bool {
	p, _, _, _ := w.ends(front)
	if !p.alive || !p.rings || p.write != xenbus.Unknown {
		return false
	}
	if p.kind.ours() {
		return next(role(p.kind), facts(w, p)) == xenbus.Step{Do: xenbus.Run}
	}
	return p.own == xenbus.Connected && (p.peer == xenbus.Connected || !front)
}

// handle makes another driver read the state of its peer, perhaps again, and handle it.
// Netback goes all the way to the state that it wants before it reads again.
func (w *world) handle(front bool) {
	p, _, _, peer := w.ends(front)
	p.peer, p.news = *peer, false
	for range 4 {
		was := *w
		if w.other(front); *w == was || p.kind != linuxNetback {
			return
		}
	}
}

// other does one step of another driver.
func (w *world) other(front bool) {
	p, _, _, _ := w.ends(front)
	switch p.kind {
	case linuxNetfront, freeBSDNetfront:
		switch {
		case p.peer == xenbus.InitWait && p.own == xenbus.Initialising:
			w.makeRings()
			w.set(true, xenbus.Connected)
		case p.peer == xenbus.Closing && p.own != xenbus.Closed:
			w.set(true, xenbus.Closed)
		case p.peer == xenbus.Closed && p.own == xenbus.Connected && p.kind == linuxNetfront:
			w.set(true, xenbus.Closed)
		case p.peer == xenbus.Closed && p.phase == 1: // xn_reset
			p.phase = 0
			w.freeRings()
			w.set(true, xenbus.Initialising)
		}
	case windowsXenvif:
		const prepared = 1
		switch {
		case p.phase == prepared && p.peer == xenbus.InitWait && p.own == xenbus.Initialising:
			w.makeRings()
			w.set(true, xenbus.Connected)
		case p.phase == prepared && (p.peer == xenbus.Closing || p.peer == xenbus.Closed):
			p.phase = 0 // FrontendClose, and then FrontendPrepare
		case p.phase == prepared:
		case p.peer == xenbus.Connected && p.own != xenbus.Closing:
			w.set(true, xenbus.Closing)
		case p.peer == xenbus.Closing && p.own != xenbus.Closed:
			w.set(true, xenbus.Closed)
		case p.peer == xenbus.Closed && p.own != xenbus.Initialising:
			w.freeRings()
			w.set(true, xenbus.Initialising)
		case p.peer == xenbus.InitWait:
			w.freeRings()
			p.phase = prepared
			if p.own != xenbus.Initialising {
				w.set(true, xenbus.Initialising)
			}
		}
	case miniOSNetfront:
		const start, waits, runs, closes = 0, 1, 2, 3
		switch {
		case p.phase == start: // its keys and its state are one transaction; the backend's state does not matter
			w.makeRings()
			w.set(true, xenbus.Connected)
			p.phase = waits
		case p.phase == waits && p.peer == xenbus.Connected:
			p.phase = runs
		case p.phase == waits && p.peer > xenbus.Connected: // it gives up, for good
			w.freeRings()
			p.alive = false
		case p.phase == closes && p.own == xenbus.Connected:
			w.set(true, xenbus.Closing)
		case p.phase == closes && p.own == xenbus.Closing && p.peer >= xenbus.Closing:
			w.set(true, xenbus.Closed)
		case p.phase == closes && p.own == xenbus.Closed && p.peer >= xenbus.Closed:
			w.set(true, xenbus.Initialising)
		case p.phase == closes && p.own == xenbus.Initialising && p.peer >= xenbus.InitWait && p.peer < xenbus.Closed:
			w.freeRings()
			w.published = noRings
			p.phase = start
		}
	case linuxNetback:
		target := map[xenbus.State]xenbus.State{
			xenbus.Initialising: xenbus.InitWait, xenbus.Connected: xenbus.Connected,
			xenbus.Closing: xenbus.Closing, xenbus.Closed: xenbus.Closed,
		}[p.peer]
		switch {
		case p.own == xenbus.Initialising: // probe
			w.set(false, xenbus.InitWait)
		case target == xenbus.Unknown || p.own == target:
		case p.own == xenbus.Closed && target == xenbus.Closing:
			w.set(false, xenbus.Closing)
		case p.own == xenbus.Closed:
			w.set(false, xenbus.InitWait)
		case p.own == xenbus.InitWait && target == xenbus.Connected:
			w.mapRings() // if it fails, Closing and then Connected are written
			w.set(false, xenbus.Connected)
		case p.own == xenbus.Closing:
			w.set(false, xenbus.Closed)
		default:
			w.unmap()
			w.set(false, xenbus.Closing)
		}
		p.alive = w.online || p.own != xenbus.Closed // device_unregister
	case freeBSDNetback:
		switch {
		case p.own == xenbus.Initialising: // xnb_attach
			w.set(false, xenbus.InitWait)
		case p.peer == xenbus.Connected && p.own != xenbus.Connected:
			if p.own == xenbus.InitWait && w.mapRings() {
				w.set(false, xenbus.Connected)
			}
		case p.peer == xenbus.Closing && p.own < xenbus.Closing:
			w.unmap()
			w.set(false, xenbus.Closing)
		case p.peer == xenbus.Closed && p.own != xenbus.Closed:
			w.unmap()
			w.set(false, xenbus.Closed)
		case p.peer == xenbus.Initialising && p.own == xenbus.Closed && w.online: // the device is attached again
			w.set(false, xenbus.InitWait)
		}
	}
}

// restart starts our program again, in the state that the last one left.
func (w *world) restart(front bool) {
	p, node, _, _ := w.ends(front)
	*p = party{kind: p.kind, alive: true, own: *node}
	w.look(front)
}

// die ends a program, and what its kernel had of it.
func (w *world) die(front bool) {
	if front {
		w.freeRings()
	} else {
		w.unmap()
	}
	p, _, _, _ := w.ends(front)
	*p = party{kind: p.kind, own: p.own}
}

// remove removes both directories.
func (w *world) remove() {
	w.fnode, w.bnode, w.online, w.published = missing, missing, false, noRings
	for _, front := range []bool{true, false} {
		p, _, _, _ := w.ends(front)
		p.news = true
		if !p.kind.ours() {
			w.die(front)
		}
	}
}

// plug adds the vif.
func (w *world) plug() {
	w.fnode, w.bnode, w.online = xenbus.Initialising, xenbus.Initialising, true
	for _, front := range []bool{true, false} {
		p, _, _, _ := w.ends(front)
		p.news = true
		if !p.kind.ours() {
			*p = party{kind: p.kind, alive: true, own: xenbus.Initialising}
		} else {
			p.remade = p.alive
		}
	}
}

// acts returns what an end may do by itself.
func (w *world) acts(next rules, front bool) (all []move) {
	p, _, _, _ := w.ends(front)
	if !p.alive {
		return nil
	}
	add := func(what string, f func(*world) string) {
		v := *w
		if bad := f(&v); v != *w || bad != "" {
			all = append(all, move{[2]string{p.kind.String(), what}, v, bad})
		}
	}
	if !p.kind.ours() {
		add(" acts", func(v *world) string { v.handle(front); return "" })
		return all
	}
	add(" looks", func(v *world) string { v.look(front); return "" })
	switch {
	case p.write != xenbus.Unknown:
		add(" writes", func(v *world) string { return v.commit(front) })
	case !p.failed:
		add(" steps", func(v *world) string { return v.step(next, front) })
	}
	return all
}

// help returns what others do so that both ends can meet again.
func (w *world) help(next rules) (all []move) {
	add := func(what string, f func(*world)) {
		v := *w
		f(&v)
		all = append(all, move{[2]string{what}, v, ""})
	}
	rest := len(w.acts(next, true)) == 0 && len(w.acts(next, false)) == 0
	if !w.hotplug {
		add("the hotplug script ends", func(v *world) { v.hotplug = true })
	}
	for _, front := range []bool{true, false} {
		p, node, _, _ := w.ends(front)
		if p.leaving && rest { // lifecycle.endNow: the other end does not answer
			add(p.kind.String()+" ends without an answer", func(v *world) {
				q, node, _, _ := v.ends(front)
				write := *node != missing && !q.remade && q.own != xenbus.Closed
				v.die(front)
				if write {
					v.set(front, xenbus.Closed)
				}
			})
		}
		if p.failed {
			add(p.kind.String()+" tries again", func(v *world) { q, _, _, _ := v.ends(front); q.failed = false })
		}
		if p.kind.ours() && !p.alive && *node != missing && w.online {
			add(p.kind.String()+" starts", func(v *world) { v.restart(front) })
		}
	}
	if k := w.front.kind; (k == linuxNetfront || k == freeBSDNetfront) && w.front.own == xenbus.Closed && w.fnode != missing && w.front.phase == 0 && w.online {
		add(k.String()+" is bound again", func(v *world) { v.freeRings(); v.set(true, xenbus.Initialising) })
	}
	if w.fnode == missing {
		add("the vif is added", func(v *world) { v.plug() })
	} else if dead := !w.front.kind.ours() && !w.front.alive; !w.online || dead || w.deaf() {
		add("the vif is removed", func(v *world) { v.remove() })
	}
	return all
}

// deaf reports whether the backend waits for a frontend that does not look at its state any
// more: Mini-OS does not once it runs. Only the toolstack can help.
func (w *world) deaf() bool {
	return w.front.kind == miniOSNetfront && w.fnode == xenbus.Connected && w.bnode == xenbus.Closing
}

// mishaps returns what may go wrong, each of which takes a fault.
func (w *world) mishaps(only string) (all []move) {
	if w.faults == 0 {
		return nil
	}
	add := func(what string, f func(*world)) {
		if !strings.Contains(what, only) {
			return
		}
		v := *w
		v.faults--
		f(&v)
		all = append(all, move{[2]string{what}, v, ""})
	}
	for _, front := range []bool{true, false} {
		p, _, _, _ := w.ends(front)
		if p.kind.ours() && p.alive {
			// A frontend that is killed before netback has mapped its rings, and starts
			// again, says Connected twice. If netback looks late it takes that for once, and
			// stays with rings that are gone. Neither end can know.
			unseen := front && w.back.kind == linuxNetback && w.bnode != xenbus.Connected &&
				(w.fnode == xenbus.Connected || w.back.peer == xenbus.Connected)
			if !unseen {
				add(p.kind.String()+" is killed", func(v *world) { v.die(front) })
			}
			if !p.leaving {
				add(p.kind.String()+" leaves", func(v *world) { q, _, _, _ := v.ends(front); q.leaving = true })
			}
		}
	}
	if w.online {
		add("the vif is unplugged", func(v *world) {
			v.online, v.bnode = false, xenbus.Closing
			v.front.news, v.back.news = true, true
		})
	}
	if f := &w.front; f.alive && f.own == xenbus.Connected {
		switch {
		case f.kind == freeBSDNetfront && f.phase == 0:
			add("the frontend resets itself", func(v *world) { v.front.phase = 1; v.set(true, xenbus.Closing) })
		case f.kind == miniOSNetfront && f.phase == 2:
			add("the frontend shuts down", func(v *world) { v.front.phase = 3 })
		case f.kind == windowsXenvif && f.phase == 1:
			add("the frontend restarts", func(v *world) { v.front.phase = 0 })
		}
	}
	return all
}

// A search is a search of all worlds from one.
type search struct {
	next rules
	only string // faults whose names contain it

	index map[world]int32
	all   []world
	from  []int32
	by    [][2]string
	good  [3]map[world]bool // by order of turns: worlds from which the ends meet
	seen  []world
}

// run returns what is wrong, with the way there; "" if nothing is.
func (s *search) run(start world) string {
	s.index = map[world]int32{start: 0}
	for i := range s.good {
		s.good[i] = make(map[world]bool)
	}
	s.all, s.from, s.by = []world{start}, []int32{-1}, [][2]string{{}}
	for i := 0; i < len(s.all); i++ {
		w := s.all[i]
		moves := slices.Concat(w.acts(s.next, true), w.acts(s.next, false), w.help(s.next), w.mishaps(s.only))
		for _, m := range moves {
			if m.bad != "" {
				return m.bad + s.way(int32(i)) + "\n" + m.name[0] + m.name[1]
			}
			if _, known := s.index[m.to]; !known {
				s.index[m.to] = int32(len(s.all))
				s.all, s.from, s.by = append(s.all, m.to), append(s.from, int32(i)), append(s.by, m.name)
			}
		}
		if len(s.all) > 4_000_000 {
			return "too many worlds"
		}
	}
	for i, w := range s.all {
		if why := s.meet(w); why != "" {
			return why + s.way(int32(i))
		}
	}
	return ""
}

func (s *search) way(i int32) string {
	if i <= 0 {
		return ""
	}
	w := &s.all[i]
	return fmt.Sprintf("%s\n%s: %v, %v", s.way(s.from[i]), s.by[i][0]+s.by[i][1], w.fnode, w.bnode)
}

// turnLimit is far more turns than any two ends need to meet.
const turnLimit = 60

// meet lets both ends act in turns, without further faults, and returns how they fail to
// meet. Only when neither has anything to do does somebody help. Three orders of the turns
// are tried: each end looks and does one step, or all that it can, in the one order or the
// other.
func (s *search) meet(start world) string {
	start.faults = 0
	for i, order := range []struct {
		steps int
		front bool // goes first
	}{{1, true}, {8, true}, {8, false}} {
		w, way := start, ""
		seen := s.seen[:0]
		for turn := 0; !w.joined(s.next) && !s.good[i][w]; turn++ {
			seen = append(seen, w)
			if turn == turnLimit {
				return "the ends never meet:" + way + "\nfrom the end of:"
			}
			was := w
			s.turn(&w, order.front, order.steps)
			s.turn(&w, !order.front, order.steps)
			if turn > turnLimit/2 {
				way += fmt.Sprintf(" %d%d", w.fnode, w.bnode)
			}
			if w == was {
				help := w.help(s.next)
				if len(help) == 0 {
					return fmt.Sprintf("the ends are stuck in %v and %v, from the end of:", w.fnode, w.bnode)
				}
				w = help[0].to
			}
		}
		for _, w := range seen {
			s.good[i][w] = true
		}
		s.seen = seen
	}
	return ""
}

// turn lets one end look and do a number of steps.
func (s *search) turn(w *world, front bool, steps int) {
	p, _, _, _ := w.ends(front)
	for range steps {
		if !p.alive {
			return
		}
		if p.write != xenbus.Unknown { // of a step that was interrupted
			w.commit(front)
		}
		if !p.kind.ours() {
			w.handle(front)
			continue
		}
		if w.look(front); !p.failed {
			w.step(s.next, front)
			if p.write != xenbus.Unknown {
				w.commit(front)
			}
		}
	}
}

// begin returns the world just after the toolstack has added a vif.
func begin(front, back kind, faults uint8) world {
	w := world{faults: faults, front: party{kind: front}, back: party{kind: back}}
	w.plug()
	for _, front := range []bool{true, false} {
		p, _, _, _ := w.ends(front)
		if p.kind.ours() {
			w.restart(front)
		}
	}
	return w
}

func TestSearch(t *testing.T) {
	for _, c := range []struct {
		front, back kind
		faults      uint8
		hotplug     bool // from the beginning
		prompt      bool
	}{
		{ourFront, ourBack, 2, true, false},
		{ourFront, ourBack, 1, false, false},
		// Netback reads a frontend's state late, and takes a second Connected for the first.
		// If our frontend acts on an old state too, both may say Connected while netback has
		// rings that are gone. So this search has a frontend that reads before it acts.
		{ourFront, linuxNetback, 2, true, true},
		{ourFront, freeBSDNetback, 2, true, false},
		{linuxNetfront, ourBack, 2, false, false},
		{windowsXenvif, ourBack, 2, false, false},
		{freeBSDNetfront, ourBack, 2, false, false},
		{miniOSNetfront, ourBack, 2, false, false},
	} {
		t.Run(fmt.Sprintf("%v with %v", c.front, c.back), func(t *testing.T) {
			s := search{next: xenbus.Next}
			start := begin(c.front, c.back, c.faults)
			start.hotplug, start.prompt = c.hotplug, c.prompt
			bad := s.run(start)
			t.Logf("%d worlds", len(s.all))
			if bad != "" {
				t.Error(bad)
			}
		})
	}
}

// A search that finds nothing wrong proves something only if it finds what is.
func TestSearchNoticesBrokenRules(t *testing.T) {
	const (
		front = xenbus.Frontend
		back  = xenbus.Backend
	)
	type fact = xenbus.Facts
	instead := func(r xenbus.Role, when func(f fact, s xenbus.Step) bool, do xenbus.Step) rules {
		return func(role xenbus.Role, f fact) xenbus.Step {
			if s := xenbus.Next(role, f); role != r || !when(f, s) {
				return s
			}
			return do
		}
	}
	wait := xenbus.Step{Do: xenbus.Wait}
	for _, c := range []struct {
		name   string
		front  kind
		back   kind
		faults uint8
		next   rules
		want   string // begins what the search says
	}{
		{"a backend that does not answer Closing", windowsXenvif, ourBack, 1,
			instead(back, func(f fact, s xenbus.Step) bool { return f.Peer == xenbus.Closing && s.State == xenbus.Closing }, wait), "the ends are stuck"},
		{"a backend that does not answer Closed", freeBSDNetfront, ourBack, 1,
			instead(back, func(f fact, s xenbus.Step) bool { return f.Peer == xenbus.Closed && s.State == xenbus.Closed }, wait), "the ends are stuck"},
		{"a backend that leaves out Closing", ourFront, ourBack, 1,
			instead(back, func(f fact, s xenbus.Step) bool { return f.Own == xenbus.Connected && s.State == xenbus.Closing },
				xenbus.Step{Do: xenbus.Release, State: xenbus.Closed}), "leaves out Closing"},
		{"a backend that keeps pages", ourFront, ourBack, 1,
			func(role xenbus.Role, f fact) xenbus.Step {
				s := xenbus.Next(role, f)
				if role == back && s.Do == xenbus.Release {
					s.Do = xenbus.Drain
				}
				if role == back && f.Attached != 0 && f.Own == xenbus.Closing && f.Peer != xenbus.Connected {
					s = xenbus.Step{Do: xenbus.Drain, State: xenbus.Closed}
				}
				return s
			}, "writes Closed with pages mapped"},
		{"a backend that does not wait for the script", linuxNetfront, ourBack, 0,
			instead(back, func(f fact, s xenbus.Step) bool { return s == xenbus.Step{Do: xenbus.Connect} },
				xenbus.Step{Do: xenbus.Connect, State: xenbus.Connected}), "writes Connected before the hotplug script"},
		{"a backend that connects without rings", ourFront, ourBack, 0,
			instead(back, func(f fact, s xenbus.Step) bool { return s.Do == xenbus.Prepare },
				xenbus.Step{Do: xenbus.Prepare, State: xenbus.Connected}), "writes Connected without rings"},
		{"a backend that writes a frontend's state", ourFront, ourBack, 0,
			instead(back, func(f fact, s xenbus.Step) bool { return s.State == xenbus.InitWait },
				xenbus.Step{Do: xenbus.Prepare, State: xenbus.Initialising}), "writes Initialising"},
		{"a backend that comes back from nothing", miniOSNetfront, ourBack, 0,
			instead(back, func(f fact, s xenbus.Step) bool { return f.Own == xenbus.Initialising && f.Peer == xenbus.Connected }, wait), "the ends are stuck"},
		{"a backend that takes no second connection", freeBSDNetfront, ourBack, 1,
			instead(back, func(f fact, s xenbus.Step) bool { return f.Own == xenbus.Closed && s.State == xenbus.InitWait }, wait), "the ends are stuck"},
		{"a backend that answers InitWait with Closing", ourFront, ourBack, 0,
			instead(back, func(f fact, s xenbus.Step) bool { return f.Own == xenbus.InitWait && f.Peer == xenbus.Connected },
				xenbus.Step{Do: xenbus.Wait, State: xenbus.Closing}), "the ends never meet"},
		{"a frontend that takes its pages back too soon", ourFront, linuxNetback, 1,
			instead(front, func(f fact, s xenbus.Step) bool { return s.Do == xenbus.Drain }, xenbus.Step{Do: xenbus.Release}), "takes back pages"},
		{"a frontend that stays Closed", ourFront, ourBack, 1,
			instead(front, func(f fact, s xenbus.Step) bool { return f.Own == xenbus.Closed && s.State == xenbus.Initialising }, wait), "the ends are stuck"},
		{"a frontend that believes a connection it knows nothing of", ourFront, linuxNetback, 1,
			instead(front, func(f fact, s xenbus.Step) bool { return f.Attached == 0 && f.Peer == xenbus.Connected }, wait), "the ends are stuck"},
		{"a frontend that does not let go", ourFront, ourBack, 1,
			instead(front, func(f fact, s xenbus.Step) bool { return s.Do == xenbus.Release }, wait), "the ends are stuck"},
		{"a frontend that finishes with rings", ourFront, ourBack, 1,
			instead(front, func(f fact, s xenbus.Step) bool { return f.Leaving }, xenbus.Step{Do: xenbus.Finish}), "finishes with rings"},
		{"a frontend that closes what it has just begun", ourFront, linuxNetback, 0,
			instead(front, func(f fact, s xenbus.Step) bool { return s.Do == xenbus.Run }, xenbus.Step{Do: xenbus.Drain, State: xenbus.Closing}), "the ends never meet"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := search{next: c.next}
			bad := s.run(begin(c.front, c.back, c.faults))
			if !strings.HasPrefix(bad, c.want) {
				t.Errorf("%d worlds; found %q, want %q", len(s.all), bad, c.want)
			}
		})
	}
}

// Linux netfront does not come back after Closed. A backend that is killed and starts again,
// however often, does not make it go there.
func TestSearchKeepsLinuxNetfrontConnected(t *testing.T) {
	closed := func(next rules) bool {
		s := search{next: next, only: "our back is killed"}
		if bad := s.run(begin(linuxNetfront, ourBack, 3)); bad != "" {
			t.Error(bad)
		}
		return slices.ContainsFunc(s.all, func(w world) bool { return w.fnode == xenbus.Closed })
	}
	if closed(xenbus.Next) {
		t.Error("it is closed")
	}
	if !closed(func(role xenbus.Role, f xenbus.Facts) xenbus.Step { f.Adopt = false; return xenbus.Next(role, f) }) {
		t.Error("nobody adopts its rings, and it stays connected")
	}
}
