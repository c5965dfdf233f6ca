package stat

import (
	"barevif/telemetry"
	"barevif/telemetry/bpf"
)

// A Pair is a vif whose two ends are both here, so that what one end sent can be
// compared with what became of it at the other.
type Pair struct {
	Front, Back int // in Look.Devices
	Flows       [2]Flow
}

// A Flow is one direction of a vif.
type Flow struct {
	From, To                string // names of devices
	Sent, Received, Dropped uint64 // frames; dropped by the receiving end
	Gone                    uint64 // frames unanswered when a connection ended
	Ring                    uint64 // slots between the two
}

// Balanced says that every frame sent was received or dropped.
func (f *Flow) Balanced() bool { return f.Sent == f.Received+f.Dropped }

// Verdict is "balanced", or why it is not. The two ends are read one after the
// other and publish at their own time, so that a few frames of difference are on
// their way; more than the ring holds cannot be. Of frames that were unanswered when
// a connection ended nobody knows whether they arrived.
func (f *Flow) Verdict() (verdict string, difference int64) {
	difference = int64(f.Sent - f.Received - f.Dropped)
	switch {
	case difference == 0:
		return "balanced", 0
	case difference > 0 && uint64(difference) <= f.Ring:
		return "in flight", difference
	case difference > 0 && uint64(difference) <= f.Ring+f.Gone:
		return "lost with a connection", difference
	case difference < 0:
		return "read later", difference
	}
	return "unequal", difference
}

// pairs finds ends that belong together. A device of two sources is nobody's end:
// it is not known which of them counts.
func pairs(devices []Device) []Pair {
	type vif struct {
		front, back uint16
		handle      uint32
	}
	const none, many = -1, -2
	ends := map[vif]*[2]int{}
	var order []vif
	for i := range devices {
		info, ok := devices[i].Info()
		if !ok || devices[i].Report == nil {
			continue
		}
		v := vif{info.Own, info.Peer, info.Handle}
		if info.Role == telemetry.Backend {
			v.front, v.back = info.Peer, info.Own
		}
		e := ends[v]
		if e == nil {
			e = &[2]int{none, none}
			ends[v] = e
			order = append(order, v)
		}
		if e[info.Role] == none {
			e[info.Role] = i
		} else {
			e[info.Role] = many
		}
	}
	var out []Pair
	for _, v := range order {
		e := ends[v]
		if e[0] < 0 || e[1] < 0 {
			continue
		}
		f, b := &devices[e[0]], &devices[e[1]]
		out = append(out, Pair{Front: e[0], Back: e[1], Flows: [2]Flow{
			flow(f.Name, b.Name, f.Report, b.Report), flow(b.Name, f.Name, b.Report, f.Report),
		}})
	}
	return out
}

func flow(from, to string, a, b *bpf.Report) Flow {
	f := Flow{From: from, To: to, Sent: Packets(&a.Stats.TX), Received: Packets(&b.Stats.RX), Dropped: Lost(&b.Stats.RX),
		Gone: a.Stats.TX.Lost(telemetry.DropDisconnected)}
	for q := range a.Stats.Queues {
		f.Ring += a.Stats.Queues[q].TX.Gauge(telemetry.RingSize)
	}
	return f
}
