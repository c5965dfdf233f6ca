package pvnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/arena"
	"barevif/hypercall"
	"barevif/pvnet/ring"
	"barevif/telemetry"
	"barevif/xenbus"
)

// A MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// station reports whether m is the address of one station: neither zero nor of a
// group, as Linux's is_valid_ether_addr has it.
func (m MAC) station() bool { return m[0]&1 == 0 && m != MAC{} }

// Config is what a device may be told. The zero Config suits most programs.
type Config struct {
	// Queues is how many queues to ask the peer for. 0 means 1. The peer may
	// offer fewer.
	Queues int

	// LendRx hands received frames out in the shared pages themselves, at most
	// half the ring at a time, instead of copying them. The peer can still write
	// such a frame: set it for consumers that copy, or that trust the peer. It
	// is for frontends; a backend always copies.
	LendRx bool

	// Offload takes frames from the peer that are longer than the MTU
	// ([Frame.GSO]) or whose checksum is partial ([ChecksumPartial]), for owners
	// that deal with both: a TCP/IP stack, or a forwarder to where they may be
	// sent on. Otherwise such frames are not asked for, and what comes has a
	// complete checksum. Sending them needs no Config.
	Offload bool

	// Buffers is the number of private pages per queue to receive into, at least
	// 17. 0 means 512. A receiver that holds this many frames gets no more.
	Buffers int

	// Wait is what a call does that has to wait.
	Wait WaitMode

	// LockedThreads says that the goroutines that wait are locked to their threads
	// (runtime.LockOSThread), as those of a program are that gives each queue a CPU.
	// They then block in the kernel, which saves Go's scheduler several switches
	// between threads a wake-up. Other goroutines each take a thread for as long as they
	// wait. Of two halves that share an event channel ("feature-split-event-channels" is
	// 0) it holds for the one that waits first.
	LockedThreads bool

	// Counters says where the counters are shown beside the heap. nil: nowhere.
	Counters telemetry.Store

	// Logger hears of state changes, never of frames. Of a peer that changes its
	// state for ever it hears every half minute, and how many lines that stands
	// for. nil: silent.
	Logger *slog.Logger
}

// equal reports whether a second Connect agrees with the first.
func (c Config) equal(o Config) bool {
	return c.Queues == o.Queues && c.LendRx == o.LendRx && c.Offload == o.Offload && c.Buffers == o.Buffers &&
		c.Wait == o.Wait && c.LockedThreads == o.LockedThreads && c.Counters == o.Counters
}

// check refuses what cannot work. One frame of MaxFrame bytes takes maxPieces.
func (c *Config) check(dom hypercall.Domain) error {
	if _, ok := dom.(hypercall.ThreadDomain); c.LockedThreads && !ok {
		return fmt.Errorf("Config.LockedThreads is set: a %T cannot block a thread", dom)
	}
	if c.Queues < 0 {
		return fmt.Errorf("Config.Queues is %d", c.Queues)
	}
	if c.Buffers < 0 || c.Buffers > 0 && c.Buffers < maxPieces {
		return fmt.Errorf("Config.Buffers is %d: the largest frame takes %d", c.Buffers, maxPieces)
	}
	return nil
}

func (c *Config) queues() int { return max(c.Queues, 1) }

// A LinkEvent says that the link came up or went down.
type LinkEvent struct {
	Up     bool
	Reason string // why it is down: "the backend closed", "Disconnect", ...
	MAC    MAC    // of this connection, or of the last one; zero before the first
	MTU    int    // in bytes, as [Device.MTU] has it; likewise
}

// A Device is one end of a vif. Its methods may be called from any goroutine.
type Device struct {
	id     string
	role   telemetry.Role
	domain hypercall.Domain
	cfg    Config
	log    *slog.Logger
	hush   *hush // of log
	set    *telemetry.Set
	tx     []*TX
	rx     []*RX

	word    atomic.Uint32 // linkDown, linkUp, linkGone; written by the life goroutine only
	active  atomic.Int32  // queues of the connection
	mtu     atomic.Int32
	offers  atomic.Uint32             // of the peer, as far as known
	epoch   atomic.Uint64             // number of the connection, from 1
	lost    atomic.Uint64             // pages the peer did not give back, not counted yet
	leaving atomic.Bool               // Disconnect was called
	broken  atomic.Pointer[PeerError] // the violation that ended, or ends, the device
	trouble atomic.Pointer[error]     // why the last step of the life failed; nil: it did not
	mac     atomic.Uint64             // in the lower 48 bits, the first byte the highest
	named   telemetry.Info            // what the counters are shown as; of the life goroutine

	stop     context.CancelCauseFunc // asks the life goroutine to end
	finish   func()                  // closes what the life goroutine used
	patience time.Duration           // with callers that are to leave
	done     chan struct{}           // closed once it has
	fault    chan *PeerError         // violations halves met
	look     chan struct{}           // holds one: the life goroutine is to look

	mu      sync.Mutex
	trusted bool              // guarded by mu
	changed chan struct{}     // guarded by mu: closed when word or a deadline changes
	cause   error             // guarded by mu: what calls return once gone
	last    LinkEvent         // guarded by mu
	subs    []chan LinkEvent  // guarded by mu
	listens bool              // guarded by mu
	budget  Budget            // guarded by mu
	arenas  []*arena.Arena    // guarded by mu: those of the budget's private pages
	peer    hypercall.DomID   // guarded by mu
	agreed  telemetry.Feature // guarded by mu: what the connection has
}

const (
	linkDown = iota
	linkUp
	linkGone
)

func newDevice(id string, role telemetry.Role, domain hypercall.Domain, cfg Config) *Device {
	d := &Device{
		id: id, role: role, domain: domain, cfg: cfg,
		set:      telemetry.NewSet(cfg.queues()),
		done:     make(chan struct{}),
		patience: patience,
		fault:    make(chan *PeerError, 1),
		look:     make(chan struct{}, 1),
		changed:  make(chan struct{}),
		last:     LinkEvent{Reason: "not connected yet"},
	}
	q := newQuiet(slog.DiscardHandler)
	if cfg.Logger != nil {
		q.Handler = cfg.Logger.Handler()
	}
	d.log, d.hush = slog.New(q), q.hush
	for i := range cfg.queues() {
		rx, tx := new(RX), new(TX)
		rx.init(d, i, receive, d.set.RX(i))
		tx.init(d, i, transmit, d.set.TX(i))
		d.rx, d.tx = append(d.rx, rx), append(d.tx, tx)
	}
	d.mtu.Store(1500)
	return d
}

// wakeLife has the life goroutine look at the device.
func (d *Device) wakeLife() {
	select {
	case d.look <- struct{}{}:
	default:
	}
}

// ID is the vif's handle, as given to Connect.
func (d *Device) ID() string { return d.id }

// MAC is the card's address. It is read anew for each connection: a vif that is
// unplugged and plugged again may have another one. The [LinkEvent] says so.
func (d *Device) MAC() MAC {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], d.mac.Load())
	return MAC(b[2:])
}

// MTU is the largest payload in bytes, without the Ethernet header, that the
// network behind the vif takes. Like the MAC it is of a connection.
func (d *Device) MTU() int { return int(d.mtu.Load()) }

// identify says who the card is from now on.
func (d *Device) identify(mac MAC, mtu int, trusted bool) {
	var b [8]byte
	copy(b[2:], mac[:])
	d.mac.Store(binary.BigEndian.Uint64(b[:]))
	d.mtu.Store(int32(mtu))
	d.mu.Lock()
	d.trusted = trusted
	d.mu.Unlock()
}

// Queues is how many queues the device can have, Active how many the connection
// has.
func (d *Device) Queues() int { return len(d.tx) }
func (d *Device) Active() int { return int(d.active.Load()) }

// Peer is the domain of the other end.
func (d *Device) Peer() hypercall.DomID {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.peer
}

// Trusted is what the toolstack says of the backend. It changes nothing: pages
// are private and copied either way.
func (d *Device) Trusted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.trusted
}

// PeerTakes reports whether the peer takes frames to be cut of type t, and their
// partial checksums. To another peer they may be sent too, but are cut before. While
// the link is down it is what was so last.
func (d *Device) PeerTakes(t GSOType) bool {
	o := offers(d.offers.Load())
	return t == GSOTCPv4 && o&takesGSO4 != 0 || t == GSOTCPv6 && o&takesGSO6 != 0
}

// A Budget is the most memory a connection ever holds, fixed when it was made. Pages
// that are shared are there from the beginning; of the private ones [Device.Touched] are.
type Budget struct {
	SharedPages  int // granted to the peer
	PrivatePages int // and mapped ring pages
}

func (b Budget) String() string {
	return fmt.Sprintf("%d pages shared (%d KiB), %d private (%d KiB)",
		b.SharedPages, b.SharedPages*4, b.PrivatePages, b.PrivatePages*4)
}

// Budget is that of the present connection; zero while the link is down.
func (d *Device) Budget() Budget {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.budget
}

// Touched is how many of the Budget's private pages are in memory: the rest are only
// reserved, until as many frames are on their way or in the user's hands at once. It is
// zero while the link is down.
func (d *Device) Touched() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.budget.PrivatePages
	for _, a := range d.arenas {
		n -= a.Len() - a.Touched()
	}
	return n
}

// Stats gives the counters since the last ResetStats. Of a half that is being
// used just now up to 32 frames may be missing.
func (d *Device) Stats() telemetry.Stats {
	d.flush()
	return d.set.Snapshot()
}

// ResetStats makes Stats start from zero.
func (d *Device) ResetStats() {
	d.flush()
	d.set.Reset()
}

// Counters is all the device counts, for export.
func (d *Device) Counters() *telemetry.Set { return d.set }

// flush publishes the counters of the halves that nobody is inside.
func (d *Device) flush() {
	for i := range d.tx {
		d.tx[i].flush()
		d.rx[i].flush()
	}
}

// SetDeadline is SetReadDeadline and SetWriteDeadline.
func (d *Device) SetDeadline(t time.Time) error {
	return errors.Join(d.SetReadDeadline(t), d.SetWriteDeadline(t))
}

// SetReadDeadline is when Listen ends with os.ErrDeadlineExceeded if no frame
// comes. It returns nil, or ErrDisconnected.
func (d *Device) SetReadDeadline(t time.Time) error {
	for _, rx := range d.rx {
		if !rx.owned.Load() {
			rx.setDeadline(t)
		}
	}
	return d.over()
}

// SetWriteDeadline is when Write, Writev and WriteBatch give up waiting for room. It
// returns nil, or ErrDisconnected.
func (d *Device) SetWriteDeadline(t time.Time) error {
	for _, tx := range d.tx {
		if !tx.owned.Load() {
			tx.setDeadline(t)
		}
	}
	return d.over()
}

// Links gives the present state of the link and then its changes, until ctx ends
// or the device does: the last event says why. A reader that falls 16 events
// behind loses the oldest.
func (d *Device) Links(ctx context.Context) iter.Seq[LinkEvent] {
	return func(yield func(LinkEvent) bool) {
		c := d.subscribe()
		defer d.unsubscribe(c)
		for ctx.Err() == nil {
			select {
			case ev, open := <-c:
				if !open || !yield(ev) {
					return
				}
			case <-ctx.Done():
			}
		}
	}
}

func (d *Device) subscribe() chan LinkEvent {
	c := make(chan LinkEvent, 16)
	d.mu.Lock()
	defer d.mu.Unlock()
	c <- d.last
	if d.word.Load() == linkGone {
		close(c)
	} else {
		d.subs = append(d.subs, c)
	}
	return c
}

func (d *Device) unsubscribe(c chan LinkEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.subs = slices.DeleteFunc(d.subs, func(s chan LinkEvent) bool { return s == c })
}

// OwnTX takes the sending half of queue i out of the Device's hands: from now on
// Write and Writev leave it alone. ErrOwned if it has an owner, ErrDisconnected.
func (d *Device) OwnTX(i int) (*TX, error) {
	if err := d.over(); err != nil {
		return nil, err
	}
	if i < 0 || i >= len(d.tx) {
		return nil, fmt.Errorf("pvnet: no queue %d: vif %s has queues 0 to %d", i, d.id, len(d.tx)-1)
	}
	tx := d.tx[i]
	tx.mu.Lock() // a Write under way ends first
	defer tx.mu.Unlock()
	if tx.owned.Swap(true) {
		return nil, ErrOwned
	}
	return tx, nil
}

// OwnRX takes the receiving half of queue i out of the Device's hands. ErrOwned
// if it has an owner, or if Listen runs; ErrDisconnected.
func (d *Device) OwnRX(i int) (*RX, error) {
	if err := d.over(); err != nil {
		return nil, err
	}
	if i < 0 || i >= len(d.rx) {
		return nil, fmt.Errorf("pvnet: no queue %d: vif %s has queues 0 to %d", i, d.id, len(d.rx)-1)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.listens || d.rx[i].owned.Swap(true) {
		return nil, ErrOwned
	}
	return d.rx[i], nil
}

// Write sends one frame, which is copied, and returns its length. It waits for
// room until the write deadline.
func (d *Device) Write(frame []byte) (int, error) { return d.Writev(frame) }

// Writev is Write of one frame whose bytes are in several slices.
func (d *Device) Writev(bufs ...[]byte) (int, error) {
	if err := d.over(); err != nil { // whatever else is wrong
		return 0, err
	}
	size := 0
	for _, b := range bufs {
		size += len(b)
	}
	if size < MinFrame || size > MaxFrame {
		return 0, ErrFrameSize
	}
	tx, err := d.pick(d.place(bufs[0]))
	if err != nil {
		return 0, err
	}
	defer tx.mu.Unlock()
	frames := tx.mine[:1] // an array here would escape through the engine's interface
	if _, err := tx.AllocWait(frames, size); err != nil {
		return 0, err
	}
	frames[0].CopyFrom(bufs...)
	if _, err := tx.SendWait(frames); err != nil {
		frames[0].Release()
		return 0, err
	}
	tx.flush()
	return size, nil
}

// WriteBatch is Write of several frames, in order within a flow, for less than as many
// calls: they are published together, and the peer is notified once for up to 32 of
// them. It returns how many were sent; the error is about the next.
func (d *Device) WriteBatch(frames [][]byte) (n int, err error) {
	if err := d.over(); err != nil {
		return 0, err
	}
	for n < len(frames) {
		size := len(frames[n])
		if size < MinFrame || size > MaxFrame {
			return n, ErrFrameSize
		}
		at := d.place(frames[n])
		run := 1
		for size <= 4096 && run < min(len(frames)-n, batch) { // each in one page, and so of any size
			next := frames[n+run]
			if len(next) < MinFrame || len(next) > 4096 || d.place(next) != at {
				break
			}
			size = max(size, len(next))
			run++
		}
		tx, err := d.pick(at)
		if err != nil {
			return n, err
		}
		k, err := tx.write(frames[n:n+run], size)
		tx.mu.Unlock()
		if n += k; err != nil {
			return n, err
		}
	}
	return n, nil
}

// batch is how many frames the Device's own calls move at once.
const batch = 32

// write sends frames, none longer than size bytes, as many as there were buffers for. The
// caller holds mu.
func (tx *TX) write(frames [][]byte, size int) (n int, err error) {
	mine := tx.mine[:len(frames)]
	k, err := tx.AllocWait(mine, size)
	if err != nil {
		return 0, err
	}
	for i := range mine[:k] {
		mine[i].Truncate(len(frames[i]))
		mine[i].CopyFrom(frames[i])
	}
	n, err = tx.SendWait(mine[:k])
	releaseAll(mine[n:k])
	tx.flush()
	return n, err
}

// place is the queue that the frames of a flow are sent on, by the beginning of one.
func (d *Device) place(head []byte) int {
	if n := d.active.Load(); n > 1 {
		return int(flow(head) % uint32(n))
	}
	return 0
}

// pick locks the sending half of queue at, or another if it has an owner.
func (d *Device) pick(at int) (*TX, error) {
	n := max(1, int(d.active.Load()))
	for i := range n {
		tx := d.tx[(at+i)%n]
		if tx.owned.Load() {
			continue
		}
		tx.mu.Lock()
		if !tx.owned.Load() {
			return tx, nil
		}
		tx.mu.Unlock()
	}
	return nil, ErrOwned
}

// Listen calls fn with every frame that arrives, until Disconnect, when it
// returns nil, or until ctx ends, when it returns its cause. It blocks. fn runs
// concurrently for different queues, in order within one; the frame is lent
// until fn returns. Frames that arrive before Listen wait in the ring, and so do
// frames for which there is no buffer because fn retained them all.
//
// A second Listen, or one beside an owner of a receiving half, is [ErrOwned]; one
// after Disconnect is [ErrDisconnected].
func (d *Device) Listen(ctx context.Context, fn func(Frame)) error {
	return d.ListenBatch(ctx, func(frames []Frame) {
		for i := range frames {
			fn(frames[i])
		}
	})
}

// ListenBatch is Listen with the frames that came together, up to 32, in one call of fn.
// The slice is lent until fn returns, as the frames are.
func (d *Device) ListenBatch(ctx context.Context, fn func([]Frame)) error {
	if err := d.over(); err != nil {
		return err
	}
	d.mu.Lock()
	taken := d.listens
	for _, rx := range d.rx {
		taken = taken || rx.owned.Load()
	}
	if !taken {
		d.listens = true
		for _, rx := range d.rx {
			rx.ending.Store(false)
		}
	}
	d.mu.Unlock()
	if taken {
		return ErrOwned
	}
	defer func() {
		d.mu.Lock()
		d.listens = false
		for _, rx := range d.rx {
			rx.ending.Store(false)
		}
		d.mu.Unlock()
	}()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		for _, rx := range d.rx {
			rx.interrupt()
		}
	})
	defer func() {
		if !stop() {
			<-stopped // or it would end the next receive
		}
	}()
	var wg sync.WaitGroup
	errs := make([]error, len(d.rx))
	for i, rx := range d.rx {
		wg.Go(func() {
			errs[i] = rx.listen(fn)
			cancel(errs[i])
		})
	}
	wg.Wait()
	if err := d.fatal(); err != nil {
		return err
	}
	for _, err := range errs {
		if v, ok := errors.AsType[*PeerError](err); ok {
			return v // the device's cause says so too, but maybe not yet
		}
		if err != nil && err != errInterrupted && !errors.Is(err, ErrDisconnected) {
			return err
		}
	}
	if d.word.Load() == linkGone {
		return nil
	}
	return context.Cause(ctx)
}

// fatal is the violation that ended the device, if one did.
func (d *Device) fatal() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := errors.AsType[*PeerError](d.cause); ok {
		return d.cause
	}
	return nil
}

func (rx *RX) listen(fn func([]Frame)) (err error) {
	debug.SetPanicOnFault(true)
	defer func() {
		if v := faulted(recover()); v != nil {
			rx.gate.abandon()
			err = rx.dev.judge(v)
		}
	}()
	var frames [batch]Frame
	for {
		n, err := rx.Receive(frames[:])
		if err == ErrNoBuffers { // fn retains them all; the frames wait in the ring
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			continue
		}
		fn(frames[:n])
		rx.Release(frames[:n])
		rx.flush()
	}
}

// faulted is the verdict on a panic: nil if there was none, a violation if shared
// memory was taken away under us. Any other panic goes on.
func faulted(r any) *PeerError {
	if r == nil {
		return nil
	}
	if f, ok := r.(interface{ Addr() uintptr }); ok {
		return &PeerError{Reason: fmt.Sprintf("shared memory is gone at %#x", f.Addr())}
	}
	panic(r)
}

// trapped runs f, which touches shared memory, on a goroutine of ours, and gives
// the verdict if that is gone.
func trapped(f func()) (v *PeerError) {
	defer func() { v = faulted(recover()) }()
	f()
	return nil
}

// Disconnect ends the device: the other end sees Closing, then Closed, every call
// that waits returns [ErrDisconnected], as do all that come later, and Listen returns
// nil. It never fails. It may take time: up to 4 s with a peer that does not answer, up
// to 6 s in all with a xenstore that does not, and 10 s more for a caller that is stuck
// ([Device.Done]). It is idempotent, ends the device for all who share it, and does not
// wait for frames that are still held: those stay readable until they are released.
func (d *Device) Disconnect() {
	d.leaving.Store(true)
	d.stop(ErrDisconnected)
	<-d.done
}

// Close is Disconnect for io.Closer. It returns nil.
func (d *Device) Close() error {
	d.Disconnect()
	return nil
}

// Done is closed once the device has ended: by Disconnect, by its peer's violation,
// or, when the link went down, by a call that did not return within 10 s. The
// memory that call may still use is then left to it, and later ones return an
// [*UnknownError].
func (d *Device) Done() <-chan struct{} { return d.done }

// state is what a call returns that finds its gate shut.
func (d *Device) state() error {
	switch d.word.Load() {
	case linkUp:
		return nil
	case linkDown:
		return ErrLinkDown
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cause
}

// over is what every call returns once the device has ended; nil: it has not.
func (d *Device) over() error {
	if d.word.Load() != linkGone {
		return nil
	}
	return d.state()
}

// stateOf is state for one half: a queue the connection does not have is down.
func (d *Device) stateOf(h *half) error {
	err := d.state()
	if err == nil && h.queue >= int(d.active.Load()) {
		return ErrLinkDown
	}
	return err
}

// awaitUp waits until h's link is up, the device gone, or h's deadline passed.
func (d *Device) awaitUp(h *half) error {
	for {
		d.mu.Lock()
		changed := d.changed
		d.mu.Unlock()
		if err := d.stateOf(h); err != ErrLinkDown {
			return err
		}
		if h.ending.Load() {
			return errInterrupted
		}
		if t := h.deadline(); t.IsZero() {
			<-changed
		} else {
			timer := time.NewTimer(time.Until(t))
			select {
			case <-changed:
				timer.Stop()
			case <-timer.C:
				return errTimeout
			}
		}
	}
}

// nudge makes those who wait for the link look at their deadlines.
func (d *Device) nudge() {
	d.mu.Lock()
	close(d.changed)
	d.changed = make(chan struct{})
	d.mu.Unlock()
}

// judge passes on what a half met; a violation ends the device.
func (d *Device) judge(err error) error {
	if err == nil || err == ErrFull {
		return err
	}
	if v, ok := err.(*PeerError); ok {
		if d.broken.CompareAndSwap(nil, v) {
			d.fault <- v
		}
		return d.broken.Load()
	}
	if errors.Is(err, ring.ErrCorrupt) {
		return d.judge(&PeerError{Reason: err.Error()})
	}
	if err == net.ErrClosed { // the connection's waiter: the gate says what comes next
		return nil
	}
	return err
}

// up puts a connection under the halves, if it is not there yet, and lets callers
// in.
func (d *Device) up(c *conn, peer hypercall.DomID, own xenbus.State) {
	for i, q := range c.queues {
		tx, rx := d.tx[i], d.rx[i]
		tx.eng, rx.eng = q.tx, q.rx
		tx.park.Store(q.txPark)
		rx.park.Store(q.rxPark)
		tx.spin.calibrate(d.cfg.Wait, q.tx)
		rx.spin.calibrate(d.cfg.Wait, q.rx)
	}
	d.active.Store(int32(len(c.queues)))
	d.offers.Store(uint32(c.feat.peer))
	d.epoch.Add(1)
	for i := range c.queues {
		d.tx[i].gate.open()
		d.rx[i].gate.open()
	}
	d.mu.Lock()
	d.budget, d.arenas = Budget{c.shared, c.own}, c.arenas
	d.peer, d.agreed = peer, c.agreed(d.cfg.LendRx, d.trusted)
	d.mu.Unlock()
	d.setStatus(own, true) // before anybody hears of it, and may look there
	d.announce(linkUp, LinkEvent{Up: true})
	for i := range c.queues {
		d.tx[i].marked()
		d.rx[i].marked()
	}
}

// down keeps callers out and waits until they have left. The connection's memory
// stays; if somebody does not leave in time it stays for ever.
func (d *Device) down(c *conn, reason string) (ok bool) {
	d.announce(linkDown, LinkEvent{Reason: reason})
	for i, q := range c.queues { // all are asked to leave, before one is waited for
		d.tx[i].gate.shut(q.txPark.wake)
		d.rx[i].gate.shut(q.rxPark.wake)
	}
	ok, end := true, time.Now().Add(d.patience)
	for i := range c.queues {
		ok = d.tx[i].gate.empty(end) && ok
		ok = d.rx[i].gate.empty(end) && ok
	}
	if !ok {
		d.log.Error("a caller is stuck in the device; its memory is abandoned", "vif", d.id)
		c.undo = nil
	}
	return ok
}

// drop gives back what the connection holds. The gates are shut.
func (d *Device) drop(c *conn) {
	if c.undo != nil {
		for i, q := range c.queues {
			q.tx.drain()
			q.rx.drain()
			d.tx[i].count.Flush()
			d.rx[i].count.Flush()
			d.tx[i].eng, d.rx[i].eng = nil, nil
		}
		c.undo.run()
		d.rx[0].count.Add(telemetry.PagesQuarantined, d.lost.Swap(0))
		d.rx[0].count.Flush()
	}
	d.mu.Lock()
	d.budget, d.arenas = Budget{}, nil
	d.mu.Unlock()
}

// setStatus shows our state beside the counters, and whether the link is up.
func (d *Device) setStatus(s xenbus.State, up bool) {
	d.mu.Lock()
	agreed := d.agreed
	d.mu.Unlock()
	d.set.SetStatus(telemetry.Status{
		State: telemetry.State(s), Up: up, MAC: d.MAC(), MTU: uint32(d.MTU()),
		Queues: uint32(d.active.Load()), Epoch: d.epoch.Load(),
		Features: agreed,
	})
}

// gone ends the device: every call returns cause from now on.
func (d *Device) gone(cause error) {
	d.mu.Lock()
	d.cause = cause
	d.mu.Unlock()
	d.announce(linkGone, LinkEvent{Reason: cause.Error()})
	for i := range d.tx {
		d.tx[i].marked()
		d.rx[i].marked()
	}
}

// patience bounds the wait for a caller to leave: it has nothing to wait for but
// the processor.
const patience = 10 * time.Second

// announce changes the link's state and tells everybody.
func (d *Device) announce(word uint32, ev LinkEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ev.MAC, ev.MTU = d.last.MAC, d.last.MTU
	if ev.Up {
		ev.MAC, ev.MTU = d.MAC(), d.MTU()
	}
	d.word.Store(word)
	close(d.changed)
	d.changed = make(chan struct{})
	if ev == d.last && word != linkGone {
		return
	}
	d.last = ev
	for _, c := range d.subs {
		select {
		case c <- ev:
		default:
			select {
			case <-c:
			default:
			}
			c <- ev
		}
		if word == linkGone {
			close(c)
		}
	}
	if word == linkGone {
		d.subs = nil
	}
}
