package pvnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"barevif/arena"
	"barevif/hypercall"
	"barevif/pvnet/internal/loglimit"
	"barevif/pvnet/ring"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// A MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// station reports whether m can be the address of one station, as Linux's
// is_valid_ether_addr does: not zero, and not a group address.
func (m MAC) station() bool { return m[0]&1 == 0 && m != MAC{} }

// A Device is one end of a vif. Its methods may be called from any goroutine.
type Device struct {
	// Immutable after newDevice.
	id            string
	role          telemetry.Role
	domain        hypercall.Domain
	cfg           Config
	log           *slog.Logger
	logs          loglimit.Handler // of log
	counters      *telemetry.Set
	tx            []*TX
	rx            []*RX
	callerTimeout time.Duration // how long quiesce waits for callers to leave

	// Immutable after start. finish closes what the lifecycle goroutine used: counters,
	// xenbus device, client.
	stop   context.CancelCauseFunc // asks the lifecycle goroutine to end
	finish func()
	own    func(context.Context, ...string) (xenstore.Values, error) // backend: reads keys of its directory

	fromBackend func(ctx context.Context, key string) (value, path string, err error) // frontend: reads a key of the backend's directory

	// To the lifecycle goroutine, and from it.
	violations chan *PeerError // violations that halves met
	wake       chan struct{}   // capacity 1: a token makes the goroutine look at the device
	handOvers  chan *handOver  // requests of HandOver
	renewed    <-chan struct{} // of a backend's vif that was taken over: closed once its claim has an id of ours, or keeps the old one; nil: there was none
	done       chan struct{}   // closed once the goroutine has ended

	// Written by the lifecycle goroutine only, read by everybody.
	link      atomic.Uint32         // linkDown, linkUp, linkGone
	active    atomic.Int32          // how many queues the connection has
	mtu       atomic.Int32          // in bytes
	noCarrier atomic.Bool           // what Carrier reports; of a backend, written by SetCarrier
	limiter   limiter               // backend: the vif's rate limit
	groups    groups                // backend: the vif's multicast filter
	joins     joins                 // frontend: what it wants of the backend's
	mac       atomic.Uint64         // in the lower 48 bits, big-endian
	peerTakes atomic.Uint32         // offloads of the peer of the last connection
	epoch     atomic.Uint64         // number of the connection, from 1
	stalled   atomic.Bool           // the link is up and the carrier off: see checkCarrier. Written with lifecycle.mu held
	lastError atomic.Pointer[error] // error of its last step; nil: the step succeeded

	// Used by the lifecycle goroutine only.
	mirrorInfo telemetry.Info    // the name that the counters have now
	hide       func()            // ends the showing by Config.Inspector; nil: it does not show the device
	complaints map[string]string // by key: the value that complain has logged

	// Written by any goroutine.
	quarantined atomic.Uint64             // pages that the peer did not give back, not yet in the counters
	leaving     atomic.Bool               // Disconnect was called
	askedMTU    atomic.Int32              // SetMTU: not yet published; 0: none
	violation   atomic.Pointer[PeerError] // the violation that ended or will end the device
	taps        atomic.Pointer[[]*Tap]    // who copies frames; nil: nobody; written with mu held

	hash  *hashClient                // a frontend's
	ctrl  atomic.Pointer[ctrlClient] // a frontend's, while its goroutine runs
	steer atomic.Pointer[steering]   // a backend's: how its frontend wants its frames to be hashed; nil: not at all. Written by setSteering

	ctrlViolations atomic.Uint64           // violations on the control ring, not yet in the counters; by any goroutine
	verdict        atomic.Pointer[verdict] // backend: of the network behind the vif; nil: not known yet

	statusMu sync.Mutex // held while the status beside the counters changes; before mu

	mu sync.Mutex // guards what follows

	takenFiles []hypercall.File // what came with a vif that was taken over, until TakenFiles
	reclaim    <-chan struct{}  // after a hand-over: closed once Serve may try to serve the vif again
	changed    chan struct{}    // closed and replaced when link or a deadline changes
	cause      error            // what calls return once link is linkGone
	last       LinkEvent        // the last event that subs got
	subs       []chan LinkEvent
	steered    chan struct{} // closed and replaced when steer changes
	addressed  chan struct{} // closed and replaced when the guest's addresses may have changed
	listening  bool          // Listen runs
	budget     Budget
	arenas     []*arena.Arena // of the budget's private pages
	peer       hypercall.DomID
	trusted    bool
	agreed     telemetry.Feature // the features of the connection
}

const (
	linkDown = iota
	linkUp
	linkGone
)

func newDevice(id string, role telemetry.Role, domain hypercall.Domain, cfg Config) *Device {
	d := &Device{
		id: id, role: role, domain: domain, cfg: cfg,
		counters:      telemetry.NewSet(cfg.queues()),
		done:          make(chan struct{}),
		callerTimeout: callerTimeout,
		violations:    make(chan *PeerError, 1),
		wake:          make(chan struct{}, 1),
		handOvers:     make(chan *handOver),
		changed:       make(chan struct{}),
		steered:       make(chan struct{}),
		addressed:     make(chan struct{}),
		last:          LinkEvent{Reason: "not connected yet"},
	}
	h := slog.DiscardHandler
	if cfg.Logger != nil {
		h = cfg.Logger.Handler()
	}
	d.logs = loglimit.New(h)
	d.log = slog.New(d.logs)
	for i := range cfg.queues() {
		rx, tx := new(RX), new(TX)
		rx.init(d, i, receive, d.counters.RX(i))
		tx.init(d, i, transmit, d.counters.TX(i))
		d.rx, d.tx = append(d.rx, rx), append(d.tx, tx)
	}
	if role == telemetry.Frontend {
		d.hash = newHashClient(cfg.Hash)
		d.joins.init()
	}
	d.mtu.Store(1500)
	return d
}

// wakeLifecycle makes the lifecycle goroutine look at the device. It never blocks.
func (d *Device) wakeLifecycle() {
	select {
	case d.wake <- struct{}{}:
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
// behind the vif takes. It is 1500 if xenstore does not say another. It may change at any
// time; a [LinkEvent] then says so.
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

// Queues returns how many queues the device can have.
func (d *Device) Queues() int { return len(d.tx) }

// Active returns how many queues the present or last connection has; 0 before the first.
func (d *Device) Active() int { return int(d.active.Load()) }

// Peer returns the domain of the other end.
func (d *Device) Peer() hypercall.DomID {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.peer
}

// Trusted reports whether the toolstack trusts the backend: the key "trusted" in the
// frontend's directory is not 0 (libxl's option "trusted", Linux's xen-netfront.trusted).
// Each connection reads it again. It is true for a backend's device.
//
// A backend that is not trusted never sees memory other than frames: Config.LendRx has no
// effect, and the pages granted to it hold what was written to frames of this vif and
// zeros. That is so for any backend, except that LendRx lends received frames. Linux's
// netfront, which grants pages of its network stack, copies for such a backend; here the
// pages are the vif's own, and no other memory shares them. But a frame of [TX.Alloc] lies
// in a page that the backend can read from the moment it is written, sent or not: what it
// must not see must not be written there.
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
	o := offloads(d.peerTakes.Load())
	return t == GSOTCPv4 && o&takesGSO4 != 0 || t == GSOTCPv6 && o&takesGSO6 != 0
}

// A Budget is the most memory that a connection ever holds, fixed when the connection is
// made. Shared pages are in memory from the beginning; of the private pages,
// [Device.Touched] are.
type Budget struct {
	SharedPages  int // granted to the peer
	PrivatePages int // not granted, and mapped ring pages of the peer

	// MappedPages is how many pages of the peer a backend may have mapped for static grants
	// ([Config].StaticGrants): the peer decides how many there are, and when. They are
	// memory of the peer, among its SharedPages. Each queue may have 512, the most that a
	// list of them names, and twice as many for a moment, while the backend joins mappings or users
	// hold frames in them. Frames in pages beyond that are copied.
	MappedPages int
}

func (b Budget) String() string {
	s := fmt.Sprintf("%d pages shared (%d KiB), %d private (%d KiB)",
		b.SharedPages, b.SharedPages*4, b.PrivatePages, b.PrivatePages*4)
	if b.MappedPages > 0 {
		s += fmt.Sprintf(", %d of the peer's mapped at most", b.MappedPages)
	}
	return s
}

// Budget returns the budget of the present connection, which a link that is down may still
// hold; zero if there is none.
func (d *Device) Budget() Budget {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.budget
}

// Touched returns how many of the Budget's private pages are in memory. The rest is only
// reserved, until that many frames are in flight or in the user's hands at once. It is
// zero if there is no connection.
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
	return d.counters.Snapshot()
}

// ResetStats makes Stats start from zero.
func (d *Device) ResetStats() {
	d.flush()
	d.counters.Reset()
}

// Counters returns all counters of the device, for export.
func (d *Device) Counters() *telemetry.Set { return d.counters }

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
	return d.endError()
}

// SetWriteDeadline sets when Write, Writev and WriteBatch stop waiting for room. It
// returns nil, or ErrDisconnected.
func (d *Device) SetWriteDeadline(t time.Time) error {
	for _, tx := range d.tx {
		if !tx.owned.Load() {
			tx.setDeadline(t)
		}
	}
	return d.endError()
}

// OwnTX hands the sending half of queue i to the caller: from now on Write, Writev and
// WriteBatch do not use it. It waits for a Write under way. It returns [ErrOwned] if the
// half has an owner, [ErrDisconnected] after the end of the device, and another error if
// there is no queue i.
func (d *Device) OwnTX(i int) (*TX, error) {
	if err := d.endError(); err != nil {
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

// OwnRX hands the receiving half of queue i to the caller. It returns the errors of OwnTX,
// and [ErrOwned] also while Listen runs.
func (d *Device) OwnRX(i int) (*RX, error) {
	if err := d.endError(); err != nil {
		return nil, err
	}
	if i < 0 || i >= len(d.rx) {
		return nil, fmt.Errorf("pvnet: no queue %d: vif %s has queues 0 to %d", i, d.id, len(d.rx)-1)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.listening || d.rx[i].owned.Swap(true) {
		return nil, ErrOwned
	}
	return d.rx[i], nil
}

// Disconnect ends the device and waits until it has ended. The other end sees Closing,
// then Closed; waiting and later calls return [ErrDisconnected], and Listen returns nil.
// The keys that the device published stay, as those of Linux's drivers do, and the next
// connection removes them.
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

// callError turns the error of a half into the error of its call. A violation ends the
// device; the first one is the error of all later calls.
func (d *Device) callError(err error) error {
	if err == nil || err == ErrFull {
		return err
	}
	if v, ok := err.(*PeerError); ok {
		if d.violation.CompareAndSwap(nil, v) {
			d.violations <- v
		}
		return d.violation.Load()
	}
	if errors.Is(err, ring.ErrCorrupt) {
		return d.callError(&PeerError{Reason: err.Error()})
	}
	if err == hypercall.ErrClosed { // the connection's waiter was closed: the next enter says why
		return nil
	}
	return err
}

// setStatus publishes our xenbus state beside the counters, and whether the link is up.
func (d *Device) setStatus(s xenbus.State, up bool) {
	d.statusMu.Lock()
	defer d.statusMu.Unlock()
	d.counters.SetStatus(telemetry.Status{
		State: s, Up: up, MAC: d.MAC(), MTU: uint32(d.MTU()),
		Queues: uint32(d.active.Load()), Epoch: d.epoch.Load(),
		Features: d.Features(),
	})
}

// Features returns the features that both ends agreed on for the connection, or for the
// last one while the link is down. Static grants and the hash are agreed on soon after the
// link is up.
func (d *Device) Features() telemetry.Feature {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.agreed
}

// agree adds a feature that the ends agreed on after the link came up. Any goroutine may
// call it while the link is up.
func (d *Device) agree(f telemetry.Feature) { d.setFeature(f, true) }

// setFeature shows whether the ends have agreed on a feature after the link came up.
func (d *Device) setFeature(f telemetry.Feature, on bool) {
	d.statusMu.Lock()
	defer d.statusMu.Unlock()
	d.mu.Lock()
	d.agreed &^= f
	if on {
		d.agreed |= f
	}
	d.mu.Unlock()
	s := d.counters.Status()
	s.Features = d.Features()
	d.counters.SetStatus(s)
}

// finishWith ends the device: every call returns cause from now on.
func (d *Device) finishWith(cause error) {
	d.mu.Lock()
	d.cause = cause
	d.mu.Unlock()
	d.announce(linkGone, LinkEvent{Reason: cause.Error()})
	for i := range d.tx {
		d.tx[i].markMember()
		d.rx[i].markMember()
	}
}

// Logger returns the device's rate-limited logger, which writes to Config.Logger; never
// nil. It is for programs that connect the device to something else. Do not log single
// frames.
func (d *Device) Logger() *slog.Logger { return d.log }

// openMirror shows the counters, and the device to the Inspector, under the name of the vif,
// which changes if the peer is in another domain now.
func (d *Device) openMirror(peer hypercall.DomID) {
	info := telemetry.Info{
		Role: d.role, Own: uint16(d.domain.ID()), Peer: uint16(peer), Queues: d.cfg.queues(),
	}
	if n, err := strconv.ParseUint(d.id, 10, 32); err == nil {
		info.Handle = uint32(n)
	}
	if d.mirrorInfo == info {
		return
	}
	if d.mirrorInfo != (telemetry.Info{}) {
		d.closeMirror()
	}
	d.mirrorInfo = info
	d.counters.Open(d.cfg.Counters, info)
	if d.cfg.Inspector != nil {
		d.hide = d.cfg.Inspector.Open(info, d)
	}
}

// closeMirror undoes openMirror.
func (d *Device) closeMirror() {
	d.counters.Close()
	if d.hide != nil {
		d.hide()
		d.hide = nil
	}
}
