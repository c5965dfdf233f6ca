package pvnet

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"

	"barevif/telemetry"
)

// A TapConfig says which frames a [Tap] copies. The zero TapConfig copies all of every
// frame.
type TapConfig struct {
	// Queues are the queues to listen at; nil: all.
	Queues []int

	// Sent and Received choose the directions, seen from this end. Neither: both.
	Sent, Received bool

	// Snaplen is how many bytes of each frame to keep at most. 0: all.
	Snaplen int

	// Filter chooses frames by their bytes, of which it gets all; nil: every frame. It
	// runs inside the calls that move frames, on several goroutines at once, so it must be
	// fast, and neither block nor keep the slice. The peer may still write the bytes of a
	// frame that is lent ([Config.LendRx]).
	Filter func(frame []byte) bool

	// Buffer is how many bytes of frames the tap holds, for each queue and direction, until
	// Read: 64 KiB at least, and rounded up to a power of two. 0: 1 MiB.
	Buffer int
}

// How large buffers of a Tap may be, and how many taps a device may have.
const (
	tapBufferMin = 64 << 10
	tapBufferMax = 1 << 30
	tapBuffer    = 1 << 20
	maxTaps      = 4
)

// ErrTaps is returned by [Device.Tap] when four others listen.
var ErrTaps = errors.New("pvnet: the device has four taps already")

// A Tap copies the frames that a device moves into a buffer, for somebody who wants to see
// them. It never delays a frame for its reader: a frame that finds no room in the buffer is
// counted and not copied. Frames that the device drops after it has their bytes are among
// those received, with the reason.
//
// It lasts for as many connections as the device has. While no device has a tap, a batch
// of frames costs one load more, and no frame anything. The copying allocates nothing and
// takes no lock, and reads the clock once for each batch.
type Tap struct {
	dev   *Device
	cfg   TapConfig
	lanes []*lane // by 2*queue + direction; nil: not listened at
}

// A TapFrame is one frame as a Tap saw it.
type TapFrame struct {
	Time     time.Time        // when its batch was moved
	Queue    int              //
	Dir      telemetry.Dir    // TX: sent by this end
	Len      int              // bytes of the frame
	Data     []byte           // its first bytes, Snaplen at most; lent until the function returns
	Lost     uint64           // frames of this queue and direction that found no room since the one before
	Checksum Checksum         // as in the frame that the user of the device sent or got
	GSO      GSO              //
	Finished bool             // the checksum is partial here, and was completed before the peer got the frame
	Dropped  telemetry.Reason // why the device dropped it; 0: it did not
}

// TapStats are the counts of a Tap.
type TapStats struct {
	Captured uint64 // frames copied to the buffer
	Filtered uint64 // frames that the filter refused
	Lost     uint64 // frames that found no room in the buffer
}

// tapBatch is how many frames are staged at once. No ring has room for more.
const tapBatch = 256

// A lane is the buffer of one half: entries in a ring, and their bytes in another. The
// caller inside the half's gate writes it, the reader of the Tap empties it.
type lane struct {
	queue   int
	dir     telemetry.Dir
	entries []kept // a power of two
	data    []byte // a power of two

	// Used by the writer only, from one batch to the next or within one.
	next    uint32           // index of the next entry
	at      uint64           // where the bytes of the next entry go, free-running
	lost    uint64           // frames without room since the last entry
	staged  [tapBatch]staged // by frame of the batch
	n       int              // how many are staged
	scratch []byte           // for the filter: a frame of several pieces in one

	_    [64]byte
	head atomic.Uint32 // written by the writer: entries before it may be read
	tail atomic.Uint32 // written by the reader: entries before it are free
	used atomic.Uint64 // written by the reader: bytes before it are free

	captured, filtered, dropped atomic.Uint64 // written by the writer
}

// A kept describes a frame, and says where its bytes are.
type kept struct {
	TapFrame
	at  uint64 // free-running
	len int
}

// staged is what the lane is once a frame of the batch and those before it were sent.
type staged struct {
	next                        uint32
	at                          uint64
	lost                        uint64
	captured, filtered, dropped uint32
}

// Tap starts copying frames. [ErrTaps]; [ErrDisconnected] or another error after the end
// of the device; an error that names the option if the config makes no sense.
func (d *Device) Tap(cfg TapConfig) (*Tap, error) {
	if err := d.endError(); err != nil {
		return nil, err
	}
	if cfg.Snaplen < 0 {
		return nil, fmt.Errorf("pvnet: TapConfig.Snaplen is %d: it must be 1 or more bytes, or 0 for whole frames", cfg.Snaplen)
	}
	if cfg.Snaplen == 0 || cfg.Snaplen > MaxFrame {
		cfg.Snaplen = MaxFrame
	}
	switch {
	case cfg.Buffer == 0:
		cfg.Buffer = tapBuffer
	case cfg.Buffer < tapBufferMin || cfg.Buffer > tapBufferMax:
		return nil, fmt.Errorf("pvnet: TapConfig.Buffer is %d: at least %d and at most %d bytes", cfg.Buffer, tapBufferMin, tapBufferMax)
	}
	for _, q := range cfg.Queues {
		if q < 0 || q >= d.Queues() {
			return nil, fmt.Errorf("pvnet: TapConfig.Queues: no queue %d: vif %s has queues 0 to %d", q, d.id, d.Queues()-1)
		}
	}
	if !cfg.Sent && !cfg.Received {
		cfg.Sent, cfg.Received = true, true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var old []*Tap
	if p := d.taps.Load(); p != nil {
		old = *p
	}
	if len(old) >= maxTaps {
		return nil, ErrTaps
	}
	t := &Tap{dev: d, cfg: cfg, lanes: make([]*lane, 2*d.Queues())}
	size := 1 << bits.Len(uint(cfg.Buffer-1))
	for i := range t.lanes {
		dir := telemetry.Dir(i % 2)
		wanted := cfg.Received && dir == telemetry.RX || cfg.Sent && dir == telemetry.TX
		if !wanted || cfg.Queues != nil && !slices.Contains(cfg.Queues, i/2) {
			continue
		}
		t.lanes[i] = &lane{
			queue: i / 2, dir: dir, data: make([]byte, size), entries: make([]kept, size/128), scratch: make([]byte, MaxFrame),
		}
	}
	taps := append(slices.Clip(old), t)
	d.taps.Store(&taps)
	return t, nil
}

// Close ends the copying. Read still gives what was copied. It is idempotent.
func (t *Tap) Close() {
	t.dev.mu.Lock()
	defer t.dev.mu.Unlock()
	p := t.dev.taps.Load()
	if p == nil {
		return
	}
	left := slices.DeleteFunc(slices.Clone(*p), func(o *Tap) bool { return o == t })
	if len(left) == 0 {
		t.dev.taps.Store(nil)
	} else {
		t.dev.taps.Store(&left)
	}
}

// Stats returns the counts so far. Any goroutine may call it.
func (t *Tap) Stats() (s TapStats) {
	for _, l := range t.lanes {
		if l != nil {
			s.Captured += l.captured.Load()
			s.Filtered += l.filtered.Load()
			s.Lost += l.dropped.Load()
		}
	}
	return s
}

// Read calls f with each frame that was copied when Read began, in the order of their
// times, until f returns false, and returns with how many it called f. It does not wait. One
// goroutine at a time may call it. A frame of a later Read may be older than the last one
// of this, by the time of one batch.
func (t *Tap) Read(f func(*TapFrame) bool) (n int) {
	var heads, tails [2 * 64]uint32
	head, tail := heads[:], tails[:]
	if len(t.lanes) > len(head) {
		head, tail = make([]uint32, len(t.lanes)), make([]uint32, len(t.lanes))
	}
	for i, l := range t.lanes {
		if l != nil {
			head[i], tail[i] = l.head.Load(), l.tail.Load()
		}
	}
	for {
		var first *lane
		var from int
		for i, l := range t.lanes {
			if l == nil || tail[i] == head[i] {
				continue
			}
			if e := l.entry(tail[i]); first == nil || e.Time.Before(first.entry(tail[from]).Time) {
				first, from = l, i
			}
		}
		if first == nil {
			return n
		}
		e := first.entry(tail[from])
		at := int(e.at) & (len(first.data) - 1)
		e.Data = first.data[at : at+e.len : at+e.len]
		more := f(&e.TapFrame)
		n++
		tail[from]++
		first.used.Store(e.at + uint64(e.len))
		first.tail.Store(tail[from])
		if !more {
			return n
		}
	}
}

func (l *lane) entry(i uint32) *kept { return &l.entries[int(i)&(len(l.entries)-1)] }

// begin starts a batch.
func (l *lane) begin() { l.n = 0 }

// now is the lane as it is after the frames staged so far.
func (l *lane) now() staged {
	if l.n == 0 {
		return staged{next: l.next, at: l.at, lost: l.lost}
	}
	return l.staged[l.n-1]
}

// stage adds a frame to the batch: its first piece, and the function that copies all of it.
func (l *lane) stage(t *Tap, e TapFrame, first []byte, copyTo func([]byte) int) {
	s := l.now()
	switch keep := min(e.Len, t.cfg.Snaplen); {
	case t.cfg.Filter != nil && !t.cfg.Filter(l.whole(first, e.Len, copyTo)):
		s.filtered++
	default:
		at, ok := l.room(s, keep)
		if !ok {
			s.lost++
			s.dropped++
			break
		}
		p := l.entry(s.next)
		p.TapFrame, p.at, p.len = e, at, keep
		p.Queue, p.Dir, p.Lost = l.queue, l.dir, s.lost
		to := l.data[int(at)&(len(l.data)-1):][:keep]
		if copy(to, first) < keep {
			copyTo(to)
		}
		s.next, s.at, s.lost = s.next+1, at+uint64(keep), 0
		s.captured++
	}
	l.staged[l.n] = s
	l.n++
}

// whole returns all bytes of a frame in one slice.
func (l *lane) whole(first []byte, n int, copyTo func([]byte) int) []byte {
	if len(first) == n {
		return first
	}
	return l.scratch[:copyTo(l.scratch[:n])]
}

// room returns where n bytes in one piece may go.
func (l *lane) room(s staged, n int) (at uint64, ok bool) {
	if s.next-l.tail.Load() >= uint32(len(l.entries)) {
		return 0, false
	}
	at = s.at
	if left := len(l.data) - int(at)&(len(l.data)-1); left < n {
		at += uint64(left) // the bytes up to the end stay unused
	}
	return at, at+uint64(n)-l.used.Load() <= uint64(len(l.data))
}

// commit shows the reader the first n frames of the batch; the others were not moved.
func (l *lane) commit(n int) {
	if n = min(n, l.n); n == 0 {
		return
	}
	s := &l.staged[n-1]
	l.next, l.at, l.lost = s.next, s.at, s.lost
	if s.captured > 0 {
		l.captured.Store(l.captured.Load() + uint64(s.captured))
		l.head.Store(s.next)
	}
	if s.filtered > 0 {
		l.filtered.Store(l.filtered.Load() + uint64(s.filtered))
	}
	if s.dropped > 0 {
		l.dropped.Store(l.dropped.Load() + uint64(s.dropped))
	}
}

// push sends frames on the engine, and shows those that it takes to the taps.
func (tx *TX) push(frames []Frame) (int, error) {
	if taps := tx.dev.taps.Load(); taps != nil {
		return tx.pushTapped(*taps, frames)
	}
	return tx.eng.send(frames)
}

// pushTapped stages the frames before they are sent, while they can be read, and commits
// those that were taken.
func (tx *TX) pushTapped(taps []*Tap, frames []Frame) (n int, err error) {
	now := time.Now()
	takes := tx.eng.peerOffloads()
	for n < len(frames) {
		batch := frames[n:min(len(frames), n+tapBatch)]
		tx.sending = batch
		for _, t := range taps {
			if l := t.lanes[2*tx.queue+int(telemetry.TX)]; l != nil {
				l.begin()
				for i := range batch {
					f := &batch[i]
					if !f.buf.Valid() {
						break // the engine refuses it, and does not look at those behind it
					}
					l.stage(t, TapFrame{
						Time: now, Len: int(f.total), Checksum: f.csum, GSO: f.gso,
						Finished: f.csum == ChecksumPartial && takes.needs(f) == needChecksum,
					}, f.Bytes(), f.CopyTo)
				}
			}
		}
		k := 0
		k, err = tx.eng.send(batch)
		for _, t := range taps {
			if l := t.lanes[2*tx.queue+int(telemetry.TX)]; l != nil {
				l.commit(k)
			}
		}
		tx.sending = nil
		n += k
		if err != nil || k < len(batch) {
			break
		}
	}
	return n, err
}

// lostSent notes that a frame of the batch that is being sent is lost for a reason.
func (b *bound) lostSent(f *Frame, reason telemetry.Reason) {
	h := b.half
	if h == nil || h.sending == nil {
		return
	}
	at := -1
	for i := range h.sending {
		if &h.sending[i] == f {
			at = i
		}
	}
	taps := h.dev.taps.Load()
	if at < 0 || taps == nil {
		return
	}
	for _, t := range *taps {
		l := t.lanes[2*h.queue+int(telemetry.TX)]
		if l == nil || at >= l.n {
			continue
		}
		before := l.next
		if at > 0 {
			before = l.staged[at-1].next
		}
		if l.staged[at].next != before {
			l.entry(before).Dropped = reason
		}
	}
}

// showReceived shows received frames to the taps.
func (rx *RX) showReceived(taps []*Tap, frames []Frame) {
	if len(frames) == 0 {
		return
	}
	now := time.Now()
	for _, t := range taps {
		l := t.lanes[2*rx.queue+int(telemetry.RX)]
		if l == nil {
			continue
		}
		for rest := frames; len(rest) > 0; {
			batch := rest[:min(len(rest), tapBatch)]
			rest = rest[len(batch):]
			l.begin()
			for i := range batch {
				f := &batch[i]
				l.stage(t, TapFrame{Time: now, Len: int(f.total), Checksum: f.csum, GSO: f.gso}, f.Bytes(), f.CopyTo)
			}
			l.commit(len(batch))
		}
	}
}

// showDropped shows a frame that is dropped to the taps, if there are any. The caller is
// inside the gate, and no batch is being sent.
func (b *bound) showDropped(f *Frame, reason telemetry.Reason) {
	b.showLost(TapFrame{Len: int(f.total), Checksum: f.csum, GSO: f.gso, Dropped: reason}, f.Bytes(), f.CopyTo)
}

func (b *bound) showLost(e TapFrame, first []byte, copyTo func([]byte) int) {
	if b.half == nil || e.Len == 0 {
		return
	}
	taps := b.half.dev.taps.Load()
	if taps == nil {
		return
	}
	e.Time = time.Now()
	for _, t := range *taps {
		if l := t.lanes[2*b.half.queue+int(b.half.dir)]; l != nil { // a direction has the number of its telemetry.Dir
			l.begin()
			l.stage(t, e, first, copyTo)
			l.commit(1)
		}
	}
}

// showNext shows the packet in shared pages that is dropped to the taps. The peer may
// still write those pages.
func (e *frontRX) showNext(reason telemetry.Reason) {
	if e.half == nil || e.half.dev.taps.Load() == nil || e.next.dataSlots == 0 {
		return
	}
	piece := func(i int) []byte {
		s := e.next.seg[i]
		return e.shared.Bytes(s.page)[s.off : s.off+s.n]
	}
	e.showLost(TapFrame{Len: int(e.next.total), Checksum: e.next.csum, Dropped: reason}, piece(0), func(to []byte) (n int) {
		for i := range e.next.dataSlots {
			n += copy(to[n:], piece(i))
		}
		return n
	})
}
