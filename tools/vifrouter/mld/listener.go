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
	repeats      = 2 // times that a change is reported, in case that one report is lost
	mostRepeats  = 7
	interval     = 125 * time.Second // between two queries for all groups
	mostInterval = time.Hour
	mostRepeat   = time.Second            // between two reports of one change
	mostDelay    = time.Second            // before the first report on a link (RFC 4862, section 5.4.2)
	leastAnswer  = 100 * time.Millisecond // between two answers
	mostLeaving  = 32                     // groups that the host has left and has yet to report as left
)

// What a record says about a group. Version 2 has lists of sources: this host excludes none of a group that it
// listens to, and includes none of one that it has left.
const (
	listens = header.MLDv2ReportRecordModeIsExclude       // the answer to a query
	join    = header.MLDv2ReportRecordChangeToExcludeMode // the report of a group that is new
	leave   = header.MLDv2ReportRecordChangeToIncludeMode // the report of a group that the host has left
)

// A Listener listens to the solicited-node groups of addresses. The zero Listener is down and listens to none.
// It is not safe for concurrent use.
type Listener struct {
	mac    [6]byte
	up     bool
	source netip.Addr // as Listen was given it; reports come from it if it is link-local
	groups []group

	all   time.Time // when to answer a query for all groups; zero: there is none to answer
	quiet time.Time // no answer goes out before this time

	old      time.Time     // until then a querier on the link is taken to speak version 1
	v1       bool          // this host speaks version 1
	repeats  int           // the querier's robustness; 0: it has not said
	interval time.Duration // between the querier's queries; 0: it has not said

	heard, sent uint64
}

// A group is one that the host listens to, or one that it has left and has yet to report as left.
type group struct {
	addr       netip.Addr
	listens    bool
	pending    int       // reports of the change that are yet to be sent
	unreported bool      // no report of the change was sent
	at         time.Time // when the next of these reports is due
	answer     time.Time // when to answer a query for the group; zero: there is none to answer
}

// Up says that the link came up, or that the card, with that MAC, is at another link now. The groups are
// reported there after a random delay of up to a second, since all stations of a link may begin at once.
func (l *Listener) Up(now time.Time, mac [6]byte) {
	l.Down()
	l.mac, l.up = mac, true
	l.quiet, l.old, l.v1, l.repeats, l.interval = time.Time{}, time.Time{}, false, 0, 0
	at := now.Add(rand.N(mostDelay))
	for i := range l.groups {
		l.groups[i].changed(l.often(), at)
	}
}

// Down says that the link is down. Until Up nothing is sent; reports and answers that were due are dropped.
func (l *Listener) Down() {
	l.up, l.all = false, time.Time{}
	l.groups = slices.DeleteFunc(l.groups, func(g group) bool { return !g.listens })
	for i := range l.groups {
		g := &l.groups[i]
		*g = group{addr: g.addr, listens: true}
	}
}

// changed makes n reports of the group due, the first at that time: it has changed, or the link may not know it.
func (g *group) changed(n int, at time.Time) {
	g.pending, g.unreported, g.at, g.answer = n, true, at, time.Time{}
}

// Listen makes the host listen to the solicited-node groups of addrs, which are IPv6 addresses, and to no
// others. source is the link-local address of this host, or :: while it has none: reports come from there
// (RFC 3590). A change becomes due to be reported at once. So do all groups when source becomes a link-local
// address, or another one, since queriers ignore a report from ::.
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
		if is != g.listens || is && !known && !g.unreported {
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

// Hurry makes changes of which no report was sent due now. A caller needs it before it solicits an address of
// its own for duplicate address detection.
func (l *Listener) Hurry(now time.Time) {
	for i := range l.groups {
		if g := &l.groups[i]; g.unreported && g.at.After(now) {
			g.at = now
		}
	}
}

// often returns how many times a change is reported.
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

// version updates the version that this host speaks. If it changes, the answers and the repeated reports that
// were due for the one before are dropped (RFC 3810, section 8.2.1).
func (l *Listener) version(now time.Time) {
	v1 := now.Before(l.old)
	if v1 == l.v1 {
		return
	}
	l.v1, l.all = v1, time.Time{}
	for i := range l.groups {
		g := &l.groups[i]
		g.answer = time.Time{}
		if !g.unreported {
			g.pending = 0
		}
	}
	l.forget()
}

// forget removes the groups that the host has left and has reported as left.
func (l *Listener) forget() {
	l.groups = slices.DeleteFunc(l.groups, func(g group) bool { return !g.listens && g.pending == 0 })
}

// Hear takes a query into account, and reports whether that changed Next. It allocates nothing.
func (l *Listener) Hear(now time.Time, q Query) (another bool) {
	if !l.up {
		return false
	}
	l.heard++
	before := l.Next()
	if q.MLDv1 {
		every := l.interval
		if every == 0 {
			every = interval
		}
		l.old = now.Add(time.Duration(l.often())*min(every, mostInterval) + q.MaxResponseDelay) // section 9.12
	} else {
		l.repeats, l.interval = q.Robustness, q.QueryInterval
	}
	l.version(now)
	at := func() time.Time { return now.Add(rand.N(max(q.MaxResponseDelay, 1))) }
	if q.Group == netip.IPv6Unspecified() && !l.v1 {
		l.all = sooner(l.all, at())
		return !l.Next().Equal(before)
	}
	for i := range l.groups {
		g := &l.groups[i]
		if !g.listens || q.Group != netip.IPv6Unspecified() && q.Group != g.addr {
			continue
		}
		g.answer = sooner(g.answer, at()) // an answer for all groups that goes out earlier answers this query too
	}
	return !l.Next().Equal(before)
}

// sooner returns the earlier time. The zero time means none.
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

// Next returns when to call Reports. The zero time means never, until another method is called.
func (l *Listener) Next() (next time.Time) {
	if !l.up {
		return next
	}
	if !l.all.IsZero() {
		next = later(l.all, l.quiet)
	}
	for i := range l.groups {
		g := &l.groups[i]
		if g.pending > 0 {
			next = sooner(next, g.at)
		}
		if !g.answer.IsZero() {
			next = sooner(next, later(g.answer, l.quiet))
		}
	}
	return next
}

// Reports returns the frames to send now, which are the caller's: reports of changes first, then answers.
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
		if g.pending == 0 || now.Before(g.at) {
			continue
		}
		kind := join
		if !g.listens {
			kind = leave
		}
		changes = append(changes, record{g.addr, kind})
		if g.pending, g.unreported, g.at = g.pending-1, false, again; l.v1 && !g.listens {
			g.pending = 0 // no repetition: the querier now asks for other listeners of the group (RFC 2710, section 4)
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

// A State says what a Listener does now, and has counted since it was made.
type State struct {
	Groups  []netip.Addr // that it listens to
	MLDv1   bool         // it speaks version 1, since a querier does, else version 2
	Queries uint64       // that Hear took while the link was up
	Reports uint64       // frames that Reports returned
}

// State returns the State at that time.
func (l *Listener) State(now time.Time) State {
	s := State{MLDv1: now.Before(l.old), Queries: l.heard, Reports: l.sent}
	for _, g := range l.groups {
		if g.listens {
			s.Groups = append(s.Groups, g.addr)
		}
	}
	return s
}
