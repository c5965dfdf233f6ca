package dnsproxy

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// ask asks the servers, twice each, beginning with the one that answered last. An answer that
// says that the server cannot tell is kept for when no other can.
func (s *Server) ask(q *query) *dnsmessage.Message {
	s.mu.Lock()
	servers, turn := s.servers, s.turn
	s.mu.Unlock()
	var poor *dnsmessage.Message
	for i := range 2 * len(servers) {
		if s.ctx.Err() != nil {
			return nil
		}
		at := (turn + i) % len(servers)
		m, err := s.askOne(q, servers[at])
		if err != nil {
			s.log.Debug("a name server does not answer", "server", servers[at], "err", err)
			continue
		}
		switch m.Header.RCode {
		case dnsmessage.RCodeSuccess, dnsmessage.RCodeNameError:
			if i > 0 {
				s.mu.Lock()
				if len(s.servers) == len(servers) {
					s.turn = at
				}
				s.mu.Unlock()
			}
			return m
		}
		if poor = m; i+1 >= len(servers) {
			return poor
		}
	}
	return poor
}

// askOne asks one server, over UDP and then over TCP if the answer is too long.
func (s *Server) askOne(q *query, to netip.AddrPort) (*dnsmessage.Message, error) {
	ctx, cancel := context.WithTimeout(s.ctx, perServer)
	defer cancel()
	m, err := s.exchange(ctx, q, "udp", to)
	if err == nil && m.Header.Truncated {
		m, err = s.exchange(ctx, q, "tcp", to)
	}
	return m, err
}

var errStrange = errors.New("too many datagrams that are no answer")

func (s *Server) exchange(ctx context.Context, q *query, network string, to netip.AddrPort) (*dnsmessage.Message, error) {
	var id [2]byte
	_, _ = rand.Read(id[:]) // never fails
	b, err := upstreamQuery(q, binary.BigEndian.Uint16(id[:]))
	if err != nil {
		return nil, err
	}
	c, err := s.cfg.Dial(ctx, network, to)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	s.n.upstream.Add(1)
	if network == "tcp" {
		if err := writeTCP(c, b); err != nil {
			return nil, err
		}
		r, err := readTCP(c, 65535)
		if err != nil {
			return nil, err
		}
		m, ok := parseAnswer(r, binary.BigEndian.Uint16(id[:]), q)
		if !ok {
			return nil, errors.New("the message is no answer to the question")
		}
		return m, nil
	}
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	return s.readUDP(c, binary.BigEndian.Uint16(id[:]), q)
}

// readUDP waits for the answer and passes over what is none: anybody can send to our port.
func (s *Server) readUDP(c net.Conn, id uint16, q *query) (*dnsmessage.Message, error) {
	b := make([]byte, longestUDP)
	for range strange {
		n, err := c.Read(b)
		if err != nil {
			return nil, err
		}
		if m, ok := parseAnswer(b[:n], id, q); ok {
			return m, nil
		}
		s.n.mismatch.Add(1)
	}
	return nil, errStrange
}

// upstreamQuery returns the question of q as a query with the number id.
func upstreamQuery(q *query, id uint16) ([]byte, error) {
	var h dnsmessage.ResourceHeader
	if err := h.SetEDNS0(maxUDP, dnsmessage.RCodeSuccess, q.do); err != nil {
		return nil, err
	}
	m := dnsmessage.Message{
		Header:      dnsmessage.Header{ID: id, RecursionDesired: true, AuthenticData: q.header.AuthenticData, CheckingDisabled: q.header.CheckingDisabled},
		Questions:   []dnsmessage.Question{q.question},
		Additionals: []dnsmessage.Resource{{Header: h, Body: &dnsmessage.OPTResource{}}},
	}
	return m.Pack()
}

// parseAnswer parses a message, all of it, and reports whether it is the answer to the query with
// the number id.
func parseAnswer(b []byte, id uint16, q *query) (*dnsmessage.Message, bool) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || !h.Response || h.ID != id || h.OpCode != 0 {
		return nil, false
	}
	question, err := p.Question()
	if err != nil || question.Type != q.question.Type || question.Class != q.question.Class ||
		!strings.EqualFold(question.Name.String(), q.question.Name.String()) {
		return nil, false
	}
	if _, err := p.Question(); err != dnsmessage.ErrSectionDone {
		return nil, false
	}
	m := &dnsmessage.Message{Header: h}
	if h.Truncated { // what is there may end anywhere, and is not used
		return m, true
	}
	if m.Answers, err = p.AllAnswers(); err != nil {
		return nil, false
	}
	if m.Authorities, err = p.AllAuthorities(); err != nil {
		return nil, false
	}
	m.Additionals, err = p.AllAdditionals()
	return m, err == nil
}
