package stat

import (
	"encoding/json"
	"errors"
	"math"
	"path"
	"strings"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/bpf"

	"charm.land/lipgloss/v2"
)

// device returns a device that sent tx frames of 100 bytes and received rx on queue 0,
// and lost some.
func device(name string, tx, rx, lost uint64) Device {
	set := telemetry.NewSet(2)
	for _, end := range []struct {
		b *telemetry.Block
		n uint64
	}{{set.TX(0), tx}, {set.RX(0), rx}} {
		end.b.Add(telemetry.Packets, end.n)
		end.b.Add(telemetry.Bytes, 100*end.n)
		end.b.Set(telemetry.RingSize, 256)
		end.b.Set(telemetry.RingUsed, 64)
	}
	set.RX(0).Drop(telemetry.DropDisconnected, lost)
	set.RX(0).Flush()
	set.TX(0).Flush()
	src := bpf.Source{Name: name, Kind: bpf.KindPins, Path: "/sys/fs/bpf/barevif/" + name}
	info, _ := parseName(name)
	return Device{Name: Clean(name), Source: src, Report: &bpf.Report{
		Source: src, Stats: set.Totals(), Info: info, Kind: bpf.KindIterator, PID: 42, Age: 300 * time.Millisecond,
		Status: telemetry.Status{State: 4, Up: true, MTU: 1500, Queues: 1, Epoch: 1, Features: telemetry.FeatureCsum | telemetry.FeatureTrusted},
	}}
}

// look returns a look during which no frames moved.
func look(devices ...Device) *Look {
	l := &Look{Time: time.Unix(1000, 0).UTC(), Devices: devices, Pairs: pairs(devices)}
	for i := range l.Pairs {
		p := &l.Pairs[i]
		f, b := &devices[p.Front].Report.Stats, &devices[p.Back].Report.Stats
		p.compare(devices, f, b, f)
	}
	return l
}

func TestVerdictOfAFlow(t *testing.T) {
	for _, c := range []struct {
		least, most int64
		verdict     Verdict
		by          int64
		words       string
	}{
		{0, 0, Balanced, 0, "balanced"},
		{-3, 20, Moving, 23, "balanced to 23, moving"},
		{0, 5, Moving, 5, "balanced to 5, moving"},
		{-1 << 40, 0, Moving, 1 << 40, "balanced to 1099511627776, moving"},
		{1, 1, Flight, 1, "1 in flight"},
		{256, 1000, Flight, 256, "256 in flight"},
		{257, 257, Unequal, 257, "unequal by 257"},
		{-1, -1, Unshown, -1, "1 not shown yet"},
		{-300, -256, Unshown, -256, "256 not shown yet"},
		{-300, -257, Unequal, -257, "unequal by -257"},
	} {
		f := Flow{Least: c.least, Most: c.most, Room: 256}
		verdict, by := f.Verdict()
		words, _ := f.words()
		if verdict != c.verdict || by != c.by || words != c.words || f.Balanced() != (verdict == Balanced || verdict == Moving) {
			t.Errorf("%d to %d: %s by %d, %q, want %s by %d, %q", c.least, c.most, verdict, by, words, c.verdict, c.by, c.words)
		}
	}
}

// Frames that move between the reads of the two ends widen the bounds. They never make a
// vif that loses nothing look as if it did.
func TestFlowsAreJudgedByWhatCanHaveBeen(t *testing.T) {
	at := func(name string, tx, rx, lost uint64) Device { return device(name, tx, rx, lost) }
	f1, b, f2 := at("front-1-2-0", 1000, 500, 1), at("back-2-1-0", 520, 1009, 3), at("front-1-2-0", 1020, 530, 1)
	p := Pair{Front: 0, Back: 1}
	p.compare([]Device{f1, b}, &f1.Report.Stats, &b.Report.Stats, &f2.Report.Stats)
	for i, want := range [2]Flow{
		{From: "front-1-2-0", To: "back-2-1-0", Sent: 1000, Received: 1009, Dropped: 3, Least: -12, Most: 8, Room: 256 + unshown},
		{From: "back-2-1-0", To: "front-1-2-0", Sent: 520, Received: 500, Dropped: 1, Least: -11, Most: 19, Room: 256 + unshown},
	} {
		if p.Flows[i] != want {
			t.Errorf("%+v, want %+v", p.Flows[i], want)
		}
		if v, _ := p.Flows[i].Verdict(); v != Moving {
			t.Errorf("flow %d is %s", i, v)
		}
	}
}

func TestEndsOfOneVifArePaired(t *testing.T) {
	l := look(device("front-1-2-0", 10, 5, 0), device("front-1-2-1", 9, 9, 0), device("back-2-1-0", 5, 8, 2), device("back-7-1-1", 0, 0, 0))
	if len(l.Pairs) != 1 || l.Pairs[0].Front != 0 || l.Pairs[0].Back != 2 {
		t.Fatalf("pairs %+v", l.Pairs)
	}
	if f := l.Pairs[0].Flows; !f[0].Balanced() || !f[1].Balanced() || f[0].Dropped != 2 {
		t.Errorf("flows %+v", f)
	}
	twice := look(device("front-1-2-0", 10, 5, 0), device("front-1-2-0", 10, 5, 0), device("back-2-1-0", 5, 8, 2))
	if len(twice.Pairs) != 0 {
		t.Errorf("an end that is there twice is paired: %+v", twice.Pairs)
	}
}

func TestNamesAreReadAsTheyWereWritten(t *testing.T) {
	for _, info := range []telemetry.Info{
		{Role: telemetry.Frontend, Own: 65535, Peer: 0, Handle: math.MaxUint32}, {Role: telemetry.Backend, Own: 1, Peer: 2},
	} {
		if got, ok := parseName(info.Name()); !ok || got != info {
			t.Errorf("%s is %+v", info.Name(), got)
		}
	}
	for _, name := range []string{"", "front-1-2", "front-1-2-3-4", "side-1-2-3", "front-70000-2-3", "front-01-2-3", "front--1-2"} {
		if _, ok := parseName(name); ok {
			t.Errorf("%q is taken for a name", name)
		}
	}
}

// plain is a sheet of unlimited width.
var plain = Sheet{Paint: NoPaint}

// Every string of another process may hold terminal control codes.
func TestForeignStringsDoNotReachTheTerminal(t *testing.T) {
	evil := "x\x1b[2J\n\u202e\xffy"
	d := device("front-1-2-0", 1, 1, 1)
	d.Name, d.Source.Path = Clean(evil), evil
	d.Report.Kind, d.Report.Reason = evil, evil
	broken := Device{Name: Clean(evil), Err: errors.New(evil)}
	var b strings.Builder
	if err := Write(&b, look(d, broken), plain); err != nil {
		t.Fatal(err)
	}
	WriteTable(&b, "", []*Device{&d, &broken}, true, plain)
	for _, bad := range []string{"\x1b", "\u202e", "\xff"} {
		if strings.Contains(b.String(), bad) {
			t.Errorf("%q got through", bad)
		}
	}
	if got := Clean(strings.Repeat("a", 1000)); len(got) > 130 {
		t.Errorf("%d bytes of a name", len(got))
	}
}

func TestCountThatWentDownGivesNoRate(t *testing.T) {
	d, before := device("front-1-2-0", 10, 20, 0), device("front-1-2-0", 20, 10, 0)
	d.before, d.Span = &before.Report.Stats, 2*time.Second
	if r, ok := d.Rate(All, telemetry.TX, Packets); ok {
		t.Errorf("%v frames/s sent", r)
	}
	if r, ok := d.Rate(All, telemetry.RX, Packets); !ok || r != 5 {
		t.Errorf("%v frames/s received, %v", r, ok)
	}
}

func TestBaselineIsSubtractedAndNeverWraps(t *testing.T) {
	d, base := device("front-1-2-0", 10, 20, 0), device("front-1-2-0", 20, 15, 0)
	d.base = &base.Report.Stats
	if tx, rx := d.Count(All, telemetry.TX, Packets), d.Count(0, telemetry.RX, Packets); tx != 0 || rx != 5 {
		t.Errorf("tx %d, rx %d", tx, rx)
	}
}

func TestUintKeepsEveryDigit(t *testing.T) {
	for _, c := range []struct {
		n    Uint
		want string
	}{{0, "0"}, {1 << 53, "9007199254740992"}, {1<<53 + 1, `"9007199254740993"`}, {math.MaxUint64, `"18446744073709551615"`}} {
		b, err := json.Marshal(c.n)
		var back Uint
		if err != nil || string(b) != c.want || json.Unmarshal(b, &back) != nil || back != c.n {
			t.Errorf("%d is %s and back %d, %v", uint64(c.n), b, back, err)
		}
	}
	for _, bad := range []string{`"-1"`, `-1`, `1.5`, `""`, `"x"`, `"18446744073709551616"`} {
		var n Uint
		if json.Unmarshal([]byte(bad), &n) == nil {
			t.Errorf("%s is taken for %d", bad, n)
		}
	}
}

func TestJSONNamesEveryField(t *testing.T) {
	b, err := json.Marshal(look(device("front-1-2-0", 10, 5, 3), device("back-2-1-0", 5, 10, 0)).JSON())
	if err != nil {
		t.Fatal(err)
	}
	var j JSON
	if err := json.Unmarshal(b, &j); err != nil {
		t.Fatal(err)
	}
	d := j.Devices[0]
	for _, dir := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			_, c := d.Totals.Counters[f.FullName(dir)]
			_, g := d.Totals.Gauges[f.FullName(dir)]
			_, h := d.Totals.Histograms[f.FullName(dir)]
			if c != (f.Kind == telemetry.KindCounter) || g != (f.Kind == telemetry.KindGauge) || h != (f.Kind == telemetry.KindHistogram) {
				t.Errorf("%s, a %s, is counter %v, gauge %v, histogram %v", f.FullName(dir), f.Kind, c, g, h)
			}
		}
	}
	if d.Role != "frontend" || *d.Own != 1 || d.Totals.Counters["rx_drop_disconnected"] != 3 || d.Status.State != "XenbusStateConnected" ||
		strings.Join(d.Status.Features, " ") != "csum trusted" || d.Rates != nil || len(j.Pairs) != 1 {
		t.Errorf("device %+v, status %+v", d, d.Status)
	}
}

func TestTextSaysWhatMatters(t *testing.T) {
	stale := device("back-9-1-0", 1, 1, 0)
	stale.Stale, stale.Report.Torn = true, true
	stale.Report.Events = []telemetry.Event{{Seq: 1, Time: time.Unix(990, 0), Kind: telemetry.EventTamper, Queue: 1, A: 5}}
	var b strings.Builder
	l := look(device("front-1-2-0", 1234567, 5, 3), device("back-2-1-0", 8, 1234500, 60), stale)
	if err := Write(&b, l, plain); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"front-1-2-0  frontend in domain 1 of vif 0, backend in domain 2\n",
		"  Connected, up; process 42, heartbeat 0.3 s ago\n  MAC 00:00:00:00:00:00, MTU 1500, 1 of 2 queues, connection 1\n  agreed: csum trusted\n",
		"  counters in bpf+pins+iterator, /sys/fs/bpf/barevif/front-1-2-0\n",
		"1 234 567  123 456 700", "██······  64/256", "rx lost: disconnected 3\n",
		"stale: was Connected, torn", "10.0 s ago: tamper on queue 1: 5 words",
		"7 in flight", "balanced\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

func TestColumnsLineUp(t *testing.T) {
	d := device("front-1-2-0", math.MaxUint64/100, 5, 3)
	var b strings.Builder
	WriteTable(&b, "", []*Device{&d}, true, plain)
	lines := strings.Split(strings.TrimRight(b.String(), "\n"), "\n")
	for _, l := range lines {
		if len([]rune(l)) != len([]rune(lines[0])) {
			t.Fatalf("lines of different length:\n%s", b.String())
		}
	}
}

// A narrow terminal cuts off nothing important: columns are dropped, and lines fold.
func TestNarrowSheetsKeepWhatMatters(t *testing.T) {
	d, before := device("front-65535-65535-4294967295", 1<<44, 1<<44, 3), device("front-65535-65535-4294967295", 0, 0, 0)
	d.before, d.Span = &before.Report.Stats, time.Second
	d.Report.Status.Features = 1<<len(telemetry.FeatureNames) - 1
	d.Report.Reason = strings.Repeat("no BPF file system is mounted; ", 5)
	b := device("back-65535-65535-4294967295", 1<<44, 1<<44, 0)
	for _, width := range []int{80, 100, 140} {
		var text strings.Builder
		if err := Write(&text, look(d, b), Sheet{Width: width, Paint: NoPaint}); err != nil {
			t.Fatal(err)
		}
		own, _, _ := strings.Cut(text.String(), "\n\nfrom")
		for _, line := range strings.Split(own, "\n") {
			if n := len([]rune(line)); n > width && !strings.Contains(line, "domain") {
				t.Errorf("%d columns of %d: %q", n, width, line)
			}
		}
		for _, want := range []string{"17.6T", "14.1P", " 64/256", "frames/s", "ring\n", "multicast_control control_ring", "MTU 1500"} {
			if !strings.Contains(text.String(), want) {
				t.Errorf("%d columns: no %q in\n%s", width, want, &text)
			}
		}
		front, _, _ := strings.Cut(own, "\n\n")
		if wide := strings.Contains(front, "notified"); wide != (width > 80) {
			t.Errorf("%d columns: notified is shown: %v\n%s", width, wide, own)
		}
	}
}

// A rate limit has a line, in which is what it costs the guest.
func TestALimitIsShown(t *testing.T) {
	set := telemetry.NewSet(2)
	set.RX(0).Set(telemetry.RateLimit, 26214400)
	for q := range 2 {
		set.RX(q).Add(telemetry.CreditWaits, 1000)
		set.RX(q).Add(telemetry.CreditWaited, uint64(1500*time.Millisecond))
		set.RX(q).Flush()
	}
	limited, free := device("back-2-1-0", 1, 1, 0), device("back-2-3-0", 1, 1, 0)
	limited.Report.Stats = set.Totals()
	for d, want := range map[*Device]string{&limited: "  rx limited to 26 214 400 bytes/s: frames waited 2 000 times, 3.0 s in all\n", &free: ""} {
		var text strings.Builder
		if err := Write(&text, look(*d), Sheet{Paint: NoPaint}); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(text.String(), "limited"); got != (want != "") || !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, &text)
		}
	}
}

func TestAxesHaveRoundSteps(t *testing.T) {
	for step, want := range map[float64]float64{0: 1, .3: 1, 1: 1, 1.01: 1.5, 7: 8, 8.1: 10, 8884: 10000, 1234: 1500, 2.2e6: 2.5e6, 9e9: 1e10} {
		if got := round(step); got != want {
			t.Errorf("%v is rounded to %v, want %v", step, got, want)
		}
	}
}

func TestNumbersAreShort(t *testing.T) {
	for _, c := range []struct {
		f    float64
		want string
	}{{0, "0"}, {7, "7"}, {7.25, "7.2"}, {999, "999"}, {999.7, "1000"}, {1000, "1.00k"}, {9994, "9.99k"}, {9996, "10.0k"},
		{99949, "99.9k"}, {99960, "100k"}, {999600, "1.00M"}, {1.25e9, "1.25G"}, {1e21, "1000E"}} {
		if got := SI(c.f); got != c.want {
			t.Errorf("%v is %s, want %s", c.f, got, c.want)
		}
	}
	for _, c := range []struct {
		used float64
		size uint64
		want string
	}{{0, 0, "-"}, {0, 256, "········   0/256"}, {1, 256, "▏·······   1/256"}, {256, 256, "████████ 256/256"}, {1e9, 8, "████████ 1000000000/8"}, {132, 256, "████▏··· 132/256"}} {
		if got := Bar(c.used, c.size); got != c.want {
			t.Errorf("%v of %d is %q, want %q", c.used, c.size, got, c.want)
		}
	}
}

func TestHistoryIsBoundedAndForgets(t *testing.T) {
	h := NewHistory(3)
	for i := range uint64(10) {
		d, before := device("front-1-2-0", 10*(i+1), 0, 0), device("front-1-2-0", 10*i, 0, 0)
		d.before, d.Span = &before.Report.Stats, time.Second
		h.Add(look(d))
	}
	s := h.Series()
	if len(s) != 2 || s[0].Queue != All || len(s[0].Samples) != 3 || s[0].Samples[2].TxFrames != 10 || s[0].Samples[2].TxBits != 8000 {
		t.Fatalf("series %+v", s)
	}
	if !s[0].Ring || s[0].Samples[2].TxUsed != 64 {
		t.Errorf("ring: %v, %v slots", s[0].Ring, s[0].Samples[2].TxUsed)
	}
	for _, width := range []int{80, 140} {
		for _, colour := range []bool{true, false} {
			p := Plot(h, width, 5, colour)
			if !strings.Contains(p, "front-1-2-0: frames/s, last") || !strings.Contains(p, "ring slots in use") || !strings.Contains(p, "256 ┤") || strings.Contains(p, "\x1b") != colour {
				t.Errorf("plot, colours %v\n%s", colour, p)
			}
			for line := range strings.Lines(p) {
				if n := lipgloss.Width(strings.TrimSuffix(line, "\n")); n > width {
					t.Errorf("plot, colours %v: %d columns of %d: %q", colour, n, width, line)
				}
			}
		}
	}
	h.Add(look())
	if len(h.Series()) != 0 {
		t.Error("a device that is gone is kept")
	}
}

// The Watcher reads the mirror of a Store in this process, of whatever kind it is here.
func TestWatcherSeesRatesAndResets(t *testing.T) {
	info := telemetry.Info{Role: telemetry.Frontend, Own: 61011, Peer: 61012, Handle: 3}
	root := path.Join(t.TempDir(), "none")
	set := telemetry.NewSet(1)
	set.Open(&bpf.Store{Root: root}, info)
	defer set.Close()
	if kind, reason := set.Backend(); kind == "heap" {
		t.Fatalf("counters cannot be seen from outside: %s", reason)
	}
	w, err := NewWatcher(root, "front-61011-*")
	if err != nil {
		t.Fatal(err)
	}
	count := func(n uint64) *Device {
		t.Helper()
		set.TX(0).Add(telemetry.Packets, n)
		set.TX(0).Flush()
		l := w.Look()
		if len(l.Devices) != 1 || l.Devices[0].Err != nil {
			t.Fatalf("devices %+v, errors %v", l.Devices, l.Errors)
		}
		return &l.Devices[0]
	}
	d := count(5)
	if _, known := d.Rate(All, telemetry.TX, Packets); known || d.Count(All, telemetry.TX, Packets) != 5 || d.Stale {
		t.Errorf("first look: %+v", d)
	}
	if r, known := count(7).Rate(All, telemetry.TX, Packets); !known || r <= 0 {
		t.Errorf("second look: %v frames/s, %v", r, known)
	}
	w.Reset()
	for range 2 { // the baseline does not move
		d = count(2)
	}
	if got := d.Count(All, telemetry.TX, Packets); got != 4 {
		t.Errorf("%d frames since the reset, want 4", got)
	}
	if got := d.Report.Stats.TX.Get(telemetry.Packets); got != 16 {
		t.Errorf("%d frames in all: the device was reset", got)
	}
	if _, err := NewWatcher("", "[x"); !errors.Is(err, path.ErrBadPattern) {
		t.Errorf("a bad pattern: %v", err)
	}
}

// A number that was never measured must not look like an empty ring.
func TestRingThatWasNotMeasuredIsNotShownEmpty(t *testing.T) {
	set := telemetry.NewSet(1)
	set.TX(0).Add(telemetry.Packets, 1)
	set.TX(0).Set(telemetry.RingSize, 256)
	set.TX(0).Flush()
	d := device("front-1-2-0", 0, 0, 0)
	d.Report.Stats = set.Totals()
	if used, known := d.Occupancy(All, telemetry.TX); known {
		t.Errorf("%v slots in use", used)
	}
	d.before, d.Span = &telemetry.Stats{Queues: make([]telemetry.Queue, 1)}, time.Second
	h := NewHistory(3)
	h.Add(look(d))
	h.Add(look(d))
	if p := Plot(h, 60, 5, false); !strings.Contains(p, "not been measured") {
		t.Errorf("plot\n%s", p)
	}
	set.TX(0).Observe(telemetry.RingOccupancy, 12)
	set.TX(0).Flush()
	d.Report.Stats = set.Totals()
	if used, known := d.Occupancy(All, telemetry.TX); !known || used != 12 {
		t.Errorf("%v slots in use, %v, want 12", used, known)
	}
}

// A frontend's receive ring is full at rest. Any other full ring is saturated, and its
// bar shows that.
func TestBuffersPostedAreNoLoad(t *testing.T) {
	for name, bars := range map[string]int{"front-1-2-0": 1, "back-2-1-0": 2} {
		d := device(name, 5, 5, 0)
		var b strings.Builder
		if err := Write(&b, look(d), Sheet{Paint: NoPaint}); err != nil {
			t.Fatal(err)
		}
		posted := strings.Count(b.String(), "posted    64/256")
		if got := strings.Count(b.String(), "██······  64/256"); got != bars || posted != 2-bars {
			t.Errorf("%s: %d bars, %d posted in\n%s", name, got, posted, &b)
		}
	}
}

func TestNamesPeopleTypeAreKnown(t *testing.T) {
	for _, c := range []struct {
		alias, name string
		want        bool
	}{
		{"vif1.0", "back-2-1-0", true}, {"vif1.0", "front-1-2-0", false}, {"vif2.0", "back-2-1-0", false},
		{"1.0", "back-2-1-0", true}, {"1.0", "front-1-2-0", true}, {"2.0", "back-2-1-0", false}, {"1.00", "back-2-1-0", false},
		{"xvif0", "front-1-2-0", true}, {"xvif0", "back-2-1-0", false}, {"xvif", "front-1-2-0", false},
		{"1.0", "somebody-1-0", false}, {"", "front-1-2-0", false},
	} {
		if got := called(c.alias, c.name); got != c.want {
			t.Errorf("%q is %s: %t", c.alias, c.name, got)
		}
	}
}
