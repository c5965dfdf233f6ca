//go:build linux

package main

import (
	"errors"
	"fmt"
	"strconv"

	"barevif/test/xenlab/proto"
)

// chunk (in bytes) and window (in nodes) bound the data of a link in xenstore: a node of an
// unprivileged domain holds less than 2048 bytes.
const (
	chunk  = 1600
	window = 16
)

// A link is a byte stream between two domains through xenstore. It consists of numbered nodes,
// which the writer makes and the reader removes. It needs no network, and uses no vifs, grants
// or event channels.
//
// One goroutine may read and one may write.
type link struct {
	s       *store
	in, out string
	home    string // the other end's directory, if it can vanish
	nextIn  int
	nextOut int
	rest    string // what Read has not returned yet of the chunk that it took last

	// The domid when nextIn and nextOut were last 0; "" at dom0's end. With another domid the
	// domain was resumed, its nodes are gone, and dom0 begins a link of its own.
	inAs, outAs string
}

var errDomainGone = errors.New("the domain is gone")

// upLink returns a domain's end of its link to dom0, downLink dom0's end.
func upLink(s *store) (*link, error) {
	l, err := newLink(s, proto.Store, "down", "up", "")
	if err != nil {
		return nil, err
	}
	l.inAs, err = s.read("domid")
	l.outAs = l.inAs
	return l, err
}

// resumed reports whether the domain was resumed since *as was set, and sets *as.
func (l *link) resumed(as *string) (bool, error) {
	if *as == "" {
		return false, nil
	}
	now, err := l.s.read("domid")
	if err != nil || now == *as {
		return false, err
	}
	*as = now
	return true, nil
}

func downLink(s *store, domid int) (*link, error) {
	home := fmt.Sprintf("/local/domain/%d", domid)
	return newLink(s, home+"/"+proto.Store, "up", "down", home)
}

func newLink(s *store, dir, in, out, home string) (*link, error) {
	l := &link{s: s, in: dir + "/" + in + "/", out: dir + "/" + out + "/", home: home}
	return l, s.watch(dir)
}

// Read implements io.Reader.
func (l *link) Read(p []byte) (int, error) {
	for l.rest == "" {
		change := l.s.change()
		if again, err := l.resumed(&l.inAs); err != nil {
			return 0, err
		} else if again {
			l.nextIn = 0
		}
		node := l.in + strconv.Itoa(l.nextIn)
		value, err := l.s.read(node)
		if isMissing(err) {
			if err := l.pause(change); err != nil {
				return 0, err
			}
			continue
		}
		if err != nil {
			return 0, err
		}
		if err := l.s.remove(node); err != nil && !isMissing(err) {
			return 0, err
		}
		l.nextIn++
		l.rest = value
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

// Write implements io.Writer. It waits while the other end has a window of unread chunks. What
// was written in part before the domain was resumed has no reader any more.
func (l *link) Write(p []byte) (n int, err error) {
	for n < len(p) {
		if again, err := l.resumed(&l.outAs); err != nil {
			return n, err
		} else if again {
			l.nextOut = 0
			if n > 0 {
				return len(p), nil
			}
		}
		for l.nextOut >= window {
			change := l.s.change()
			_, err := l.s.read(l.out + strconv.Itoa(l.nextOut-window))
			if isMissing(err) {
				break
			}
			if err != nil {
				return n, err
			}
			if err := l.pause(change); err != nil {
				return n, err
			}
		}
		part := p[n:min(n+chunk, len(p))]
		if l.home != "" { // a write would recreate the directory of a dead domain
			if _, err := l.s.read(l.home); err != nil {
				return n, errDomainGone
			}
		}
		if err := l.s.write(l.out+strconv.Itoa(l.nextOut), string(part)); err != nil {
			return n, err
		}
		l.nextOut++
		n += len(part)
	}
	return n, nil
}

// pause waits until a watched path changes.
func (l *link) pause(change <-chan struct{}) error {
	if l.home != "" {
		if _, err := l.s.read(l.home); isMissing(err) {
			return errDomainGone
		}
	}
	select {
	case <-change:
		return nil
	case <-l.s.gone:
		return l.s.err
	}
}
