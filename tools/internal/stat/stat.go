// Package stat reads the counters of every vif of this machine from outside the processes
// that own them, and shows them as text, JSON and plots.
//
// It needs only read access: to pins, their text or a memfd. Other processes wrote this
// data. It is shown but not trusted: a name is cleaned before it reaches a terminal, and
// a count that went down gives no rate.
//
// A [Watcher] has one owner. A [Look] is immutable once made.
package stat

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/tools/internal/users"

	"golang.org/x/sys/unix"
)

// StaleAge is the greatest age of a heartbeat that comes once a second.
const StaleAge = 3 * time.Second

// All is the queue that stands for the sum of all queues.
const All = -1

// A Look holds the devices found at one time.
type Look struct {
	Time    time.Time
	Devices []Device // by name
	Pairs   []Pair   // vifs with both ends among Devices
	Errors  []error  // errors of searching for devices
	Hidden  int      // matching devices of other users that were left out
}

// A Device is one source of counters and its report.
type Device struct {
	Name   string // cleaned: printable characters only
	Source bpf.Source
	Report *bpf.Report // nil if Err is set
	Err    error       // why it could not be read
	Stale  bool        // no heartbeat of its owner for StaleAge
	Span   time.Duration

	// Foreign says that any user of the machine may have made the data up. A device of
	// this user, of root or of a named user is not foreign.
	Foreign bool
	owned   bool // devices of several users are shown, so name the owner

	before *telemetry.Stats // counters of the same owner, Span ago; nil: not seen before
	base   *telemetry.Stats // baseline of Count; nil: zero
}

// A Get selects one number of a block.
type Get func(*telemetry.Values) uint64

// Lost returns the number of frames lost, for whatever reason.
func Lost(v *telemetry.Values) uint64 { return v.Dropped() + v.Errors() }

// Packets, Bytes and Sent are the numbers that tables and plots show.
func Packets(v *telemetry.Values) uint64 { return v.Get(telemetry.Packets) }
func Bytes(v *telemetry.Values) uint64   { return v.Get(telemetry.Bytes) }
func Sent(v *telemetry.Values) uint64    { return v.Get(telemetry.NotifiesSent) }

// Values returns the block of one direction of a queue, or of All.
func Values(s *telemetry.Stats, queue int, d telemetry.Dir) *telemetry.Values {
	switch {
	case queue == All && d == telemetry.RX:
		return &s.RX
	case queue == All:
		return &s.TX
	case d == telemetry.RX:
		return &s.Queues[queue].RX
	}
	return &s.Queues[queue].TX
}

// Count returns the number since the device was made, or since [Watcher.Reset].
func (d *Device) Count(queue int, dir telemetry.Dir, get Get) uint64 {
	n := get(Values(&d.Report.Stats, queue, dir))
	if d.base == nil {
		return n
	}
	return n - min(n, get(Values(d.base, queue, dir)))
}

// Rate returns the growth of the number per second. It is unknown at the first look, and
// when the count went down, which means that the owner is another process.
func (d *Device) Rate(queue int, dir telemetry.Dir, get Get) (perSecond float64, known bool) {
	if d.before == nil || d.Span <= 0 {
		return 0, false
	}
	now, then := get(Values(&d.Report.Stats, queue, dir)), get(Values(d.before, queue, dir))
	if now < then {
		return 0, false
	}
	return float64(now-then) / d.Span.Seconds(), true
}

// Batch returns the mean number of frames moved at a time: since the look before, or ever
// at the first look. It is unknown if none moved.
func (d *Device) Batch(queue int, dir telemetry.Dir) (mean float64, known bool) {
	return d.mean("batch_size", queue, dir)
}

// Occupancy returns the number of slots in use, as the mean over the owner's polls since
// the look before. Without a poll since then it is the number at the last poll. It is
// unknown if the owner has never polled and found no slot in use.
func (d *Device) Occupancy(queue int, dir telemetry.Dir) (slots float64, known bool) {
	if mean, ok := d.mean("ring_occupancy", queue, dir); ok && d.before != nil {
		return mean, true
	}
	v := Values(&d.Report.Stats, queue, dir)
	looks, _ := observed("ring_occupancy", v)
	used := v.Gauge(telemetry.RingUsed)
	return float64(used), looks > 0 || max(used, v.Gauge(telemetry.RingUsedMax)) > 0
}

// mean returns the mean of a histogram's values since the look before, or ever.
func (d *Device) mean(name string, queue int, dir telemetry.Dir) (mean float64, known bool) {
	n, sum := observed(name, Values(&d.Report.Stats, queue, dir))
	if d.before != nil {
		n0, sum0 := observed(name, Values(d.before, queue, dir))
		if n < n0 || sum < sum0 {
			return 0, false
		}
		n, sum = n-n0, sum-sum0
	}
	if n == 0 {
		return 0, false
	}
	return float64(sum) / float64(n), true
}

func observed(name string, v *telemetry.Values) (n, sum uint64) {
	for _, f := range telemetry.Fields() {
		if f.Kind != telemetry.KindHistogram || f.Name != name {
			continue
		}
		var buckets []uint64
		buckets, sum = v.Histogram(f)
		for _, b := range buckets {
			n += b
		}
	}
	return n, sum
}

// Info returns which end of which vif the device is. A source with only counters tells
// this by its name.
func (d *Device) Info() (telemetry.Info, bool) {
	if d.Report != nil && d.Report.Source.Kind != bpf.KindMetrics {
		return d.Report.Info, true
	}
	return parseName(d.Source.Name)
}

// parseName parses the result of telemetry.Info.Name.
func parseName(name string) (telemetry.Info, bool) {
	part := strings.Split(name, "-")
	if len(part) != 4 {
		return telemetry.Info{}, false
	}
	var n [3]uint64
	for i := range n {
		var err error
		if n[i], err = strconv.ParseUint(part[i+1], 10, []int{16, 16, 32}[i]); err != nil {
			return telemetry.Info{}, false
		}
	}
	info := telemetry.Info{Own: uint16(n[0]), Peer: uint16(n[1]), Handle: uint32(n[2])}
	if part[0] == "back" {
		info.Role = telemetry.Backend
	}
	return info, info.Name() == name
}

// Queues returns the queues to show: those in use and those that have counted frames.
func (d *Device) Queues() []int {
	var out []int
	for q := range d.Report.Stats.Queues {
		v := &d.Report.Stats.Queues[q]
		used := q < int(d.Report.Status.Queues) || Packets(&v.RX)+Packets(&v.TX)+Lost(&v.RX)+Lost(&v.TX) > 0
		if used || q == 0 {
			out = append(out, q)
		}
	}
	return out
}

// A Watcher reads devices repeatedly.
type Watcher struct {
	// AllUsers shows the devices of every user. Users are further users, by uid, whose
	// devices are shown and trusted like this user's own and root's. Set them before the
	// first Look.
	AllUsers bool
	Users    []int

	root     string
	patterns []string

	sources  []bpf.Source
	believed []int // uids that trusts accepts; see believe
	hidden   int
	listed   time.Time
	listErr  error
	last     map[key]seen
}

// A key identifies one life of one device.
type key struct {
	source bpf.Source
	pid    int
	start  int64
}

type seen struct {
	at          time.Time
	stats, base *telemetry.Stats
}

// NewWatcher watches the devices below root (see [bpf.List]) whose name is one of
// patterns, or matches one as in a shell: "front-*". A pattern may also be a name that
// people use for the device: see called. Without patterns it watches all. The error is
// path.ErrBadPattern.
func NewWatcher(root string, patterns ...string) (*Watcher, error) {
	for _, p := range patterns {
		if _, err := path.Match(p, ""); err != nil {
			return nil, fmt.Errorf("%q: %w", p, err)
		}
	}
	return &Watcher{root: root, patterns: patterns, last: map[key]seen{}}, nil
}

// listEvery is the interval between searches of the machine, which read all of /proc.
const listEvery = time.Second

// Look reads every device once.
func (w *Watcher) Look() *Look {
	if time.Since(w.listed) >= listEvery {
		w.sources, w.listErr = bpf.List(w.root)
		w.listed = time.Now()
		w.sources = slices.DeleteFunc(w.sources, func(s bpf.Source) bool { return !w.wants(s.Name) })
		w.believe()
		w.leaveOut()
		slices.SortFunc(w.sources, func(a, b bpf.Source) int {
			return cmp.Or(CompareNames(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Path, b.Path))
		})
	}
	l := &Look{Time: time.Now(), Hidden: w.hidden}
	if w.listErr != nil {
		l.Errors = append(l.Errors, w.listErr)
	}
	now := make(map[key]seen, len(w.last))
	for _, src := range w.sources {
		d, k, s := w.read(src)
		if s != nil {
			now[k] = *s
		}
		l.Devices = append(l.Devices, d)
	}
	w.last = now
	for _, p := range pairs(l.Devices) {
		// Skip a pair with an end that has gone since.
		if p.measure(l.Devices) == nil {
			l.Pairs = append(l.Pairs, p)
		}
	}
	return l
}

// read opens the source anew, because the pins of a restarted device lead to other maps.
func (w *Watcher) read(src bpf.Source) (Device, key, *seen) {
	d := Device{Name: Clean(src.Name), Source: src, Foreign: !w.trusts(src.UID), owned: w.AllUsers || len(w.Users) > 0}
	r, err := bpf.Open(src)
	if err == nil {
		d.Report, err = r.Read()
		err = errors.Join(err, r.Close())
	}
	if err != nil {
		d.Err, d.Report = err, nil
		return d, key{}, nil
	}
	at := time.Now()
	rep := d.Report
	d.Stale = src.Kind != bpf.KindMetrics && (rep.Age > StaleAge || rep.Age < 0)
	k := key{src, rep.PID, rep.Start.UnixNano()}
	next := &seen{at: at, stats: &rep.Stats}
	if old, ok := w.last[k]; ok && len(old.stats.Queues) == len(rep.Stats.Queues) {
		d.before, d.Span = old.stats, at.Sub(old.at)
		if old.base != nil && len(old.base.Queues) == len(rep.Stats.Queues) {
			d.base, next.base = old.base, old.base
		}
	}
	return d, k, next
}

// mostForeign is how many devices of one untrusted user are read.
const mostForeign = 64

// leaveOut removes the sources of untrusted users that were not asked for. A user with
// many made-up devices must not spoil the others' overview.
func (w *Watcher) leaveOut() {
	w.hidden = 0
	of := map[int]int{}
	w.sources = slices.DeleteFunc(w.sources, func(s bpf.Source) bool {
		if w.trusts(s.UID) {
			return false
		}
		of[s.UID]++
		if w.AllUsers && of[s.UID] <= mostForeign {
			return false
		}
		w.hidden++
		return true
	})
}

// believe records the users whose devices are trusted: this user, root, the named ones,
// and the one to whom root gave the directory of the pins.
func (w *Watcher) believe() {
	w.believed = append(append(users.Own(), 0), w.Users...)
	if uid, ok := keeper(w.root); ok {
		w.believed = append(w.believed, uid)
	}
}

func (w *Watcher) trusts(uid int) bool { return uid >= 0 && slices.Contains(w.believed, uid) }

// Keeper returns the user to whom root gave the default directory of the pins: what that
// user shows is believed like root's.
func Keeper() (uid int, ok bool) { return keeper("") }

// keeper returns the owner of the directory of the pins, if only root can have made it.
func keeper(root string) (uid int, ok bool) {
	if root == "" {
		root = bpf.DefaultRoot
	}
	var dir, parent unix.Stat_t
	if unix.Lstat(root, &dir) != nil || unix.Lstat(filepath.Dir(filepath.Clean(root)), &parent) != nil {
		return 0, false
	}
	ok = parent.Uid == 0 && parent.Mode&0o022 == 0 && dir.Mode&unix.S_IFMT == unix.S_IFDIR
	return int(dir.Uid), ok
}

// Reset makes Count start from zero, in this Watcher only: the devices do not change.
func (w *Watcher) Reset() {
	for k, s := range w.last {
		s.base = s.stats
		w.last[k] = s
	}
}

func (w *Watcher) wants(name string) bool {
	if len(w.patterns) == 0 {
		return true
	}
	return slices.ContainsFunc(w.patterns, func(p string) bool { return Named(p, name) })
}

// Named reports whether pattern means the device with this name: it is the name, matches it
// as in a shell, or is a name that people use for it, such as "vif1.0".
func Named(pattern, name string) bool {
	ok, _ := path.Match(pattern, name)
	return ok || pattern == name || called(pattern, name)
}

// called reports whether people use alias for the device with this name. "vif1.0" is the
// interface of the backend of domain 1's vif 0, as Linux's netback and "barevif back"
// name it. "1.0" is the vif, that is both ends. "xvif0" is the interface of "barevif
// attach" for the frontend of vif 0.
func called(alias, name string) bool {
	info, ok := parseName(name)
	if !ok {
		return false
	}
	front, handle := info.Own, strconv.FormatUint(uint64(info.Handle), 10)
	if info.Role == telemetry.Backend {
		front = info.Peer
	}
	vif := strconv.Itoa(int(front)) + "." + handle
	switch info.Role {
	case telemetry.Backend:
		return alias == vif || alias == "vif"+vif
	default:
		return alias == vif || alias == "xvif"+handle
	}
}

// CompareNames sorts front-2 before front-10.
func CompareNames(a, b string) int {
	ia, oka := parseName(a)
	ib, okb := parseName(b)
	if !oka || !okb {
		return cmp.Compare(a, b)
	}
	return cmp.Or(cmp.Compare(ia.Role, ib.Role), cmp.Compare(ia.Own, ib.Own),
		cmp.Compare(ia.Peer, ib.Peer), cmp.Compare(ia.Handle, ib.Handle))
}

// Label returns a name that identifies the device: since two users can have devices of
// the same name, the label of a foreign one names its user.
func (d *Device) Label() string {
	if !d.Foreign {
		return d.Name
	}
	if d.Source.UID < 0 {
		return d.Name + "@unknown"
	}
	return d.Name + "@" + strconv.Itoa(d.Source.UID)
}

// Labelled returns the readable devices, one for each label. Of several it takes the one
// in the place that is hardest to write: pins before maps, text and memfds, and root's
// before other users'.
func (l *Look) Labelled() []*Device {
	rank := map[string]int{bpf.KindPins: 0, bpf.KindMaps: 1, bpf.KindMetrics: 2, bpf.KindMemfd: 3}
	best := map[string]*Device{}
	for i := range l.Devices {
		d := &l.Devices[i]
		if d.Report == nil {
			continue
		}
		old := best[d.Label()]
		if old == nil || cmp.Or(cmp.Compare(rank[d.Source.Kind], rank[old.Source.Kind]), cmp.Compare(d.Source.UID, old.Source.UID)) < 0 {
			best[d.Label()] = d
		}
	}
	var out []*Device
	for i := range l.Devices {
		if d := &l.Devices[i]; best[d.Label()] == d {
			out = append(out, d)
		}
	}
	return out
}

// Clean makes another process's string safe for a terminal: one line of limited length,
// without control codes.
func Clean(s string) string { return CleanTo(s, 120) }

// CleanTo is Clean for up to most characters.
func CleanTo(s string, most int) string {
	var b strings.Builder
	n := 0
	for _, c := range s {
		if n++; n > most {
			b.WriteString("...")
			break
		}
		if !unicode.IsPrint(c) || c == unicode.ReplacementChar {
			c = '?'
		}
		b.WriteRune(c)
	}
	return b.String()
}
