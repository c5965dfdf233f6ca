package mld

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Times of RFC 3810, section 9, in the order of its sections, and bounds of what a querier may say instead.
const (
	repeats      = 2 // a report of a change, in case that one is lost
	mostRepeats  = 7
	interval     = 125 * time.Second // between two queries for all groups
	mostInterval = time.Hour
	mostRepeat   = time.Second            // between two reports of one change
	mostDelay    = time.Second            // before the first report on a link (RFC 4862, section 5.4.2)
	leastAnswer  = 100 * time.Millisecond // between two answers
	mostLeaving  = 32                     // groups of which it is yet to be said that nobody listens any more
)

// What a report says of a group.
const (
	listens = header.MLDv2ReportRecordModeIsExclude
	join    = header.MLDv2ReportRecordChangeToExcludeMode // no source is left out
	leave   = header.MLDv2ReportRecordChangeToIncludeMode // all are
)

// A Listener listens to the solicited-node groups of addresses. The zero Listener is down and listens to none.
// It is not safe for concurrent use.
type Listener struct {
	mac    [6]byte
	up     bool
	source netip.Addr // of reports, if it is link-local
	groups []group

	all   time.Time // when to answer a query for all groups; zero: there is none
	quiet time.Time // when the next answer may go out

	old      time.Time     // until then a querier speaks version 1
	v1       bool          // and so does this host
	repeats  int           // that a querier wants; 0: it has not said
	interval time.Duration // between its queries; 0: it has not said

	heard, sent uint64
}

// A group is one that is listened to, or one that is not any more and of which this is yet to be said.
type group struct {
	addr    netip.Addr
	listens bool
	left    int       // reports of the change that are yet to be sent
	unsaid  bool      // none was sent
	at      time.Time // of the next one
	answer  time.Time // when to answer a query for it; zero: there is none
}

// Up says that the link came up, or is another one, for a card with that MAC. What is listened to is reported
// there, after a random delay of up to a second: all stations of a link may begin at once.
func (l *Listener) Up(now time.Time, mac [6]byte) {
	l.Down()
	l.mac, l.up = mac, true
	l.quiet, l.old, l.v1, l.repeats, l.interval = time.Time{}, time.Time{}, false, 0, 0
	at := now.Add(rand.N(mostDelay))
	for i := range l.groups {
		l.groups[i].changed(l.often(), at)
	}
}

// Down says that the link is down: nothing is sent, and what was to be is forgotten.
func (l *Listener) Down() {
	l.up, l.all = false, time.Time{}
	l.groups = slices.DeleteFunc(l.groups, func(g group) bool { return !g.listens })
	for i := range l.groups {
		g := &l.groups[i]
		*g = group{addr: g.addr, listens: true}
	}
}

// changed begins the reports of a change, or of what may have become unknown.
func (g *group) changed(n int, at time.Time) {
	g.left, g.unsaid, g.at, g.answer = n, true, at, time.Time{}
}

// Listen makes the groups that are listened to the solicited-node groups of addrs, of IPv6. source is the
// link-local address of this host, once it is one: reports come from there, and without one from :: (RFC 3590).
// A change is to be reported at once. So is all that is listened to when source becomes a link-local address,
// or another one: queriers do not believe what came from ::.
func (l *Listener) Listen(now time.Time, source netip.Addr, addrs []netip.Addr) {
	known := source == l.source || !source.IsLinkLocalUnicast()
	l.source = source
	want := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		if g := Group(a); !slices.Contains(want, g) {
			want = append(want, g)
		}
	}
	leaving := 0
	for i := range l.groups {
		g := &l.groups[i]
		is := slices.Contains(want, g.addr)
		if is != g.listens || is && !known && !g.unsaid {
			g.listens = is
			g.changed(l.often(), now)
		}
		if !is {
			leaving++
		}
	}
	for _, a := range want {
		if !slices.ContainsFunc(l.groups, func(g group) bool { return g.addr == a }) {
			g := group{addr: a, listens: true}
			g.changed(l.often(), now)
			l.groups = append(l.groups, g)
		}
	}
	l.groups = slices.DeleteFunc(l.groups, func(g group) bool {
		if g.listens || l.up && leaving <= mostLeaving {
			return false
		}
		leaving--
		return true
	})
	if !l.up {
		l.Down()
	}
}

// Hurry has what was not reported yet be reported now: an address is about to be asked for.
func (l *Listener) Hurry(now time.Time) {
	for i := range l.groups {
		if g := &l.groups[i]; g.unsaid && g.at.After(now) {
			g.at = now
		}
	}
}

// often returns how many reports there are of a change.
func (l *Listener) often() int {
	if l.repeats == 0 {
		return repeats
	}
	return min(max(l.repeats, repeats), mostRepeats)
}

// from returns the source of reports.
func (l *Listener) from() netip.Addr {
	if l.source.IsLinkLocalUnicast() {
		return l.source
	}
	return netip.IPv6Unspecified()
}

// version brings the version that this host speaks up to date. With another one answers and repetitions are
// not sent that were for the one before (RFC 3810, section 8.2.1).
func (l *Listener) version(now time.Time) {
	v1 := now.Before(l.old)
	if v1 == l.v1 {
		return
	}
	l.v1, l.all = v1, time.Time{}
	for i := range l.groups {
		g := &l.groups[i]
		g.answer = time.Time{}
		if !g.unsaid {
			g.left = 0
		}
	}
	l.forget()
}

// forget removes groups that nobody listens to, of which this was said.
func (l *Listener) forget() {
	l.groups = slices.DeleteFunc(l.groups, func(g group) bool { return !g.listens && g.left == 0 })
}

// Hear takes a query. It reports whether Next is another time for it. It allocates nothing.
func (l *Listener) Hear(now time.Time, q Query) (another bool) {
	if !l.up {
		return false
	}
	l.heard++
	before := l.Next()
	if q.Old {
		every := l.interval
		if every == 0 {
			every = interval
		}
		l.old = now.Add(time.Duration(l.often())*min(every, mostInterval) + q.Delay) // section 9.12
	} else {
		l.repeats, l.interval = q.Repeats, q.Interval
	}
	l.version(now)
	at := func() time.Time { return now.Add(rand.N(max(q.Delay, 1))) }
	if q.Group == netip.IPv6Unspecified() && !l.v1 {
		l.all = sooner(l.all, at())
		return !l.Next().Equal(before)
	}
	for i := range l.groups {
		g := &l.groups[i]
		if !g.listens || q.Group != netip.IPv6Unspecified() && q.Group != g.addr {
			continue
		}
		g.answer = sooner(g.answer, at()) // an answer for all groups that goes out before is one for this
	}
	return !l.Next().Equal(before)
}

// sooner returns the earlier time. The zero time is none.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// Next returns when Reports is to be called; the zero time: not before something else happens.
func (l *Listener) Next() (next time.Time) {
	if !l.up {
		return next
	}
	if !l.all.IsZero() {
		next = later(l.all, l.quiet)
	}
	for i := range l.groups {
		g := &l.groups[i]
		if g.left > 0 {
			next = sooner(next, g.at)
		}
		if !g.answer.IsZero() {
			next = sooner(next, later(g.answer, l.quiet))
		}
	}
	return next
}

// Reports returns the frames that are to be sent now.
func (l *Listener) Reports(now time.Time) [][]byte {
	if !l.up {
		return nil
	}
	l.version(now)
	var changes, answers []record
	again := now.Add(rand.N(mostRepeat))
	due := func(t time.Time) bool { return !t.IsZero() && !now.Before(t) }
	for i := range l.groups {
		g := &l.groups[i]
		if g.left == 0 || now.Before(g.at) {
			continue
		}
		kind := join
		if !g.listens {
			kind = leave
		}
		changes = append(changes, record{g.addr, kind})
		if g.left, g.unsaid, g.at = g.left-1, false, again; l.v1 && !g.listens {
			g.left = 0 // the querier asks itself whether that is so
		}
	}
	if !now.Before(l.quiet) {
		all := due(l.all)
		for i := range l.groups {
			if g := &l.groups[i]; g.listens && (all || due(g.answer)) {
				answers = append(answers, record{g.addr, listens})
				g.answer = time.Time{}
			}
		}
		if all {
			l.all = time.Time{}
		}
		if len(answers) > 0 {
			l.quiet = now.Add(leastAnswer)
		}
	}
	frames := append(l.reports(changes), l.reports(answers)...)
	l.forget()
	l.sent += uint64(len(frames))
	return frames
}

// A State is what a Listener does, and has done since it was made.
type State struct {
	Groups  []netip.Addr // that it listens to
	Old     bool         // by version 1
	Queries uint64       // heard
	Reports uint64       // sent
}

// State returns that of now.
func (l *Listener) State(now time.Time) State {
	s := State{Old: now.Before(l.old), Queries: l.heard, Reports: l.sent}
	for _, g := range l.groups {
		if g.listens {
			s.Groups = append(s.Groups, g.addr)
		}
	}
	return s
}
