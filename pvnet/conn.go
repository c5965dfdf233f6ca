package pvnet

import (
	"strconv"

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
	undo      undo
	feat      features
	frontKeys xenstore.Values // backend: the frontend's keys that it was made from
	shared    int             // pages granted to the peer
	private   int             // private pages
	arenas    []*arena.Arena  // the arenas of the private pages; the other private pages are rings
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

// drainAll counts the frames that are lost with the queues and puts every page back into
// its arena, since the arenas wait for the posted pages.
func drainAll(queues []connQueue) {
	for _, q := range queues {
		q.tx.drain()
		q.rx.drain()
	}
}

// A connQueue is one queue of a connection.
type connQueue struct {
	tx             sender
	rx             receiver
	txPark, rxPark *parker // the same one if both halves share an event channel
	keys           queueKeys
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
}

// features returns the features as the counters show them.
func (c *conn) features(lend, trusted bool) telemetry.Feature {
	f := telemetry.FeatureRxCopy
	for _, has := range []struct {
		it  bool
		bit telemetry.Feature
	}{
		{c.feat.frontSG && c.feat.backSG, telemetry.FeatureScatter},
		{c.feat.split, telemetry.FeatureSplitEvents},
		{lend, telemetry.FeatureLendRx},
		{trusted, telemetry.FeatureTrusted},
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
