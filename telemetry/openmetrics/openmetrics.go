// Package openmetrics writes counters as OpenMetrics 1.0 text.
//
// The text is the same, byte for byte, as the one the pinned BPF iterator of
// telemetry/bpf prints; this is for machines and processes without it.
package openmetrics

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"barevif/telemetry"
)

// A Device is the counters of one device under the name that becomes its vif
// label. Of a page, no two may have the same: a reader refuses it. A byte of the
// name that is not UTF-8 is written as \xff, with its own two digits. Its Stats
// should be totals: monitoring takes a counter that goes down for a restart.
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

// ErrName says that two devices given to Write have one name.
var ErrName = errors.New("openmetrics: two devices have the same name, which would make the page unreadable; name each differently")

// Write writes the counters of all devices. The error is w's, or ErrName, and then
// nothing was written.
func Write(w io.Writer, devices ...Device) error {
	labels := make([]string, len(devices))
	for i := range devices {
		if labels[i] = label(devices[i].Name); slices.Contains(labels[:i], labels[i]) {
			return fmt.Errorf("%w: %q", ErrName, devices[i].Name)
		}
	}
	out := bufio.NewWriter(w)
	for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			out.WriteString(Header(f, d))
			for i := range devices {
				writeSamples(out, f, d, labels[i], &devices[i].Stats)
			}
		}
	}
	out.WriteString("# EOF\n")
	return out.Flush()
}

var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// label is the name as a label's value. A reader refuses the whole page for one
// byte that is not UTF-8.
func label(name string) string {
	var b strings.Builder
	for len(name) > 0 {
		r, n := utf8.DecodeRuneInString(name)
		if r == utf8.RuneError && n == 1 {
			fmt.Fprintf(&b, `\x%02x`, name[0])
		} else {
			b.WriteString(name[:n])
		}
		name = name[n:]
	}
	return escape.Replace(b.String())
}

func writeSamples(out *bufio.Writer, f telemetry.Field, d telemetry.Dir, name string, stats *telemetry.Stats) {
	m := f.Metric(d)
	for q := range stats.Queues {
		v := &stats.Queues[q].RX
		if d == telemetry.TX {
			v = &stats.Queues[q].TX
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
		// Other failures are a client that went away.
		if err := Write(w, list()...); errors.Is(err, ErrName) {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
}
