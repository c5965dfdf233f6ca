package pvnet

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"barevif/hypercall"
	"barevif/pvnet/ctrl"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
	"barevif/telemetry"
	"barevif/xenbus/xenstore"
)

// A toldState is what a frontend has told its backend since it connected, and does not tell
// another process that takes the vif over.
type toldState struct {
	Groups []string   // the multicast list, in its order; nil: it is not known
	Ctrl   *ctrlState // nil: no control ring is served
}

// A ctrlState is what a frontend has told over its control ring.
type ctrlState struct {
	Answered uint32 // how many requests have a response: the index of the next one
	Hash     hashState
	Grants   [][]byte // by queue, its static grants as entries of a list page; nil: none
}

// A hashState is the content of a hashServer.
type hashState struct {
	Algorithm netif.HashAlgorithm
	Flags     uint32
	Key       []byte
	Mapping   []uint32 // nil: the queue is the hash mod the number of queues
}

// toldState describes what the frontend of connection c has told. Neither its control ring
// nor its queues are served now.
func (b *back) toldState(c *conn) (t toldState) {
	if !b.adopted {
		t.Groups = []string{}
		for _, mac := range b.d.groups.list() {
			t.Groups = append(t.Groups, mac.String())
		}
	}
	s, ok := c.ctrl.(*ctrlServer)
	if !ok {
		return t
	}
	h := b.hash
	t.Ctrl = &ctrlState{
		Answered: s.server.Slot(),
		Hash:     hashState{h.algorithm, h.set.flags, h.key, h.set.mapping},
	}
	for _, list := range c.grants.lists() {
		t.Ctrl.Grants = append(t.Ctrl.Grants, putGrefs(nil, list))
	}
	return t
}

// lists returns the static grants by queue; nil if there are none.
func (s *grantServer) lists() (all [][]netif.GrefEntry) {
	if s == nil {
		return nil
	}
	if s.told != nil { // they are not mapped yet
		return s.told
	}
	some := false
	for i := range s.queues {
		list := s.queues[i].table.list()
		some = some || len(list) > 0
		all = append(all, list)
	}
	if !some {
		return nil
	}
	return all
}

// list returns the entries of a table, as a frontend would add them.
func (t *grantTable) list() (list []netif.GrefEntry) {
	for _, r := range t.all() {
		flags := uint16(0)
		if r.access == hypercall.ReadOnly {
			flags = netif.GrefReadOnly
		}
		for _, ref := range r.refs {
			list = append(list, netif.GrefEntry{Ref: ref, Flags: flags})
		}
	}
	return list
}

// A told is a toldState that has been checked.
type told struct {
	known  bool // the multicast list is
	groups []MAC
	hash   *hashServer         // nil: no control ring was served
	grants [][]netif.GrefEntry // by queue; nil: none
}

// check refuses what no frontend can have told over the rings of connection c, whose pages are
// mapped.
func (t *toldState) check(c *conn) (*told, error) {
	ok := &told{known: t.Groups != nil}
	if len(t.Groups) > maxGroups {
		return nil, fmt.Errorf("pvnet: a list of %d multicast addresses, at most %d", len(t.Groups), maxGroups)
	}
	for _, s := range t.Groups {
		mac, err := xenstore.ParseMAC(s)
		if err != nil {
			return nil, fmt.Errorf("pvnet: %.40q in the multicast list is no address", s)
		}
		ok.groups = append(ok.groups, mac)
	}
	s := t.Ctrl
	if s == nil {
		return ok, nil
	}
	if c.ctrlPage == nil {
		return nil, fmt.Errorf("pvnet: the state of a control ring, which the frontend does not have")
	}
	if err := s.checkRing(c); err != nil {
		return nil, err
	}
	queues := len(c.mapped)
	var err error
	if ok.hash, err = s.Hash.server(queues); err == nil {
		ok.grants, err = s.grantLists(queues)
	}
	return ok, err
}

// checkRing checks that the ring is where the state says: a request is answered once.
func (s *ctrlState) checkRing(c *conn) error {
	var at uint32
	var err error
	fault := catchFault(func() {
		var ring *ctrl.Server
		if ring, err = ctrl.Attach(c.ctrlPage.Memory); err == nil {
			at = ring.Slot()
		}
	})
	switch {
	case fault != nil:
		return fault
	case err != nil:
		return &PeerError{Ring: "ctrl", Reason: err.Error()}
	case at != s.Answered:
		return fmt.Errorf("pvnet: the control ring shows %d answers, its backend has given %d", at, s.Answered)
	}
	return nil
}

// server returns a hashServer with the settings, for a connection of that many queues.
func (s *hashState) server(queues int) (*hashServer, error) {
	switch {
	case s.Algorithm > netif.HashToeplitz:
		return nil, fmt.Errorf("pvnet: %v is not known", s.Algorithm)
	case s.Flags&^netif.HashFlagsAll != 0:
		return nil, fmt.Errorf("pvnet: unknown hash flags %#x", s.Flags&^netif.HashFlagsAll)
	case len(s.Key) > toeplitz.MaxKey:
		return nil, fmt.Errorf("pvnet: a hash key of %d bytes, at most %d", len(s.Key), toeplitz.MaxKey)
	case len(s.Mapping) > hashMappingMax:
		return nil, fmt.Errorf("pvnet: a hash mapping of %d entries, at most %d", len(s.Mapping), hashMappingMax)
	}
	if i := slices.IndexFunc(s.Mapping, func(q uint32) bool { return q >= uint32(queues) }); i >= 0 {
		return nil, fmt.Errorf("pvnet: entry %d of the hash mapping is queue %d of %d", i, s.Mapping[i], queues)
	}
	return &hashServer{
		algorithm: s.Algorithm, key: s.Key,
		set: steering{table: toeplitz.NewTable(s.Key), flags: s.Flags, mapping: s.Mapping},
	}, nil
}

// grantLists returns the static grants by queue, if a frontend of that many queues could have
// added them.
func (s *ctrlState) grantLists(queues int) (all [][]netif.GrefEntry, err error) {
	if n := len(s.Grants); n != 0 && n != queues {
		return nil, fmt.Errorf("pvnet: static grants of %d queues, there are %d", n, queues)
	}
	for i, b := range s.Grants {
		if n := len(b) / netif.GrefEntrySize; len(b)%netif.GrefEntrySize != 0 || n > netif.GrefListMax {
			return nil, fmt.Errorf("pvnet: queue %d: %d bytes of static grants are no list of at most %d", i, len(b), netif.GrefListMax)
		}
		list := getGrefs(b)
		if err := new(grantQueue).mayAdd(list); err != nil {
			return nil, fmt.Errorf("pvnet: queue %d: static grants: %w", i, err)
		}
		all = append(all, list)
	}
	return all, nil
}

// getGrefs returns the entries of a list page. len(b) is a multiple of their size.
func getGrefs(b []byte) []netif.GrefEntry {
	list := make([]netif.GrefEntry, len(b)/netif.GrefEntrySize)
	for i := range list {
		at := b[i*netif.GrefEntrySize:]
		list[i] = netif.GrefEntry{
			Ref:    hypercall.GrantRef(binary.LittleEndian.Uint32(at)),
			Flags:  binary.LittleEndian.Uint16(at[4:]),
			Status: binary.LittleEndian.Uint16(at[6:]),
		}
	}
	return list
}

// goOn makes t what the frontend has told this process, for the connection that goes on here.
func (b *back) goOn(t *told, filter bool) {
	b.startFilter(filter, t.known)
	for _, mac := range t.groups {
		b.d.groups.add(mac)
	}
	b.hash, b.grants = t.hash, t.grants
}

// serveGrants makes s answer the messages about static grants. The pages that are known
// already are mapped once frames move, since it takes milliseconds: until then their frames
// are copied by grant operations.
func (b *back) serveGrants(m *setup, s *ctrlServer) {
	known := b.grants
	b.grants = nil
	if !b.cfg.StaticGrants {
		if known != nil {
			b.d.log.Info("this process keeps no pages of a frontend mapped: frames are copied by grant operations", "vif", b.d.id)
		}
		return
	}
	g := newGrantServer(m, b.d, b.mappings)
	g.serve(s.server)
	m.c.grants = g
	if g.told = known; known != nil {
		s.first = g.restore
	}
}

// restore maps the pages that the frontend told another process of: those of a queue that may
// be mapped read-only in one run, and the others in one. Frames in pages that cannot be mapped
// are copied by grant operations.
func (s *grantServer) restore() {
	all := s.told
	s.told = nil
	for i, list := range all {
		q := &s.queues[i]
		var runs []*pageRun
		left, why := 0, error(nil)
		for access, refs := range byAccess(list) {
			slices.Sort(refs)
			some, err := s.mapMost(q, len(runs), refs, hypercall.Access(access))
			left, why = left+len(refs)-pagesOf(some), cmp.Or(why, err)
			runs = append(runs, some...)
		}
		if why != nil {
			s.log.Warn("static grants cannot be mapped again: frames in their pages are copied by grant operations", "vif", s.d.id, "queue", i, "pages", left, "of", len(list), "err", why)
		}
		if len(runs) > 0 {
			q.use(newGrantTable(runs, q.seed))
			s.d.agree(telemetry.FeatureStaticGrants)
		}
	}
}

// mapMost maps refs in one run, or, if one of them cannot be mapped, most of those that can in
// several, for a queue that has so many runs. It gives up after maxRuns tries: the refs are
// the frontend's.
func (s *grantServer) mapMost(q *grantQueue, have int, refs []hypercall.GrantRef, access hypercall.Access) (runs []*pageRun, err error) {
	tries := maxRuns
	var halve func(refs []hypercall.GrantRef)
	halve = func(refs []hypercall.GrantRef) {
		if tries--; len(refs) == 0 || tries < 0 {
			return
		}
		r, e := s.mapRun(q, have+len(runs), refs, access)
		if e == nil {
			runs = append(runs, r)
			return
		}
		err = cmp.Or(err, e)
		if n := len(refs) / 2; n > 0 {
			halve(refs[:n])
			halve(refs[n:])
		}
	}
	halve(refs)
	return runs, err
}
