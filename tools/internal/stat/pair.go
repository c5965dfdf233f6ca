package stat

import (
	"errors"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
)

// A Pair is a vif with both ends here, so that the frames one end sent can be compared
// with those that the other end received or lost.
type Pair struct {
	Front, Back int // indices in Look.Devices
	Flows       [2]Flow
}

// A Flow is one direction of a vif. The frontend is read, then the backend, then the
// frontend again: when the backend was read, the frontend's numbers were between its two
// readings.
type Flow struct {
	From, To                string // names of devices
	Sent, Received, Dropped uint64 // frames, at the first read; dropped is counted by either end
	Least, Most             int64  // bounds of the frames sent and not yet accounted for, at one time
	Room                    uint64 // frames that can be in the ring, or counted and not yet published
}

// unshown is how many frames an owner counts before it publishes them.
const unshown = 32

// Balanced reports whether there may have been a time at which every sent frame was
// received or dropped.
func (f *Flow) Balanced() bool { return f.Least <= 0 && f.Most >= 0 }

// A Verdict is the judgement of a flow.
type Verdict string

const (
	Balanced Verdict = "balanced"      // every frame is accounted for
	Moving   Verdict = "moving"        // balanced except for frames that moved during the reads
	Flight   Verdict = "in flight"     // frames in the ring, or received and not yet published
	Unshown  Verdict = "not shown yet" // frames that the sender has not yet published
	Unequal  Verdict = "unequal"       // one end has counted for longer, or has lost count
)

// Verdict judges the flow. by is the number of frames concerned: the missing ones,
// negative if there are too many; for Moving those that moved.
func (f *Flow) Verdict() (v Verdict, by int64) {
	switch room := int64(f.Room); {
	case f.Least == 0 && f.Most == 0:
		return Balanced, 0
	case f.Balanced():
		return Moving, f.Most - f.Least
	case f.Most < -room:
		return Unequal, f.Most
	case f.Most < 0:
		return Unshown, f.Most
	case f.Least <= room:
		return Flight, f.Least
	}
	return Unequal, f.Least
}

// pairs finds the two ends of each vif. An end with two sources is left out, since it is
// unknown which of them counts. A foreign device is an end only if there is no other,
// because any user can make one up.
func pairs(devices []Device) []Pair {
	type vif struct {
		front, back uint16
		handle      uint32
	}
	type ends struct {
		at   [2]int
		firm [2]bool // an end that is not foreign was found
	}
	const none, many = -1, -2
	found := map[vif]*ends{}
	var order []vif
	for _, foreign := range [...]bool{false, true} {
		for i := range devices {
			info, ok := devices[i].Info()
			if !ok || devices[i].Report == nil || devices[i].Foreign != foreign {
				continue
			}
			v := vif{info.Own, info.Peer, info.Handle}
			if info.Role == telemetry.Backend {
				v.front, v.back = info.Peer, info.Own
			}
			e := found[v]
			if e == nil {
				e = &ends{at: [2]int{none, none}}
				found[v] = e
				order = append(order, v)
			}
			switch {
			case foreign && e.firm[info.Role]:
			case e.at[info.Role] == none:
				e.at[info.Role], e.firm[info.Role] = i, !foreign
			default:
				e.at[info.Role] = many
			}
		}
	}
	var out []Pair
	for _, v := range order {
		if at := found[v].at; at[0] >= 0 && at[1] >= 0 {
			out = append(out, Pair{Front: at[0], Back: at[1]})
		}
	}
	return out
}

// compare sets the flows of p from three readings: of the frontend, the backend, and the
// frontend again.
func (p *Pair) compare(devices []Device, f, b, f2 *telemetry.Stats) {
	front, back := devices[p.Front].Label(), devices[p.Back].Label()
	p.Flows = [2]Flow{flow(front, back, f, b), flow(back, front, b, f)}
	there, here := flow(front, back, f2, b), flow(back, front, b, f2)
	p.Flows[0].Most, p.Flows[1].Least = there.Most, here.Least
}

func flow(from, to string, a, b *telemetry.Stats) Flow {
	f := Flow{From: from, To: to, Sent: Packets(&a.TX), Received: Packets(&b.RX), Dropped: Lost(&b.RX) + a.TX.Lost(telemetry.DropDisconnected)}
	f.Least = telemetry.Unaccounted(&a.TX, &b.RX)
	f.Most = f.Least
	for q := range a.Queues {
		if size := a.Queues[q].TX.Gauge(telemetry.RingSize); size > 0 {
			f.Room += size + unshown
		}
	}
	return f
}

// measure reads the two ends of p again, in the order that Flow describes, with nothing
// in between.
func (p *Pair) measure(devices []Device) (err error) {
	ends := [2]*bpf.Reader{}
	for i, at := range [2]int{p.Front, p.Back} {
		if ends[i], err = bpf.Open(devices[at].Source); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, ends[i].Close()) }()
	}
	var reads [3]*telemetry.Stats
	for i, end := range [3]*bpf.Reader{ends[0], ends[1], ends[0]} {
		st, err := end.Stats()
		if err != nil {
			return err
		}
		reads[i] = &st
	}
	p.compare(devices, reads[0], reads[1], reads[2])
	return nil
}
