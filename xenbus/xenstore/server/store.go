// Package server is an embedded xenstore: the tree of small values through which domains
// find each other, with its wire protocol, permissions, watches, transactions and quotas.
// It lives in memory and needs no Xen.
//
// It answers as C xenstored 4.17 does, down to the names of errors. Unprivileged domains
// are hostile. Quotas bound every byte that the store holds for a domain. The store stops
// reading a client that does not read its replies. It ends a client whose events exceed
// Config.Backlog and that has read nothing for a second. It keeps nothing on disk,
// knows no hypervisor (its owner tells it which domains come and go) and has none of
// xenstored's control commands.
package server

import (
	"errors"
	"net"
	"sync"
	"time"

	"barevif/hypercall"
)

// A Quota bounds one unprivileged domain. A zero field means the default of C xenstored
// (tools/xenstore/xenstored_core.c), if there is one.
type Quota struct {
	Nodes            int // nodes it owns: 1000
	NodeSize         int // bytes of header, permissions, value and names of children; a node stays below: 2048
	Perms            int // entries on a node: 5
	Watches          int // 128; as in C xenstored a domain gets one more
	Transactions     int // open at once: 10; a domain gets one more
	TransactionNodes int // nodes touched in one: 1024
	Outstanding      int // unwritten replies at which a connection is no longer read: 20
	Memory           int // bytes of nodes, watches and transactions: 2.5 MiB
	Connections      int // open at once: 16; on Xen a domain has one
}

// A Config changes a Store from its defaults.
type Config struct {
	// Quota applies to every unprivileged domain.
	Quota Quota

	// Privileged lists the domains besides 0 that are exempt from permissions and quotas.
	Privileged []hypercall.DomID

	// Backlog is how many bytes of replies and events may wait for one connection; 0
	// means 256 KiB. Over it, a client that has read nothing for a second is ended; for a
	// client that does read, the domain that causes its events has to wait. At twice
	// Backlog the client is ended in any case.
	Backlog int
}

// privilegedFactor is how much more than others a privileged client may leave unread, in
// events and in replies.
const privilegedFactor = 64

var (
	// ErrBacklog ends a connection whose client does not read its watch events.
	ErrBacklog = errors.New("xenstore client does not read its events")

	// ErrConnections refuses a connection over the domain's quota.
	ErrConnections = errors.New("xenstore: domain has too many connections")
)

// A Store is an embedded xenstore. It may be used from any goroutine.
type Store struct {
	cfg     Config
	running sync.WaitGroup // ServeConn and Serve calls
	done    chan struct{}  // closed by Close

	// mu guards the fields below, and those fields of domains and clients that say so. It
	// is never held during I/O.
	mu        sync.Mutex
	closed    error // net.ErrClosed once closed
	listeners map[net.Listener]struct{}
	nodes     map[string]*node
	gen       uint64
	openTxs   int
	domains   map[hypercall.DomID]*domain // alive
	clients   []*client                   // oldest first
	watched   map[string]int              // watches by path
	special   map[string][]perm           // permissions of the @ events
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
	EventsMerged  uint64 // not queued: the same event was waiting
	EventsTooLong uint64 // not queued: path and token exceed a message
	ProtocolKills uint64 // connections ended for a message over 4096 bytes
	BacklogKills  uint64 // connections ended with ErrBacklog
	RepliesUnread uint64 // times a client was not read because it did not read its replies
	Throttled     uint64 // times a client was not read because another had to catch up with its events
	RateLimited   uint64 // times a client was not read because it wrote too fast while others had transactions open
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
		panic(err) // domain 0 may do this on an empty tree
	}
	return s
}

// Serve serves every connection that l accepts as domain 0. A process that can connect
// thus has all rights: put a unix socket into a directory that is closed to others. Serve
// ends when l is closed: by [Store.Close], with nil, or by another caller, with
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
		// Probably out of descriptors: clients that are connected already go first.
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
		select {
		case <-time.After(delay):
		case <-s.done:
			return nil
		}
	}
}

// forget handles a listener that was closed, by Close or by another caller.
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

// Stats returns a snapshot of the counters.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Nodes, st.Transactions = len(s.nodes), s.openTxs
	return st
}

// Write sets the value of a node as domain 0, for a caller that plays the toolstack. Like
// the other methods below it takes an absolute path, creates missing ancestors, fires
// watches, and fails with an [Errno].
func (s *Store) Write(path, value string) error {
	return s.asDomain0(func(r *request) error { return r.write(path, []byte(value)) })
}

// Mkdir makes the node if it does not exist.
func (s *Store) Mkdir(path string) error {
	return s.asDomain0(func(r *request) error { return r.mkdir(path) })
}

// Remove removes the node and all nodes below it.
func (s *Store) Remove(path string) error {
	return s.asDomain0(func(r *request) error { return r.remove(path) })
}

// Read returns the value of a node.
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

// SetPerms replaces the permissions of a node. An entry has the protocol's form: n, r, w
// or b, and a domid. The first names the owner and the access of domains without an
// entry.
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
