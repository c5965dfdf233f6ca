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

// station reports whether m can be the address of one station, as Linux's
// is_valid_ether_addr does: not zero, and not a group address.
func (m MAC) station() bool { return m[0]&1 == 0 && m != MAC{} }

// Config holds the options of a device. The zero Config suits most programs.
type Config struct {
	// Queues is how many queues to ask the peer for. 0 means 1. The connection has fewer
	// if the peer offers fewer; see [Device.Active].
	Queues int

	// LendRx lends received frames in the shared pages themselves, at most half the ring
	// at a time, instead of copying them. The peer can still write such a frame, so set
	// it only for consumers that copy the frame or that trust the peer. It applies to
	// frontends; a backend always copies.
	LendRx bool

	// Offload accepts frames from the peer that are longer than the MTU ([Frame.GSO]) or
	// whose checksum is partial ([ChecksumPartial]). It is for owners that handle both: a
	// TCP/IP stack, or a forwarder to a card that takes such frames. Otherwise the device
	// does not offer to take them, and every received frame has a complete checksum.
	// Sending them needs no Config.
	Offload bool

	// Buffers is the number of private pages per queue for received frames, at least 17.
	// 0 means 512. A receiver that holds all of them gets no more frames.
	Buffers int

	// Wait is how a blocking call waits.
	Wait WaitMode

	// LockedThreads says that the goroutines that wait are locked to their threads
	// (runtime.LockOSThread), as in a program that gives each queue a CPU. They then
	// block in the kernel, which saves Go's scheduler several thread switches per
	// wake-up. A goroutine that is not locked occupies a thread while it waits. Where two
	// halves share an event channel ("feature-split-event-channels" is 0), it applies to
	// the half that waits first.
	LockedThreads bool

	// Counters is a store that mirrors the counters for other processes. nil: they are on
	// the heap only.
	Counters telemetry.Store

	// Logger gets the state changes, never a line per frame. If a peer changes its state
	// without end, it gets one line every half minute, with the number of lines
	// suppressed. nil: silent.
	Logger *slog.Logger
}

// equal reports whether o, of a second Connect, agrees with c. The Logger may differ.
func (c Config) equal(o Config) bool {
	return c.Queues == o.Queues && c.LendRx == o.LendRx && c.Offload == o.Offload && c.Buffers == o.Buffers &&
		c.Wait == o.Wait && c.LockedThreads == o.LockedThreads && c.Counters == o.Counters
}

// check refuses a Config that cannot work in dom. A frame of MaxFrame bytes takes
// maxPieces buffers.
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
	Reason string // why the link is down: "the backend closed", "Disconnect", ...
	MAC    MAC    // of the connection, or of the last one; zero before the first
	MTU    int    // in bytes, as [Device.MTU]; of the same connection as MAC
}

// A Device is one end of a vif. Its methods may be called from any goroutine.
type Device struct {
	id     string
	role   telemetry.Role
	domain hypercall.Domain
	cfg    Config
	log    *slog.Logger
	hush   *hush // the rate limit of log
	set    *telemetry.Set
	tx     []*TX
	rx     []*RX

	word    atomic.Uint32 // linkDown, linkUp, linkGone; written by the life goroutine only
	active  atomic.Int32  // how many queues the connection has
	mtu     atomic.Int32
	offers  atomic.Uint32             // the peer's offers, of the last connection
	epoch   atomic.Uint64             // number of the connection, from 1
	lost    atomic.Uint64             // pages that the peer did not give back, not yet in the counters
	leaving atomic.Bool               // Disconnect was called
	broken  atomic.Pointer[PeerError] // the violation that ended or will end the device
	trouble atomic.Pointer[error]     // error of the last step of the life; nil: it succeeded
	mac     atomic.Uint64             // in the lower 48 bits, big-endian
	named   telemetry.Info            // the name that the counters have now; life goroutine only

	stop     context.CancelCauseFunc // asks the life goroutine to end
	finish   func()                  // closes what the life goroutine used: counters, xenbus device, client
	patience time.Duration           // how long down waits for callers to leave
	done     chan struct{}           // closed once the life goroutine has ended
	fault    chan *PeerError         // violations that halves met, for the life goroutine
	look     chan struct{}           // capacity 1: a token makes the life goroutine look at the device

	mu      sync.Mutex
	trusted bool              // guarded by mu
	changed chan struct{}     // guarded by mu: closed and replaced when word or a deadline changes
	cause   error             // guarded by mu: what calls return once word is linkGone
	last    LinkEvent         // guarded by mu: the last event that subs got
	subs    []chan LinkEvent  // guarded by mu
	listens bool              // guarded by mu: Listen runs
	budget  Budget            // guarded by mu
	arenas  []*arena.Arena    // guarded by mu: the arenas of the budget's private pages
	peer    hypercall.DomID   // guarded by mu
	agreed  telemetry.Feature // guarded by mu: the features of the connection
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

// wakeLife makes the life goroutine look at the device. It never blocks.
func (d *Device) wakeLife() {
	select {
	case d.look <- struct{}{}:
	default:
	}
}

// ID returns the vif's handle, as given to Connect.
func (d *Device) ID() string { return d.id }

// MAC returns the card's address. Each connection reads it again: a vif that is unplugged
// and plugged again may have another one. The [LinkEvent] has it too.
func (d *Device) MAC() MAC {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], d.mac.Load())
	return MAC(b[2:])
}

// MTU returns the largest payload in bytes, without the Ethernet header, that the network
// behind the vif takes. Each connection reads it again.
func (d *Device) MTU() int { return int(d.mtu.Load()) }

// identify stores the card's properties for the connection to come.
func (d *Device) identify(mac MAC, mtu int, trusted bool) {
	var b [8]byte
	copy(b[2:], mac[:])
	d.mac.Store(binary.BigEndian.Uint64(b[:]))
	d.mtu.Store(int32(mtu))
	d.mu.Lock()
	d.trusted = trusted
	d.mu.Unlock()
}

// Queues returns how many queues the device can have, Active how many the connection has.
func (d *Device) Queues() int { return len(d.tx) }
func (d *Device) Active() int { return int(d.active.Load()) }

// Peer returns the domain of the other end.
func (d *Device) Peer() hypercall.DomID {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.peer
}

// Trusted returns what the toolstack's "trusted" key says of the backend. It changes
// nothing: pages are private and copied either way.
func (d *Device) Trusted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.trusted
}

// PeerTakes reports whether the peer takes GSO frames of type t and the partial checksums
// that they have. Such frames may be sent to any peer; for one that does not take them,
// the device cuts them first. While the link is down it is the answer of the last
// connection.
func (d *Device) PeerTakes(t GSOType) bool {
	o := offers(d.offers.Load())
	return t == GSOTCPv4 && o&takesGSO4 != 0 || t == GSOTCPv6 && o&takesGSO6 != 0
}

// A Budget is the most memory that a connection ever holds, fixed when the connection is
// made. Shared pages are in memory from the beginning; of the private pages,
// [Device.Touched] are.
type Budget struct {
	SharedPages  int // granted to the peer
	PrivatePages int // not granted, and mapped ring pages of the peer
}

func (b Budget) String() string {
	return fmt.Sprintf("%d pages shared (%d KiB), %d private (%d KiB)",
		b.SharedPages, b.SharedPages*4, b.PrivatePages, b.PrivatePages*4)
}

// Budget returns the budget of the present connection; zero while the link is down.
func (d *Device) Budget() Budget {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.budget
}

// Touched returns how many of the Budget's private pages are in memory. The rest is only
// reserved, until that many frames are in flight or in the user's hands at once. It is
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

// Stats returns the counters since the last ResetStats. For a half that is in use at this
// moment, the last 32 frames may be missing.
func (d *Device) Stats() telemetry.Stats {
	d.flush()
	return d.set.Snapshot()
}

// ResetStats makes Stats start from zero.
func (d *Device) ResetStats() {
	d.flush()
	d.set.Reset()
}

// Counters returns all counters of the device, for export.
func (d *Device) Counters() *telemetry.Set { return d.set }

// flush publishes the counters of each half that no caller is inside.
func (d *Device) flush() {
	for i := range d.tx {
		d.tx[i].flush()
		d.rx[i].flush()
	}
}

// SetDeadline sets the read deadline and the write deadline.
func (d *Device) SetDeadline(t time.Time) error {
	return errors.Join(d.SetReadDeadline(t), d.SetWriteDeadline(t))
}

// SetReadDeadline sets when Listen returns os.ErrDeadlineExceeded if no frame comes. It
// returns nil, or ErrDisconnected.
func (d *Device) SetReadDeadline(t time.Time) error {
	for _, rx := range d.rx {
		if !rx.owned.Load() {
			rx.setDeadline(t)
		}
	}
	return d.over()
}

// SetWriteDeadline sets when Write, Writev and WriteBatch stop waiting for room. It
// returns nil, or ErrDisconnected.
func (d *Device) SetWriteDeadline(t time.Time) error {
	for _, tx := range d.tx {
		if !tx.owned.Load() {
			tx.setDeadline(t)
		}
	}
	return d.over()
}

// Links yields the present state of the link and then its changes, until ctx ends or the
// device does; the last event then says why. A reader that falls 16 events behind loses
// the oldest.
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

// OwnTX hands the sending half of queue i to the caller: from now on Write, Writev and
// WriteBatch do not use it. ErrOwned if it has an owner; ErrDisconnected.
func (d *Device) OwnTX(i int) (*TX, error) {
	if err := d.over(); err != nil {
		return nil, err
	}
	if i < 0 || i >= len(d.tx) {
		return nil, fmt.Errorf("pvnet: no queue %d: vif %s has queues 0 to %d", i, d.id, len(d.tx)-1)
	}
	tx := d.tx[i]
	tx.mu.Lock() // waits for a Write under way
	defer tx.mu.Unlock()
	if tx.owned.Swap(true) {
		return nil, ErrOwned
	}
	return tx, nil
}

// OwnRX hands the receiving half of queue i to the caller. ErrOwned if it has an owner,
// or if Listen runs; ErrDisconnected.
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

// Write sends a copy of one frame and returns its length. It waits for room, and while
// the link is down, until the write deadline.
func (d *Device) Write(frame []byte) (int, error) { return d.Writev(frame) }

// Writev is Write of one frame whose bytes are in several slices.
func (d *Device) Writev(bufs ...[]byte) (int, error) {
	if err := d.over(); err != nil { // before any other error
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

// WriteBatch is Write of several frames, in order within a flow. It costs less than one
// Write each: up to 32 frames are published together, with one notification. It returns
// how many frames were sent; the error is about frames[n].
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
		for size <= 4096 && run < min(len(frames)-n, batch) { // each fits one page, so they may differ in size
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

// write sends as many of frames as there are buffers for. No frame is longer than size
// bytes. The caller holds mu.
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

// place returns the queue for a frame that begins with head: the same one for all frames
// of a flow.
func (d *Device) place(head []byte) int {
	if n := d.active.Load(); n > 1 {
		return int(flow(head) % uint32(n))
	}
	return 0
}

// pick returns the sending half of queue at with its mu locked, or that of another queue
// if this one has an owner.
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
// returns nil, or until ctx ends, when it returns the cause of ctx. It blocks. fn runs
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

// ListenBatch is Listen with up to 32 frames that arrived together in one call of fn. The
// slice and the frames are lent until fn returns.
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
			<-stopped // else its interrupt could end the receive of a later Listen
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
			return v // d.cause will be v too, but may not be set yet
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

// fatal returns the violation that ended the device, or nil.
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
		if err == ErrNoBuffers { // fn retains every buffer; new frames wait in the ring
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

// faulted judges the value of a recover: nil for nil, a violation for a fault on shared
// memory that was taken away. It panics again with any other value.
func faulted(r any) *PeerError {
	if r == nil {
		return nil
	}
	if f, ok := r.(interface{ Addr() uintptr }); ok {
		return &PeerError{Reason: fmt.Sprintf("shared memory is gone at %#x", f.Addr())}
	}
	panic(r)
}

// trapped runs f, which touches shared memory, and returns a violation if that memory is
// gone. The goroutine must have set debug.SetPanicOnFault.
func trapped(f func()) (v *PeerError) {
	defer func() { v = faulted(recover()) }()
	f()
	return nil
}

// Disconnect ends the device and waits until it has ended. The other end sees Closing,
// then Closed; waiting and later calls return [ErrDisconnected], and Listen returns nil.
// It never fails. It takes up to 4 s if the peer does not answer, up to 6 s in all if
// xenstore does not, and 10 s more if a caller is stuck ([Device.Done]). It is idempotent
// and ends the device for every user of it. It does not wait for frames that are still
// held: they stay readable until they are released.
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

// Done returns a channel that is closed once the device has ended: by Disconnect, by a
// violation of the peer, or by a call that did not return within 10 s after the link went
// down. The memory that the stuck call may still use is then never freed, and later calls
// return an [*UnknownError].
func (d *Device) Done() <-chan struct{} { return d.done }

// state returns the error of a call that finds its gate shut; nil if the link is up.
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

// over returns the error of every call once the device has ended; nil before.
func (d *Device) over() error {
	if d.word.Load() != linkGone {
		return nil
	}
	return d.state()
}

// stateOf is state for one half: the link of a queue that the connection does not have is
// down.
func (d *Device) stateOf(h *half) error {
	err := d.state()
	if err == nil && h.queue >= int(d.active.Load()) {
		return ErrLinkDown
	}
	return err
}

// awaitUp waits until the link of h is up, the device has ended, or the deadline of h has
// passed.
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

// nudge makes the callers in awaitUp look at their deadlines again.
func (d *Device) nudge() {
	d.mu.Lock()
	close(d.changed)
	d.changed = make(chan struct{})
	d.mu.Unlock()
}

// judge turns the error of a half into the error of its call. A violation ends the
// device; the first one is the error of all later calls.
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
	if err == net.ErrClosed { // the connection's waiter was closed: the next enter says why
		return nil
	}
	return err
}

// up gives the halves the engines of connection c, opens the gates and announces the
// link.
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
	d.setStatus(own, true) // before the event: a subscriber may look at the status
	d.announce(linkUp, LinkEvent{Up: true})
	for i := range c.queues {
		d.tx[i].marked()
		d.rx[i].marked()
	}
}

// down shuts the gates and waits until callers have left. The connection keeps its
// memory. If a caller does not leave in time, it is never freed, and down reports false.
func (d *Device) down(c *conn, reason string) (ok bool) {
	d.announce(linkDown, LinkEvent{Reason: reason})
	for i, q := range c.queues { // all callers are asked to leave before the wait for one
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

// drop frees what the connection holds. The gates are shut.
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

// setStatus publishes our xenbus state beside the counters, and whether the link is up.
func (d *Device) setStatus(s xenbus.State, up bool) {
	d.mu.Lock()
	agreed := d.agreed
	d.mu.Unlock()
	d.set.SetStatus(telemetry.Status{
		State: s, Up: up, MAC: d.MAC(), MTU: uint32(d.MTU()),
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

// patience bounds the wait for a caller to leave. A caller inside the gate that was asked
// to leave waits for nothing but a CPU.
const patience = 10 * time.Second

// announce changes the link's state and tells waiting callers and subscribers.
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
