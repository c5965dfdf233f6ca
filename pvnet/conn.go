package pvnet

import (
	"barevif/arena"
	"barevif/xenbus/xenstore"
)

// A conn holds what belongs to one connection: rings, pages, ports. The Device outlives
// it.
type conn struct {
	queues []connQueue
	undo   undo
	feat   features
	made   xenstore.Values // backend: the frontend's keys that it was made from
	shared int             // pages granted to the peer
	own    int             // private pages
	arenas []*arena.Arena  // the arenas of the private pages; the other private pages are rings
}

// joined reports whether the peer has its end of every event channel, as far as that can
// be known.
func (c *conn) joined() bool {
	for _, q := range c.queues {
		if q.txPark.deserted() || q.rxPark.deserted() {
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
