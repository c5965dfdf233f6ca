// Package openmetrics writes counters as OpenMetrics 1.0 text.
//
// The text is the same, byte for byte, as the one the pinned BPF iterator of
// telemetry/bpf prints; this is for machines and processes without it.
package openmetrics

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"

	"barevif/telemetry"
)

// A Device is the counters of one device under the name that becomes its vif
// label. Its Stats should be totals: monitoring takes a counter that goes down
// for a restart.
type Device struct {
	Name  string
	Stats telemetry.Stats
}

// ContentType is the media type of what Write writes.
const ContentType = "application/openmetrics-text; version=1.0.0; charset=utf-8"

// Header is the lines above the samples of f in direction d.
func Header(f telemetry.Field, d telemetry.Dir) string {
	m := f.Metric(d)
	unit := ""
	if strings.HasSuffix(m, "_"+f.Unit) {
		unit = fmt.Sprintf("# UNIT %s %s\n", m, f.Unit)
	}
	return fmt.Sprintf("# TYPE %s %s\n%s# HELP %s %s\n", m, f.Kind, unit, m, f.Help)
}

// Write writes the counters of all devices. The error is w's.
func Write(w io.Writer, devices ...Device) error {
	out := bufio.NewWriter(w)
	for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			out.WriteString(Header(f, d))
			for i := range devices {
				writeSamples(out, f, d, &devices[i])
			}
		}
	}
	out.WriteString("# EOF\n")
	return out.Flush()
}

var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func writeSamples(out *bufio.Writer, f telemetry.Field, d telemetry.Dir, dev *Device) {
	m, name := f.Metric(d), escape.Replace(dev.Name)
	for q := range dev.Stats.Queues {
		v := &dev.Stats.Queues[q].RX
		if d == telemetry.TX {
			v = &dev.Stats.Queues[q].TX
		}
		switch f.Kind {
		case telemetry.KindCounter:
			fmt.Fprintf(out, "%s_total{vif=\"%s\",queue=\"%d\"} %d\n", m, name, q, v.Field(f))
		case telemetry.KindGauge:
			fmt.Fprintf(out, "%s{vif=\"%s\",queue=\"%d\"} %d\n", m, name, q, v.Field(f))
		case telemetry.KindHistogram:
			buckets, sum := v.Histogram(f)
			var count uint64
			for i, n := range buckets {
				count += n
				fmt.Fprintf(out, "%s_bucket{vif=\"%s\",queue=\"%d\",le=\"%s\"} %d\n", m, name, q, f.LE(i), count)
			}
			fmt.Fprintf(out, "%s_count{vif=\"%s\",queue=\"%d\"} %d\n", m, name, q, count)
			fmt.Fprintf(out, "%s_sum{vif=\"%s\",queue=\"%d\"} %d\n", m, name, q, sum)
		}
	}
}

// Handler serves the text of the devices that list gives at each request.
func Handler(list func() []Device) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", ContentType)
		// A failure here is a client that went away.
		_ = Write(w, list()...)
	})
}
