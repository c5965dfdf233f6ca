package pvnet

import (
	"context"
	"iter"

	"barevif/pvnet/toeplitz"
)

// A Steering says how the frontend of a backend's device wants the frames that are sent to it
// to be spread over its queues: the queue of a frame is
//
//	hash, _, _ := s.Table.Frame(frame, len(frame), s.Types)
//	queue := s.Queues[hash%uint32(len(s.Queues))]
//
// as [Device.QueueFor] computes it. It is immutable.
type Steering struct {
	Table  *toeplitz.Table // hashes with the frontend's key
	Types  uint32          // which types of hash it asked for: a set of [HashType.Flag]
	Queues []int           // queues of the connection; at least one entry, 128 at most
}

// Steerings yields the present steering and then each one that replaces it, until ctx or the
// device ends. It yields nil where the frontend has asked for no hash, so that QueueFor takes
// another one; the device of a frontend has no other steering. A reader that falls behind
// misses all but the newest. It is for those who choose the queues of frames before they
// reach this process, such as a [barevif/pvnet/link.Joint], whose kernel does.
func (d *Device) Steerings(ctx context.Context) iter.Seq[*Steering] {
	return func(yield func(*Steering) bool) {
		var last *steering
		for first := true; ; first = false {
			d.mu.Lock()
			changed := d.steered
			d.mu.Unlock()
			if s := d.steer.Load(); first || s != last {
				if last = s; !yield(s.public()) {
					return
				}
			}
			select {
			case <-changed:
			case <-d.done:
				return
			case <-ctx.Done():
				return
			}
		}
	}
}

// setSteering makes senders use s, and tells the readers of Steerings.
func (d *Device) setSteering(s *steering) {
	if d.steer.Swap(s) == nil && s == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.steered)
	d.steered = make(chan struct{})
}

// public returns s for callers of the package; nil for nil.
func (s *steering) public() *Steering {
	if s == nil {
		return nil
	}
	p := &Steering{Table: s.table, Types: s.flags}
	for _, q := range s.mapping {
		p.Queues = append(p.Queues, int(q))
	}
	if len(p.Queues) == 0 {
		for q := range max(s.queues, 1) {
			p.Queues = append(p.Queues, q)
		}
	}
	return p
}
