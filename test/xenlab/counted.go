//go:build linux

package xenlab

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/test/counters"
)

// A flow is what one end has counted at a vif: from the guest (out) and to the guest (in).
type flow struct{ out, in load }

// A load is what was counted in one direction.
type load struct{ frames, bytes uint64 }

// frontName and backName return the names of the counters of our ends for a guest's vif 0.
func frontName(guest *Domain, backend int) string {
	return fmt.Sprintf("front-%d-%d-0", guest.ID, backend)
}
func backName(guest *Domain, backend int) string {
	return fmt.Sprintf("back-%d-%d-0", backend, guest.ID)
}

// dumpCounters returns bpftool's dump of the counters with that name in a domain.
func (t *T) dumpCounters(d *Domain, name string) counters.Dump {
	dump, err := counters.ParseDump(d.Run("bpftool", "-j", "map", "dump", "pinned", bpf.DefaultRoot+"/"+name+"/counters").Stdout)
	if err != nil {
		t.Fatalf("%s: %s: %w", d.Name, name, err)
	}
	return dump
}

func (t *T) counterTotal(d counters.Dump, name string) uint64 {
	n, err := d.Total(name)
	if err != nil {
		t.Fatalf("%w", err)
	}
	return n
}

// ourCounters returns the counters of one of our ends, which must have lost no frames.
func (t *T) ourCounters(d *Domain, name string) flow {
	dump := t.dumpCounters(d, name)
	for _, lost := range [...]string{"rx_errors", "rx_dropped", "tx_errors", "tx_dropped"} {
		if n := t.counterTotal(dump, lost); n != 0 {
			t.Fatalf("%s: %s: %s is %d", d.Name, name, lost, n)
		}
	}
	rx := load{t.counterTotal(dump, "rx_packets"), t.counterTotal(dump, "rx_bytes")}
	tx := load{t.counterTotal(dump, "tx_packets"), t.counterTotal(dump, "tx_bytes")}
	if strings.HasPrefix(name, "back") {
		return flow{out: rx, in: tx}
	}
	return flow{out: tx, in: rx}
}

// linkStats returns the kernel's counters of an interface.
func (t *T) linkStats(d *Domain, name string) (rx, tx load) {
	var links []struct {
		Stats struct {
			RX, TX struct{ Packets, Bytes uint64 }
		} `json:"stats64"`
	}
	out := d.Run("ip", "-s", "-j", "link", "show", "dev", name).Stdout
	if err := json.Unmarshal(out, &links); err != nil || len(links) != 1 {
		t.Fatalf("%s: ip -s -j link show %s: %q: %w", d.Name, name, out, err)
	}
	s := links[0].Stats
	return load{s.RX.Packets, s.RX.Bytes}, load{s.TX.Packets, s.TX.Bytes}
}

const etherHeader = 14 // bytes

// netbackCounters returns the counters of Linux's netback for a guest's vif 0. netback counts
// received frames without their Ethernet header (xenvif_tx_submit counts after
// eth_type_trans), and starts from 0 whenever a frontend connects.
func (t *T) netbackCounters(guest *Domain) flow {
	rx, tx := t.linkStats(t.Dom0(), guest.VIF(0))
	rx.bytes += etherHeader * rx.frames
	return flow{out: rx, in: tx}
}

// netfrontCounters returns the counters of a guest's netfront.
func (t *T) netfrontCounters(guest *Domain) flow {
	rx, tx := t.linkStats(guest, "eth0")
	rx.bytes += etherHeader * rx.frames
	return flow{out: tx, in: rx}
}

// restLimit is how long a vif may take to come to rest: the kernel sends some frames by itself
// when a link comes up, and counters are published once a second.
const restLimit = 20 * time.Second

// requireSameCounts fails unless both ends of a vif at rest have counted the same frames and bytes.
func (t *T) requireSameCounts(who string, ours, theirs func() flow) {
	for limit := t.machine.Limit(restLimit); ; {
		before := theirs()
		counted := ours()
		if after := theirs(); before == after && counted == after {
			t.Note("%s counted the same %d frames out, %d in", who, counted.out.frames, counted.in.frames)
			return
		} else if limit.Over() {
			t.Fatalf("ours counted %+v, %s %+v", counted, who, after)
		}
	}
}

// requireEveryCounter fails unless bpftool shows every counter by name, and the file metrics
// has the same number in OpenMetrics text. A device at rest still looks at its rings once a
// second, so of counters that changed between two dumps only the names are compared.
func (t *T) requireEveryCounter(d *Domain, name string) {
	file := bpf.DefaultRoot + "/" + name + "/metrics"
	var wrong string
	for limit := t.machine.Limit(restLimit); ; {
		before := t.dumpCounters(d, name)
		text := string(d.Get(file))
		if wrong = missing(before, t.dumpCounters(d, name), text, name); wrong == "" {
			return
		}
		if limit.Over() {
			t.Fatalf("%s: %s", d.Name, wrong)
		}
	}
}

// missing names a counter that is not in both dumps, or has another value in the text that was
// read between them; "" if there is none.
func missing(dump, after counters.Dump, text, name string) string {
	if len(dump) != len(after) {
		return "bpftool shows queues that come or go"
	}
	if !strings.HasSuffix(text, "# EOF\n") {
		return "metrics do not end in # EOF"
	}
	for _, dir := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			if !strings.Contains(text, fmt.Sprintf("# TYPE %s %s\n", f.Metric(dir), f.Kind)) {
				return "metrics have no " + f.Metric(dir)
			}
			for q, queue := range dump {
				shown, ok := queue[f.FullName(dir)]
				if !ok {
					return "bpftool shows no " + f.FullName(dir)
				}
				if f.Kind == telemetry.KindHistogram {
					continue // a struct
				}
				sample := f.Metric(dir)
				if f.Kind == telemetry.KindCounter {
					sample += "_total"
				}
				line := fmt.Sprintf("\n%s{vif=%q,queue=\"%d\"} ", sample, name, q)
				if string(after[q][f.FullName(dir)]) == string(shown) {
					line += string(shown) + "\n"
				}
				if !strings.Contains(text, line) {
					return fmt.Sprintf("metrics do not say%s", line)
				}
			}
		}
	}
	return ""
}

// requireNoPins fails if there are still pins of the counters with that name.
func (t *T) requireNoPins(d *Domain, name string) {
	d.Sh("[ ! -e %s/%s ]", bpf.DefaultRoot, name)
}
