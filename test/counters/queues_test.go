package counters

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/telemetry/bpf/bpftest"
	"barevif/telemetry/openmetrics"
)

// Four queues carry different traffic each way, and everybody who looks is told of
// each queue what that queue carried.
func TestEveryQueueCountsForItself(t *testing.T) {
	bpftest.Need(t)
	bpftest.Tool(t, "bpftool")
	const queues = 4
	cfg := pvnet.Config{Queues: queues, Counters: &bpf.Store{}}
	w := newWire(t, cfg, cfg)
	bpftest.Eventually(t, "both ends use all queues", func() bool { return w.Front.Active() == queues && w.Back.Active() == queues })
	there := func(q int) traffic { return traffic{batch: 5 + q, batches: 40 + 7*q, size: 60 + 300*q} }
	here := func(q int) traffic { return traffic{batch: 11 - q, batches: 90 - 13*q, size: 1514 - 450*q} }
	var paths [2][queues]*path
	for q := range queues {
		paths[0][q] = newPath(t, w.Front, w.Back, q, there(q).batch)
		paths[1][q] = newPath(t, w.Back, w.Front, q, here(q).batch)
	}
	for i := range 100 { // all queues in turn
		for q := range queues {
			if i < there(q).batches {
				paths[0][q].move(t, there(q).size)
			}
			if i < here(q).batches {
				paths[1][q].move(t, here(q).size)
			}
		}
	}
	bpftest.Eventually(t, "the counts are published", func() bool {
		f, b := w.Front.Stats(), w.Back.Stats()
		for q := range queues {
			if f.Queues[q].TX.Get(telemetry.Packets) != there(q).frames() || b.Queues[q].RX.Get(telemetry.Packets) != there(q).frames() ||
				b.Queues[q].TX.Get(telemetry.Packets) != here(q).frames() || f.Queues[q].RX.Get(telemetry.Packets) != here(q).frames() {
				return false
			}
		}
		return true
	})

	counted := func(q int) map[string]map[string]uint64 {
		there, here := there(q), here(q)
		return map[string]map[string]uint64{
			frontName: {"tx_packets": there.frames(), "tx_bytes": there.bytes(), "rx_packets": here.frames(), "rx_bytes": here.bytes()},
			backName:  {"rx_packets": there.frames(), "rx_bytes": there.bytes(), "tx_packets": here.frames(), "tx_bytes": here.bytes()},
		}
	}
	dumps := map[string]Dump{frontName: bpftool(t, frontPins), backName: bpftool(t, backPins)}
	s := statJSON(t, nil, frontName, backName)
	if len(s.Devices) != 2 || len(s.Pairs) != 1 {
		t.Fatalf("%d devices, %d pairs", len(s.Devices), len(s.Pairs))
	}
	for _, d := range s.Devices {
		text := metrics(t, d.Vif)
		dump := dumps[d.Vif]
		if len(dump) != queues || len(d.Queues) != queues {
			t.Fatalf("%s: %d queues in the map, %d in stat", d.Vif, len(dump), len(d.Queues))
		}
		for q := range queues {
			var shown map[string]json.RawMessage
			if err := json.Unmarshal(d.Queues[q]["counters"], &shown); err != nil || string(d.Queues[q]["queue"]) != fmt.Sprint(q) {
				t.Fatalf("%s: queue %s, %v", d.Vif, d.Queues[q]["queue"], err)
			}
			for name, want := range counted(q)[d.Vif] {
				if got := number(t, dump[q:q+1], name); got != want {
					t.Errorf("%s queue %d: bpftool says %s %d, want %d", d.Vif, q, name, got, want)
				}
				if got := string(shown[name]); got != fmt.Sprint(want) {
					t.Errorf("%s queue %d: stat says %s %s, want %d", d.Vif, q, name, got, want)
				}
				if line := fmt.Sprintf("barevif_%s_total{vif=\"%s\",queue=\"%d\"} %d\n", name, d.Vif, q, want); text != nil && !bytes.Contains(text, []byte("\n"+line)) {
					t.Errorf("%s: no line %s", d.Vif, line)
				}
			}
		}
	}
	for q := range queues {
		front, back := dumps[frontName][q:q+1], dumps[backName][q:q+1]
		balance(t, fmt.Sprintf("queue %d to the backend", q), front, back)
		balance(t, fmt.Sprintf("queue %d to the frontend", q), back, front)
	}
	for i, name := range []string{"tx_packets", "rx_packets"} {
		want := number(t, dumps[frontName], name)
		if f := s.Pairs[0].Flows[i]; f.Sent != want || f.Received != want || f.Verdict != "balanced" {
			t.Errorf("flow %d: %+v, want %d balanced", i, f, want)
		}
	}

	bpftest.Eventually(t, "cat and the device write the same text", func() bool {
		text := metrics(t, frontName)
		var b bytes.Buffer
		if err := openmetrics.Write(&b, openmetrics.Device{Name: frontName, Stats: w.Front.Counters().Totals()}); err != nil {
			t.Fatal(err)
		}
		return text == nil || bytes.Equal(b.Bytes(), text)
	})
}

// metrics is what "cat" prints of a device, nil where this kernel lets it have no such
// file.
func metrics(t *testing.T, name string) []byte {
	t.Helper()
	if bpftest.Iterators() != nil {
		return nil
	}
	text, err := os.ReadFile(bpf.DefaultRoot + "/" + name + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	return text
}
