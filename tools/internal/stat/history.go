package stat

import (
	"time"

	"barevif/telemetry"
)

// A Sample holds the values that plots show of one queue, or of All, at one time. Values
// per second are means since the sample before.
type Sample struct {
	Time     time.Time `json:"time"`
	RxFrames float64   `json:"rx_frames"` // per second
	TxFrames float64   `json:"tx_frames"`
	RxBits   float64   `json:"rx_bits"`
	TxBits   float64   `json:"tx_bits"`
	RxLost   float64   `json:"rx_lost"`
	TxLost   float64   `json:"tx_lost"`
	RxUsed   float64   `json:"rx_used"` // slots in use: mean over the owner's polls
	TxUsed   float64   `json:"tx_used"`
}

// A Series is the samples of a queue, oldest first.
type Series struct {
	Vif     string   `json:"vif"`
	Source  string   `json:"source"` // kind and path: two sources may have the same name
	Queue   int      `json:"queue"`  // or All
	RxSize  uint64   `json:"rx_size"`
	TxSize  uint64   `json:"tx_size"` // slots of the ring
	Ring    bool     `json:"ring"`    // the owner has measured the slots in use of a ring
	Samples []Sample `json:"samples"`
}

// A History keeps the latest samples of every device. It has one owner.
type History struct {
	limit  int
	series []Series
}

// NewHistory returns a History of limit samples per queue.
func NewHistory(limit int) *History { return &History{limit: limit} }

// Series returns the stored series, in the order of the latest look. It is valid until
// the next Add; samples are never changed.
func (h *History) Series() []Series { return h.series }

// Add adds the rates of a look. It drops devices that are gone.
func (h *History) Add(l *Look) {
	var next []Series
	for i := range l.Devices {
		d := &l.Devices[i]
		if d.Report == nil {
			continue
		}
		for _, q := range append([]int{All}, d.Queues()...) {
			s := Series{Vif: d.Name, Source: d.Source.Kind + " " + Clean(d.Source.Path), Queue: q}
			for k := range h.series {
				if o := &h.series[k]; o.Vif == s.Vif && o.Source == s.Source && o.Queue == q {
					s.Samples = o.Samples
				}
			}
			s.RxSize = Values(&d.Report.Stats, q, telemetry.RX).Gauge(telemetry.RingSize)
			s.TxSize = Values(&d.Report.Stats, q, telemetry.TX).Gauge(telemetry.RingSize)
			_, rx := d.Occupancy(q, telemetry.RX)
			_, tx := d.Occupancy(q, telemetry.TX)
			s.Ring = rx || tx
			if d.before != nil {
				s.Samples = append(s.Samples, d.sample(q, l.Time))
				if extra := len(s.Samples) - h.limit; extra > 0 {
					s.Samples = s.Samples[extra:]
				}
			}
			next = append(next, s)
		}
	}
	h.series = next
}

func (d *Device) sample(q int, at time.Time) Sample {
	rate := func(dir telemetry.Dir, get Get, scale float64) float64 {
		r, _ := d.Rate(q, dir, get)
		return r * scale
	}
	used := func(dir telemetry.Dir) float64 {
		slots, _ := d.Occupancy(q, dir)
		return slots
	}
	return Sample{
		Time:     at,
		RxFrames: rate(telemetry.RX, Packets, 1), TxFrames: rate(telemetry.TX, Packets, 1),
		RxBits: rate(telemetry.RX, Bytes, 8), TxBits: rate(telemetry.TX, Bytes, 8),
		RxLost: rate(telemetry.RX, Lost, 1), TxLost: rate(telemetry.TX, Lost, 1),
		RxUsed: used(telemetry.RX), TxUsed: used(telemetry.TX),
	}
}
