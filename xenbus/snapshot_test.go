package xenbus

import "testing"

// The Change of a device depends only on the one before, on our writes and on the
// snapshot.
func TestMerge(t *testing.T) {
	mine := written{last: Connected, mark: "ring-ref"}
	old := Change{Own: Connected, Peer: Connected, Generation: 3, Online: true, Hotplug: true, SawClosing: true, PeerWrites: 7}
	with := func(f func(*Change)) Change {
		ch := old
		f(&ch)
		return ch
	}
	for name, c := range map[string]struct {
		role Role
		old  Change
		mine written
		s    snapshot
		want Change
	}{
		"nothing was read": {Frontend, old, mine, snapshot{}, old},
		"our state":        {Frontend, old, mine, snapshot{own: &ownNodes{there: true, state: "4"}}, old},
		"the state that a SetState writes": {Frontend, old, written{last: InitWait, writing: Connected},
			snapshot{own: &ownNodes{there: true, state: "4"}}, old},
		"one that it may have written": {Frontend, old, written{last: InitWait, failed: Connected},
			snapshot{own: &ownNodes{there: true, state: "4"}}, old},
		"nothing written yet": {Frontend, old, written{}, snapshot{own: &ownNodes{there: true, state: "1"}},
			with(func(ch *Change) { ch.Own = Initialising })},
		"a foreign state": {Frontend, old, mine, snapshot{own: &ownNodes{there: true, state: "6"}},
			with(func(ch *Change) { ch.Overwritten = `"6"` })},
		"a state that is none": {Frontend, old, mine, snapshot{own: &ownNodes{there: true, state: "\xff"}},
			with(func(ch *Change) { ch.Overwritten = `"\xff"` })},
		"a foreign state under a SetState": {Frontend, old, written{last: InitWait, writing: Connected},
			snapshot{own: &ownNodes{there: true, state: "6"}}, with(func(ch *Change) { ch.Own = InitWait })},
		"our state again": {Frontend, with(func(ch *Change) { ch.Overwritten = `"6"` }), mine,
			snapshot{own: &ownNodes{there: true, state: "4"}}, old},
		"gone": {Frontend, old, mine, snapshot{own: &ownNodes{}},
			with(func(ch *Change) { ch.Own, ch.Gone = Unknown, true })},
		"gone, as the search for the backend shows": {Frontend, old, mine, snapshot{gone: true},
			with(func(ch *Change) { ch.Gone, ch.Own = true, Unknown })},
		"back": {Frontend, with(func(ch *Change) { ch.Own, ch.Gone = Unknown, true }), mine,
			snapshot{recreated: true, own: &ownNodes{there: true, state: "1"}, peer: &peerNodes{there: true, state: InitWait, writes: 8, online: true}},
			with(func(ch *Change) {
				ch.Own, ch.Peer, ch.Generation, ch.SawClosing, ch.PeerWrites = Initialising, InitWait, 4, false, 8
			})},
		"made anew with a state that was never ours": {Frontend, with(func(ch *Change) { ch.Overwritten = `"1"` }), mine,
			snapshot{recreated: true, own: &ownNodes{there: true, state: "1"}},
			with(func(ch *Change) { ch.Own, ch.Generation, ch.SawClosing = Initialising, 4, false })},
		"another backend": {Frontend, old, mine, snapshot{found: true, peer: &peerNodes{there: true, state: Closing, writes: 8, online: true}},
			with(func(ch *Change) { ch.Peer, ch.Generation, ch.PeerWrites = Closing, 4, 8 })},
		"the first look": {Backend, Change{}, written{},
			snapshot{own: &ownNodes{there: true, state: "1", online: true}, peer: &peerNodes{there: true, state: Initialised}},
			Change{Own: Initialising, Peer: Initialised, Generation: 1, Online: true}},
		"a peer that closes": {Backend, with(func(ch *Change) { ch.SawClosing = false }), mine,
			snapshot{peer: &peerNodes{there: true, state: Closing, writes: 8}},
			with(func(ch *Change) { ch.Peer, ch.PeerWrites = Closing, 8 })},
		"a peer that has closed before": {Backend, old, mine, snapshot{peer: &peerNodes{there: true, state: Connected, writes: 9}},
			with(func(ch *Change) { ch.PeerWrites = 9 })},
		"a peer that vanished": {Backend, old, mine, snapshot{peer: &peerNodes{writes: 7}},
			with(func(ch *Change) { ch.Peer, ch.Vanished = Unknown, true })},
		"a backend that is taken away": {Frontend, old, mine, snapshot{peer: &peerNodes{there: true, state: Closed, writes: 8}},
			with(func(ch *Change) { ch.Peer, ch.PeerWrites, ch.Online = Closed, 8, false })},
		"a toolstack that closes in our place": {Backend, old, mine, snapshot{own: &ownNodes{there: true, state: "5", hotplug: true}},
			with(func(ch *Change) { ch.Own, ch.Online = Closing, false })},
		"a hotplug script that is not done": {Backend, old, mine, snapshot{own: &ownNodes{there: true, state: "4", online: true}},
			with(func(ch *Change) { ch.Hotplug = false })},
	} {
		if got := merge(c.old, c.role, c.mine, c.s); got != c.want {
			t.Errorf("%s:\ngot  %+v\nwant %+v", name, got, c.want)
		}
	}
}
