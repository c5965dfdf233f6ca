package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/telemetry"
)

// A flow is one direction of a vif: what one end sent and the other received.
type flow struct {
	from, to string
	sent     telemetry.Values
	received telemetry.Values
}

// flows are both directions of a vif whose two ends are here.
func flows(front, back telemetry.Stats) [2]flow {
	return [2]flow{
		{"frontend", "backend", front.TX, back.RX},
		{"backend", "frontend", back.TX, front.RX},
	}
}

func lost(v *telemetry.Values) uint64 { return v.Dropped() + v.Errors() }

// balanced says whether every frame that was sent was received or dropped.
func (f *flow) balanced() bool {
	return telemetry.Unaccounted(&f.sent, &f.received) == 0
}

// printFlows writes flows as a table, indented.
func printFlows(w io.Writer, indent string, flows [2]flow) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "%s\tframes\tbytes\tframes a batch\tnotified\tnot needed\tdropped\t\n", indent)
	for i := range flows {
		f := &flows[i]
		for _, side := range []struct {
			who string
			v   *telemetry.Values
		}{{f.from + " sent", &f.sent}, {f.to + " received", &f.received}} {
			fmt.Fprintf(t, "%s%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", indent, side.who,
				grouped(side.v.Get(telemetry.Packets)), grouped(side.v.Get(telemetry.Bytes)), perBatch(side.v),
				grouped(side.v.Get(telemetry.NotifiesSent)), grouped(side.v.Get(telemetry.NotifiesSpared)), grouped(lost(side.v)))
		}
	}
	// The writer below reports its own errors.
	_ = t.Flush()
}

// perBatch is how many frames were moved at a time, on average.
func perBatch(v *telemetry.Values) string {
	for _, f := range telemetry.Fields() {
		if f.Kind != telemetry.KindHistogram || f.Name != "batch_size" {
			continue
		}
		buckets, sum := v.Histogram(f)
		var n uint64
		for _, b := range buckets {
			n += b
		}
		if n > 0 {
			return strconv.FormatFloat(float64(sum)/float64(n), 'f', 1, 64)
		}
	}
	return "-"
}

// grouped is n with its thousands apart.
func grouped(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + " " + s[i:]
	}
	return s
}

// binarySize is a number of bytes in the unit that suits it.
func binarySize(n uint64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for ; f >= 1024 && i < len(units)-1; i++ {
		f /= 1024
	}
	if f == float64(uint64(f)) {
		return fmt.Sprintf("%.0f %s", f, units[i])
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

// tally is a vif's life in one line. peer is what its other end is.
func tally(dev *pvnet.Device, j *link.Joint, peer string) string {
	st, js := dev.Stats(), j.Stats()
	return fmt.Sprintf("%s frames from the %s (%s lost), %s to the network%s; %s from the network%s, %s to the %s",
		grouped(st.RX.Get(telemetry.Packets)), peer, grouped(lost(&st.RX)), grouped(js.ToLink), toNetworkLost(&js),
		grouped(js.FromLink), fromNetworkLost(&js), grouped(st.TX.Get(telemetry.Packets)), peer)
}

// toNetworkLost and fromNetworkLost say how many frames a joint dropped, and why.
func toNetworkLost(js *link.JointStats) string {
	return reasons(reason{js.Unsent, "not taken there"})
}

func fromNetworkLost(js *link.JointStats) string {
	return reasons(
		reason{js.Oversize, "longer than the vif's MTU"},
		reason{js.Refused, "longer than the other end takes"},
		reason{js.Uncut, "malformed or not to be segmented"},
		reason{js.Unread, "not handed over by the kernel"})
}

type reason struct {
	frames uint64
	why    string
}

// reasons is " (3 lost: 2 for this, 1 for that)", of those that are not 0.
func reasons(list ...reason) string {
	var sum uint64
	var said []string
	for _, r := range list {
		if sum += r.frames; r.frames > 0 {
			said = append(said, grouped(r.frames)+" "+r.why)
		}
	}
	if sum == 0 {
		return " (0 lost)"
	}
	return fmt.Sprintf(" (%s lost: %s)", grouped(sum), strings.Join(said, ", "))
}
