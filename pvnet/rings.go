package pvnet

import (
	"time"

	"barevif/hypercall"
	"barevif/pvnet/ring"
	"barevif/telemetry"
)

// A RingState is what a device's rings look like, as the files that Linux's netback and
// netfront have in debugfs show those of the kernel. It is for people and for tests; no
// part of the device reads it.
type RingState struct {
	Time     time.Time       `json:"time"`
	ID       string          `json:"id"` // of the vif
	Role     string          `json:"role"`
	Own      hypercall.DomID `json:"own"`
	Peer     hypercall.DomID `json:"peer"`
	State    string          `json:"state"` // our state in xenstore, as last written
	Up       bool            `json:"up"`
	Reason   string          `json:"reason,omitempty"` // why the link is down
	Epoch    uint64          `json:"epoch"`            // number of the connection, from 1
	Queues   int             `json:"queues"`           // of the present or last connection
	Features []string        `json:"features"`
	Halves   []HalfState     `json:"halves"` // two for each queue of the connection: the tx ring, then the rx ring
}

// A HalfState is one end's half of one queue, with its ring.
type HalfState struct {
	Queue int    `json:"queue"`
	Ring  string `json:"ring"` // "tx" or "rx", as the frontend calls it
	Half  string `json:"half"` // "tx" if this end sends on it, otherwise "rx"

	// Owner is what the owner of the half does: "away" from it, "inside" a call, or
	// "waiting" in one for an event. "asleep": a Poller waits for its event. "shut": there
	// is no ring, since the link is down.
	Owner string `json:"owner"`

	// Unread says that the caller inside the half did not answer in time. Then all that
	// follows is zero.
	Unread bool `json:"unread,omitempty"`

	// Age is how old what follows was when the state was complete, in nanoseconds. All of
	// one half is of one moment.
	Age time.Duration `json:"age_ns"`

	ring.Indexes

	RingRef  hypercall.GrantRef `json:"ring_ref"`         // the frontend's grant of the ring's page
	Port     hypercall.PortID   `json:"port"`             // our port of its event channel
	Joined   *bool              `json:"joined,omitempty"` // whether the peer has its end of the channel; nil: the system does not tell
	Buffers  int                `json:"buffers_free"`     // free buffers for frames of this half
	Lent     int                `json:"pages_lent"`       // of a frontend: pages that the peer may use now
	Parsed   bool               `json:"parsed"`           // a frame has been taken out of the ring and waits for its owner
	Shortage uint32             `json:"short"`            // slots the peer must still give before the call that found no room may go on

	// Slots are the requests that this end has to account for. A frontend's are those the
	// peer has not answered, a backend's those it has taken and not answered.
	Slots []SlotState `json:"slots"`
}

// A SlotState is one outstanding request.
type SlotState struct {
	ID  uint16             `json:"id"`
	Ref hypercall.GrantRef `json:"ref"`
	Of  string             `json:"of"` // "frame": the first slot of one; "more": a later one; "posted": an empty page
}

// bound is what an engine knows of its half; see bringUp.
type bound struct{ half *half }

func (b *bound) bind(h *half) { b.half = h }

// visitPatience is how long Rings and Kick wait for a caller inside a half.
const visitPatience = 200 * time.Millisecond

// Rings returns the present state of the device's rings. It asks whoever is inside a half,
// which delays that one by some microseconds, and takes 0.2 s at most. It may be called
// from any goroutine, whether the link is up or not.
func (d *Device) Rings() *RingState {
	s := &RingState{ID: d.id, Role: d.role.String(), Own: d.domain.ID(), Epoch: d.epoch.Load(), Queues: d.Active()}
	d.mu.Lock()
	s.Peer, s.Up, s.Reason = d.peer, d.last.Up, d.last.Reason
	agreed := d.agreed
	d.mu.Unlock()
	s.State = d.counters.Status().State.String()
	s.Features = []string{}
	for i, name := range telemetry.FeatureNames {
		if agreed>>i&1 != 0 {
			s.Features = append(s.Features, name)
		}
	}
	end := time.Now().Add(visitPatience)
	var read []time.Time
	for i := range s.Queues {
		halves := [2]*half{&d.tx[i].half, &d.rx[i].half}
		if d.role == telemetry.Backend {
			halves[0], halves[1] = halves[1], halves[0] // the tx ring first
		}
		for n, h := range halves {
			s.Halves = append(s.Halves, HalfState{})
			hs := &s.Halves[len(s.Halves)-1]
			h.show(hs, end)
			hs.Ring = [2]string{"tx", "rx"}[n]
			read = append(read, time.Now())
		}
	}
	s.Time = time.Now()
	for i := range s.Halves {
		s.Halves[i].Age = s.Time.Sub(read[i])
	}
	return s
}

func (h *half) show(s *HalfState, end time.Time) {
	owner := h.whereabouts()
	var got HalfState
	ran := h.visit(end, func() {
		h.engine().show(&got)
		got.RingRef = h.ringRef // the next connection has another
	})
	if ran {
		*s = got
	} else if h.gate.state.Load() == gateShut {
		owner = "shut"
	} else {
		s.Unread = true
	}
	s.Queue, s.Half, s.Owner = h.queue, h.dir.String(), owner
	if s.Slots == nil {
		s.Slots = []SlotState{}
	}
}

// whereabouts says what the owner of h does.
func (h *half) whereabouts() string {
	switch waits := h.waitSeq.Load()%2 == 1; h.gate.state.Load() {
	case gateShut:
		return "shut"
	case gateBusy, gateClosing:
		if waits {
			return "waiting"
		}
		return "inside"
	default:
		if waits {
			return "asleep"
		}
		return "away"
	}
}

// engine returns the engine of the half's connection. The caller may use the engine.
func (h *half) engine() engine {
	if h.dir == transmit {
		return h.dev.tx[h.queue].eng
	}
	return h.dev.rx[h.queue].eng
}

func (d direction) String() string {
	if d == transmit {
		return "tx"
	}
	return "rx"
}

// Kick does for each queue of the connection what an event would: it makes whoever waits in
// a half look at the ring, and with peer it also notifies the other end, on every event
// channel, without having published anything. It is for a link that stands still, to find
// out whether an event was lost; Linux's netback takes "kick" in debugfs for it. It returns
// how many halves it reached, 0 while the link is down, and may be called from any
// goroutine. It takes 0.2 s at most.
func (d *Device) Kick(peer bool) (halves int) {
	end := time.Now().Add(visitPatience)
	for i := range d.Active() {
		for _, h := range [2]*half{&d.tx[i].half, &d.rx[i].half} {
			if h.gate.state.Load() == gateShut {
				continue
			}
			if peer && !h.visit(end, func() { h.engine().kick() }) {
				continue
			}
			if p := h.park.Load(); p != nil {
				p.wake()
			}
			halves++
		}
	}
	return halves
}

// kick notifies the peer. An error says that the domain is gone, which the next call tells.
func (p *peerLink) kick() { p.port.Notify() }

func (p *peerLink) showPort(s *HalfState) {
	s.Port = p.port.ID()
	if j, ok := p.port.(hypercall.JoinedPort); ok {
		joined := j.Joined()
		s.Joined = &joined
	}
}

// short returns how many more slots the peer must give for the call that last found no
// room.
func (s *shortage) short(index uint32) uint32 {
	return uint32(max(int32(s.goal.Load()-index), 0))
}

func (e *frontTX) show(s *HalfState) {
	e.showPort(s)
	s.Indexes, s.Buffers = e.ring.Inspect(), e.shared.Free()
	s.Shortage = e.short(e.ring.Peer())
	for id, state := range e.state {
		switch state {
		case idFirst:
			s.Slots = append(s.Slots, SlotState{uint16(id), e.refs[id], "frame"})
		case idMore:
			s.Slots = append(s.Slots, SlotState{uint16(id), e.refs[id], "more"})
		}
	}
	s.Lent = len(s.Slots)
}

func (e *frontRX) show(s *HalfState) {
	e.showPort(s)
	s.Indexes, s.Buffers, s.Parsed = e.ring.Inspect(), e.private.Free(), e.haveNext
	for i := e.ring.Consumed(); i != e.ring.Next(); i++ {
		slot := i % e.ring.Size()
		s.Slots = append(s.Slots, SlotState{uint16(slot), e.refs[e.pageAt[slot]], "posted"})
	}
	s.Lent = len(s.Slots)
}

func (e *backTX) show(s *HalfState) {
	e.showPort(s)
	s.Indexes, s.Buffers = e.ring.Inspect(), e.private.Free()
	s.Shortage = e.short(e.ring.Peer())
}

func (e *backRX) show(s *HalfState) {
	e.showPort(s)
	s.Indexes, s.Buffers, s.Parsed = e.ring.Inspect(), e.private.Free(), e.haveNext
	if !e.haveNext {
		return
	}
	for i := range e.next.seg[:e.next.dataSlots] {
		r, of := &e.next.seg[i], "more"
		if i == 0 {
			of = "frame"
		}
		s.Slots = append(s.Slots, SlotState{r.ID, r.Ref, of})
	}
}
