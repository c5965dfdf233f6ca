//go:build linux

package bpf

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"barevif/telemetry"
)

// A Report is the state of a device as read from a source at one time.
type Report struct {
	Source Source

	// Stats are totals since the mirror was made or resumed, regardless of the device's
	// own Reset. Torn says that a block is not of one instant: its owner was killed
	// during a publish.
	Stats telemetry.Stats
	Torn  bool

	// The fields below are empty for a source of [KindMetrics].

	Info      telemetry.Info
	Status    telemetry.Status
	Reset     telemetry.Reset
	Events    []telemetry.Event // oldest first
	Kind      string            // kind of the mirror; Reason is why it is not a better one
	Reason    string
	PID       int // of the owner, by its own account
	Start     time.Time
	Heartbeat time.Time
	Age       time.Duration // time since the heartbeat; more than a few seconds: the owner is stopped or dead
}

// A Reader reads one source again and again. It is not safe for concurrent use.
type Reader struct {
	src Source
	elements
}

// elements returns copies of the records of one kind of source. A copy is made upwards,
// as the markers require.
type elements interface {
	info() (*infoRecord, error)
	counters(queue int) ([]byte, error)
	event(slot int) ([]byte, error)
	Close() error
}

// Open opens a source. The error wraps [ErrLayout] for counters of another version,
// fs.ErrPermission or fs.ErrNotExist.
func Open(src Source) (*Reader, error) {
	var e elements
	var err error
	switch src.Kind {
	case KindPins, KindIterator:
		var dir string
		var leave func()
		if dir, leave, err = src.enter(); err == nil {
			e, err = openPins(dir)
			leave()
		}
	case KindMaps:
		e, err = openMaps(src.ID)
	case KindMemfd:
		e, err = openMemfd(src)
	case KindMetrics:
		e, err = nil, nil
	default:
		err = fmt.Errorf("no source of kind %q", src.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("telemetry/bpf: open %s: %w", src.Name, err)
	}
	return &Reader{src, e}, nil
}

// Close closes the source.
func (r *Reader) Close() error {
	if r.elements == nil {
		return nil
	}
	return r.elements.Close()
}

// Read reads the device's counters and state.
func (r *Reader) Read() (*Report, error) {
	var rep *Report
	var err error
	if r.elements == nil {
		rep, err = readText(r.src)
	} else {
		rep, err = readElements(r.elements)
	}
	if err != nil {
		return nil, fmt.Errorf("telemetry/bpf: read %s: %w", r.src.Name, err)
	}
	rep.Source = r.src
	return rep, nil
}

// Stats reads only the counters. It is many times faster than Read, so that two devices
// can be compared while they count.
func (r *Reader) Stats() (telemetry.Stats, error) {
	if r.elements == nil {
		rep, err := r.Read()
		if err != nil {
			return telemetry.Stats{}, err
		}
		return rep.Stats, nil
	}
	rec, err := r.info()
	if err != nil {
		return telemetry.Stats{}, fmt.Errorf("telemetry/bpf: read %s: %w", r.src.Name, err)
	}
	st, _, err := readStats(r.elements, rec)
	if err != nil {
		return telemetry.Stats{}, fmt.Errorf("telemetry/bpf: read %s: %w", r.src.Name, err)
	}
	return st, nil
}

// patience is how many times 2 ms a reader waits for all records of one device: a device
// that is torn in every queue costs no more time than one that is torn in one.
const patience = 100

// attempts repeats try until it has read a whole record. The owner writes a record within
// tens of nanoseconds, but it may be preempted in between for milliseconds, or stopped or
// killed for good. left is the remaining patience; nil means none.
func attempts(left *int, try func() (whole bool, err error)) (whole bool, err error) {
	const quick = 64
	for i := 0; ; i++ {
		if i >= quick {
			if left == nil || *left == 0 {
				return false, nil
			}
			*left--
			time.Sleep(2 * time.Millisecond)
		}
		if whole, err = try(); whole || err != nil {
			return whole, err
		}
	}
}

// aliveAge is the greatest age of a living owner's heartbeat, which comes once a second.
const aliveAge = 3 * time.Second

func readElements(e elements) (*Report, error) {
	rec, err := e.info()
	if err != nil {
		return nil, err
	}
	rep := rec.report()
	if rep.Stats, rep.Torn, err = readStats(e, rec); err != nil {
		return nil, err
	}
	for slot := range eventSlots {
		b, err := e.event(slot)
		if err != nil {
			return nil, err
		}
		var ev eventRecord
		if err := decode(b, &ev); err != nil {
			return nil, err
		}
		if ev.Seq == 0 || ev.Seq != ev.Begun {
			continue // empty, or being written
		}
		rep.Events = append(rep.Events, telemetry.Event{
			Seq: ev.Seq, Time: time.Unix(0, int64(ev.Unix)), Kind: telemetry.EventKind(min(ev.Kind, 255)),
			Queue: int(ev.Queue), A: ev.A, B: ev.B,
		})
	}
	slices.SortFunc(rep.Events, func(a, b telemetry.Event) int {
		if a.Seq < b.Seq {
			return -1
		}
		return 1
	})
	return rep, nil
}

// readStats reads the counters of all queues.
func readStats(e elements, rec *infoRecord) (st telemetry.Stats, torn bool, err error) {
	queues := make([]telemetry.Queue, rec.Slots)
	var left *int
	if rec.age() < aliveAge {
		left = new(patience)
	}
	for q := range queues {
		words, mixed, err := readQueue(e, q, left)
		if err != nil {
			return telemetry.Stats{}, false, err
		}
		torn = torn || mixed
		queues[q].RX = telemetry.ValuesOf((*[telemetry.BlockWords]uint64)(words[:telemetry.BlockWords]))
		queues[q].TX = telemetry.ValuesOf((*[telemetry.BlockWords]uint64)(words[telemetry.BlockWords:]))
	}
	return telemetry.Sum(queues), torn, nil
}

// readQueue reads an element until both of its blocks are whole. If one never is, it
// returns the last copy.
func readQueue(e elements, q int, left *int) (words [queueWords]uint64, torn bool, err error) {
	const n = telemetry.BlockWords
	var have [2]bool
	whole, err := attempts(left, func() (bool, error) {
		b, err := e.counters(q)
		if err != nil {
			return false, err
		}
		var got [queueWords]uint64
		if err := decode(b, got[:]); err != nil {
			return false, err
		}
		for d := range have {
			if !have[d] {
				copy(words[d*n:(d+1)*n], got[d*n:])
				have[d] = got[d*n] == got[d*n+n-1]
			}
		}
		return have[0] && have[1], nil
	})
	return words, !whole, err
}

// age returns the time since the heartbeat.
func (r *infoRecord) age() time.Duration { return time.Duration(bootTime() - r.Beat) }

func (r *infoRecord) report() *Report {
	rep := &Report{
		Info: telemetry.Info{
			Role: telemetry.Role(min(r.Role, 1)), Own: r.Own, Peer: r.Peer, Handle: r.Handle, Queues: int(r.Slots),
		},
		Status: telemetry.Status{
			State: telemetry.State(min(r.State, 255)), Up: r.Up != 0, MTU: r.MTU, Queues: r.Queues, Epoch: r.Epoch,
		},
		Reset: telemetry.Reset{
			Count: r.Reset.Count, RxPackets: r.Reset.RxPackets, RxBytes: r.Reset.RxBytes,
			TxPackets: r.Reset.TxPackets, TxBytes: r.Reset.TxBytes,
		},
		Kind: str(r.Kind[:]), Reason: str(r.Reason[:]), PID: int(int32(r.PID)),
		Start: time.Unix(0, int64(r.Start)), Heartbeat: time.Unix(0, int64(r.BeatUnix)),
		Age: r.age(),
	}
	if r.Reset.Count != 0 {
		rep.Reset.Time = time.Unix(0, int64(r.Reset.Unix))
	}
	for b := range telemetry.FeatureNames {
		if r.Features[b] != 0 {
			rep.Status.Features |= 1 << b
		}
	}
	for i, part := range strings.SplitN(str(r.MAC[:]), ":", len(rep.Status.MAC)) {
		v, err := strconv.ParseUint(part, 16, 8)
		if err != nil {
			break
		}
		rep.Status.MAC[i] = byte(v)
	}
	return rep
}

// wholeInfo returns the last copy if none was whole: each single word is valid.
func wholeInfo(read func() ([]byte, error)) (*infoRecord, error) {
	rec := &infoRecord{}
	_, err := attempts(nil, func() (bool, error) {
		b, err := read()
		if err == nil {
			err = decode(b, rec)
		}
		if err == nil {
			err = rec.check()
		}
		return err == nil && rec.Done == rec.Begun, err
	})
	if err != nil {
		return nil, err
	}
	return rec, nil
}
