package pvnet

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet/netif"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// joins is what a frontend's device wants of its backend's multicast filter.
type joins struct {
	turn chan struct{} // one token: whoever holds it is the one SetMulticast under way

	mu   sync.Mutex
	want []MAC // guarded by mu: the groups; nil: all multicast

	filter  atomic.Bool // the backend is to filter
	asked   atomic.Bool // it has been asked to; stored by the lifecycle goroutine
	offered atomic.Bool // it knows lists
	dynamic atomic.Bool // it follows the request while it is connected
}

func (j *joins) init() {
	j.turn = make(chan struct{}, 1)
	j.turn <- struct{}{}
}

func (j *joins) wanted() []MAC {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.want
}

// SetMulticast asks the backend to send no multicast but that to these groups, at most 64
// of them, and waits until it has answered or ctx ends. nil asks for all multicast, as a
// device begins with; an empty list that is not nil asks for none. Broadcast always comes.
// The device keeps the list for its later connections. The list saves work and is no
// promise: frames to other groups may still come.
//
// One call at a time asks the backend. A call whose ctx ends while it waits for an earlier
// one changes nothing.
//
// Whoever joins groups by IPv6 has to list those of its neighbour discovery, ff02::1 and
// the solicited-node groups. Package netstack sets no list.
//
// Errors: [ErrNotFrontend] for a backend's device. A backend that has no filter, or one
// that cannot be turned on or off while it is connected (Linux's netback before 4.5), is
// [ErrUnimplemented]: the list then counts from the next connection on. If the backend has
// no room for a group, the error names it, and all multicast is received as before, if the
// backend can be told so. Also the cause of ctx, [ErrDisconnected], and an error for an
// address that is no group's. While the link is down it waits.
func (d *Device) SetMulticast(ctx context.Context, list []MAC) error {
	if err := d.endError(); err != nil {
		return err
	}
	if d.role != xenbus.Frontend {
		return ErrNotFrontend
	}
	if len(list) > maxGroups {
		return fmt.Errorf("pvnet: vif %s: %d multicast groups: a backend takes %d", d.id, len(list), maxGroups)
	}
	for _, mac := range list {
		if mac[0]&1 == 0 || mac == broadcast {
			return fmt.Errorf("pvnet: vif %s: %v is no multicast group", d.id, mac)
		}
	}
	j := &d.joins
	select {
	case <-j.turn:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { j.turn <- struct{}{} }()
	j.mu.Lock()
	j.want = slices.Clone(list)
	if list != nil && j.want == nil {
		j.want = []MAC{}
	}
	j.mu.Unlock()
	for {
		err := d.applyMulticast(ctx, list)
		if err != ErrLinkDown {
			return err
		}
		if err := pauseFor(ctx, 10*joinPause); err != nil {
			return err
		}
	}
}

// applyMulticast puts the list in force in the present connection. [ErrLinkDown] if that is
// over, or there is none yet.
func (d *Device) applyMulticast(ctx context.Context, list []MAC) error {
	if err := d.linkErrorOf(&d.tx[0].half); err != nil {
		return err
	}
	if !d.joins.offered.Load() && list != nil {
		return fmt.Errorf("the backend of vif %s has no multicast filter: %w", d.id, ErrUnimplemented)
	}
	if list == nil {
		if err := d.askFilter(ctx, false); err != nil {
			return err
		}
	}
	if err := d.tellGroups(ctx, list); err != nil || list == nil {
		return err
	}
	return d.askFilter(ctx, true)
}

var broadcast = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// joinPause is the time between two looks at answers to SetMulticast. Nothing else waits
// for them, so no event is asked for.
const joinPause = time.Millisecond

// tellGroups has the backend's list changed to list, and waits for its answers.
func (d *Device) tellGroups(ctx context.Context, list []MAC) error {
	for {
		var done bool
		var refused MAC
		var err error
		ran := d.tx[0].visit(time.Now().Add(joinPause), func() {
			if e, ok := d.tx[0].eng.(*frontTX); ok {
				done, refused, err = e.tell(list)
			}
		})
		switch {
		case err != nil:
			return d.callError(err)
		case ran && refused != MAC{}:
			return fmt.Errorf("pvnet: vif %s: the backend does not take the multicast group %v", d.id, refused)
		case ran && done:
			return nil
		}
		if err := d.linkErrorOf(&d.tx[0].half); err != nil {
			return err
		}
		if err := pauseFor(ctx, joinPause); err != nil {
			return err
		}
	}
}

// askFilter has the backend's filter turned on or off. [ErrLinkDown] also if the lifecycle
// goroutine wants it otherwise meanwhile: there is another connection, or a refusal.
func (d *Device) askFilter(ctx context.Context, on bool) error {
	j := &d.joins
	j.filter.Store(on)
	d.wakeLifecycle()
	for j.asked.Load() != on {
		if !j.dynamic.Load() {
			return fmt.Errorf("the backend of vif %s cannot change its multicast filter while it is connected: %w", d.id, ErrUnimplemented)
		}
		if j.filter.Load() != on {
			return ErrLinkDown
		}
		if err := d.linkErrorOf(&d.tx[0].half); err != nil {
			return err
		}
		if err := pauseFor(ctx, joinPause); err != nil {
			return err
		}
	}
	return nil
}

func pauseFor(ctx context.Context, d time.Duration) error {
	sleep(ctx, d)
	return context.Cause(ctx)
}

// agreeMulticast notes what the backend offers, in the values of its directory, and
// reports whether to ask for its filter with the connection.
func (f *front) agreeMulticast(back xenstore.Values) (ask bool) {
	says := func(key string) bool { on, err := back.Bool(key, false); return on && err == nil }
	j := &f.d.joins
	offered := says(netif.KeyFeatureMulticastControl)
	j.offered.Store(offered)
	j.dynamic.Store(offered && says(netif.KeyFeatureDynamicMulticast))
	ask = offered && j.wanted() != nil
	j.filter.Store(ask)
	j.asked.Store(ask)
	return ask
}

// refused has all multicast sent, since the backend does not take one of our groups.
func (d *Device) refused(mac MAC) {
	d.joins.filter.Store(false)
	d.log.Warn("the backend does not take a multicast group; all multicast is asked for", "vif", d.id, "group", mac, "granted", d.joins.dynamic.Load())
	d.wakeLifecycle()
}

// publish turns the backend's multicast filter on or off while the connection lasts.
func (f *front) publish(ctx context.Context, xd *xenbus.Device) (more bool, err error) {
	j := &f.d.joins
	on := j.filter.Load()
	if on == j.asked.Load() || !j.dynamic.Load() {
		return false, nil
	}
	value := "0"
	if on {
		value = "1"
	}
	if err := xd.Publish(ctx, xenstore.Values{netif.KeyRequestMulticast: value}); err != nil {
		return true, err
	}
	j.asked.Store(on)
	f.d.log.Info("multicast filter", "vif", f.d.id, "on", on)
	return true, nil
}

// joinID is the id of the first of maxGroups requests that change the list. The others'
// are numbers of buffers.
const joinID = 1 << 15

// A lister is the part of a frontTX that changes the backend's list. It is empty for all
// queues but the first.
type lister struct {
	listed  []MAC             // in the backend's list, as far as we asked
	changes [maxGroups]change // by id
	waits   uint64            // of changes: which have no response yet
	refused MAC               // the last group that the backend did not take; zero: none
	refuse  func(MAC)         // is told of it
}

type change struct {
	mac MAC
	add bool
}

// listFirst begins a connection with the list that d wants.
func (e *frontTX) listFirst(d *Device) {
	e.refuse = d.refused
	if d.joins.filter.Load() {
		e.ask(d.joins.wanted())
		e.ring.Publish() // the peer is notified once it has the port
	}
}

// tell asks for the changes that make the backend's list want, as far as the ring has room,
// and takes the answers that are there. It reports whether the list is as wanted, or one
// address that the backend has refused.
func (e *frontTX) tell(want []MAC) (done bool, refused MAC, err error) {
	if err := e.reap(); err != nil {
		return false, refused, err
	}
	if e.refused != (MAC{}) {
		refused, e.refused = e.refused, refused
		if slices.Contains(want, refused) { // else it is of an earlier list
			return false, refused, nil
		}
	}
	all := e.ask(want)
	e.notify(e.ring.Publish(), 0)
	return all && e.waits == 0, MAC{}, nil
}

// ask fills the slots of the changes, without publishing them. It reports whether there was
// room for all.
func (e *frontTX) ask(want []MAC) (all bool) {
	for _, mac := range slices.Clone(e.listed) {
		if !slices.Contains(want, mac) && !e.putChange(change{mac, false}) {
			return false
		}
	}
	for _, mac := range want {
		if !slices.Contains(e.listed, mac) && !e.putChange(change{mac, true}) {
			return false
		}
	}
	return true
}

// putChange fills the two slots of one change: a request without a frame, and the extra info. It
// reports whether there was room.
func (e *frontTX) putChange(c change) bool {
	i := slices.IndexFunc(e.changes[:], func(o change) bool { return o == change{} })
	if i < 0 || e.ring.Free() < 2 {
		return false
	}
	x := netif.McastDelExtra(netif.Mcast{MAC: c.mac})
	if c.add {
		x = netif.McastAddExtra(netif.Mcast{MAC: c.mac})
		e.listed = append(e.listed, c.mac)
	} else {
		e.listed = slices.DeleteFunc(e.listed, func(mac MAC) bool { return mac == c.mac })
	}
	e.changes[i] = c
	e.waits |= 1 << i
	e.ring.Put(netif.TxRequest{ID: joinID + uint16(i), Flags: netif.TxExtraInfo})
	e.ring.Put(x.TxRequest())
	e.extrasInFlight++
	return true
}

// answered takes a response to a change, and reports whether r is one.
func (e *frontTX) answered(r netif.TxResponse) bool {
	i := uint(r.ID) - joinID
	if i >= maxGroups || e.waits&(1<<i) == 0 {
		return false
	}
	c := e.changes[i]
	e.changes[i] = change{}
	e.waits &^= 1 << i
	if r.Status < 0 && c.add {
		e.listed = slices.DeleteFunc(e.listed, func(mac MAC) bool { return mac == c.mac })
		e.refused = c.mac
		e.refuse(c.mac)
	}
	return true
}

// ErrNotFrontend is returned to a backend by methods that ask the other end for something.
// It is [errors.ErrUnsupported].
var ErrNotFrontend error = &errorOf{"pvnet: only a frontend's device can ask that", errors.ErrUnsupported}
