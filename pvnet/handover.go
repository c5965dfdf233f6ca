package pvnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// A TakenVif is a vif that another process of this domain hands over: it has stopped
// between two frames, and goes on unless it is told that the vif was taken.
type TakenVif struct {
	// State is what that process gave [Device.HandOver]'s function. nil: its vif has no
	// connection; the process gives the vif up once Accept was called.
	State []byte

	// Held is how long that process needed to bring the vif's link to rest, for the log.
	Held time.Duration

	// Files are descriptors that belong to the vif: first those that HandOver gave its
	// function, then others, such as its TAP's. The device owns them; the others until
	// [Device.TakenFiles].
	Files []hypercall.File

	// Accept tells the process that the vif is ours. With an error it has not heard of it
	// and goes on, or has ended. It is called before anything of the vif is used.
	Accept func() error

	// Refuse tells the process to go on, and why. One of Accept and Refuse is called, once.
	Refuse func(why error)
}

// A handoverState is the content of TakenVif.State.
type handoverState struct {
	Front  hypercall.DomID
	ID     string
	Type   string
	Claim  xenbus.ClaimState
	Keys   xenstore.Values // the frontend's keys, of which the connection is made
	Offers xenstore.Values // the features that were offered to the frontend
	Told   toldState       // what the frontend does not say again
	Times  handoverTimes
}

// MaxHandoverState bounds TakenVif.State, in bytes. A queue takes 5464 of them for its static
// grants, which are 512 entries of 8 bytes in base64, and less than 256 for its keys: there
// is room for 128 queues. A queue of a frontend takes 2 KiB at most.
const MaxHandoverState = 768 << 10

// A handOver is a request of Device.HandOver to the lifecycle goroutine, or without give one of
// PrepareHandOver.
type handOver struct {
	give    func([]byte, []hypercall.File) error
	reclaim <-chan struct{}
	asked   time.Time
	err     chan error // capacity 1
}

// A passing is a connection at rest, and what another process needs to go on with it.
type passing struct {
	state []byte
	files []hypercall.File
	given func() // the other process has it; the lifecycle ends next
	kept  func() // it has not; the lifecycle goes on
}

// HandOver passes a connected vif on to another process of this domain. The other end does
// not notice it. It stops the device between two frames: calls wait as they do while the
// link is down, and frames that the other end sends wait in the rings. Then it calls give,
// which passes state and files on and returns nil once the other process has accepted the
// vif, for good ([TakenVif.Accept]); the device ends with [ErrHandover] and leaves the state
// in xenstore as it is. If give fails the device goes on with the frame where it stopped,
// and HandOver returns that error. give does not close files, and is to return within a
// second or two: meanwhile the other end is not served.
//
// A backend answers every frame that it has received; its claim passes to the other process.
// files is empty. Frames that were received and lie in the frontend's pages
// ([Config].LendRx) hold HandOver up, while other frames pass, for 2 s; then it fails. A frontend waits, a second at most, until its backend has answered every
// frame that was sent, and until the frames that users of the device hold in shared pages
// have come back: those of [TX.Alloc], and received ones with [Config.LendRx]. If they do
// not, HandOver says so, and the device goes on. Its domain must be a
// [hypercall.HandoverDomain], whose descriptors are files, else the error is
// [ErrUnimplemented].
//
// For a device without a connection state is nil. The vif is given up once give has
// returned nil, and any process may have it.
//
// Serve tries to serve the vif again once reclaim is closed. The caller closes it if the
// other process may have ended without keeping the vif; nil: never. A frontend's device is
// over in any case.
//
// HandOver returns the error of the device if it has ended.
func (d *Device) HandOver(give func(state []byte, files []hypercall.File) error, reclaim <-chan struct{}) error {
	r := &handOver{give, reclaim, time.Now(), make(chan error, 1)}
	select {
	case d.handOvers <- r:
		return <-r.err
	case <-d.done:
		return d.endError()
	}
}

// PrepareHandOver waits, while frames pass, until HandOver can stop the device at once: a vif
// that was just taken over may have to wait for xenstore, which is to know whose it is, and for
// its counters' mirror, which it opens late. It returns nil, the cause of ctx, or the error of
// the device if it has ended.
func (d *Device) PrepareHandOver(ctx context.Context) error {
	if err := d.endError(); err != nil {
		return err
	}
	r := &handOver{err: make(chan error, 1)}
	renewed, ask := d.renewed, d.handOvers
	for ask != nil || renewed != nil {
		select {
		case <-renewed:
			renewed = nil
		case ask <- r:
			ask = nil
		case <-d.done:
			return d.endError()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	select {
	case err := <-r.err:
		return err
	case <-d.done:
		return d.endError()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// TakenFiles returns the descriptors that came with a vif that was taken over, in the order
// of [TakenVif].Files, without those of the connection; nil if there are none. They are the
// caller's from then on.
func (d *Device) TakenFiles() []hypercall.File {
	d.mu.Lock()
	defer d.mu.Unlock()
	files := d.takenFiles
	d.takenFiles = nil
	return files
}

// handOver is HandOver on the lifecycle goroutine.
func (l *lifecycle) handOver(r *handOver) error {
	if l.cause != nil {
		return l.cause
	}
	if r.give == nil {
		l.showNow()
		return nil
	}
	began := time.Now()
	p := &passing{given: func() {}, kept: func() {}}
	isBack := l.d.role == xenbus.Backend
	switch ch := l.xd.Current(); {
	case l.conn != nil && !l.peerLost && onlyConnected(ch) && (l.running || isBack):
		if !isBack {
			defer l.d.holdWrites()()
		}
		var err error
		if p, err = l.part(ch, r.asked); err != nil {
			return err
		}
	case l.conn != nil && !isBack:
		return fmt.Errorf("pvnet: vif %s is about to connect, or to close: it cannot be handed over now", l.d.id)
	}
	err := r.give(p.state, p.files)
	if err == nil {
		p.given()
		l.d.mu.Lock()
		l.d.reclaim = r.reclaim
		if l.d.reclaim == nil {
			l.d.reclaim = make(chan struct{})
		}
		l.d.mu.Unlock()
		l.d.log.Info("vif handed over to another process", "vif", l.d.id, "took", time.Since(began))
		l.cause = ErrHandover
		return nil
	}
	l.d.log.Warn("a vif was not taken over and stays here", "vif", l.d.id, "err", err)
	p.kept()
	return err
}

// handoverReason is the Reason of a LinkEvent.
const handoverReason = "another process takes the vif over"

// onlyConnected reports whether both ends are Connected and nobody wants anything else.
func onlyConnected(ch xenbus.Change) bool {
	return ch.Own == xenbus.Connected && ch.Peer == xenbus.Connected && ch.Online && ch.Overwritten == "" &&
		!ch.Gone && !ch.Lost && !ch.Vanished && !ch.SawClosing
}

// marshalState makes a TakenVif.State of v.
func marshalState(v any) ([]byte, error) {
	state, err := json.Marshal(v)
	if err == nil && len(state) > MaxHandoverState {
		err = fmt.Errorf("pvnet: the state of a vif has %d bytes, more than %d", len(state), MaxHandoverState)
	}
	return state, err
}

func unmarshalState(state []byte, v any) error {
	if len(state) > MaxHandoverState {
		return fmt.Errorf("pvnet: a handover state of %d bytes, at most %d", len(state), MaxHandoverState)
	}
	if err := json.Unmarshal(state, v); err != nil {
		return fmt.Errorf("pvnet: the state of a vif: %w", err)
	}
	return nil
}

func (c *ServeConfig) typ() string {
	if c.Type == "" {
		return "vif"
	}
	return c.Type
}

// takeOver takes a vif over from the process that serves it, and serves it. It reports
// false if the vif is to be claimed in the usual way.
func (s *server) takeOver(ctx context.Context, id xenbus.BackendID, log *slog.Logger) bool {
	if s.cfg.TakeOver == nil {
		return false
	}
	xd, err := xenbus.OpenBackend(ctx, s.client, s.cfg.Type, id.Front, id.ID)
	if err != nil {
		return false // the usual way says what is wrong
	}
	h := successor{s: s, id: id, xd: xd, renewed: make(chan struct{})}
	var b *back
	if err = h.mayTake(ctx); err == nil {
		b, err = h.take(ctx)
	}
	if b == nil {
		if err != nil && ctx.Err() == nil {
			log.Warn("cannot take a vif over from the process that serves it", "err", err)
		}
		closing, cancel := context.WithTimeout(context.Background(), storeTimeout)
		defer cancel()
		xd.Close(closing)
		return false
	}
	go func() {
		defer close(h.renewed)
		ctx, cancel := context.WithTimeout(ctx, storeTimeout)
		defer cancel()
		if err := xd.Renew(ctx, s.presence); err != nil && ctx.Err() == nil {
			log.Warn("the claim of a vif keeps the name of the process that had it", "err", err)
		}
	}()
	s.await(ctx, b)
	<-h.renewed
	closeAll(b.d.TakenFiles())
	s.afterwards(ctx, xd, b)
	return true
}

// A successor takes one vif over.
type successor struct {
	s    *server
	id   xenbus.BackendID
	xd   *xenbus.Device
	keys xenstore.Values // of the frontend, from before the vif was asked for

	renewed chan struct{} // see Device.renewed
}

// mayTake asks the user of Serve whether the vif is to be taken over.
func (h *successor) mayTake(ctx context.Context) error {
	if h.s.cfg.MayTake == nil {
		return nil
	}
	says, err := h.xd.OwnValues(ctx, toolstackKeys...)
	if err != nil {
		return err
	}
	return h.s.cfg.MayTake(h.id.Front, h.id.ID, parseToolstack(says))
}

// take returns a device that has started; nil if the vif stays where it is, or is
// nobody's.
func (h *successor) take(ctx context.Context) (*back, error) {
	debug.SetPanicOnFault(true) // attach reads the rings
	s := h.s
	b := s.newBack(ctx, h.id, h.xd)
	seen := h.xd.Current() // before the keys: a later write of the frontend has them read again
	c := new(conn)
	offers, cannot := h.prepare(ctx, b, c)
	in, err := s.cfg.TakeOver(ctx, h.id.Front, h.id.ID)
	if in == nil {
		c.undo.run()
		return nil, err
	}
	if in.State == nil {
		c.undo.run()
		closeAll(in.Files) // a device without a connection does without them
		return nil, in.Accept()
	}
	still := standstill{held: in.Held, got: time.Now()}
	old, err := h.decide(b, c, in, offers, cannot)
	still.accepted = time.Now()
	if err == nil {
		err = h.xd.AdoptClaim(old.Claim) // parse has checked it
	}
	if err == nil {
		// Only now: the other process needs its event channels if the vif stays there.
		if unbound := h.bind(b, c); unbound != nil {
			b.d.log.Warn("a vif that was taken over has to connect again", "vif", b.d.id, "err", unbound)
			drainAll(c.queues)
			c.undo.run()
			c, b.grants = nil, nil
		}
	}
	if err != nil {
		drainAll(c.queues)
		c.undo.run()
		closeAll(in.Files)
		return nil, err
	}
	d := b.d
	d.mu.Lock()
	d.takenFiles = in.Files
	d.mu.Unlock()
	d.renewed = h.renewed
	l := &lifecycle{d: d, xd: h.xd, end: b, state: xenbus.Connected, mirrorLate: true}
	if c != nil {
		d.active.Store(int32(len(c.queues))) // a frame may be given a queue before the link is up
		still.old, still.bound = old.Times, time.Now()
		l.still = &still
		l.conn, l.connGeneration, l.verifiedWrites = c, seen.Generation, seen.PeerWrites
	}
	d.startWith(l, func() {})
	return b, nil
}

// decide checks what came, makes connection c of it, without its event channels, and accepts
// the vif or refuses it. cannot is an error of prepare.
func (h *successor) decide(b *back, c *conn, in *TakenVif, offers xenstore.Values, cannot error) (*handoverState, error) {
	old, err := h.parse(in.State)
	if err == nil {
		err = cannot
	}
	if err == nil {
		err = h.agree(old, offers)
	}
	if err == nil {
		err = h.attach(b, c, &old.Told)
	}
	if err != nil {
		in.Refuse(err)
		return nil, err
	}
	return old, in.Accept()
}

// prepare reads what connection c needs to know of xenstore, and maps its rings, so that the
// frontend is not kept waiting for it. The rings are another process's still.
func (h *successor) prepare(ctx context.Context, b *back, c *conn) (offers xenstore.Values, err error) {
	if !onlyConnected(h.xd.Current()) {
		return nil, nil // a device without a connection hands over no state
	}
	if h.keys, err = b.frontendKeys(ctx, h.xd); err != nil {
		return nil, err
	}
	offers, gone := b.offers()
	all := append(slices.Collect(maps.Keys(offers)), gone...)
	all = append(all, netif.KeyCarrier)
	there, err := h.xd.OwnValues(ctx, all...)
	if err != nil {
		return nil, err
	}
	for _, key := range gone {
		if v := there[key]; v != "" && v != "0" && key != xenbus.KeyReason {
			return nil, fmt.Errorf("pvnet: the frontend was offered %s = %q, which this process does not have", key, xenstore.Clip(v))
		}
	}
	switch v, said := there[netif.KeyCarrier]; {
	case v == "0":
		b.carrier = carrierOff
	case said:
		b.carrier = carrierOn
	}
	b.resumes = true // the other process has the multicast list
	err = b.mapTo(ctx, h.keys, h.xd, c)
	b.resumes = false
	return offers, err
}

// parse checks a handover state.
func (h *successor) parse(state []byte) (*handoverState, error) {
	var old handoverState
	if err := unmarshalState(state, &old); err != nil {
		return nil, err
	}
	switch {
	case old.Front != h.id.Front || old.ID != h.id.ID || old.Type != h.s.cfg.Type:
		return nil, fmt.Errorf("pvnet: the state is of %s %d/%s", xenstore.Clip(old.Type), old.Front, xenstore.Clip(old.ID))
	case !onlyConnected(h.xd.Current()):
		return nil, errors.New("pvnet: the vif is not connected any more")
	}
	return &old, old.Claim.Check()
}

// agree checks that the connection is the one that this process would make: of the keys
// that the frontend publishes, with no feature that we do not have.
func (h *successor) agree(old *handoverState, offers xenstore.Values) error {
	if !maps.Equal(old.Keys, h.keys) {
		return errors.New("pvnet: the frontend has published other keys than those of the connection")
	}
	for key, v := range old.Offers {
		if key == netif.KeyHotplugStatus {
			continue
		}
		if now, ok := offers[key]; ok && now == v || v == "0" {
			continue
		}
		return fmt.Errorf("pvnet: the frontend was offered %s = %q, this process has %q", xenstore.Clip(key), xenstore.Clip(v), offers[key])
	}
	return nil
}

// attach makes the connection, without its event channels, and goes on with what its
// frontend has told the other process.
func (h *successor) attach(b *back, c *conn, state *toldState) (err error) {
	defer func() {
		if v := faultError(recover()); v != nil {
			err = v
		}
	}()
	t, err := state.check(c)
	if err != nil {
		return err
	}
	b.goOn(t, c.feat.multicast)
	return b.attachRings(h.xd, c)
}

// bind binds the connection's event channels.
func (h *successor) bind(b *back, c *conn) (err error) {
	defer func() {
		if v := faultError(recover()); v != nil {
			err = v
		}
	}()
	return b.bind(h.xd, c)
}

func closeAll(files []hypercall.File) {
	for _, f := range files {
		f.Close()
	}
}
