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
	rest    string // the unread rest of the last chunk
}

var errDomainGone = errors.New("the domain is gone")

// upLink returns a domain's end of its link to dom0, downLink dom0's end.
func upLink(s *store) (*link, error) {
	return newLink(s, proto.Store, "down", "up", "")
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
		node := l.in + strconv.Itoa(l.nextIn)
		change := l.s.change()
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

// Write implements io.Writer. It waits while the other end has a window of unread chunks.
func (l *link) Write(p []byte) (n int, err error) {
	for n < len(p) {
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
