// Package server is an embedded xenstore: the tree of small values through which
// domains find each other, with its wire protocol, permissions, watches,
// transactions and quotas. It lives in memory and needs no Xen.
//
// It answers as C xenstored 4.17 does, down to the names of errors. What a domain
// that is not privileged sends is hostile: quotas bound every byte the store holds
// for it, a client that does not read its replies is not read either, and one that
// does not read its events ends within a second of being in anyone's way. The store
// keeps nothing on disk, knows no hypervisor (its owner tells it of domains that
// come and go) and has none of xenstored's control commands.
package server

import (
	"errors"
	"net"
	"sync"
	"time"

	"barevif/hypercall"
)

// A Quota bounds one domain that is not privileged. The zero value of a field is
// the default of C xenstored (tools/xenstore/xenstored_core.c), if it has one.
type Quota struct {
	Nodes            int // it owns: 1000
	NodeSize         int // bytes of header, permissions, value and names of children, which stay below: 2048
	Perms            int // entries on a node: 5
	Watches          int // 128; as in C xenstored one more is let through
	Transactions     int // open at once: 10; one more is let through
	TransactionNodes int // touched in one: 1024
	Outstanding      int // replies not yet written at which a connection is not read: 20
	Memory           int // bytes of nodes, watches and transactions: 2.5 MiB
	Connections      int // at once: 16; on Xen a domain has one
}

// A Config says how a Store differs from the usual one.
type Config struct {
	// Quota binds all domains that are not privileged.
	Quota Quota

	// Privileged lists domains beside 0 to which neither permissions nor quotas apply.
	Privileged []hypercall.DomID

	// Backlog is how many bytes of replies and events may wait for one connection;
	// 0 means 256 KiB. Beyond, a client that has not read anything for a second
	// ends, and whoever causes events for one that does read waits for it. At twice
	// as many it ends in any case.
	Backlog int
}

// privilegedFactor is how much more than others a privileged client may leave
// unread, of events and of replies.
const privilegedFactor = 64

var (
	// ErrBacklog ends a connection whose client does not read its watch events.
	ErrBacklog = errors.New("xenstore client does not read its events")

	// ErrConnections refuses a connection over the domain's quota.
	ErrConnections = errors.New("xenstore: domain has too many connections")
)

// A Store may be used from any goroutine.
type Store struct {
	cfg     Config
	running sync.WaitGroup // ServeConn and Serve calls
	done    chan struct{}  // closed by Close

	// mu guards all that follows, and the fields of domains and clients that say
	// so. It is never held over I/O.
	mu        sync.Mutex
	closed    error // net.ErrClosed once closed
	listeners map[net.Listener]struct{}
	nodes     map[string]*node
	gen       uint64
	openTxs   int
	domains   map[hypercall.DomID]*domain // alive
	clients   []*client                   // oldest first
	watched   map[string]int              // watches by path
	special   map[string][]perm           // who hears the @ events
	stats     Stats
}

// Stats counts what the store did and holds. Reading it resets nothing.
type Stats struct {
	Connections   int    // open now
	Nodes         int    // now
	Watches       int    // now
	Transactions  int    // open now
	Requests      uint64 // from connections
	Errors        uint64 // replies that were errors
	Conflicts     uint64 // commits refused with EAGAIN
	Events        uint64 // queued for clients
	EventsMerged  uint64 // not queued, as the same one was waiting
	EventsTooLong uint64 // not queued, as path and token exceed a message
	ProtocolKills uint64 // connections ended for a message over 4096 bytes
	BacklogKills  uint64 // connections ended with ErrBacklog
	RepliesUnread uint64 // times a client was not read as it did not read its replies
	Throttled     uint64 // times one was not read as another had to catch up with its events
	RateLimited   uint64 // times one was not read as it writes too fast beside transactions
}

// New makes a store with the nodes of a fresh C xenstored: /tool/xenstored.
func New(cfg Config) *Store {
	q := &cfg.Quota
	for _, d := range []struct {
		field *int
		usual int
	}{
		{&q.Nodes, 1000}, {&q.NodeSize, 2048}, {&q.Perms, 5}, {&q.Watches, 128},
		{&q.Transactions, 10}, {&q.TransactionNodes, 1024}, {&q.Outstanding, 20},
		{&q.Memory, 2560 << 10}, {&q.Connections, 16}, {&cfg.Backlog, 256 << 10},
	} {
		if *d.field == 0 {
			*d.field = d.usual
		}
	}
	dom0 := &domain{home: homeOf(0), privileged: true}
	s := &Store{
		cfg:       cfg,
		done:      make(chan struct{}),
		listeners: make(map[net.Listener]struct{}),
		nodes:     make(map[string]*node),
		domains:   map[hypercall.DomID]*domain{0: dom0},
		watched:   make(map[string]int),
		special: map[string][]perm{
			introduceDomain: {{dom: dom0}},
			releaseDomain:   {{dom: dom0}},
		},
	}
	s.gen++
	s.putLocked("/", &node{gen: s.gen, perms: []perm{{dom: dom0}}})
	r := &request{s: s, dom: dom0}
	if err := r.mkdir("/tool/xenstored"); err != nil {
		panic(err) // nothing refuses domain 0 on an empty tree
	}
	return s
}

// Serve serves every connection l accepts as domain 0, so who can connect has all
// rights: a unix socket belongs into a directory that is closed to others. It ends
// when l is closed: by [Store.Close], with nil, or by someone else, with
// [net.ErrClosed].
func (s *Store) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closed != nil {
		s.mu.Unlock()
		l.Close()
		return nil
	}
	s.listeners[l] = struct{}{}
	s.running.Add(1)
	s.mu.Unlock()
	defer s.running.Done()

	var delay time.Duration
	for {
		conn, err := l.Accept()
		if err == nil {
			delay = 0
			s.running.Go(func() { s.ServeConn(conn, 0) })
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return s.forget(l, err)
		}
		// Out of descriptors, most likely: those who are connected go first.
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
		select {
		case <-time.After(delay):
		case <-s.done:
			return nil
		}
	}
}

// forget is for a listener that was closed, by Close or by someone else.
func (s *Store) forget(l net.Listener, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed != nil {
		return nil
	}
	delete(s.listeners, l)
	return err
}

// Close ends all connections and Serve calls and waits for them. It is idempotent.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed == nil {
		s.closed = net.ErrClosed
		close(s.done)
	}
	for l := range s.listeners {
		l.Close()
	}
	for _, c := range s.clients {
		c.endLocked(net.ErrClosed)
	}
	s.mu.Unlock()
	s.running.Wait()
	return nil
}

// Stats reads the counters.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Nodes, st.Transactions = len(s.nodes), s.openTxs
	return st
}

// Write sets the value of a node as domain 0, for whoever plays the toolstack. Like
// the other methods here it takes an absolute path, creates missing nodes on the
// way, fires watches, and fails with an [Errno].
func (s *Store) Write(path, value string) error {
	return s.asDomain0(func(r *request) error { return r.write(path, []byte(value)) })
}

// Mkdir makes sure that the node exists.
func (s *Store) Mkdir(path string) error {
	return s.asDomain0(func(r *request) error { return r.mkdir(path) })
}

// Remove removes the node and all below it.
func (s *Store) Remove(path string) error {
	return s.asDomain0(func(r *request) error { return r.remove(path) })
}

// Read gives the value of a node.
func (s *Store) Read(path string) (value string, err error) {
	err = s.asDomain0(func(r *request) error {
		n, err := r.find(path, canRead)
		if err == nil {
			value = n.value
		}
		return err
	})
	return value, err
}

// SetPerms replaces the permissions of a node by entries as they go over the wire:
// n, r, w or b and a domid. The first names the owner, and what domains without
// an entry may do.
func (s *Store) SetPerms(path string, entries ...string) error {
	return s.asDomain0(func(r *request) error {
		if len(entries) == 0 {
			return EINVAL
		}
		perms, err := s.parsePermsLocked(entries)
		if err != nil {
			return err
		}
		return r.setPerms(path, perms)
	})
}

func (s *Store) asDomain0(op func(*request) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return op(&request{s: s, dom: s.domains[0]})
}
