// Package dnsproxy is the name server of a router's guests: it asks the servers that the router
// was told of, and remembers what they answer for a while.
//
// Guests and servers are hostile. Each message is parsed as a whole, and what is sent on was
// built anew: of a query its one question and three of its flags, of an answer its records.
// A query upstream has a random number and a port of its own, and an answer counts only if it
// comes from the server, with that number and that question. Options of EDNS stay at the hop that
// they were for (cookies, padding), and what tells about a guest (client subnet) is not sent on.
//
// A [Client], which is one guest, has [PerClient] queries under way, and one that has
// [Share] or fewer is served even if all others together have as many as the server allows: nobody's
// flood is another's lack. The memory of answers is one for each group, so that a guest does not
// learn from the time of an answer what a guest of another group has asked for.
package dnsproxy

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Bounds of what guests may use.
const (
	PerClient   = 64   // queries of one client under way, at most
	Share       = 4    // queries that a client may have under way however many others have
	All         = 1024 // queries of all clients under way, beyond which each has its Share alone
	Connections = 8    // TCP connections of one client, at most

	maxQuery   = 4096 // bytes
	longestUDP = 4096 // bytes of an answer of a server over UDP that are read: more than it was told to send; each question under way has so many
	maxUDP     = 1232 // bytes of an answer over UDP: what fits any path (DNS flag day 2020)
	leastUDP   = 512  // bytes of an answer over UDP that a client without EDNS takes
	perServer  = 2 * time.Second
	idle       = 10 * time.Second // of a TCP connection
	strange    = 32               // datagrams that are no answer, after which a server is given up
)

// A Client is the guest that a query comes from.
type Client struct {
	ID    string // the guest's: bounds are counted by it
	Group string // guests of one group share the memory of answers
}

// Config configures a Server. All fields but Logger are required.
type Config struct {
	// Dial opens a connection to a name server, over "udp" from a port of its own that cannot
	// be guessed, or over "tcp".
	Dial func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error)
	// Client returns the client that has an address. If ok is false the query is not answered.
	Client func(netip.Addr) (c Client, ok bool)
	Now    func() time.Time
	Logger *slog.Logger // nil: silent
}

// Stats counts queries.
type Stats struct {
	Queries   uint64 // of guests
	Cached    uint64 // answered from memory
	Joined    uint64 // answered with what another query of the group got
	Upstream  uint64 // questions sent to servers
	Answered  uint64 // answers sent to guests
	Failed    uint64 // no server has answered
	Refused   uint64 // malformed or of a kind that is not forwarded
	Limited   uint64 // beyond a client's share
	Mismatch  uint64 // datagrams from servers' addresses that were no answer
	Truncated uint64 // answers that a guest has to ask for again over TCP
}

type counters struct {
	queries, cached, joined, upstream, answered, failed, refused, limited, mismatch, truncated atomic.Uint64
}

// A Server forwards queries. Its methods may be called from any goroutine.
type Server struct {
	cfg   Config
	log   *slog.Logger
	ctx   context.Context
	end   context.CancelFunc
	works sync.WaitGroup
	n     counters

	mu      sync.Mutex
	servers []netip.AddrPort   // guarded by mu
	turn    int                // guarded by mu: the server that is asked first
	under   map[string]int     // guarded by mu: queries under way by client
	conns   map[string]int     // guarded by mu: TCP connections by client
	total   int                // guarded by mu: queries under way
	flights map[string]*flight // guarded by mu: questions under way by key
	caches  map[string]*cache  // guarded by mu: by group
}

// A flight is a question under way.
type flight struct {
	done chan struct{}
	m    *dnsmessage.Message // valid once done is closed; nil: no server has answered
}

// New makes a Server. Close ends it.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, log: cfg.Logger, under: map[string]int{}, conns: map[string]int{}, flights: map[string]*flight{}, caches: map[string]*cache{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.ctx, s.end = context.WithCancel(context.Background())
	return s
}

// SetServers replaces the servers that are asked. If they are others than before, what the old
// ones answered is forgotten.
func (s *Server) SetServers(list []netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	same := len(list) == len(s.servers)
	for i := range list {
		same = same && list[i] == s.servers[i]
	}
	if !same {
		s.servers, s.turn = append([]netip.AddrPort(nil), list...), 0
		clear(s.caches)
	}
}

// Forget removes the memory of a group that is no more.
func (s *Server) Forget(group string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.caches, group)
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	n := &s.n
	return Stats{n.queries.Load(), n.cached.Load(), n.joined.Load(), n.upstream.Load(), n.answered.Load(), n.failed.Load(),
		n.refused.Load(), n.limited.Load(), n.mismatch.Load(), n.truncated.Load()}
}

// Close ends all queries and waits for them. The caller closes the sockets first.
func (s *Server) Close() {
	s.mu.Lock() // what enter and admit let in is counted in works before the Wait, or they refuse it
	s.end()
	s.mu.Unlock()
	s.works.Wait()
}

// enter admits a query of c, until leave, or reports false and counts the query as limited.
func (s *Server) enter(c Client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.under[c.ID]
	if n >= PerClient || s.total >= All && n >= Share || s.ctx.Err() != nil {
		s.n.limited.Add(1)
		return false
	}
	s.under[c.ID]++
	s.total++
	s.works.Add(1)
	return true
}

func (s *Server) leave(c Client) {
	s.mu.Lock()
	if s.under[c.ID]--; s.under[c.ID] == 0 {
		delete(s.under, c.ID)
	}
	s.total--
	s.mu.Unlock()
	s.works.Done()
}

// who returns the client at a remote address.
func (s *Server) who(remote net.Addr) (Client, bool) {
	ap, err := netip.ParseAddrPort(remote.String())
	if err != nil {
		return Client{}, false
	}
	return s.cfg.Client(ap.Addr().Unmap().WithZone(""))
}

// ServePacket answers the datagrams of c until c is closed. It returns the error of c that ended it.
func (s *Server) ServePacket(c net.PacketConn) error {
	for {
		b := make([]byte, maxQuery+1)
		n, remote, err := c.ReadFrom(b)
		if err != nil {
			if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
				continue
			}
			return err
		}
		client, ok := s.who(remote)
		if !ok || n > maxQuery {
			s.n.refused.Add(1)
			continue
		}
		if !s.enter(client) {
			continue
		}
		go func() {
			defer s.leave(client)
			if r := s.answer(client, b[:n], false); r != nil {
				if _, err := c.WriteTo(r, remote); err == nil {
					s.n.answered.Add(1)
				}
			}
		}()
	}
}

// Serve answers the connections of l until l is closed. It returns the error of l that ended it.
func (s *Server) Serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		client, ok := s.who(c.RemoteAddr())
		if !ok || !s.admit(client) {
			c.Close()
			continue
		}
		go func() {
			defer s.dismiss(client)
			defer c.Close()
			defer context.AfterFunc(s.ctx, func() { c.Close() })()
			for s.serveOne(client, c) {
			}
		}()
	}
}

// admit admits a TCP connection of c, until dismiss, or reports false and counts it as limited.
func (s *Server) admit(c Client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns[c.ID] >= Connections || s.ctx.Err() != nil {
		s.n.limited.Add(1)
		return false
	}
	s.conns[c.ID]++
	s.works.Add(1)
	return true
}

func (s *Server) dismiss(c Client) {
	s.mu.Lock()
	if s.conns[c.ID]--; s.conns[c.ID] == 0 {
		delete(s.conns, c.ID)
	}
	s.mu.Unlock()
	s.works.Done()
}

// serveOne answers one query of a connection, and reports whether there may be another.
func (s *Server) serveOne(client Client, c net.Conn) bool {
	c.SetDeadline(time.Now().Add(idle))
	b, err := readTCP(c, maxQuery)
	if err != nil || !s.enter(client) {
		return false
	}
	defer s.leave(client)
	r := s.answer(client, b, true)
	if r == nil {
		return false
	}
	c.SetDeadline(time.Now().Add(idle))
	if err := writeTCP(c, r); err != nil {
		return false
	}
	s.n.answered.Add(1)
	return true
}

// readTCP reads a message with its length.
func readTCP(c net.Conn, most int) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > most {
		return nil, errors.New("dnsproxy: the message is too long")
	}
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	return b, err
}

func writeTCP(c net.Conn, m []byte) error {
	b := make([]byte, 2, 2+len(m))
	binary.BigEndian.PutUint16(b, uint16(len(m)))
	_, err := c.Write(append(b, m...))
	return err
}

// A query is what a client asks.
type query struct {
	header   dnsmessage.Header
	question dnsmessage.Question
	edns     bool
	size     int  // the longest answer over UDP
	do       bool // with DNSSEC's records
}

// key returns the key of the question in a group's memory: it is equal for questions with the same answer.
func (q *query) key(group string) string {
	flags := byte('0')
	if q.do {
		flags |= 1
	}
	if q.header.CheckingDisabled {
		flags |= 2
	}
	if q.header.AuthenticData {
		flags |= 4
	}
	return string([]byte{flags, byte(q.question.Type >> 8), byte(q.question.Type)}) + strings.ToLower(q.question.Name.String()) + "\x00" + group
}

// answer returns the answer to a query; nil: it gets none.
func (s *Server) answer(c Client, b []byte, tcp bool) []byte {
	s.n.queries.Add(1)
	q, code, ok := parseQuery(b)
	if !ok {
		s.n.refused.Add(1)
		return nil
	}
	if code != dnsmessage.RCodeSuccess {
		s.n.refused.Add(1)
		return s.pack(q, &dnsmessage.Message{Header: dnsmessage.Header{RCode: code}}, tcp)
	}
	m := s.find(c, q)
	if m == nil {
		s.n.failed.Add(1)
		m = &dnsmessage.Message{Header: dnsmessage.Header{RCode: dnsmessage.RCodeServerFailure}}
	}
	return s.pack(q, m, tcp)
}

const (
	typeIXFR = 251
	typeAXFR = 252
)

// parseQuery parses a query. ok is false if it gets no answer; otherwise code says why it is not
// forwarded.
func parseQuery(b []byte) (q *query, code dnsmessage.RCode, ok bool) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || h.Response {
		return nil, 0, false
	}
	q = &query{header: h, size: leastUDP}
	if h.OpCode != 0 {
		return q, dnsmessage.RCodeNotImplemented, true
	}
	if q.question, err = p.Question(); err != nil {
		return q, dnsmessage.RCodeFormatError, true
	}
	if _, err = p.Question(); err != dnsmessage.ErrSectionDone {
		return q, dnsmessage.RCodeFormatError, true
	}
	if p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		return q, dnsmessage.RCodeFormatError, true
	}
	for {
		r, err := p.AdditionalHeader()
		if err == dnsmessage.ErrSectionDone {
			break
		}
		if err != nil || r.Type == dnsmessage.TypeOPT && q.edns {
			return q, dnsmessage.RCodeFormatError, true
		}
		if r.Type == dnsmessage.TypeOPT {
			q.edns, q.do = true, r.DNSSECAllowed()
			q.size = min(max(int(r.Class), leastUDP), maxUDP)
		}
		if p.SkipAdditional() != nil {
			return q, dnsmessage.RCodeFormatError, true
		}
	}
	switch {
	case q.question.Class != dnsmessage.ClassINET:
		return q, dnsmessage.RCodeRefused, true
	case q.question.Type == typeAXFR || q.question.Type == typeIXFR || q.question.Type == dnsmessage.TypeOPT:
		return q, dnsmessage.RCodeRefused, true
	}
	return q, dnsmessage.RCodeSuccess, true
}

// pack makes m the answer to q.
func (s *Server) pack(q *query, m *dnsmessage.Message, tcp bool) []byte {
	r := dnsmessage.Message{Header: dnsmessage.Header{
		ID: q.header.ID, Response: true, OpCode: q.header.OpCode, RecursionDesired: q.header.RecursionDesired, RecursionAvailable: true,
		AuthenticData: m.Header.AuthenticData, CheckingDisabled: q.header.CheckingDisabled, RCode: m.Header.RCode,
	}, Answers: slices.Clone(m.Answers), Authorities: slices.Clone(m.Authorities)} // Pack writes to the records, which others read
	if q.question.Name.Length > 0 {
		r.Questions = []dnsmessage.Question{q.question}
	}
	for _, a := range m.Additionals {
		if a.Header.Type != dnsmessage.TypeOPT {
			r.Additionals = append(r.Additionals, a)
		}
	}
	if q.edns {
		var h dnsmessage.ResourceHeader
		if h.SetEDNS0(maxUDP, m.Header.RCode, q.do) == nil {
			r.Additionals = append(r.Additionals, dnsmessage.Resource{Header: h, Body: &dnsmessage.OPTResource{}})
		}
	}
	r.Header.RCode &= 15
	b, err := r.Pack()
	if err != nil { // records that cannot be written again
		r.Answers, r.Authorities, r.Additionals = nil, nil, nil
		r.Header.RCode = dnsmessage.RCodeServerFailure
		if b, err = r.Pack(); err != nil {
			return nil
		}
	}
	most := 65535
	if !tcp {
		most = q.size
	}
	if len(b) > most {
		s.n.truncated.Add(1)
		r.Answers, r.Authorities, r.Header.Truncated = nil, nil, true
		if n := len(r.Additionals); q.edns && n > 0 {
			r.Additionals = r.Additionals[n-1:]
		} else {
			r.Additionals = nil
		}
		if b, err = r.Pack(); err != nil {
			return nil
		}
	}
	return b
}

// find returns the answer to a question, which others may share; nil: there is none.
func (s *Server) find(c Client, q *query) *dnsmessage.Message {
	key := q.key(c.Group)
	now := s.cfg.Now()
	s.mu.Lock()
	cached := s.caches[c.Group]
	if cached == nil {
		cached = newCache()
		s.caches[c.Group] = cached
	}
	if m := cached.get(key, now); m != nil {
		s.mu.Unlock()
		s.n.cached.Add(1)
		return m
	}
	if f := s.flights[key]; f != nil {
		s.mu.Unlock()
		s.n.joined.Add(1)
		select {
		case <-f.done:
			return f.m
		case <-s.ctx.Done():
			return nil
		}
	}
	f := &flight{done: make(chan struct{})}
	s.flights[key] = f
	s.mu.Unlock()

	f.m = s.ask(q)
	s.mu.Lock()
	delete(s.flights, key)
	if f.m != nil && s.caches[c.Group] == cached { // else SetServers or Forget has dropped this memory meanwhile
		cached.put(key, f.m, s.cfg.Now())
	}
	s.mu.Unlock()
	close(f.done)
	return f.m
}
