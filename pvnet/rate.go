package pvnet

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus/xenstore"
)

// leastBurst is the credit that may accumulate for a frame that waits, however low the
// limit: Linux's netback allows a jumbo frame of 128 KiB, since an interface would seize
// up otherwise (drivers/net/xen-netback/netback.c: tx_add_credit).
const leastBurst = 128 << 10

// A rate is the limit of what a guest may send: bytes of credit in each window. The zero
// rate is none.
type rate struct {
	bytes  uint64
	window time.Duration // 0: no limit
}

// parseRate reads the value of the key "rate": bytes and microseconds, as Linux's
// xen_net_read_rate does. As there, "0" microseconds mean no limit, and so does the
// largest number of bytes, 2^64-1. "0" bytes mean that nothing may be sent.
func parseRate(text string) (r rate, err error) {
	size, usec, two := strings.Cut(text, ",")
	b, err1 := strconv.ParseUint(size, 10, 64)
	u, err2 := strconv.ParseUint(usec, 10, 64)
	if !two || err1 != nil || err2 != nil {
		return rate{}, &xenstore.ValueError{Path: netif.KeyRate, Value: xenstore.Clip(text), Want: `"bytes,microseconds"`}
	}
	if u == 0 || b == math.MaxUint64 {
		return rate{}, nil
	}
	const longest = math.MaxInt64 / 4 // so that no sum of times overflows: 73 years
	return rate{b, time.Duration(min(u, longest/1000)) * time.Microsecond}, nil
}

func (r rate) String() string {
	switch {
	case r.window == 0:
		return "none"
	case r.bytes == 0:
		return "nothing may be sent"
	}
	return fmt.Sprintf("%d bytes/s: %d bytes every %v", r.perSecond(), r.bytes, r.window)
}

// perSecond returns the limit in bytes per second; 0 if there is none. The least limit is
// 1, also if nothing may be sent.
func (r rate) perSecond() uint64 {
	if r.window == 0 {
		return 0
	}
	hi, lo := bits.Mul64(r.bytes, uint64(time.Second))
	if hi >= uint64(r.window) {
		return math.MaxUint64
	}
	q, _ := bits.Div64(hi, lo, uint64(r.window))
	return max(q, 1)
}

// burst returns how much credit may accumulate.
func (r rate) burst() int64 { return max(leastBurst, r.credit()) }

// credit returns the bytes of one window, as far as they can be counted.
func (r rate) credit() int64 { return int64(min(r.bytes, math.MaxInt64/4)) }

// A limiter holds a vif to its rate, whichever of its queues the guest sends on, and over
// all its connections: a guest gets no fresh credit by connecting again.
//
// It follows Linux's netback. Credit comes a window's worth at a time. One that nobody
// waited for begins when it is asked for, and what earlier ones had left over is kept. A
// frame that is wrong, and dropped, costs its bytes too. A frame that is longer than the
// credit at hand waits, and its window ends on time,
// however late we notice; for that frame credit accumulates beyond a window's worth, up
// to rate.burst. In two things it differs: netback's windows are whole milliseconds, and
// netback gives each queue the whole rate, so that a guest has as many times the rate as
// it has queues.
//
// Queues take credit from the limiter some frames' worth at a time, and use it up without
// a lock or a look at the clock. Of several queues none starves: when credit comes, those
// whose frames wait get equal shares of the first half of it. What a queue has taken it
// keeps, at most half a window's worth in all queues together, and a frame.
type limiter struct {
	state atomic.Uint32 // 0: no limit; else the number of the limit in force; stored with mu held

	mu       sync.Mutex
	rate     rate       // guarded by mu
	number   uint32     // guarded by mu: of the last limit
	start    time.Time  // guarded by mu: of the window
	credit   int64      // guarded by mu: bytes, of those that no queue has taken
	awaited  bool       // guarded by mu: a frame waits for the window's end
	accounts []*account // guarded by mu: the queues of the connection
}

// An account is the account of one receiving half with its vif's limiter.
type account struct {
	limiter *limiter
	count   *telemetry.Block
	held    atomic.Bool // the next frame waits for credit; stored inside the gate

	// Inside the gate.
	seen   uint32 // number of the limit that credit is under
	credit int64  // bytes that may be received
	since  time.Time
	until  time.Time // while held: when more credit comes; zero: never under this limit

	missing int64 // guarded by limiter.mu: bytes that the frame that waits lacks
	granted int64 // guarded by limiter.mu: bytes that the account gets with its next draw
}

// set puts r in force and reports whether it differs from the rate before. A change gives
// a guest no credit beyond that of the new limit, as in netback (xen_net_rate_changed).
func (l *limiter) set(r rate) (changed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r == l.rate {
		return false
	}
	switch {
	case l.rate.window == 0:
		l.start, l.credit, l.awaited = time.Now(), r.credit(), false
	case l.rate.bytes == 0:
		l.start = time.Now() // no credit was due in the windows that are over
	}
	l.rate = r
	l.credit = min(l.credit, r.credit())
	if l.number++; l.number == 0 {
		l.number = 1
	}
	if r.window == 0 {
		l.state.Store(0)
	} else {
		l.state.Store(l.number)
	}
	return true
}

// now returns the rate in force.
func (l *limiter) now() rate {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rate
}

// join adds the queue to the vif's limiter.
func (p *account) join(l *limiter, count *telemetry.Block) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.limiter, p.count = l, count
	l.accounts = append(l.accounts, p)
}

// leave removes the queue, which gives back the credit that it has. The gate is shut.
func (p *account) leave() {
	l := p.limiter
	p.release(time.Now())
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, q := range l.accounts {
		if q != p {
			continue
		}
		l.accounts = append(l.accounts[:i], l.accounts[i+1:]...)
		if p.seen == l.state.Load() {
			l.credit = min(l.credit+p.credit+p.granted, l.rate.burst())
		}
		break
	}
	p.credit, p.granted, p.missing = 0, 0, 0
	l.awaited = false
	for _, q := range l.accounts {
		l.awaited = l.awaited || q.missing > 0
	}
}

// limited reports whether there is a limit, or a frame that waited for one that is gone. It
// is all that a vif without a limit pays, once per batch.
func (p *account) limited() bool { return p.limiter.state.Load()|p.seen != 0 }

// adopt takes notice of a new limit, and reports whether there is one. It is called once
// per batch.
func (p *account) adopt() bool {
	s := p.limiter.state.Load()
	if s == p.seen {
		return true
	}
	if s == 0 {
		p.release(time.Now())
		p.seen, p.credit = 0, 0
		return false
	}
	p.limiter.mu.Lock()
	defer p.limiter.mu.Unlock()
	most := p.limiter.rate.credit()
	p.credit = min(p.credit, most)
	p.granted = min(p.granted, most-p.credit) // for draw, which also says that no frame waits any longer
	p.seen, p.missing = s, 0
	return true
}

// covers reports whether there is credit for a frame of size bytes. If not, the frame
// waits until p.until.
func (p *account) covers(size int64) bool {
	return p.credit >= size || p.draw(size)
}

// draw gets credit for a frame of size bytes, and some for frames that follow.
func (p *account) draw(size int64) bool {
	l := p.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	p.credit += p.granted
	p.granted, p.missing = 0, 0
	for p.credit+l.credit < size {
		if !l.refillLocked(p, now) {
			p.credit, l.credit = p.credit+l.credit, 0
			p.missing, l.awaited = size-p.credit, true
			p.hold(now, l.start.Add(l.rate.window))
			return false
		}
	}
	most := l.credit // a single queue takes all that there is
	if n := int64(len(l.accounts)); n > 1 {
		most = min(most, max(size-p.credit, l.rate.credit()/(4*n)))
	}
	p.credit, l.credit = p.credit+most, l.credit-most
	p.release(now)
	return true
}

// refillLocked begins another window if the present one is over, with p as the one that
// asks.
func (l *limiter) refillLocked(p *account, now time.Time) bool {
	late := now.Sub(l.start.Add(l.rate.window))
	if late < 0 || l.rate.bytes == 0 {
		return false
	}
	add, burst := l.rate.credit(), l.rate.burst()
	if l.awaited { // more windows may be over by now, which is not the guest's fault
		n := late / l.rate.window
		l.start = l.start.Add((n + 1) * l.rate.window)
		if int64(n) >= burst/add {
			add = burst
		} else {
			add *= int64(n) + 1
		}
	} else {
		l.start = now
	}
	l.awaited = false
	l.credit = max(min(p.credit+l.credit+add, burst)-p.credit, l.credit)
	waiting := int64(1)
	for _, q := range l.accounts {
		if q != p && q.missing > 0 {
			waiting++
		}
	}
	fair := l.rate.credit() / (2 * int64(len(l.accounts))) // the other half is for who comes first
	for _, q := range l.accounts {
		if q != p && q.missing > 0 {
			share := min(max(q.missing, fair), l.credit/waiting)
			q.missing, q.granted, l.credit = max(q.missing-share, 0), q.granted+share, l.credit-share
			l.awaited = l.awaited || q.missing > 0
			waiting--
		}
	}
	return true
}

// hold records that the next frame waits for credit.
func (p *account) hold(now, until time.Time) {
	if p.until = until; p.limiter.rate.bytes == 0 {
		p.until = time.Time{}
	}
	if !p.held.Load() {
		p.since = now
		p.held.Store(true)
		p.count.Add(telemetry.CreditWaits, 1)
	}
}

// release records that no frame waits for credit any longer.
func (p *account) release(now time.Time) {
	if p.held.Load() {
		p.held.Store(false)
		p.count.Add(telemetry.CreditWaited, uint64(now.Sub(p.since)))
	}
}

// over reports whether a frame that is held has waited long enough, or the limit has
// changed.
func (p *account) over() bool {
	return p.limiter.state.Load() != p.seen || !p.until.IsZero() && !time.Now().Before(p.until)
}

// setRate puts the limit in force that the toolstack has written for the vif, in the values
// of its directory. Without the key there is none. A value that cannot be read changes
// nothing: the limit before it holds, if there was one. So does the limit of a vif whose
// directory is being removed, until its link is down.
func (b *back) setRate(own xenstore.Values, dir string) {
	if !own.Has(netif.KeyFrontend) {
		return
	}
	l := &b.d.limiter
	var r rate
	var err error
	if own.Has(netif.KeyRate) {
		r, err = parseRate(own[netif.KeyRate])
	}
	b.d.complain(dir, netif.KeyRate, own, err, "the limit stays as it was: "+l.now().String())
	if err != nil || !l.set(r) {
		return
	}
	b.d.log.Info("rate limit", "vif", b.d.id, "limit", r.String())
	b.d.wakeReceivers()
	b.d.rx[0].request(requestRate)
}

// wakeReceivers makes the owners of the receiving halves look at the limit again.
func (d *Device) wakeReceivers() {
	for _, rx := range d.rx {
		if p := rx.park.Load(); p != nil {
			p.wake()
		}
		rx.markMember()
	}
}
