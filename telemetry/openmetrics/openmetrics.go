// Package openmetrics writes counters as OpenMetrics 1.0 text.
//
// The text is byte for byte what the pinned BPF iterator of telemetry/bpf prints. This
// package is for machines and processes without the iterator.
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

// A Device is the counters of one device with the value of its vif label, Name. All names
// of a page must differ, because a reader refuses a page with two equal ones. Bytes of
// Name that are not UTF-8 are written as \xff, with their own two digits. Stats should be
// totals: monitoring takes a counter that goes down for a restart.
type Device struct {
	Name  string
	Stats telemetry.Stats
}

// ContentType is the media type of the text.
const ContentType = "application/openmetrics-text; version=1.0.0; charset=utf-8"

// Header returns the lines above the samples of f in direction d.
func Header(f telemetry.Field, d telemetry.Dir) string {
	m := f.Metric(d)
	unit := ""
	if strings.HasSuffix(m, "_"+f.Unit) {
		unit = fmt.Sprintf("# UNIT %s %s\n", m, f.Unit)
	}
	return fmt.Sprintf("# TYPE %s %s\n%s# HELP %s %s\n", m, f.Kind, unit, m, f.Help)
}

// ErrName is returned by Write when two devices have the same name.
var ErrName = errors.New("openmetrics: two devices have the same name, which would make the page unreadable; name each differently")

// Write writes the counters of all devices. The error is w's, or ErrName; with ErrName it
// has written nothing.
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

// label returns name as a label's value. It escapes bytes that are not UTF-8, because a
// single one makes a reader refuse the whole page.
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

// Handler serves the text of the devices that list returns at each request.
func Handler(list func() []Device) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", ContentType)
		// Any other error means that the client went away.
		if err := Write(w, list()...); errors.Is(err, ErrName) {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
}
