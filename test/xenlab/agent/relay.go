//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"sync"

	"barevif/test/xenlab/proto"
)

// maxLine bounds one message of the protocol, in bytes.
const maxLine = 64 << 20

// replies writes one reply per line. It is safe for concurrent use.
type replies struct {
	mu sync.Mutex
	w  io.Writer
}

func (r *replies) send(reply proto.Reply) error {
	b, err := json.Marshal(reply)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err = r.w.Write(append(b, '\n'))
	return err
}

// each decodes every line of r and passes it to f, until r ends.
func each[T any](r io.Reader, f func(T) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 64<<10), maxLine)
	for s.Scan() {
		var v T
		if err := json.Unmarshal(s.Bytes(), &v); err != nil {
			return err
		}
		if err := f(v); err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil {
		return err
	}
	return io.EOF
}

// A relay passes calls to other domains and their replies back.
type relay struct {
	host *replies
	dial func() (io.ReadWriteCloser, error) // connects to xenstore

	mu    sync.Mutex
	peers map[int]*peer // guarded by mu
}

// A peer is the agent of another domain, as dom0 sees it.
type peer struct {
	calls   chan proto.Call
	gone    chan struct{} // closed when the link ended
	mu      sync.Mutex
	pending map[uint64]bool // guarded by mu; nil once the link ended
	err     error           // guarded by mu; why the link ended
}

var errBusy = errors.New("too many calls wait for this domain")

// call passes c on to its domain. The reply goes to the host later; if the domain ends first,
// the host gets an error instead.
func (r *relay) call(c proto.Call) error {
	r.mu.Lock()
	p := r.peers[c.Domain]
	if p == nil || p.ended() { // another domain may have the same domid by now
		var err error
		if p, err = r.connect(c.Domain); err != nil {
			r.mu.Unlock()
			return err
		}
		r.peers[c.Domain] = p
	}
	r.mu.Unlock()

	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pending == nil {
		return p.err
	}
	select {
	case p.calls <- c:
		p.pending[c.ID] = true
		return nil
	default:
		return errBusy
	}
}

func (p *peer) ended() bool {
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}

func (r *relay) connect(domid int) (*peer, error) {
	conn, err := r.dial()
	if err != nil {
		return nil, err
	}
	s := newStore(conn)
	l, err := downLink(s, domid)
	if err != nil {
		s.close()
		return nil, err
	}
	p := &peer{calls: make(chan proto.Call, 64), gone: make(chan struct{}), pending: map[uint64]bool{}}
	go func() {
		enc := json.NewEncoder(l)
		for {
			select {
			case c := <-p.calls:
				if err := enc.Encode(c); err != nil {
					p.end(r.host, err)
					s.close()
					return
				}
			case <-p.gone:
				return
			}
		}
	}()
	go func() {
		err := each(l, func(reply proto.Reply) error {
			p.mu.Lock()
			delete(p.pending, reply.ID)
			p.mu.Unlock()
			return r.host.send(reply)
		})
		p.end(r.host, err)
		s.close()
	}()
	return p, nil
}

// end answers all pending calls with err.
func (p *peer) end(host *replies, err error) {
	p.mu.Lock()
	pending := p.pending
	if pending == nil {
		p.mu.Unlock()
		return
	}
	p.pending, p.err = nil, err
	close(p.gone)
	p.mu.Unlock()
	for id := range pending {
		host.send(proto.Reply{ID: id, Err: err.Error()})
	}
}
