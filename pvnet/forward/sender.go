package forward

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"
)

// Batch is how many frames are sent at once, with one notification.
const Batch = 32

// A Policy says what happens to a frame for which an [Input] has no room.
type Policy uint8

const (
	// Drop drops the frames that find no room, and all frames while the vif's link is down.
	// No receiver waits: it is for more than one vif.
	Drop Policy = iota

	// Wait makes [Input.Send] wait, also for the link. The frames that arrive meanwhile wait
	// in the ring of the vif that receives them, and then at their sender.
	Wait
)

// String returns the policy's name.
func (p Policy) String() string {
	switch p {
	case Drop:
		return "drop"
	case Wait:
		return "wait"
	}
	return fmt.Sprintf("Policy(%d)", uint8(p))
}

// A Config holds the options of a [Sender]. The zero Config suits a bridge or a router.
type Config struct {
	// Full says what to do with frames for which there is no room.
	Full Policy

	// Pool is the pool that receives the frames of the inputs; nil: there is none. While the
	// pool's goroutines receive frames they also send the frames that wait in the Sender for room
	// in a ring. Without a Pool a goroutine of the Sender sends these frames, and Go's scheduler may let it run
	// milliseconds after there is room, if the processors are busy. Full must be Drop.
	Pool *Pool

	// Frames is how many frames of each input may wait for each queue of the vif, at most
	// 4096; rounded up to a power of two. 0 means 64.
	Frames int
}

const (
	standardFrames = 64
	mostFrames     = 4096
)

// Stats counts frames. Each frame that was given to [Input.Send] is counted in one of Sent,
// Full, Down, Oversize, Refused and Ended, or it still waits.
type Stats struct {
	Sent     uint64 // given to the vif, which counts those that it drops for a stopped frontend
	Full     uint64 // dropped: the input's queue was full, or too many pages of its source wait
	Down     uint64 // dropped: the link of the vif was down
	Oversize uint64 // dropped: longer than the vif's MTU and a tagged header, or in segments that are
	Refused  uint64 // dropped: the vif does not take the frame; it contradicts its headers, was stale, or needs more pages than there are
	Ended    uint64 // dropped: the vif, the Sender or the Input had ended
	Waiting  int    // frames in queues now
}

// Lost returns how many frames were dropped, for whatever reason.
func (s *Stats) Lost() uint64 { return s.Full + s.Down + s.Oversize + s.Refused + s.Ended }

// A kind is what happened to a frame.
type kind uint8

const (
	sent kind = iota
	full
	down
	oversize
	refused
	ended
	waiting // a gauge
	kinds
)

// counts counts frames by kind. Any goroutine may count.
type counts [kinds]atomic.Int64

func (c *counts) stats() Stats {
	return Stats{
		Sent: uint64(c[sent].Load()), Full: uint64(c[full].Load()), Down: uint64(c[down].Load()),
		Oversize: uint64(c[oversize].Load()), Refused: uint64(c[refused].Load()), Ended: uint64(c[ended].Load()),
		Waiting: int(c[waiting].Load()),
	}
}

// ErrClosed is returned by [Input.Send] after the Input or its Sender was closed.
var ErrClosed = errors.New("forward: closed")

// A Sender is the sending side of one vif, with all its queues, shared by many receivers. Its
// methods may be called from any goroutine.
type Sender struct {
	dev    *pvnet.Device
	cfg    Config
	queues []*queue
	own    *Input // of the frames of Write; it has no lanes
	stop   context.CancelFunc
	wg     sync.WaitGroup
	counts counts // of all inputs
	ended  chan struct{}

	mu     sync.Mutex
	inputs []*Input // guarded by mu: those that are open
	err    error    // guarded by mu: why the Sender has ended; nil: it has not
	cut    bool     // guarded by mu: it has ended, and so have all its queues
}

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// NewSender makes the Sender of dev and owns the sending halves of all its queues, for good:
// a device has one Sender, also after that was closed. The device may be the frontend or the
// backend of a vif, with its link up or down. NewSender returns the errors of
// [pvnet.Device.OwnTX], and one that names the option if cfg makes no sense.
func NewSender(dev *pvnet.Device, cfg Config) (*Sender, error) {
	switch {
	case cfg.Full != Drop && cfg.Full != Wait:
		return nil, fmt.Errorf("forward: Config.Full is %v: it must be Drop or Wait", cfg.Full)
	case cfg.Full == Wait && cfg.Pool != nil:
		return nil, errors.New("forward: Config.Full is wait, and there is a Config.Pool, whose goroutines must not wait: it must be drop")
	case cfg.Frames < 0 || cfg.Frames > mostFrames:
		return nil, fmt.Errorf("forward: Config.Frames is %d: it must be 1 to %d, or 0 for %d", cfg.Frames, mostFrames, standardFrames)
	case cfg.Frames == 0:
		cfg.Frames = standardFrames
	}
	cfg.Frames = 1 << bits.Len(uint(cfg.Frames-1))
	s := &Sender{dev: dev, cfg: cfg, ended: make(chan struct{})}
	s.own = &Input{s: s, src: NewSource(0)}
	for i := range dev.Queues() {
		tx, err := dev.OwnTX(i)
		if err != nil {
			return nil, fmt.Errorf("forward: transmit queue %d of vif %s: %w", i, dev.ID(), err)
		}
		q := newQueue(s, tx)
		if cfg.Pool != nil {
			q.worker = cfg.Pool.worker(&cfg.Pool.sending)
		}
		s.queues = append(s.queues, q)
	}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	for _, q := range s.queues {
		s.wg.Go(q.work)
	}
	s.wg.Go(func() { s.follow(ctx) })
	return s, nil
}

// follow ends the waits of queues that the connection does not have, and, unless the policy is to
// wait for the link, all waits while that is down. It ends the Sender with its device.
func (s *Sender) follow(ctx context.Context) {
	for ev := range s.dev.Links(ctx) {
		s.mu.Lock()
		for i, q := range s.queues {
			late := !ev.Up && s.cfg.Full == Drop || ev.Up && i >= s.dev.Active()
			q.tx.SetDeadline(s.deadlineLocked(late))
		}
		s.mu.Unlock()
	}
	if ctx.Err() == nil {
		_, err := s.queues[0].tx.SendWait(nil) // returns the error that has ended the device, without a wait
		s.end(cmp.Or(err, pvnet.ErrDisconnected))
	}
}

// deadlineLocked returns the deadline of a queue; late: calls that wait give up now.
func (s *Sender) deadlineLocked(late bool) time.Time {
	if late || s.cut {
		return past
	}
	return time.Time{}
}

// end ends the Sender: every frame that waits is dropped, and so are later ones.
func (s *Sender) end(err error) {
	s.mu.Lock()
	first := s.err == nil
	if first {
		s.err = err
		close(s.ended)
	}
	inputs := slices.Clone(s.inputs)
	s.mu.Unlock()
	if !first {
		return
	}
	for _, q := range s.queues {
		q.close(err) // before SetDeadline ends its wait, so that its goroutine counts the frames as Ended and not as Down
	}
	s.mu.Lock()
	s.cut = true
	for _, q := range s.queues {
		q.tx.SetDeadline(past)
	}
	s.mu.Unlock()
	for _, in := range inputs {
		in.src.wake()
	}
}

// Close drops the frames that wait, ends every call of [Input.Send], and returns once nothing
// of the Sender runs any more. The device stays as it is, and stays owned. It is
// idempotent and returns nil.
func (s *Sender) Close() error {
	s.end(ErrClosed)
	s.stop()
	s.wg.Wait()
	for _, q := range s.queues {
		q.awaitIdle()
	}
	return nil
}

// Done returns a channel that is closed once the Sender has ended: by Close, or with its
// device.
func (s *Sender) Done() <-chan struct{} { return s.ended }

// Err returns why the Sender has ended: [ErrClosed], or the error that ended its device; nil
// if it has not.
func (s *Sender) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Device returns the device.
func (s *Sender) Device() *pvnet.Device { return s.dev }

// Stats returns the counts of all inputs together, also of those that were closed.
func (s *Sender) Stats() Stats { return s.counts.stats() }

// Input adds an input for the frames of src. Several inputs, of any Senders, may have one
// source. An error is that of [Sender.Err].
func (s *Sender) Input(src *Source) (*Input, error) {
	in := &Input{s: s, src: src}
	for _, q := range s.queues {
		in.lanes = append(in.lanes, &lane{in: in, q: q})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	s.inputs = append(s.inputs, in)
	return in, nil
}

// A Source bounds the pages that wait in [Sender]s, of frames that one device received. Its
// methods may be called from any goroutine.
type Source struct {
	limit int32
	held  atomic.Int32 // pages that wait

	freed   atomic.Uint32 // how often pages have come back
	waiters atomic.Int32
	mu      sync.Mutex
	changed sync.Cond // with mu: freed has grown

	copying sync.Once // guards the making of copies
	copies  *pvnet.Copies
}

// mostCopies bounds the memory for copies of one source's lent frames, in pages.
const mostCopies = 4 * StandardPages

// copy replaces a lent frame by a copy of it, which may wait. It reports false if no page is free.
// The memory for copies is allocated when the first lent frame waits.
func (s *Source) copy(f *pvnet.Frame) bool {
	s.copying.Do(func() { s.copies = pvnet.NewCopies(min(int(s.limit), mostCopies)) })
	return s.copies.Replace(f)
}

// StandardPages is half of the pages that a device receives into, for each queue, if its
// [pvnet.Config] says nothing else.
const StandardPages = 256

// leastPages is the smallest limit that a Source may have, in pages. Two frames of 64 KiB fit in it,
// so that one finds room while the other waits in another queue.
const leastPages = 36

// NewSource makes a source of which at most so many pages wait, in all Senders together. 0
// means [StandardPages]. It should be half of the device's [pvnet.Config].Buffers, so that
// there is room for frames that arrive; less than 36 counts as 36, which has room for one
// frame of 64 KiB.
func NewSource(pages int) *Source {
	if pages == 0 {
		pages = StandardPages
	}
	s := &Source{limit: int32(min(max(pages, leastPages), 1<<24))}
	s.changed.L = &s.mu
	return s
}

// Held returns how many pages of the source wait now.
func (s *Source) Held() int { return int(s.held.Load()) }

// free gives pages back to the source.
func (s *Source) free(pages int32) {
	s.held.Add(-pages)
	s.wake()
}

// wake makes the goroutines in await look again: pages came back, or their wait is to end.
func (s *Source) wake() {
	s.freed.Add(1)
	if s.waiters.Load() > 0 {
		s.mu.Lock()
		s.changed.Broadcast()
		s.mu.Unlock()
	}
}

// await waits until freed differs from seen.
func (s *Source) await(seen uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiters.Add(1)
	for s.freed.Load() == seen {
		s.changed.Wait()
	}
	s.waiters.Add(-1)
}
