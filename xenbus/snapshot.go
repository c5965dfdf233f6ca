package xenbus

import (
	"context"
	"errors"
	"slices"
	"strconv"

	"barevif/xenbus/xenstore"
)

// A snapshot holds the xenstore nodes of a device that one refresh read.
type snapshot struct {
	own  *ownNodes  // nil: not read
	peer *peerNodes // nil: not read

	settings uint64 // Change.Settings

	at        end  // the directory of the other end
	found     bool // at is not the end that the device had before
	recreated bool // the toolstack removed our directory and made it again
	gone      bool // our directory is missing, as resolve found
}

// ownNodes holds the nodes of our own directory.
type ownNodes struct {
	there   bool
	state   string
	online  bool // backend
	hotplug bool // backend: hotplug-status is "connected"
}

// peerNodes holds the nodes of the other end's directory.
type peerNodes struct {
	there  bool
	state  State
	writes uint64
	online bool // read from a frontend's backend only; else true
}

// refresh reads the stale parts from xenstore and delivers the Change they make. With an
// error it returns the parts that are still to be read.
func (d *Device) refresh(ctx context.Context, stale parts) (left parts, err error) {
	for {
		d.mu.Lock()
		old, peer, writes, mine := d.cur, d.peer, d.writes, d.writtenLocked()
		d.mu.Unlock()
		s, err := d.read(ctx, stale, old, peer, mine)
		stale.recreated = s.recreated
		if err != nil {
			return stale, err
		}
		if d.take(s, merge(old, d.role, mine, s), writes) {
			return parts{}, nil
		}
		stale.state = true
	}
}

// read reads the stale parts, and any others that the result shows to be stale too. The
// snapshot is valid with an error only in recreated: whether our directory was made again.
func (d *Device) read(ctx context.Context, stale parts, old Change, peer end, mine written) (s snapshot, err error) {
	if stale.settings {
		d.settled++
	}
	s.at, s.recreated, s.settings = peer, stale.recreated, d.settled
	gone := old.Gone
	writes := d.written // taken before the other end's state is read: a write during the read counts next time
	var state *node     // the other end's, if it was read together with ours
	if stale.state || stale.backend {
		if s.own, state, err = d.readOwn(ctx, peer, stale.peer); err != nil {
			return s, err
		}
		gone = !s.own.there
		recreated, err := d.wasRecreated(ctx, s.own, old, mine)
		if err != nil {
			return s, err
		}
		s.recreated = s.recreated || recreated
	}
	if (stale.state || stale.claim) && !gone {
		renewed, err := d.keepClaim(ctx)
		if err != nil {
			return s, err
		}
		s.recreated = s.recreated || renewed
	}
	if d.role == Frontend && (stale.backend || s.recreated) && !gone {
		if err := d.readBackend(ctx, &s); err != nil {
			return s, err
		}
	}
	if s.recreated && s.own == nil && old.Overwritten != "" { // the value that overwrote our state was in the old directory
		if s.own, _, err = d.readOwn(ctx, end{}, false); err != nil {
			return s, err
		}
	}
	if stale.peer || s.replaced(old) {
		if s.recreated || s.found { // what was read may be of the other end that was there before
			state = nil
		}
		s.peer, err = d.readPeer(ctx, s.at, state, writes)
	}
	return s, err
}

// replaced reports whether the device now has another peer, or its first one.
func (s *snapshot) replaced(old Change) bool { return s.recreated || s.found || old.Generation == 0 }

// readBackend reads where a frontend's backend directory is.
func (d *Device) readBackend(ctx context.Context, s *snapshot) error {
	at, missing, err := d.resolve(ctx)
	var bad *xenstore.ValueError
	switch {
	case errors.As(err, &bad) || len(missing) > 0:
		// The toolstack has written our keys in part: its event for the others starts another
		// refresh. If a key of the other end is missing, no event comes, and the caller retries.
		if at.dir != "" && err == nil {
			return &WaitError{Dir: d.dir, Missing: missing}
		}
	case errors.Is(err, ErrGone):
		s.gone = true
	case err != nil:
		return err
	case at != s.at:
		s.at, s.found = at, true
	}
	return nil
}

// A node is what a lookup found.
type node struct {
	value string
	there bool
}

// readOwn reads the state and, for a backend, the toolstack's nodes in our directory; and, if
// withPeer says so, the state of the other end, peer, with the requests in flight together.
func (d *Device) readOwn(ctx context.Context, peer end, withPeer bool) (own *ownNodes, state *node, err error) {
	paths := []string{d.dir + "/state"}
	if d.role == Backend {
		paths = append(paths, d.dir+"/online", d.dir+"/hotplug-status")
	}
	if withPeer {
		paths = append(paths, peer.dir+"/state")
	}
	nodes, err := d.lookups(ctx, paths...)
	if err != nil {
		return nil, nil, err
	}
	own = &ownNodes{there: nodes[0].there, state: nodes[0].value}
	if d.role == Backend {
		own.online = !nodes[1].there || nodes[1].value != "0"
		own.hotplug = nodes[2].value == "connected"
	}
	if withPeer {
		state = &nodes[len(nodes)-1]
	}
	return own, state, nil
}

// wasRecreated reports whether the toolstack removed our directory and made it again since we
// wrote there. In a new directory the last key we published is missing, or it is empty if
// the toolstack made nodes for our keys (toolstack.Vif.Room).
func (d *Device) wasRecreated(ctx context.Context, own *ownNodes, old Change, mine written) (bool, error) {
	switch {
	case !own.there:
		return false, nil
	case old.Gone:
		return true, nil
	case mine.ours(own.state) || mine.writing != Unknown || parseState(own.state) != Initialising:
		return false, nil
	case mine.mark == "":
		return true, nil
	}
	mark, err := d.lookup(ctx, d.dir+"/"+mine.mark)
	return err == nil && mark.value == "", err
}

// readPeer reads the other end's state, unless the caller has: then state is that.
func (d *Device) readPeer(ctx context.Context, peer end, state *node, writes uint64) (*peerNodes, error) {
	if state == nil {
		n, err := d.lookup(ctx, peer.dir+"/state")
		if err != nil {
			return nil, err
		}
		state = &n
	}
	p := &peerNodes{there: state.there, state: parseState(state.value), writes: writes, online: true}
	if d.role == Frontend && p.state == Closed {
		online, err := d.lookup(ctx, peer.dir+"/online")
		if err != nil {
			return nil, err
		}
		p.online = !online.there || online.value != "0"
	}
	return p, nil
}

// merge computes the Change of a device from the one before, old, and a snapshot. mine
// says what we wrote to our directory. It is a pure function.
func merge(old Change, role Role, mine written, s snapshot) Change {
	ch := old
	ch.Settings = s.settings
	if s.recreated {
		mine = written{} // we wrote that to the old directory
	}
	if s.own != nil {
		s.own.merge(&ch, role, mine)
	}
	if s.gone {
		ch.setGone()
	}
	if s.replaced(old) {
		ch.Generation++
		ch.SawClosing = false
	}
	if p := s.peer; p != nil {
		ch.Vanished, ch.Peer, ch.PeerWrites = !p.there, p.state, p.writes
		ch.SawClosing = ch.SawClosing || p.state == Closing
		if role == Frontend {
			ch.Online = p.online
		}
	}
	return ch
}

// setGone says that our directory is missing, and our state with it.
func (ch *Change) setGone() { ch.Gone, ch.Own, ch.Overwritten = true, Unknown, "" }

// merge sets the fields of ch that depend on our own directory.
func (o *ownNodes) merge(ch *Change, role Role, mine written) {
	ch.Gone, ch.Overwritten, ch.Own = !o.there, "", parseState(o.state)
	if role == Backend {
		ch.Online, ch.Hotplug = o.online, o.hotplug
		if !ch.Online { // libxl writes state Closing for us when it takes the device away
			return
		}
	}
	if !o.there || mine.ours(o.state) {
		return
	}
	ch.Own = mine.last
	if mine.writing == Unknown { // else SetState replaces the value, or asks for another read
		ch.Overwritten = strconv.Quote(xenstore.Clip(o.state))
	}
}

// take makes ch the current Change. It reports false if a SetState began or ended since
// writes was read: the snapshot may then be older than that write.
func (d *Device) take(s snapshot, ch Change, writes uint64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.writes != writes {
		return false
	}
	switch {
	case s.recreated:
		d.wrote, d.failed, d.mark = Unknown, Unknown, ""
	case s.own != nil && d.failed != Unknown && ch.Own == d.failed: // the failed SetState did write it
		d.wrote, d.failed = d.failed, Unknown
	}
	if s.own != nil {
		d.reads++
	}
	d.peer = s.at
	ch.Lost = d.cur.Lost
	if s.peer != nil && !ch.Vanished && (len(d.seen) == 0 || d.seen[len(d.seen)-1] != ch.Peer) {
		if len(d.seen) == maxSeen {
			d.seen = slices.Delete(d.seen, 0, 1)
		}
		d.seen = append(d.seen, ch.Peer)
	}
	d.deliverLocked(ch)
	return true
}

// lookup reads a node. A node that is missing or may not be read is not there: after a
// hot-unplug xenstored reports either.
func (d *Device) lookup(ctx context.Context, path string) (node, error) {
	nodes, err := d.lookups(ctx, path)
	if err != nil {
		return node{}, err
	}
	return nodes[0], nil
}

// lookups is lookup of several nodes, with the requests in flight together.
func (d *Device) lookups(ctx context.Context, paths ...string) ([]node, error) {
	values, errs := d.c.ReadAll(ctx, paths...)
	nodes := make([]node, len(paths))
	for i, err := range errs {
		if err != nil && !errors.Is(err, xenstore.ErrNotFound) && !errors.Is(err, xenstore.ErrAccess) {
			return nil, err
		}
		nodes[i] = node{values[i], err == nil}
	}
	return nodes, nil
}
