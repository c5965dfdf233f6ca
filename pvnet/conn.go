package pvnet

import (
	"barevif/arena"
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

// A connQueue is one queue of a connection.
type connQueue struct {
	tx             sender
	rx             receiver
	txPark, rxPark *parker // the same one if both halves share an event channel
	keys           queueKeys
}
