//go:build linux

package bpf

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"barevif/telemetry"
	"barevif/telemetry/bpf/bpftest"
)

func TestSecondOwnerGetsNoPins(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	first := start(t, plan{Info: info, Packets: 1})
	if first.Kind != withPins() {
		t.Fatalf("mirrored to %+v", first.ready)
	}
	second := telemetry.NewSet(1)
	second.Open(&Store{}, info)
	second.RX(0).Add(telemetry.Packets, 2)
	second.RX(0).Flush()
	if k, r := second.Backend(); k != KindMaps || !strings.Contains(r, ErrBusy.Error()) {
		t.Errorf("mirrored to %s (%s)", k, r)
	}
	packets := map[string]uint64{}
	all, err := List("")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Name != info.Name() {
			continue
		}
		r, err := Open(s)
		if err != nil {
			t.Fatal(err)
		}
		rep, err := r.Read()
		if err != nil {
			t.Fatal(err)
		}
		packets[s.Kind] = rep.Stats.RX.Get(telemetry.Packets)
		r.Close()
	}
	if len(packets) != 2 || packets[KindPins] != 1 || packets[KindMaps] != 2 {
		t.Errorf("found %v, want 1 packet in the pins and 2 without", packets)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(DefaultRoot, info.Name(), pinCounters)); err != nil {
		t.Errorf("the second owner's end took the first one's pins: %v", err)
	}
	first.End(t)
	open(t, &Store{}, info, 1, withPins())
}

// Whatever a killed owner was doing, the next one gets the pins, and the path of the
// counters always leads to a map.
func TestKilledOwnerIsReplaced(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	dir := filepath.Join(DefaultRoot, info.Name())
	first := start(t, plan{Info: info})
	first.Kill()

	var stop atomic.Bool
	var wg sync.WaitGroup
	var opened, failed int
	var last error
	wg.Go(func() {
		for !stop.Load() {
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinCounters), &ebpf.LoadPinOptions{ReadOnly: true})
			if err != nil {
				failed, last = failed+1, err
				continue
			}
			opened++
			m.Close()
		}
	})
	for i := range 25 {
		o := start(t, plan{Info: info, Busy: true, Packets: uint64(i)})
		if o.Kind != withPins() {
			t.Fatalf("round %d: mirrored to %+v", i, o.ready)
		}
		o.Kill()
	}
	// Kill owners at any step of their start, before they print anything.
	for i := range 25 {
		p := plan{Info: info, Queues: 4}
		o := launch(t, p)
		<-time.After(time.Duration(rand.N(40_000)) * time.Microsecond)
		o.Kill()
		after := start(t, plan{Info: info})
		if after.Kind != withPins() {
			t.Fatalf("round %d: mirrored to %+v", i, after.ready)
		}
		after.Kill()
	}
	stop.Store(true)
	wg.Wait()
	if failed != 0 || opened == 0 {
		t.Errorf("the counters were there %d times and missing %d times: %v", opened, failed, last)
	}
	set := telemetry.NewSet(1)
	set.Open(&Store{}, info)
	if err := set.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory is still there: %v", err)
	}
	bpftest.Eventually(t, "the killed owners' maps go away", func() bool { return len(ourMaps(t, info)) == 0 })
}

// ourMaps returns the names of a device's maps that the kernel still holds.
func ourMaps(t *testing.T, info telemetry.Info) (names []string) {
	t.Helper()
	suffix := (&mirror{name: info.Name()}).suffix()
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		id = next
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue
		}
		if i, err := m.Info(); err == nil && strings.HasSuffix(i.Name, suffix) {
			names = append(names, i.Name)
		}
		m.Close()
	}
}

// Owners of one name open and close at the same time: each gets the pins or ErrBusy, and
// the last one leaves nothing.
func TestOwnersOfOneNameTakeTurns(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	var pinned, busy atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 40 {
				set := telemetry.NewSet(1)
				set.Open(&Store{}, info)
				switch k, r := set.Backend(); {
				case k == withPins():
					pinned.Add(1)
				case k == KindMaps && strings.Contains(r, ErrBusy.Error()):
					busy.Add(1)
				default:
					t.Errorf("mirrored to %s (%s)", k, r)
				}
				if err := set.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d had the pins, %d found them taken", pinned.Load(), busy.Load())
	if pinned.Load() == 0 {
		t.Error("nobody got the pins")
	}
	if _, err := os.Stat(filepath.Join(DefaultRoot, info.Name())); !os.IsNotExist(err) {
		t.Errorf("something is left: %v", err)
	}
}

func TestKilledOwnersTotalsAreContinued(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	read := func() *Report {
		t.Helper()
		rep, err := reader(t, info.Name()).Read()
		if err != nil {
			t.Fatal(err)
		}
		return rep
	}
	resume := Store{Resume: true}

	a := start(t, plan{Store: resume, Info: info, Packets: 100, Queues: 2})
	if a.Kind != withPins() { // nothing to resume is no failure
		t.Fatalf("mirrored to %+v", a.ready)
	}
	a.Kill()
	if rep := read(); rep.Stats.RX.Get(telemetry.Packets) != 100 {
		t.Fatalf("a killed owner's pins show %d packets", rep.Stats.RX.Get(telemetry.Packets))
	}
	b := start(t, plan{Store: resume, Info: info, Packets: 11, Queues: 1})
	if b.Kind != withPins() {
		t.Fatalf("mirrored to %+v", b.ready)
	}
	rep := read()
	if n := rep.Stats.RX.Get(telemetry.Packets); n != 111 || rep.Stats.RX.Dropped() != 111 || rep.Stats.RX.Get(telemetry.Bytes) != 11100 {
		t.Errorf("%d packets, want 100 continued by 11", n)
	}
	if rep.PID != b.Cmd.Process.Pid {
		t.Errorf("owner %d, want %d", rep.PID, b.Cmd.Process.Pid)
	}
	b.Kill()

	set := open(t, &resume, info, 1, withPins())
	set.RX(0).Add(telemetry.Packets, 5)
	set.RX(0).Flush()
	if st := set.Totals(); st.RX.Get(telemetry.Packets) != 5 {
		t.Errorf("Totals count %d packets, this process 5", st.RX.Get(telemetry.Packets))
	}
	if n := set.RX(0).Refresh(); n != 0 {
		t.Errorf("%d words healed that nobody touched", n)
	}
	if n := read().Stats.RX.Get(telemetry.Packets); n != 116 {
		t.Errorf("%d packets, want 116", n)
	}
	if err := set.Close(); err != nil {
		t.Fatal(err)
	}

	c := start(t, plan{Info: info, Packets: 3})
	c.Kill()
	d := start(t, plan{Info: info, Packets: 4}) // without Resume
	if n := read().Stats.RX.Get(telemetry.Packets); n != 4 {
		t.Errorf("%d packets, want a fresh start with 4", n)
	}
	d.End(t)
}

// Owners are killed at any point, many times: the totals in the pins never go back, and
// lost frames remain the sum of their reasons.
func TestTotalsOutliveManyKills(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	var last uint64
	for i := range 25 {
		o := start(t, plan{Store: Store{Resume: true}, Info: info, Packets: 10, Busy: true})
		if o.Kind != withPins() || o.Kind == KindIterator && o.Reason != "" {
			t.Fatalf("round %d: mirrored to %+v", i, o.ready)
		}
		r := reader(t, info.Name())
		sees := func(more uint64) {
			t.Helper()
			st, err := r.Stats()
			if err != nil {
				t.Fatal(err)
			}
			n := st.RX.Get(telemetry.Packets)
			if n < last+more {
				t.Fatalf("round %d: %d packets after %d", i, n, last)
			}
			last = n
		}
		sees(10)
		<-time.After(time.Duration(rand.N(20_000)) * time.Microsecond)
		sees(0)
		o.Kill()
		sees(0)
	}
	set := open(t, &Store{Resume: true}, info, 1, withPins())
	rep, err := reader(t, info.Name()).Read()
	if err != nil {
		t.Fatal(err)
	}
	if n := rep.Stats.RX.Get(telemetry.Packets); n < last || rep.Torn {
		t.Errorf("%d packets after %d, torn %v", n, last, rep.Torn)
	}
	if rx := rep.Stats.RX; rx.Dropped() != rx.Lost(telemetry.DropDisconnected) || rx.Dropped() == 0 {
		t.Errorf("%d frames dropped, %d for the one reason", rx.Dropped(), rx.Lost(telemetry.DropDisconnected))
	}
	if st := set.Totals(); st.RX.Get(telemetry.Packets) != 0 {
		t.Errorf("the device itself claims %d packets", st.RX.Get(telemetry.Packets))
	}
}

// The pins of another version are replaced, but their totals are not continued.
func TestTotalsOfAnotherLayoutAreNotContinued(t *testing.T) {
	bpftest.Need(t)
	good := infoRecord{Version: telemetry.LayoutVersion, Layout: telemetry.Layout(), Slots: 1}
	copy(good.Magic[:], infoMagic)
	wrong := good
	wrong.Layout++
	for _, c := range []struct {
		name                    string
		info                    infoRecord
		infoSize, size, entries int
		counters                ebpf.MapType
		reason                  string
	}{
		{"another layout", wrong, infoBytes, queueBytes, 1, ebpf.Array, ErrLayout.Error()},
		{"no record", infoRecord{}, infoBytes, queueBytes, 1, ebpf.Array, "no magic"},
		{"info too small", infoRecord{}, 8, queueBytes, 1, ebpf.Array, "info of another size"},
		{"counters too small", good, infoBytes, queueBytes - 8, 1, ebpf.Array, "maps of another size"},
		{"too many counters", good, infoBytes, queueBytes, 2, ebpf.Array, "maps of another size"},
		{"no array", good, infoBytes, queueBytes, 1, ebpf.Hash, "maps of another size"},
	} {
		t.Run(c.name, func(t *testing.T) {
			info := device(t)
			dir := filepath.Join(DefaultRoot, info.Name())
			if err := errors.Join(os.MkdirAll(DefaultRoot, 0o755), os.Mkdir(dir, 0o755)); err != nil {
				t.Fatal(err)
			}
			for _, m := range []struct {
				pin           string
				kind          ebpf.MapType
				size, entries int
				value         []byte
			}{
				{pinInfo, ebpf.Array, c.infoSize, 1, encode(c.info)[:c.infoSize]},
				{pinCounters, c.counters, c.size, c.entries, slices.Repeat([]byte{7}, c.size)},
				{pinEvents, ebpf.Array, eventBytes, eventSlots, make([]byte, eventBytes)},
			} {
				mp, err := ebpf.NewMap(&ebpf.MapSpec{Type: m.kind, KeySize: 4, ValueSize: uint32(m.size), MaxEntries: uint32(m.entries)})
				if err != nil {
					t.Fatal(err)
				}
				defer mp.Close()
				if err := errors.Join(mp.Put(uint32(0), m.value), mp.Pin(filepath.Join(dir, m.pin))); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := Open(Source{Name: info.Name(), Kind: KindPins, Path: dir}); !errors.Is(err, ErrLayout) {
				t.Errorf("a reader gets %v", err)
			}
			set := open(t, &Store{Resume: true}, info, 1, withPins())
			if _, r := set.Backend(); !strings.Contains(r, c.reason) {
				t.Errorf("the reason is %q, want ...%s...", r, c.reason)
			}
			set.RX(0).Add(telemetry.Packets, 1)
			set.RX(0).Flush()
			rep, err := reader(t, info.Name()).Read()
			if err != nil || rep.Stats.RX.Get(telemetry.Packets) != 1 {
				t.Errorf("%v, %+v", err, rep)
			}
		})
	}
}

func TestSumsOfATornBlockAreMended(t *testing.T) {
	set := telemetry.NewSet(1)
	set.RX(0).Drop(telemetry.DropDisconnected, 3)
	set.RX(0).Drop(telemetry.DropTooShort, 4)
	set.RX(0).Drop(telemetry.DropBadID, 5)
	set.RX(0).Flush()
	whole := make([]uint64, telemetry.BlockWords)
	st := set.Totals()
	for _, f := range telemetry.Fields() {
		if f.Kind == telemetry.KindCounter {
			whole[f.Word] = st.RX.Field(f)
		}
	}
	torn := slices.Clone(whole)
	for _, f := range telemetry.Fields() {
		if f.Name == "dropped" || f.Name == "errors" {
			torn[f.Word] = 1
		}
	}
	mendSums(torn)
	if !slices.Equal(torn, whole) {
		t.Error("the sums do not agree with their parts")
	}
}

func TestHeartbeatTellsTheLivingFromTheDead(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	set := open(t, &Store{}, info, 1, withPins())
	r := reader(t, info.Name())
	var before time.Time
	for range 3 {
		set.Tick()
		rep, err := r.Read()
		if err != nil {
			t.Fatal(err)
		}
		if rep.Age < 0 || rep.Age > time.Minute || !rep.Heartbeat.After(before) || rep.Heartbeat.Before(rep.Start) {
			t.Fatalf("age %v, heartbeat %v after %v, start %v", rep.Age, rep.Heartbeat, before, rep.Start)
		}
		before = rep.Heartbeat
	}
}

func TestReportTellsTheDevice(t *testing.T) {
	bpftest.Need(t)
	info := device(t)
	info.Role, info.Own, info.Peer = telemetry.Backend, 65535, 65534
	set := open(t, &Store{}, info, 2, withPins())
	status := telemetry.Status{
		State: 5, Up: true, MAC: [6]byte{2, 3, 4, 0xff, 0, 9}, MTU: 9000, Queues: 2, Epoch: 1 << 40,
		Features: telemetry.FeatureGSO4 | telemetry.FeatureTrusted,
	}
	set.SetStatus(status)
	set.TX(1).Add(telemetry.Packets, 8)
	set.TX(1).Flush()
	set.Reset()
	for i := range uint64(300) {
		set.Record(telemetry.EventStall, 1, i, ^uint64(0))
	}
	rep, err := reader(t, info.Name()).Read()
	if err != nil {
		t.Fatal(err)
	}
	info.Queues = 2
	if rep.Info != info || rep.Status != status {
		t.Errorf("%+v\n%+v", rep.Info, rep.Status)
	}
	if rep.Reset.Count != 1 || rep.Reset.TxPackets != 8 || rep.Reset.Time.IsZero() {
		t.Errorf("%+v", rep.Reset)
	}
	if rep.Stats.TX.Get(telemetry.Packets) != 8 {
		t.Error("a reset moved the mirror")
	}
	want := set.Events()
	if len(rep.Events) != len(want) {
		t.Fatalf("%d events, want %d", len(rep.Events), len(want))
	}
	for i, e := range rep.Events {
		if !e.Time.Equal(want[i].Time) {
			t.Fatalf("event %d is of %v, want %v", e.Seq, e.Time, want[i].Time)
		}
		e.Time = want[i].Time
		if e != want[i] {
			t.Fatalf("event %d is %+v, want %+v", i, e, want[i])
		}
	}
}

func TestRecordsHaveNoHiddenPadding(t *testing.T) {
	for _, r := range []any{infoRecord{}, eventRecord{}, fieldRecord{}, lineRecord{}} {
		if s := recordType("x", r); len(encode(r)) != int(s.Size) || s.Size%8 != 0 {
			t.Errorf("%T is %d bytes in memory and %d encoded", r, s.Size, len(encode(r)))
		}
	}
	for _, f := range fieldRecords() {
		for _, text := range [][]byte{f.Name[:], f.Metric[:], f.UnitOf[:], f.Help[:], f.LE[0][:]} {
			if text[len(text)-2] != 0 {
				t.Errorf("%q fills its place: it may have been cut", text)
			}
		}
		if f.Buckets > bucketSlots || f.Offset > queueBytes-8*(bucketSlots+1) {
			t.Errorf("%s: the iterator cannot print %d buckets at %d", str(f.Name[:]), f.Buckets, f.Offset)
		}
	}
	var info infoRecord
	if n := len(telemetry.FeatureNames); n != len(info.Features) {
		t.Errorf("%d features in %d places", n, len(info.Features))
	}
	if name := (telemetry.Info{Own: 65535, Peer: 65535, Handle: 1<<32 - 1}).Name(); len(name) >= len(info.Vif) {
		t.Errorf("%s does not fit", name)
	}
	if got := fmt.Sprint("bvf_c_", (&mirror{name: "x"}).suffix()); len(got) > 15 {
		t.Errorf("%s is too long for the kernel", got)
	}
}
