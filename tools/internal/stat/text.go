package stat

import (
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/tools/cli"
	"barevif/tools/internal/users"
	"barevif/tools/table"
)

// A Tone is the role of a piece of text, which determines its colour.
type Tone uint8

const (
	Plain Tone = iota
	Title
	Head
	Dim
	Good
	Warn
	Bad
)

// A Paint colours text by its tone. It must not change the width.
type Paint func(Tone, string) string

// NoPaint returns text as it is.
func NoPaint(_ Tone, s string) string { return s }

// A Sheet describes the output: its width in columns, 0 for unlimited, and how to colour
// it.
type Sheet struct {
	Width int
	Paint Paint
}

// Write writes the look as text for people. The error is w's.
func Write(w io.Writer, l *Look, on Sheet) error {
	var b strings.Builder
	for i := range l.Devices {
		if i > 0 {
			b.WriteByte('\n')
		}
		writeDevice(&b, &l.Devices[i], l.Time, on)
	}
	WritePairs(&b, l, on)
	_, err := io.WriteString(w, b.String())
	return err
}

func writeDevice(b *strings.Builder, d *Device, now time.Time, on Sheet) {
	b.WriteString(on.Paint(Title, d.Name))
	if d.owned {
		b.WriteString("  " + on.Paint(d.ownerTone(), d.Owner()))
	}
	if info, ok := d.Info(); ok {
		other := 1 - info.Role
		fmt.Fprintf(b, "  %s in domain %d of vif %d, %s in domain %d", info.Role, info.Own, info.Handle, other, info.Peer)
	}
	b.WriteByte('\n')
	if d.Err != nil {
		on.Line(b, Bad, "cannot be read: "+Clean(d.Err.Error()))
		return
	}
	r := d.Report
	text, tone := d.Condition()
	b.WriteString("  " + on.Paint(tone, text))
	if d.Source.Kind == bpf.KindMetrics {
		b.WriteByte('\n')
	} else {
		fmt.Fprintf(b, "; %s\n  MAC %s, MTU %d, %d of %d queues, connection %d\n", d.Life(),
			mac(r.Status.MAC), r.Status.MTU, r.Status.Queues, len(r.Stats.Queues), r.Status.Epoch)
		if names := features(r.Status.Features); len(names) > 0 {
			on.Line(b, Plain, "agreed: "+strings.Join(names, " "))
		}
	}
	on.Line(b, Dim, d.Place())
	WriteTable(b, "  ", []*Device{d}, true, on)
	for _, line := range d.Losses() {
		on.Line(b, Warn, line)
	}
	if line := d.Limit(); line != "" {
		on.Line(b, Plain, line)
	}
	const events = 3
	for _, e := range r.Events[max(0, len(r.Events)-events):] {
		on.Line(b, Dim, Event(e, now))
	}
}

// Line writes text as a line indented by two columns, or as several lines if it is too
// long.
func (on Sheet) Line(b *strings.Builder, tone Tone, text string) {
	indent, line := "  ", ""
	for i, word := range strings.Split(text, " ") {
		if n := utf8.RuneCountInString(indent + line + " " + word); i > 0 && (on.Width == 0 || n <= on.Width) {
			line += " " + word
			continue
		}
		if i > 0 {
			b.WriteString(indent + on.Paint(tone, line) + "\n")
			indent = "    "
		}
		line = word
	}
	b.WriteString(indent + on.Paint(tone, line) + "\n")
}

// Owner names the user of the device.
func (d *Device) Owner() string { return "of user " + users.Name(d.Source.UID) }

func (d *Device) ownerTone() Tone {
	if d.Foreign {
		return Warn
	}
	return Plain
}

// Condition describes the state of the device in a few words.
func (d *Device) Condition() (string, Tone) {
	if d.Err != nil {
		return "cannot be read", Bad
	}
	if d.Source.Kind == bpf.KindMetrics {
		return "counters only", Dim
	}
	state, tone := d.Report.Status.State.String(), Warn
	switch {
	case d.Stale:
		state, tone = "stale: was "+state, Bad
	case d.Report.Status.Up:
		state, tone = state+", up", Good
	}
	if d.Report.Torn {
		state += ", torn" // its owner was killed during a publish
	}
	return state, tone
}

// Place says where the counters are, and why there.
func (d *Device) Place() string {
	r := d.Report
	if d.Source.Kind == bpf.KindMetrics {
		return "counters in " + Clean(d.Source.Path) + "/metrics, of which this user may read the text alone"
	}
	where := Clean(d.Source.Path)
	if where == "" {
		where = "map " + strconv.FormatUint(uint64(d.Source.ID), 10)
	}
	s := fmt.Sprintf("counters in %s, %s", Clean(r.Kind), where)
	if r.Reason != "" {
		s += " (" + Clean(r.Reason) + ")"
	}
	return s
}

// Life names the owner's process and the age of its heartbeat. It is empty if they are
// not known.
func (d *Device) Life() string {
	if d.Source.Kind == bpf.KindMetrics {
		return ""
	}
	return fmt.Sprintf("process %d, heartbeat %s ago", d.Report.PID, Age(d.Report.Age))
}

// Losses returns the lost frames by reason, a line for each direction that has any.
func (d *Device) Losses() []string {
	var out []string
	for _, dir := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		var parts []string
		for _, f := range telemetry.Fields() {
			if f.SumIn == "" {
				continue
			}
			if n := d.Count(All, dir, func(v *telemetry.Values) uint64 { return v.Field(f) }); n > 0 {
				parts = append(parts, strings.TrimPrefix(f.Name, "drop_")+" "+cli.Grouped(n))
			}
		}
		if len(parts) > 0 {
			out = append(out, dir.String()+" lost: "+strings.Join(parts, ", "))
		}
	}
	return out
}

// Limit describes the vif's rate limit, and how often and how long frames have waited for
// it. It is empty if there is none.
func (d *Device) Limit() string {
	if len(d.Report.Stats.Queues) == 0 {
		return ""
	}
	rate := Values(&d.Report.Stats, 0, telemetry.RX).Gauge(telemetry.RateLimit)
	if rate == 0 {
		return ""
	}
	waits := d.Count(All, telemetry.RX, func(v *telemetry.Values) uint64 { return v.Get(telemetry.CreditWaits) })
	long := d.Count(All, telemetry.RX, func(v *telemetry.Values) uint64 { return v.Get(telemetry.CreditWaited) })
	return fmt.Sprintf("rx limited to %s bytes/s: frames waited %s times, %s in all",
		cli.Grouped(rate), cli.Grouped(waits), Age(time.Duration(long)))
}

// Event describes e in one line.
func Event(e telemetry.Event, now time.Time) string {
	where := ""
	if e.Queue != telemetry.NoQueue {
		where = fmt.Sprintf(" on queue %d", e.Queue)
	}
	what := fmt.Sprintf("%s%s: %d, %d", e.Kind, where, e.A, e.B)
	switch e.Kind {
	case telemetry.EventState:
		what = fmt.Sprintf("%s after %s", telemetry.State(min(e.B, 255)), telemetry.State(min(e.A, 255)))
	case telemetry.EventTamper:
		what = fmt.Sprintf("tamper%s: %d words of the mirror were written by somebody else, and healed", where, e.A)
	case telemetry.EventStall:
		what = fmt.Sprintf("stall%s: the peer is %d slots short and made no progress for %s", where, e.A, Age(time.Duration(e.B)))
	case telemetry.EventStallOver:
		what = fmt.Sprintf("stall%s over after %s", where, Age(time.Duration(e.B)))
	case telemetry.EventCarrierOff:
		what = fmt.Sprintf("carrier off: the peer took nothing%s for %s", where, Age(time.Duration(e.B)))
	case telemetry.EventCarrierOn:
		what = fmt.Sprintf("carrier on again after %s", Age(time.Duration(e.B)))
	case telemetry.EventRescued:
		what = fmt.Sprintf("rescued wake-up%s: %d slots waited", where, e.A)
	case telemetry.EventReconnect:
		what = fmt.Sprintf("connection %d", e.A)
	case telemetry.EventReset:
		what = fmt.Sprintf("counters reset, %d times so far", e.A)
	}
	return fmt.Sprintf("%s ago: %s", Age(now.Sub(e.Time)), what)
}

// WritePairs writes the flows of vifs with both ends here.
func WritePairs(b *strings.Builder, l *Look, on Sheet) {
	if len(l.Pairs) == 0 {
		return
	}
	g := grid{head: []string{"from", "to", "sent", "= received", "+ dropped", ""}, left: 2, last: true}
	for i := range l.Pairs {
		for k := range l.Pairs[i].Flows {
			f := &l.Pairs[i].Flows[k]
			verdict, tone := f.words()
			g.add([]cell{{f.From, Plain}, {f.To, Plain}, {cli.Grouped(f.Sent), Plain}, {cli.Grouped(f.Received), Plain},
				{cli.Grouped(f.Dropped), Plain}, {verdict, tone}})
		}
	}
	b.WriteByte('\n')
	g.write(b, "", on)
}

// words describes the verdict for people.
func (f *Flow) words() (string, Tone) {
	switch verdict, by := f.Verdict(); verdict {
	case Balanced:
		return string(verdict), Good
	case Moving:
		return fmt.Sprintf("balanced to %d, moving", by), Good
	case Unequal:
		return fmt.Sprintf("unequal by %d", by), Bad
	default:
		return fmt.Sprintf("%d %s", max(by, -by), verdict), Plain
	}
}

// WriteTable writes a table of devices. With queues it has a line for each direction of
// each queue, else one for each direction. It omits columns that do not fit a narrow
// sheet.
func WriteTable(b *strings.Builder, indent string, devices []*Device, queues bool, on Sheet) {
	single, rates := len(devices) == 1, false
	for _, d := range devices {
		rates = rates || d.before != nil
	}
	g := grid{head: []string{"", "frames", "bytes", "lost"}, left: 1, spare: []string{"bytes", "notified", "a batch", "lost"}}
	if rates {
		g.head = []string{"", "frames/s", "bit/s", "lost/s", "frames", "bytes", "lost"}
	}
	g.head = append(g.head, "a batch", "notified", "ring")
	for _, d := range devices {
		if d.Err != nil {
			g.add([]cell{{d.Name + " cannot be read: " + Clean(d.Err.Error()), Bad}})
			continue
		}
		if !single {
			text, tone := d.Condition()
			row := []cell{{d.Name, Title}, {text, tone}}
			if d.owned {
				row = append(row, cell{d.Owner(), d.ownerTone()})
			}
			g.add(row)
		}
		list := []int{All}
		if qs := d.Queues(); queues {
			list = qs
			if len(qs) > 1 {
				list = append(list, All)
			}
		}
		for _, q := range list {
			for _, dir := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
				g.add(d.line(q, dir, rates))
			}
		}
	}
	g.write(b, indent, on)
}

func (d *Device) line(q int, dir telemetry.Dir, rates bool) []cell {
	name := dir.String() + " " + strconv.Itoa(q)
	if q == All {
		name = dir.String() + " all"
	}
	lost := d.Count(q, dir, Lost)
	tone := Plain
	if lost > 0 {
		tone = Warn
	}
	row := []cell{{name, Dim}}
	if rates {
		lostRate := cell{d.rateText(q, dir, Lost, 1), Plain}
		if lostRate.text != "0" && lostRate.text != "-" {
			lostRate.tone = Bad
		}
		row = append(row, cell{d.rateText(q, dir, Packets, 1), Title}, cell{d.rateText(q, dir, Bytes, 8), Title}, lostRate)
	}
	batch := "-"
	if mean, ok := d.Batch(q, dir); ok {
		batch = strconv.FormatFloat(mean, 'f', 1, 64)
	}
	ring := "-"
	if used, ok := d.Occupancy(q, dir); ok {
		v := Values(&d.Report.Stats, q, dir)
		ring = Bar(used, v.Gauge(telemetry.RingSize))
		if d.posted(dir) {
			ring = fmt.Sprintf("%-8s %3.0f/%d", "posted", used, v.Gauge(telemetry.RingSize))
		}
	}
	return append(row,
		cell{cli.Grouped(d.Count(q, dir, Packets)), Plain}, cell{cli.Grouped(d.Count(q, dir, Bytes)), Plain}, cell{cli.Grouped(lost), tone},
		cell{batch, Plain}, cell{cli.Grouped(d.Count(q, dir, Sent)), Plain},
		cell{ring, Plain})
}

// posted reports whether the slots in use hold posted buffers, as in the receive ring of
// a frontend. That ring is full at rest, and must not look saturated.
func (d *Device) posted(dir telemetry.Dir) bool {
	info, ok := d.Info()
	return ok && info.Role == telemetry.Frontend && dir == telemetry.RX
}

func (d *Device) rateText(q int, dir telemetry.Dir, get Get, scale float64) string {
	r, ok := d.Rate(q, dir, get)
	if !ok {
		return "-"
	}
	return SI(r * scale)
}

// Bar draws how full a ring is, eight cells wide, with the numbers: "██▌····· 80/256".
func Bar(used float64, size uint64) string {
	if size == 0 {
		return "-"
	}
	const cells = 8
	parts := []rune(" ▏▎▍▌▋▊▉█")
	eighths := int(min(used/float64(size), 1) * cells * 8)
	if used > 0 {
		eighths = max(eighths, 1)
	}
	var b strings.Builder
	for i := range cells {
		switch n := min(max(eighths-8*i, 0), 8); n {
		case 0:
			b.WriteRune('·')
		default:
			b.WriteRune(parts[n])
		}
	}
	fmt.Fprintf(&b, " %3.0f/%d", used, size)
	return b.String()
}

// SI returns f in three digits with an SI prefix: "1.25M".
func SI(f float64) string {
	const units = "kMGTPE"
	if f < 1000 {
		if f >= 100 || f == float64(int(f)) {
			return strconv.FormatFloat(f, 'f', 0, 64)
		}
		return strconv.FormatFloat(f, 'f', 1, 64)
	}
	i := -1
	for f >= 999.5 && i < len(units)-1 {
		f /= 1000
		i++
	}
	digits := 2
	switch {
	case f >= 99.95:
		digits = 0
	case f >= 9.995:
		digits = 1
	}
	return strconv.FormatFloat(f, 'f', digits, 64) + units[i:i+1]
}

// Age returns a duration to a tenth, in one unit.
func Age(d time.Duration) string {
	switch {
	case d < 0:
		return "0 s"
	case d < time.Minute:
		return strconv.FormatFloat(d.Seconds(), 'f', 1, 64) + " s"
	case d < time.Hour:
		return strconv.Itoa(int(d.Minutes())) + " min"
	case d < 48*time.Hour:
		return strconv.Itoa(int(d.Hours())) + " h"
	}
	return strconv.Itoa(int(d.Hours()/24)) + " days"
}

func mac(m [6]byte) string { return net.HardwareAddr(m[:]).String() }

type cell struct {
	text string
	tone Tone
}

// A grid is a table that omits columns for which a narrow sheet has no room.
type grid struct {
	head  []string
	left  int      // number of columns aligned to the left
	last  bool     // the last column is, too
	spare []string // columns that may be omitted, in this order
	rows  [][]cell // one with fewer cells is a line without columns
}

func (g *grid) add(row []cell) { g.rows = append(g.rows, row) }

// table returns the grid in colours.
func (g *grid) table(paint Paint) *table.Table {
	t := &table.Table{Left: func(column int) bool { return column < g.left || g.last && column == len(g.head)-1 }}
	for _, name := range g.head {
		t.Head = append(t.Head, paint(Head, name))
	}
	for _, row := range g.rows {
		var cells []string
		for _, c := range row {
			cells = append(cells, paint(c.tone, c.text))
		}
		t.Rows = append(t.Rows, cells)
	}
	return t
}

// omit takes a column out.
func (g *grid) omit(name string) {
	at := slices.Index(g.head, name)
	if at < 0 {
		return
	}
	for i, row := range g.rows {
		if len(row) == len(g.head) {
			g.rows[i] = slices.Delete(row, at, at+1)
		}
	}
	g.head = slices.Delete(g.head, at, at+1)
}

func (g *grid) write(b *strings.Builder, indent string, on Sheet) {
	t := g.table(on.Paint)
	for _, name := range g.spare {
		if on.Width == 0 || t.Width() <= on.Width-len(indent) {
			break
		}
		g.omit(name)
		t = g.table(on.Paint)
	}
	for _, line := range t.Lines() {
		b.WriteString(indent + line + "\n")
	}
}

// Left says how many devices of other users are not shown; "" if none.
func (l *Look) Left() string {
	switch l.Hidden {
	case 0:
		return ""
	case 1:
		return "1 device of another user is not shown"
	}
	return fmt.Sprintf("%d devices of other users are not shown", l.Hidden)
}
