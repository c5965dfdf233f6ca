package main

import (
	"fmt"
	"strconv"
	"strings"

	"barevif/pvnet/link"
	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/tools/table"
)

// A flow is one direction of a vif: what one end sent and the other received.
type flow struct {
	from, to string
	sent     telemetry.Values
	received telemetry.Values
}

// flows returns both directions of a vif from the counters of its two ends.
func flows(front, back telemetry.Stats) [2]flow {
	return [2]flow{
		{"frontend", "backend", front.TX, back.RX},
		{"backend", "frontend", back.TX, front.RX},
	}
}

func lost(v *telemetry.Values) uint64 { return v.Dropped() + v.Errors() }

// balanced reports whether every sent frame was received or dropped.
func (f *flow) balanced() bool {
	return telemetry.Unaccounted(&f.sent, &f.received) == 0
}

// sprintFlows returns flows as the lines of a table, indented.
func sprintFlows(indent string, flows [2]flow) string {
	t := table.Table{Head: []string{"", "frames", "bytes", "frames a batch", "notified", "not needed", "dropped"}}
	for i := range flows {
		f := &flows[i]
		for _, side := range []struct {
			who string
			v   *telemetry.Values
		}{{f.from + " sent", &f.sent}, {f.to + " received", &f.received}} {
			t.Rows = append(t.Rows, []string{side.who,
				cli.Grouped(side.v.Get(telemetry.Packets)), cli.Grouped(side.v.Get(telemetry.Bytes)), perBatch(side.v),
				cli.Grouped(side.v.Get(telemetry.NotifiesSent)), cli.Grouped(side.v.Get(telemetry.NotifiesSpared)), cli.Grouped(lost(side.v))})
		}
	}
	return indent + strings.Join(t.Lines(), "\n"+indent)
}

// perBatch returns the average number of frames per batch.
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

// tally describes the traffic of a vif, one clause per direction. The numbers add up: a frame
// that came in on one side went out on the other, or was lost. peer names the other end.
func tally(peer string, st *telemetry.Stats, js link.JointStats) string {
	in, out := st.RX.Get(telemetry.Packets)+lost(&st.RX), js.ToLink
	read := js.FromLink + js.Dropped() + js.Unfed
	stalled := st.TX.Lost(telemetry.DropGuestStalled)
	gone := min(st.TX.Lost(telemetry.DropDisconnected)+stalled, js.FromLink)
	s := fmt.Sprintf("%s frames from the %s, %s to the network, %s lost%s; %s from the network, %s to the %s, %s lost%s",
		cli.Grouped(in), peer, cli.Grouped(out), cli.Grouped(in-out), toNetworkLost(&js),
		cli.Grouped(read), cli.Grouped(js.FromLink-gone), peer, cli.Grouped(read-js.FromLink+gone), fromNetworkLost(&js, stalled))
	if n := st.TX.Get(telemetry.Packets); n > js.FromLink {
		s += fmt.Sprintf(", cut into %s", cli.Grouped(n))
	}
	return s
}

// toNetworkLost and fromNetworkLost say why a joint dropped frames.
func toNetworkLost(js *link.JointStats) string {
	return reasons(reason{js.Unsent, "not taken there"})
}

func fromNetworkLost(js *link.JointStats, stalled uint64) string {
	return reasons(
		reason{stalled, "not taken by the other end in time"},
		reason{js.Oversize, "longer than the vif's MTU"},
		reason{js.Refused, "longer than the other end takes"},
		reason{js.Uncut, "malformed or not to be segmented"},
		reason{js.Unread, "not handed over by the kernel"})
}

type reason struct {
	frames uint64
	why    string
}

// reasons formats the reasons whose count is not 0, like " (2 for this, 1 for that)".
func reasons(list ...reason) string {
	var said []string
	for _, r := range list {
		if r.frames > 0 {
			said = append(said, cli.Grouped(r.frames)+" "+r.why)
		}
	}
	if said == nil {
		return ""
	}
	return " (" + strings.Join(said, ", ") + ")"
}
