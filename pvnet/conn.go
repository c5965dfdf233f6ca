package pvnet

import (
	"strconv"
	"time"

	"barevif/arena"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus/xenstore"
)

// A conn holds what belongs to one connection: rings, pages, ports. The Device outlives
// it.
type conn struct {
	queues    []connQueue
	mapped    []mappedQueue      // backend: what queues are made of
	undo      undo               // closes waiters, too
	waiters   []hypercall.Waiter // with the connection's event channels
	feat      features
	noCarrier bool // frontend: the backend has none
	timeouts  timeouts
	frontKeys xenstore.Values    // backend: the frontend's keys that it was made from
	keys      xenstore.Values    // frontend: what it tells the backend of the connection
	stale     []string           // frontend: keys of earlier connections, which are removed
	shared    int                // pages granted to the peer
	private   int                // private pages
	arenas    []*arena.Arena     // the arenas of the private pages; the other private pages are rings
	ctrl      ctrlEnd            // nil: there is no control ring
	given     bool               // frontend: another process has what it shares, and uses the rings
	ctrlKeys  *ctrlKeys          // backend: where the frontend has its control ring; nil: nowhere
	ctrlPage  *hypercall.Mapping // backend: the control ring; nil: it is not mapped
	grants    *grantServer       // backend: nil: there are no static grants
}

// budget returns the most memory that the connection ever holds.
func (c *conn) budget() Budget {
	b := Budget{SharedPages: c.shared, PrivatePages: c.private}
	if c.grants != nil {
		b.MappedPages = maxMapped * len(c.grants.queues)
	}
	return b
}

// closes takes over a waiter.
func (c *conn) closes(w hypercall.Waiter) {
	c.waiters = append(c.waiters, w)
	c.undo.add(func() { w.Close() })
}

// closePorts closes the event channels of a connection that is over: the peer's ends are
// free for another process.
func (c *conn) closePorts() {
	for _, w := range c.waiters {
		w.Close()
	}
}

// peerPresent reports whether the peer has its end of every event channel, as far as that can
// be known.
func (c *conn) peerPresent() bool {
	for _, q := range c.queues {
		if q.txPark.peerClosed() || q.rxPark.peerClosed() {
			return false
		}
	}
	return true
}

// settle puts every page back into its arena, before the connection is freed.
func (c *conn) settle() {
	if !c.given {
		drainAll(c.queues)
		return
	}
	for _, q := range c.queues {
		q.rx.(*frontRX).letGo()
	}
}

// drainAll counts the frames that are lost with the queues and puts every page back into
// its arena, since the arenas wait for the posted pages.
func drainAll(queues []connQueue) {
	end := time.Now().Add(lentTimeout)
	for _, q := range queues {
		q.tx.drain(end)
		q.rx.drain(end)
	}
}

// A connQueue is one queue of a connection.
type connQueue struct {
	tx             sender
	rx             receiver
	txPark, rxPark *parker // the same one if both halves share an event channel
	keys           queueKeys
	parts          *frontParts // of a frontend
}

// values returns the queue's xenstore keys, with prefix before each.
func (k queueKeys) values(prefix string) xenstore.Values {
	number := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	v := xenstore.Values{
		prefix + netif.KeyTxRingRef: number(uint32(k.txRing)),
		prefix + netif.KeyRxRingRef: number(uint32(k.rxRing)),
	}
	if k.txPort == k.rxPort {
		v[prefix+netif.KeyEventChannel] = number(uint32(k.txPort))
	} else {
		v[prefix+netif.KeyEventChannelTx] = number(uint32(k.txPort))
		v[prefix+netif.KeyEventChannelRx] = number(uint32(k.rxPort))
	}
	return v
}

// queueKeys are the grefs and ports that the frontend publishes for one queue.
type queueKeys struct {
	txRing, rxRing hypercall.GrantRef
	txPort, rxPort hypercall.PortID // equal: both directions share an event channel
}

// features are the protocol features that both ends agreed on for a connection.
type features struct {
	queues    int
	split     bool // an event channel for each direction
	frontSG   bool // the frontend takes frames of several slots
	backSG    bool // the backend takes frames of several slots
	offload   bool // this end takes frames with offloads: Config.Offload
	peerTakes offloads
	offered   int  // frontend: the queues that the backend offers
	untrusted bool // frontend: the toolstack does not trust the backend
	multicast bool // the backend filters multicast by the frontend's list
}

// features returns the features as the counters show them.
func (c *conn) features(lend, trusted bool) telemetry.Feature {
	f := telemetry.FeatureRxCopy
	for _, has := range []struct {
		it  bool
		bit telemetry.Feature
	}{
		{c.feat.frontSG && c.feat.backSG, telemetry.FeatureScatter},
		{c.ctrl != nil, telemetry.FeatureControlRing},
		{c.feat.split, telemetry.FeatureSplitEvents},
		{lend && !c.feat.untrusted, telemetry.FeatureLendRx},
		{trusted, telemetry.FeatureTrusted},
		{c.feat.multicast, telemetry.FeatureMulticastControl},
		{c.feat.peerTakes&takesCsum4 != 0, telemetry.FeatureCsum},
		{c.feat.peerTakes&takesCsum6 != 0, telemetry.FeatureCsum6},
		{c.feat.peerTakes&takesGSO4 != 0, telemetry.FeatureGSO4},
		{c.feat.peerTakes&takesGSO6 != 0, telemetry.FeatureGSO6},
	} {
		if has.it {
			f |= has.bit
		}
	}
	return f
}
