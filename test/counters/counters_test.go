package counters

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/telemetry/bpf/bpftest"
	"barevif/telemetry/openmetrics"
)

const (
	frontPins = bpf.DefaultRoot + "/" + frontName
	backPins  = bpf.DefaultRoot + "/" + backName
)

// traffic is frames moved by exact counts: sizes[i] bytes each, in batches.
type traffic struct {
	batch, batches, size int
}

func (tr traffic) frames() uint64 { return uint64(tr.batch * tr.batches) }
func (tr traffic) bytes() uint64  { return tr.frames() * uint64(tr.size) }

var (
	toBack  = traffic{batch: 7, batches: 191, size: 1500}
	toFront = traffic{batch: 13, batches: 77, size: 64}
)

// exercised is a wire over which toBack and toFront have gone, counted in maps.
func exercised(t *testing.T, s *bpf.Store) *pvnettest.Wire {
	t.Helper()
	w := newWire(t, pvnet.Config{Counters: s}, pvnet.Config{Counters: s})
	for _, d := range []*pvnet.Device{w.Front, w.Back} {
		if kind, reason := d.Counters().Backend(); kind != pinned() {
			t.Fatalf("counters are in %s (%s)", kind, reason)
		}
	}
	for _, way := range []struct {
		traffic
		*path
	}{
		{toBack, newPath(t, w.Front, w.Back, 0, toBack.batch)},
		{toFront, newPath(t, w.Back, w.Front, 0, toFront.batch)},
	} {
		for range way.batches {
			way.move(t, way.size)
		}
	}
	// Owners that do nothing any more publish with the next tick.
	bpftest.Eventually(t, "the counts are published", func() bool {
		f, b := w.Front.Stats(), w.Back.Stats()
		return f.TX.Get(telemetry.Packets) == toBack.frames() && b.RX.Get(telemetry.Packets) == toBack.frames() &&
			b.TX.Get(telemetry.Packets) == toFront.frames() && f.RX.Get(telemetry.Packets) == toFront.frames()
	})
	return w
}

// pinned is the kind of mirror that a device gets here.
func pinned() string {
	if bpftest.Iterators() != nil {
		return bpf.KindPins
	}
	return bpf.KindIterator
}

// bpftool gives the named counters, as bpftool prints them.
func bpftool(t *testing.T, dir string) Dump {
	t.Helper()
	d, err := ParseDump([]byte(bpftest.Run(t, bpftest.Tool(t, "bpftool"), "-j", "map", "dump", "pinned", dir+"/counters")))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func number(t *testing.T, d Dump, name string) uint64 {
	t.Helper()
	n, err := d.Total(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestBpftoolShowsTheFramesThatWereSent(t *testing.T) {
	bpftest.Need(t)
	bpftest.Tool(t, "bpftool")
	exercised(t, &bpf.Store{})
	front, back := bpftool(t, frontPins), bpftool(t, backPins)
	for _, c := range []struct {
		who  string
		have Dump
		name string
		want uint64
	}{
		{"frontend", front, "tx_packets", toBack.frames()},
		{"frontend", front, "tx_bytes", toBack.bytes()},
		{"frontend", front, "rx_packets", toFront.frames()},
		{"frontend", front, "rx_bytes", toFront.bytes()},
		{"backend", back, "rx_packets", toBack.frames()},
		{"backend", back, "rx_bytes", toBack.bytes()},
		{"backend", back, "tx_packets", toFront.frames()},
		{"backend", back, "tx_bytes", toFront.bytes()},
	} {
		if got := number(t, c.have, c.name); got != c.want {
			t.Errorf("%s: %s is %d, want %d", c.who, c.name, got, c.want)
		}
	}
	balance(t, "to the backend", front, back)
	balance(t, "to the frontend", back, front)
}

// balance checks sent = received + dropped, and that drops are their reasons.
func balance(t *testing.T, way string, from, to Dump) {
	t.Helper()
	sent, received := number(t, from, "tx_packets"), number(t, to, "rx_packets")
	var reasons uint64
	for _, f := range telemetry.Fields() {
		if f.SumIn != "" {
			reasons += number(t, to, f.FullName(telemetry.RX))
		}
	}
	if dropped := number(t, to, "rx_dropped") + number(t, to, "rx_errors"); dropped != reasons || sent != received+dropped {
		t.Errorf("%s: sent %d, received %d, dropped %d for %d reasons", way, sent, received, dropped, reasons)
	}
}

// A peer that goes takes frames with it: each is counted as lost, for a reason, and
// the two ends still balance.
func TestFramesLostWithThePeerAreCountedByReason(t *testing.T) {
	w := newWire(t, pvnet.Config{}, pvnet.Config{})
	p := newPath(t, w.Front, w.Back, 0, 8)
	n := p.tx.AllocSize(p.frames, 100)
	if k, err := p.tx.Send(p.frames[:n]); k != 8 || err != nil {
		t.Fatal(k, err)
	}
	w.Back.Disconnect() // nobody has received them
	bpftest.Eventually(t, "every frame sent is lost", func() bool {
		tx := w.Front.Stats().TX
		return tx.Lost(telemetry.DropDisconnected) == 8
	})
	f, b := w.Front.Stats(), w.Back.Stats()
	if sent, received, dropped := f.TX.Get(telemetry.Packets), b.RX.Get(telemetry.Packets), f.TX.Dropped()+f.TX.Errors(); sent != 8 || received != 0 || dropped != 8 {
		t.Errorf("sent %d, received %d, lost %d", sent, received, dropped)
	}
}

func TestMetricsFilePassesAStrictParser(t *testing.T) {
	bpftest.NeedIterator(t)
	python := bpftest.Tool(t, "python3")
	for _, p := range []string{"/usr/bin/python3", python} { // Debian's own has Debian's modules
		if exec.Command(p, "-c", "import prometheus_client.openmetrics.parser").Run() == nil {
			python = p
			break
		}
		python = ""
	}
	if python == "" {
		t.Skip("python3-prometheus-client is not installed")
	}
	w := exercised(t, &bpf.Store{})
	var text []byte
	bpftest.Eventually(t, "text is the same before and after", func() bool {
		want := w.Front.Counters().Totals()
		var err error
		if text, err = os.ReadFile(frontPins + "/metrics"); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := openmetrics.Write(&b, openmetrics.Device{Name: frontName, Stats: want}); err != nil {
			t.Fatal(err)
		}
		return bytes.Equal(b.Bytes(), text) && reflect.DeepEqual(want, w.Front.Counters().Totals())
	})
	const script = `
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
for family in parse(sys.stdin.read()):
    for s in family.samples:
        if s.name in ("barevif_tx_packets_total", "barevif_rx_bytes_total"):
            print(s.name, s.labels["vif"], s.labels["queue"], int(s.value))
`
	cmd := exec.Command(python, "-c", script)
	cmd.Stdin = bytes.NewReader(text)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := fmt.Sprintf("barevif_rx_bytes_total "+frontName+" 0 %d\nbarevif_tx_packets_total "+frontName+" 0 %d\n",
		toFront.bytes(), toBack.frames())
	if string(out) != want {
		t.Errorf("the parser read\n%swant\n%s", out, want)
	}
}

// shape is what these tests read of the output of stat --json.
type shape struct {
	Devices []struct {
		Vif    string
		Source struct{ Kind string }
		Status *struct {
			Mirror, State string
			Up, Stale     bool
		}
		Torn   bool
		Totals map[string]map[string]json.RawMessage
		Queues []map[string]json.RawMessage
		Events []struct {
			Kind string
			A    uint64
		}
	}
	Pairs []struct {
		Frontend, Backend string
		Flows             []struct {
			Sent, Received, Dropped uint64
			Verdict                 string
		}
	}
}

func statJSON(t *testing.T, front []string, args ...string) shape {
	t.Helper()
	line := append(append(front, command(t), "stat", "--json"), args...)
	var s shape
	if err := json.Unmarshal([]byte(bpftest.Run(t, line[0], line[1:]...)), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// sameAs compares what stat says of a device with what the device says itself.
func sameAs(t *testing.T, got map[string]map[string]json.RawMessage, want *telemetry.Stats) bool {
	t.Helper()
	same, checked := true, 0
	for dir, v := range []*telemetry.Values{&want.RX, &want.TX} {
		for _, f := range telemetry.Fields() {
			name := f.FullName(telemetry.Dir(dir))
			var have, should string
			switch f.Kind {
			case telemetry.KindHistogram:
				var h struct {
					Buckets map[string]uint64
					Sum     uint64
				}
				if err := json.Unmarshal(got["histograms"][name], &h); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				buckets, sum := v.Histogram(f)
				for i, n := range buckets {
					have += fmt.Sprint(h.Buckets[f.Bucket(i)], " ")
					should += fmt.Sprint(n, " ")
				}
				have += fmt.Sprint(h.Sum)
				should += fmt.Sprint(sum)
			case telemetry.KindGauge:
				have, should = string(got["gauges"][name]), fmt.Sprint(v.Field(f))
			default:
				have, should = string(got["counters"][name]), fmt.Sprint(v.Field(f))
			}
			if have != should {
				same = false
			}
			checked++
		}
	}
	if checked != 2*len(telemetry.Fields()) {
		t.Fatalf("%d fields compared", checked)
	}
	return same
}

func TestStatSaysWhatTheDeviceSays(t *testing.T) {
	bpftest.Need(t)
	w := exercised(t, &bpf.Store{})
	devices := map[string]*pvnet.Device{frontName: w.Front, backName: w.Back}
	var s shape
	bpftest.Eventually(t, "every field of both devices agrees", func() bool {
		s = statJSON(t, nil, frontName, backName)
		if len(s.Devices) != 2 {
			t.Fatalf("%d devices", len(s.Devices))
		}
		for i := range s.Devices {
			st := devices[s.Devices[i].Vif].Stats()
			if !sameAs(t, s.Devices[i].Totals, &st) {
				return false
			}
		}
		return true
	})
	for _, d := range s.Devices {
		if d.Status == nil || d.Status.State != "XenbusStateConnected" || !d.Status.Up || d.Status.Stale || d.Torn ||
			d.Status.Mirror != pinned() || d.Source.Kind != bpf.KindPins {
			t.Errorf("%s: %+v, %+v, torn %v", d.Vif, d.Source, d.Status, d.Torn)
		}
	}
	if len(s.Pairs) != 1 || s.Pairs[0].Frontend != frontName || s.Pairs[0].Backend != backName {
		t.Fatalf("pairs %+v", s.Pairs)
	}
	for i, want := range []uint64{toBack.frames(), toFront.frames()} {
		f := s.Pairs[0].Flows[i]
		if f.Sent != want || f.Received != want || f.Dropped != 0 || f.Verdict != "balanced" {
			t.Errorf("flow %d: %+v, want %d balanced", i, f, want)
		}
	}
}

func TestTamperedCounterIsHealedAndReported(t *testing.T) {
	bpftest.Need(t)
	tool := bpftest.Tool(t, "bpftool")
	w := exercised(t, &bpf.Store{})
	before := w.Front.Stats()
	// Element 0 whole, every byte 1.
	const words = 2 * telemetry.BlockWords
	args := append([]string{"map", "update", "pinned", frontPins + "/counters", "key", "hex", "00", "00", "00", "00", "value", "hex"},
		strings.Fields(strings.Repeat("01 ", 8*words))...)
	start := time.Now()
	bpftest.Run(t, tool, args...)
	if got := w.Front.Stats(); got.TX.Get(telemetry.Packets) != before.TX.Get(telemetry.Packets) ||
		got.RX.Get(telemetry.Bytes) != before.RX.Get(telemetry.Bytes) {
		t.Error("Stats took the forged numbers")
	}
	bpftest.Eventually(t, "the map is healed", func() bool {
		m := bpftool(t, frontPins)
		return number(t, m, "tx_packets") == toBack.frames() && number(t, m, "rx_bytes") == toFront.bytes()
	})
	t.Logf("healed within %v", time.Since(start).Round(10*time.Millisecond))
	bpftest.Eventually(t, "the event is reported", func() bool {
		for _, d := range statJSON(t, nil, frontName).Devices {
			for _, e := range d.Events {
				if e.Kind == "tamper" && e.A > 0 {
					return true
				}
			}
		}
		return false
	})
	if n := w.Front.Stats().TX; n.Get(telemetry.MirrorHealed) == 0 {
		t.Error("no word is counted as healed")
	}
}

var nobody = []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"}

func TestAnyUserReadsAPublicDevice(t *testing.T) {
	bpftest.NeedIterator(t)
	bpftest.Tool(t, "setpriv")
	exercised(t, &bpf.Store{Public: true})
	s := statJSON(t, nobody, frontName, backName)
	if len(s.Devices) != 2 {
		t.Fatalf("%d devices", len(s.Devices))
	}
	for _, d := range s.Devices {
		want := toBack.frames()
		if d.Vif == frontName {
			want = toFront.frames()
		}
		if d.Source.Kind != bpf.KindMetrics || string(d.Totals["counters"]["rx_packets"]) != fmt.Sprint(want) {
			t.Errorf("%s from %s: rx_packets %s, want %d", d.Vif, d.Source.Kind, d.Totals["counters"]["rx_packets"], want)
		}
	}
	if len(s.Pairs) != 1 || s.Pairs[0].Flows[0].Verdict != "balanced" {
		t.Errorf("pairs %+v", s.Pairs)
	}
}

func TestPrivateDeviceIsNotShownToOthers(t *testing.T) {
	bpftest.Need(t)
	bpftest.Tool(t, "setpriv")
	exercised(t, &bpf.Store{})
	for _, d := range statJSON(t, nobody).Devices {
		if d.Vif == frontName || d.Vif == backName {
			t.Errorf("another user sees %+v", d)
		}
	}
}

func TestUserReadsTheMemfdOfItsOwnProcess(t *testing.T) {
	if os.Geteuid() == 0 {
		bpftest.Tool(t, "setpriv")
	}
	info := telemetry.Info{Role: telemetry.Frontend, Own: 77, Peer: 0, Handle: 5}
	var front []string
	if os.Geteuid() == 0 {
		front = nobody
	}
	command(t) // before anybody is nobody
	_, kind := startOwner(t, info, front...)
	if kind != bpf.KindMemfd {
		t.Fatalf("the owner counts in %s", kind)
	}
	s := statJSON(t, front, info.Name())
	if len(s.Devices) != 1 || s.Devices[0].Source.Kind != bpf.KindMemfd {
		t.Fatalf("devices %+v", s.Devices)
	}
	if got := string(s.Devices[0].Totals["counters"]["rx_packets"]); got != `"9007199254740993"` {
		t.Errorf("rx_packets is %s", got)
	}
}
