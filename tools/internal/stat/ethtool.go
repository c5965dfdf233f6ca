package stat

import (
	"fmt"
	"io"
	"strings"

	"barevif/telemetry"
)

// WriteNames writes every counter, gauge and histogram bucket of the look, one per line,
// in the form of "ethtool -S". Names are those of COUNTERS.md with their direction; a
// histogram has a line per bucket and one for the sum of its values: "rx_frame_size_le_64",
// "rx_frame_size_sum". The sums of all queues come first, then each queue with its number
// before the name: "queue_0_rx_packets". The order is that of COUNTERS.md, rx before tx.
// Queues that were never used are among them, so that the lines of a device stay the same
// while it lives.
func WriteNames(w io.Writer, l *Look) error {
	var b strings.Builder
	for i := range l.Devices {
		d := &l.Devices[i]
		if i > 0 {
			b.WriteByte('\n')
		}
		name := d.Name
		if d.Foreign || d.owned {
			name = d.Label()
		}
		if d.Err != nil {
			fmt.Fprintf(&b, "statistics of %s cannot be read: %s\n", name, Clean(d.Err.Error()))
			continue
		}
		fmt.Fprintf(&b, "NIC statistics of %s:\n", name)
		st := &d.Report.Stats
		writeBlock(&b, "", telemetry.RX, &st.RX)
		writeBlock(&b, "", telemetry.TX, &st.TX)
		for q := range st.Queues {
			prefix := fmt.Sprintf("queue_%d_", q)
			writeBlock(&b, prefix, telemetry.RX, &st.Queues[q].RX)
			writeBlock(&b, prefix, telemetry.TX, &st.Queues[q].TX)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func writeBlock(b *strings.Builder, prefix string, dir telemetry.Dir, v *telemetry.Values) {
	for _, f := range telemetry.Fields() {
		name := prefix + f.FullName(dir)
		if f.Kind != telemetry.KindHistogram {
			fmt.Fprintf(b, "     %s: %d\n", name, v.Field(f))
			continue
		}
		buckets, sum := v.Histogram(f)
		for i, n := range buckets {
			fmt.Fprintf(b, "     %s_%s: %d\n", name, f.Bucket(i), n)
		}
		fmt.Fprintf(b, "     %s_%s: %d\n", name, f.Bucket(len(buckets)), sum)
	}
}
