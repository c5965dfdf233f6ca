//go:build linux

package bpf

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"barevif/telemetry"
	"barevif/telemetry/bpf/bpftest"
	"barevif/telemetry/openmetrics"
)

// device gives every test devices of its own.
func device(t testing.TB) telemetry.Info {
	h := uint32(1)
	for _, c := range t.Name() {
		h = h*31 + uint32(c)
	}
	return telemetry.Info{Role: telemetry.Frontend, Own: 3, Peer: 0, Handle: h}
}

// open mirrors a new set, fails the test unless the mirror is of kind want, and closes
// the set after the test.
func open(t testing.TB, s *Store, info telemetry.Info, queues int, want string) *telemetry.Set {
	t.Helper()
	set := telemetry.NewSet(queues)
	set.Open(s, info)
	t.Cleanup(func() {
		if err := set.Close(); err != nil {
			t.Error(err)
		}
	})
	if kind, reason := set.Backend(); kind != want {
		t.Fatalf("mirrored to %s (%s), want %s", kind, reason, want)
	}
	return set
}

// fill gives every field of every block a distinct value.
func fill(s *telemetry.Set) {
	for q := range s.Queues() {
		for d, b := range []*telemetry.Block{s.RX(q), s.TX(q)} {
			seed := uint64(1000*q + 100*d)
			for c := telemetry.Packets; c < telemetry.Counter(telemetry.DropDisconnected); c++ {
				b.Add(c, seed+uint64(c))
			}
			for r := telemetry.DropDisconnected; r <= telemetry.DropBackendError; r++ {
				b.Drop(r, seed+uint64(r))
			}
			for g := telemetry.RingSize; g <= telemetry.BuffersFree; g++ {
				b.Set(g, seed+uint64(g))
			}
			for h := telemetry.FrameSize; h <= telemetry.RequestLatency; h++ {
				for range 100 {
					b.Observe(h, rand.Uint64()>>(30+rand.N(34)))
				}
			}
			b.Flush()
		}
	}
}

// formatted is bpftool's rendering of one map element by its type.
type formatted struct {
	Formatted struct {
		Key   int
		Value map[string]json.RawMessage
	}
}

func dump(t *testing.T, path string) []formatted {
	t.Helper()
	tool := bpftest.Tool(t, "bpftool")
	var out []formatted
	if err := json.Unmarshal([]byte(bpftest.Run(t, tool, "-j", "map", "dump", "pinned", path)), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestBpftoolNamesEveryCounter(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	set := open(t, &Store{}, info, 3, withPins())
	fill(set)
	elems := dump(t, filepath.Join(DefaultRoot, info.Name(), pinCounters))
	if len(elems) != 3 {
		t.Fatalf("%d elements, want one for each of 3 queues", len(elems))
	}
	stats := set.Totals()
	for q, e := range elems {
		if e.Formatted.Key != q {
			t.Fatalf("element %d has key %d", q, e.Formatted.Key)
		}
		got := e.Formatted.Value
		for d, v := range []*telemetry.Values{&stats.Queues[q].RX, &stats.Queues[q].TX} {
			dir := telemetry.Dir(d)
			for _, f := range telemetry.Fields() {
				name := f.FullName(dir)
				raw, ok := got[name]
				if !ok {
					t.Errorf("queue %d has no %s", q, name)
					continue
				}
				delete(got, name)
				if f.Kind != telemetry.KindHistogram {
					if want := fmt.Sprint(v.Field(f)); string(raw) != want {
						t.Errorf("queue %d: %s is %s, want %s", q, name, raw, want)
					}
					continue
				}
				var buckets map[string]uint64
				if err := json.Unmarshal(raw, &buckets); err != nil {
					t.Fatal(err)
				}
				want := map[string]uint64{}
				counts, sum := v.Histogram(f)
				for i, n := range append(counts, sum) {
					want[f.Bucket(i)] = n
				}
				if !reflect.DeepEqual(buckets, want) {
					t.Errorf("queue %d: %s is %v, want %v", q, name, buckets, want)
				}
			}
			for _, marker := range []string{"_gen_done", "_gen_start"} {
				if string(got[dir.String()+marker]) != "2" { // one publish by attach, one by Flush
					t.Errorf("%s%s is %s", dir, marker, got[dir.String()+marker])
				}
				delete(got, dir.String()+marker)
			}
		}
		for name := range got {
			t.Errorf("%s is not in the table", name)
		}
	}
}

func TestBpftoolShowsTheDevice(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	info.Role = telemetry.Backend
	set := open(t, &Store{}, info, 1, withPins())
	set.SetStatus(telemetry.Status{
		State: 4, Up: true, MAC: [6]byte{0, 0x16, 0x3e, 0xaa, 0xbb, 0xcc}, MTU: 1500, Queues: 1, Epoch: 7,
		Features: telemetry.FeatureCsum | telemetry.FeatureTrusted,
	})
	set.RX(0).Add(telemetry.Packets, 5)
	set.RX(0).Flush()
	set.Reset()
	dir := filepath.Join(DefaultRoot, info.Name())
	got := dump(t, filepath.Join(dir, pinInfo))[0].Formatted.Value
	for name, want := range map[string]string{
		"vif":             `"` + info.Name() + `"`,
		"mac":             `"00:16:3e:aa:bb:cc"`,
		"role":            `"back"`,
		"state":           `"XenbusStateConnected"`,
		"backend":         fmt.Sprintf("%q", withPins()),
		"mtu":             `1500`,
		"epoch":           `7`,
		"own_domid":       `3`,
		"handle":          fmt.Sprint(info.Handle),
		"owner_pid":       fmt.Sprint(os.Getpid()),
		"queue_slots":     `1`,
		"layout_version":  fmt.Sprint(telemetry.LayoutVersion),
		"counters_map_id": fmt.Sprint(mapIDAt(t, filepath.Join(dir, pinCounters))),
	} {
		if string(got[name]) != want {
			t.Errorf("%s is %s, want %s", name, got[name], want)
		}
	}
	var features map[string]bool
	if err := json.Unmarshal(got["features"], &features); err != nil {
		t.Fatal(err)
	}
	if len(features) != len(telemetry.FeatureNames) || !features["csum"] || !features["trusted"] || features["gso4"] {
		t.Errorf("features are %v", features)
	}
	var reset map[string]uint64
	if err := json.Unmarshal(got["reset"], &reset); err != nil {
		t.Fatal(err)
	}
	if reset["count"] != 1 || reset["rx_packets"] != 5 || reset["unix_ns"] == 0 {
		t.Errorf("reset is %v", reset)
	}
}

func mapIDAt(t *testing.T, path string) uint32 {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	return mapID(m)
}

func TestBpftoolShowsEventsByName(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	set := open(t, &Store{}, info, 1, withPins())
	for k := telemetry.EventState; k <= telemetry.EventReconnect; k++ {
		set.Record(k, telemetry.NoQueue, uint64(k)*10, 1<<63)
	}
	elems := dump(t, filepath.Join(DefaultRoot, info.Name(), pinEvents))
	if len(elems) != eventSlots {
		t.Fatalf("%d elements", len(elems))
	}
	for k := telemetry.EventState; k <= telemetry.EventReconnect; k++ {
		v := elems[k].Formatted.Value // event n is in slot n
		if string(v["kind"]) != `"`+k.String()+`"` || string(v["queue"]) != "-1" ||
			string(v["a"]) != fmt.Sprint(int(k)*10) || string(v["b"]) != "9223372036854775808" ||
			string(v["seq"]) != string(v["seq_start"]) || string(v["seq"]) != fmt.Sprint(int(k)) {
			t.Errorf("event %v is shown as %s", k, v)
		}
	}
}

func TestLayoutIsThatOfTheHeader(t *testing.T) {
	bpftest.Need(t)
	tool := bpftest.Tool(t, "bpftool")
	info := device(t)
	open(t, &Store{}, info, 1, withPins())
	var got strings.Builder
	for _, pin := range []string{pinCounters, pinInfo, pinEvents, pinFields} {
		var shown struct {
			BTF int `json:"btf_id"`
		}
		out := bpftest.Run(t, tool, "-j", "map", "show", "pinned", filepath.Join(DefaultRoot, info.Name(), pin))
		if err := json.Unmarshal([]byte(out), &shown); err != nil || shown.BTF == 0 {
			t.Fatalf("%v: %s", err, out)
		}
		text := bpftest.Run(t, tool, "btf", "dump", "id", fmt.Sprint(shown.BTF), "format", "c")
		fmt.Fprintf(&got, "/* %s */\n", pin)
		for line := range strings.Lines(text) {
			// Versions of bpftool differ in these lines, which are not part of our
			// layout.
			if line != "\n" && !strings.HasPrefix(line, "#") {
				got.WriteString(line)
			}
		}
	}
	golden(t, "testdata/layout.txt", got.String())
}

func TestCatPrintsWhatOpenMetricsWrites(t *testing.T) {
	bpftest.NeedIterator(t)
	for _, queues := range []int{1, 2, 8, 64} {
		t.Run(fmt.Sprintf("queues=%d", queues), func(t *testing.T) {
			info := device(t)
			set := open(t, &Store{}, info, queues, KindIterator)
			fill(set)
			got := bpftest.Run(t, "cat", filepath.Join(DefaultRoot, info.Name(), pinMetrics))
			var want strings.Builder
			if err := openmetrics.Write(&want, openmetrics.Device{Name: info.Name(), Stats: set.Totals()}); err != nil {
				t.Fatal(err)
			}
			if got != want.String() {
				g, w := strings.Split(got, "\n"), strings.Split(want.String(), "\n")
				for i := range min(len(g), len(w)) {
					if g[i] != w[i] {
						t.Fatalf("line %d: cat prints\n%s\nOpenMetrics is\n%s", i, g[i], w[i])
					}
				}
				t.Fatalf("cat prints %d lines, OpenMetrics has %d", len(g), len(w))
			}
		})
	}
}

func TestStrictParserAcceptsWhatCatPrints(t *testing.T) {
	bpftest.NeedIterator(t)
	const python = "/usr/bin/python3"
	if exec.Command(python, "-c", "import prometheus_client.openmetrics.parser").Run() != nil {
		t.Skip("python3-prometheus-client is not installed")
	}
	info := device(t)
	set := open(t, &Store{}, info, 2, KindIterator)
	set.RX(0).Add(telemetry.Packets, 1000)
	set.RX(1).Add(telemetry.Packets, 1)
	set.RX(0).Flush()
	set.RX(1).Flush()
	f, err := os.Open(filepath.Join(DefaultRoot, info.Name(), pinMetrics))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(python, "../openmetrics/testdata/parse.py")
	cmd.Stdin = f
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if want := "104 families\nbarevif_rx_packets 1001\n"; string(out) != want {
		t.Errorf("the parser read %q, want %q", out, want)
	}
}

// The text needs neither privileges nor a running owner.
func TestAnybodyMayCatPublicMetrics(t *testing.T) {
	bpftest.NeedIterator(t)
	setpriv := bpftest.Tool(t, "setpriv")
	nobody := []string{"--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"}
	cat := func(path string) (string, error) {
		out, err := exec.Command(setpriv, append(nobody, "cat", path)...).CombinedOutput()
		return string(out), err
	}
	info := device(t)
	o := start(t, plan{Store: Store{Public: true}, Info: info, Packets: 4711})
	if o.Kind != KindIterator {
		t.Fatalf("mirrored to %+v", o.ready)
	}
	path := filepath.Join(DefaultRoot, info.Name(), pinMetrics)
	want := fmt.Sprintf("barevif_rx_packets_total{vif=\"%s\",queue=\"0\"} 4711\n", info.Name())
	check := func(when string) {
		t.Helper()
		out, err := cat(path)
		if err != nil || !strings.Contains(out, want) || !strings.HasSuffix(out, "# EOF\n") {
			t.Errorf("%s: %v, %d bytes", when, err, len(out))
		}
	}
	check("while the owner runs")
	if err := o.Cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	check("while the owner is stopped")
	o.Kill()
	check("after the owner was killed")

	private := start(t, plan{Info: info})
	if out, err := cat(path); err == nil {
		t.Errorf("metrics that are not public were read: %d bytes", len(out))
	}
	private.End(t)
	if _, err := os.Stat(filepath.Join(DefaultRoot, info.Name())); !os.IsNotExist(err) {
		t.Errorf("the directory of a closed device is still there: %v", err)
	}
}

func TestGroupMayReadPins(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	open(t, &Store{Group: 4242}, info, 1, withPins())
	dir := filepath.Join(DefaultRoot, info.Name())
	for _, name := range pinNames {
		if name == pinMetrics && withPins() == KindPins {
			continue
		}
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o440 || st.Sys().(*syscall.Stat_t).Gid != 4242 {
			t.Errorf("%s: mode %v group %d", name, st.Mode(), st.Sys().(*syscall.Stat_t).Gid)
		}
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

func TestOutsideReadersSeeOneInstant(t *testing.T) {
	for _, kind := range []string{withPins(), KindMemfd} {
		t.Run(kind, func(t *testing.T) {
			p := plan{Info: device(t), Busy: true}
			if kind == KindMemfd {
				p.Deny = []uint32{unix.SYS_BPF}
			} else {
				bpftest.Need(t)
			}
			o := start(t, p)
			if o.Kind != kind {
				t.Fatalf("mirrored to %+v", o.ready)
			}
			r := reader(t, p.Info.Name())
			var last uint64
			for range 1000 {
				rep, err := r.Read()
				if err != nil {
					t.Fatal(err)
				}
				n := rep.Stats.RX.Get(telemetry.Packets)
				if rep.Torn {
					t.Fatal("no whole copy within the tries")
				}
				if rep.Stats.RX.Get(telemetry.Bytes) != 100*n || rep.Stats.RX.Dropped() != n {
					t.Fatalf("mixed instants: %d packets, %d bytes", n, rep.Stats.RX.Get(telemetry.Bytes))
				}
				if n < last {
					t.Fatal("a total went backwards")
				}
				last = n
			}
			if last == 0 {
				t.Error("saw no traffic")
			}
			o.End(t)
		})
	}
}

// reader opens the only source of a device.
func reader(t *testing.T, name string) *Reader {
	t.Helper()
	r, err := Open(source(t, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func source(t *testing.T, name string) Source {
	t.Helper()
	var found []Source
	all, err := List("")
	for _, s := range all {
		if s.Name == name {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d sources of %s among %v (%v)", len(found), name, all, err)
	}
	return found[0]
}

func TestTamperedMirrorIsHealedAndReported(t *testing.T) {
	bpftest.Need(t)
	tool := bpftest.Tool(t, "bpftool")
	info := device(t)
	set := open(t, &Store{}, info, 1, withPins())
	set.RX(0).Add(telemetry.Packets, 10)
	set.RX(0).Flush()
	dir := filepath.Join(DefaultRoot, info.Name())

	ff := strings.Fields(strings.Repeat("ff ", queueBytes))
	bpftest.Run(t, tool, append([]string{"map", "update", "pinned", filepath.Join(dir, pinCounters),
		"key", "hex", "00", "00", "00", "00", "value", "hex"}, ff...)...)
	bpftest.Run(t, tool, append([]string{"map", "update", "pinned", filepath.Join(dir, pinInfo),
		"key", "hex", "00", "00", "00", "00", "value", "hex"}, ff[:infoBytes]...)...)

	if st := set.Snapshot(); st.RX.Get(telemetry.Packets) != 10 {
		t.Fatal("Stats follow the tampered map")
	}
	if n := set.RX(0).Refresh(); n != telemetry.BlockWords-1 { // all words; the two markers count as one
		t.Errorf("%d words healed", n)
	}
	set.TX(0).Refresh()
	set.Tick()
	rep, err := reader(t, info.Name()).Read()
	if err != nil {
		t.Fatal(err)
	}
	if rep.Torn || rep.Stats.RX.Get(telemetry.Packets) != 10 || rep.Stats.TX.Get(telemetry.Bytes) != 0 {
		t.Errorf("not healed: %d packets, torn %v", rep.Stats.RX.Get(telemetry.Packets), rep.Torn)
	}
	if len(rep.Events) != 1 || rep.Events[0].Kind != telemetry.EventTamper || rep.Events[0].A != 2*(telemetry.BlockWords-1) {
		t.Errorf("events %+v, want one of %d healed words", rep.Events, 2*(telemetry.BlockWords-1))
	}
}

func TestPublishingMakesNoSystemCall(t *testing.T) {
	bpftest.Need(t)
	strace := bpftest.Tool(t, "strace")
	calls := func(publishes int) int {
		log := filepath.Join(t.TempDir(), "strace")
		o := start(t, plan{Info: device(t), Publish: publishes}, strace, "-f", "-e", "trace=bpf,write,pwrite64", "-o", log)
		if o.Kind != withPins() {
			t.Fatalf("mirrored to %+v", o.ready)
		}
		o.End(t)
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		n := strings.Count(string(b), "bpf(BPF")
		if n == 0 {
			t.Fatal("strace saw no bpf call at all")
		}
		return n
	}
	// A signal during verification makes the library load a program once more, so that
	// two runs differ by a few calls. A call per thousand publishes would make a
	// thousand.
	const publishes = 1_000_000
	if few, many := calls(1), calls(publishes); many >= few+publishes/1000 {
		t.Errorf("%d bpf calls with 1 publish, %d with a million", few, many)
	}
}

func TestPublishingToAMapDoesNotAllocate(t *testing.T) {
	bpftest.Need(t)
	set := open(t, &Store{}, device(t), 1, withPins())
	b := set.TX(0)
	if n := testing.AllocsPerRun(1000, func() {
		b.Add(telemetry.Packets, 1)
		b.Observe(telemetry.BatchSize, 32)
		b.Publish()
		b.Refresh()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestOpenAndCloseLeaveNothing(t *testing.T) {
	bpftest.Need(t)
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	mapped := func() int {
		b, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "bpf-map")
	}
	cycle := func(s *Store, kind string) {
		set := telemetry.NewSet(2)
		set.Open(s, device(t))
		if k, r := set.Backend(); k != kind {
			t.Fatal(k, r)
		}
		if err := set.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cycle(&Store{}, withPins()) // the library caches what it learned about the kernel
	before := count()
	for range 20 {
		cycle(&Store{}, withPins())
		cycle(&Store{Root: "/nowhere/at/all"}, KindMaps)
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	if n := mapped(); n != 0 {
		t.Errorf("%d maps are still mapped", n)
	}
	if _, err := os.Stat(filepath.Join(DefaultRoot, device(t).Name())); !os.IsNotExist(err) {
		t.Errorf("the pins are still there: %v", err)
	}
}

func TestTooManyQueuesAreRefused(t *testing.T) {
	for _, n := range []int{-1, 0, maxQueues + 1} {
		info := device(t)
		info.Queues = n
		if _, err := (&Store{}).Open(info); err == nil {
			t.Errorf("%d queues were accepted", n)
		}
	}
}
