package stat

import (
	"strconv"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
)

// Version is increased when a name below changes its meaning or is removed. New names may
// be added without that.
const Version = 3

// JSON is the form of a look, as "barevif stat --json" and the page's endpoint return it.
// Names are those of COUNTERS.md with their direction: "rx_packets".
type JSON struct {
	Version int          `json:"version"`
	Time    time.Time    `json:"time"`
	Devices []JSONDevice `json:"devices"`
	Pairs   []JSONPair   `json:"pairs"`
	Errors  []string     `json:"errors"`
	Hidden  int          `json:"hidden"` // devices of other users that were left out
}

// JSONDevice is one source. A source with an error has no counters. One of kind "metrics"
// has no fields that need the info record.
type JSONDevice struct {
	Vif    string     `json:"vif"`
	Error  string     `json:"error,omitempty"`
	Source JSONSource `json:"source"`

	// Foreign: the device is neither root's nor that of a named user, so it may be made
	// up. Its label in flows and metrics is "NAME@UID".
	Foreign bool `json:"foreign"`

	Role   string  `json:"role,omitempty"` // "frontend", "backend"
	Own    *uint16 `json:"own_domain,omitempty"`
	Peer   *uint16 `json:"peer_domain,omitempty"`
	Handle *uint32 `json:"handle,omitempty"`

	Status *JSONStatus `json:"status,omitempty"`
	Torn   bool        `json:"torn"` // a block is not of one instant

	Totals *JSONCounters `json:"totals,omitempty"` // over all queues
	Queues []JSONQueue   `json:"queues,omitempty"`

	// Rates are per second, over the last Seconds; absent in a first look.
	Rates *JSONRates `json:"rates,omitempty"`

	Events []JSONEvent `json:"events,omitempty"` // oldest first
}

// JSONSource says where the counters were read.
type JSONSource struct {
	Kind string `json:"kind"` // "bpf+pins", "bpf", "memfd", "metrics"
	Path string `json:"path,omitempty"`
	ID   uint32 `json:"map_id,omitempty"`
	UID  *int   `json:"uid,omitempty"` // the user who made it, if known
}

// JSONStatus is the owner's status beside its counters.
type JSONStatus struct {
	Mirror       string    `json:"mirror"`                  // such as "bpf+pins+iterator"
	MirrorReason string    `json:"mirror_reason,omitempty"` // why it is not a better one
	State        string    `json:"state"`                   // enum xenbus_state
	Up           bool      `json:"up"`
	MAC          string    `json:"mac"`
	MTU          uint32    `json:"mtu"` // bytes
	QueuesInUse  uint32    `json:"queues_in_use"`
	Epoch        Uint      `json:"epoch"`
	Features     []string  `json:"features"`
	PID          int       `json:"pid"`
	Start        time.Time `json:"start"`
	Heartbeat    time.Time `json:"heartbeat"`
	Age          float64   `json:"heartbeat_age_seconds"`
	Stale        bool      `json:"stale"`
	Reset        JSONReset `json:"reset"`
}

// JSONReset is the baseline that the device itself reset to.
type JSONReset struct {
	Count     Uint       `json:"count"`
	Time      *time.Time `json:"time,omitempty"`
	RxPackets Uint       `json:"rx_packets"`
	RxBytes   Uint       `json:"rx_bytes"`
	TxPackets Uint       `json:"tx_packets"`
	TxBytes   Uint       `json:"tx_bytes"`
}

// JSONCounters are all fields of both directions.
type JSONCounters struct {
	Counters   map[string]Uint          `json:"counters"`
	Gauges     map[string]Uint          `json:"gauges"`
	Histograms map[string]JSONHistogram `json:"histograms"`
}

// JSONHistogram has the count of each bucket, not cumulated.
type JSONHistogram struct {
	Buckets map[string]Uint `json:"buckets"` // "le_64", ..., "inf"
	Sum     Uint            `json:"sum"`
}

// JSONQueue is one queue.
type JSONQueue struct {
	Queue int `json:"queue"`
	JSONCounters
	Rates map[string]float64 `json:"rates,omitempty"`
}

// JSONRates are the growth rates of all counters.
type JSONRates struct {
	Seconds  float64            `json:"seconds"`
	Counters map[string]float64 `json:"counters"`
}

// JSONEvent is one event of the device's log.
type JSONEvent struct {
	Seq   Uint      `json:"seq"`
	Time  time.Time `json:"time"`
	Kind  string    `json:"kind"`
	Queue int       `json:"queue"` // -1: the whole device
	A     Uint      `json:"a"`
	B     Uint      `json:"b"`
}

// JSONPair is a vif with both ends here.
type JSONPair struct {
	Front string     `json:"frontend"`
	Back  string     `json:"backend"`
	Flows []JSONFlow `json:"flows"`
}

// JSONFlow is one direction of a vif: counts of frames and the verdict.
type JSONFlow struct {
	From     string `json:"from"`
	To       string `json:"to"`
	Sent     Uint   `json:"sent"`
	Received Uint   `json:"received"`
	Dropped  Uint   `json:"dropped"`

	// Frames move during the reads. Difference is sent less received less dropped; Least
	// and Most are bounds of it at one time.
	Difference int64   `json:"difference"`
	Least      int64   `json:"difference_least"`
	Most       int64   `json:"difference_most"`
	Verdict    Verdict `json:"verdict"`
	By         int64   `json:"verdict_frames"` // the number of frames in the verdict
}

// A Uint is a JSON number up to 2^53, which every JSON parser can represent, and a string
// of digits above.
type Uint uint64

// MarshalJSON writes one of the two forms. It never fails.
func (u Uint) MarshalJSON() ([]byte, error) {
	b := strconv.AppendUint(nil, uint64(u), 10)
	if u > 1<<53 {
		b = append(append([]byte{'"'}, b...), '"')
	}
	return b, nil
}

// UnmarshalJSON accepts both forms. The error is a *strconv.NumError.
func (u *Uint) UnmarshalJSON(b []byte) error {
	if len(b) > 2 && b[0] == '"' && b[len(b)-1] == '"' {
		b = b[1 : len(b)-1]
	}
	n, err := strconv.ParseUint(string(b), 10, 64)
	*u = Uint(n)
	return err
}

// JSON returns the look in its documented form.
func (l *Look) JSON() *JSON {
	j := &JSON{Version: Version, Time: l.Time, Devices: []JSONDevice{}, Pairs: []JSONPair{}, Errors: []string{}, Hidden: l.Hidden}
	for i := range l.Devices {
		j.Devices = append(j.Devices, l.Devices[i].json())
	}
	for i := range l.Pairs {
		p := &l.Pairs[i]
		out := JSONPair{Front: l.Devices[p.Front].Label(), Back: l.Devices[p.Back].Label()}
		for k := range p.Flows {
			f := &p.Flows[k]
			verdict, by := f.Verdict()
			out.Flows = append(out.Flows, JSONFlow{
				From: f.From, To: f.To, Sent: Uint(f.Sent), Received: Uint(f.Received), Dropped: Uint(f.Dropped),
				Difference: int64(f.Sent - f.Received - f.Dropped), Least: f.Least, Most: f.Most, Verdict: verdict, By: by,
			})
		}
		j.Pairs = append(j.Pairs, out)
	}
	for _, err := range l.Errors {
		j.Errors = append(j.Errors, Clean(err.Error()))
	}
	return j
}

func (d *Device) json() JSONDevice {
	j := JSONDevice{Vif: d.Name, Foreign: d.Foreign,
		Source: JSONSource{Kind: d.Source.Kind, Path: Clean(d.Source.Path), ID: d.Source.ID}}
	if d.Source.UID >= 0 {
		j.Source.UID = &d.Source.UID
	}
	if info, ok := d.Info(); ok {
		j.Role, j.Own, j.Peer, j.Handle = info.Role.String(), &info.Own, &info.Peer, &info.Handle
	}
	if d.Err != nil {
		j.Error = Clean(d.Err.Error())
		return j
	}
	r := d.Report
	if d.Source.Kind != bpf.KindMetrics {
		j.Status = d.status()
	}
	j.Torn = r.Torn
	totals := counters(&r.Stats.RX, &r.Stats.TX)
	j.Totals = &totals
	for q := range r.Stats.Queues {
		v := &r.Stats.Queues[q]
		j.Queues = append(j.Queues, JSONQueue{q, counters(&v.RX, &v.TX), d.rates(q)})
	}
	if rates := d.rates(All); rates != nil {
		j.Rates = &JSONRates{d.Span.Seconds(), rates}
	}
	for _, e := range r.Events {
		j.Events = append(j.Events, JSONEvent{Uint(e.Seq), e.Time, e.Kind.String(), e.Queue, Uint(e.A), Uint(e.B)})
	}
	return j
}

func (d *Device) status() *JSONStatus {
	r := d.Report
	s := &JSONStatus{
		Mirror: Clean(r.Kind), MirrorReason: Clean(r.Reason),
		State: r.Status.State.Symbol(), Up: r.Status.Up, MAC: mac(r.Status.MAC), MTU: r.Status.MTU,
		QueuesInUse: r.Status.Queues, Epoch: Uint(r.Status.Epoch), Features: features(r.Status.Features),
		PID: r.PID, Start: r.Start, Heartbeat: r.Heartbeat, Age: r.Age.Seconds(), Stale: d.Stale,
		Reset: JSONReset{
			Count: Uint(r.Reset.Count), RxPackets: Uint(r.Reset.RxPackets), RxBytes: Uint(r.Reset.RxBytes),
			TxPackets: Uint(r.Reset.TxPackets), TxBytes: Uint(r.Reset.TxBytes),
		},
	}
	if r.Reset.Count != 0 {
		s.Reset.Time = &r.Reset.Time
	}
	return s
}

func features(f telemetry.Feature) []string {
	out := []string{}
	for b, name := range telemetry.FeatureNames {
		if f&(1<<b) != 0 {
			out = append(out, name)
		}
	}
	return out
}

func counters(rx, tx *telemetry.Values) JSONCounters {
	c := JSONCounters{map[string]Uint{}, map[string]Uint{}, map[string]JSONHistogram{}}
	for dir, v := range []*telemetry.Values{rx, tx} {
		for _, f := range telemetry.Fields() {
			name := f.FullName(telemetry.Dir(dir))
			switch f.Kind {
			case telemetry.KindCounter:
				c.Counters[name] = Uint(v.Field(f))
			case telemetry.KindGauge:
				c.Gauges[name] = Uint(v.Field(f))
			case telemetry.KindHistogram:
				buckets, sum := v.Histogram(f)
				h := JSONHistogram{map[string]Uint{}, Uint(sum)}
				for i, n := range buckets {
					h.Buckets[f.Bucket(i)] = Uint(n)
				}
				c.Histograms[name] = h
			}
		}
	}
	return c
}

func (d *Device) rates(queue int) map[string]float64 {
	if d.before == nil {
		return nil
	}
	out := map[string]float64{}
	for _, dir := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			if f.Kind != telemetry.KindCounter {
				continue
			}
			if r, ok := d.Rate(queue, dir, func(v *telemetry.Values) uint64 { return v.Field(f) }); ok {
				out[f.FullName(dir)] = r
			}
		}
	}
	return out
}
