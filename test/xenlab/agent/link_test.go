//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/test/xenlab/proto"
	"barevif/xenbus/xenstore/server"
)

const guestID = 5

// xenstore returns a xenstore with a domain in it, as libxl makes it.
func xenstore(t *testing.T) *server.Store {
	t.Helper()
	s := server.New(server.Config{})
	t.Cleanup(func() { s.Close() })
	s.Introduce(guestID)
	home := fmt.Sprintf("/local/domain/%d", guestID)
	if err := errors.Join(s.Mkdir(home), s.Write(home+"/domid", fmt.Sprint(guestID)), s.SetPerms(home+"/domid", "n0", fmt.Sprintf("r%d", guestID)), s.SetPerms(home, "n0", fmt.Sprintf("r%d", guestID)),
		s.Mkdir(home+"/data"), s.SetPerms(home+"/data", fmt.Sprintf("n%d", guestID))); err != nil {
		t.Fatal(err)
	}
	return s
}

// dial connects a client of the domain dom to s.
func dial(t *testing.T, s *server.Store, dom hypercall.DomID) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.ServeConn(theirs, dom)
	}()
	t.Cleanup(func() {
		ours.Close()
		<-done
	})
	return ours
}

func pairOfLinks(t *testing.T) (dom0, guest *link, s *server.Store) {
	t.Helper()
	s = xenstore(t)
	dom0, err := downLink(newStore(dial(t, s, 0)), guestID)
	if err != nil {
		t.Fatal(err)
	}
	guest, err = upLink(newStore(dial(t, s, guestID)))
	if err != nil {
		t.Fatal(err)
	}
	return dom0, guest, s
}

func TestLinkCarriesBytesBothWays(t *testing.T) {
	dom0, guest, _ := pairOfLinks(t)
	data := make([]byte, 3*chunk*window+17)
	rand.NewChaCha8([32]byte{}).Read(data)
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, l := range [...]*link{dom0, guest} {
		wg.Go(func() {
			if n, err := l.Write(data); n != len(data) || err != nil {
				t.Errorf("wrote %d: %v", n, err)
			}
		})
		wg.Go(func() {
			got := make([]byte, len(data))
			if _, err := io.ReadFull(l, got); err != nil || !bytes.Equal(got, data) {
				t.Errorf("read other bytes than were written: %v", err)
			}
		})
	}
}

func TestLinkLeavesNothingInXenstore(t *testing.T) {
	dom0, guest, s := pairOfLinks(t)
	if _, err := dom0.Write([]byte("before anyone reads")); err != nil {
		t.Fatal(err)
	}
	if _, err := guest.Read(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	node := fmt.Sprintf("/local/domain/%d/%s/down/0", guestID, proto.Store)
	if v, err := s.Read(node); err == nil {
		t.Errorf("%s is still %q", node, v)
	}
}

// A resume takes the domain's nodes away, and dom0 makes a link of its own to the new domain.
func TestLinkBeginsAgainAfterAResume(t *testing.T) {
	dom0, guest, s := pairOfLinks(t)
	home := fmt.Sprintf("/local/domain/%d", guestID)
	for i := range 3 {
		data := bytes.Repeat([]byte{byte('a' + i)}, (3-i)*chunk+5)
		got := make([]byte, len(data))
		for _, way := range [...][2]*link{{dom0, guest}, {guest, dom0}} {
			if _, err := way[0].Write(data); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(way[1], got); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("read other bytes than were written: %v", err)
			}
		}
		if err := errors.Join(s.Remove(home+"/"+proto.Store), s.Write(home+"/domid", fmt.Sprint(guestID+1+i))); err != nil {
			t.Fatal(err)
		}
		var err error
		if dom0, err = downLink(newStore(dial(t, s, 0)), guestID); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLinkOfADeadDomainEnds(t *testing.T) {
	dom0, _, s := pairOfLinks(t)
	ended := make(chan error, 1)
	go func() {
		_, err := dom0.Read(make([]byte, 1))
		ended <- err
	}()
	if err := s.Remove(fmt.Sprintf("/local/domain/%d", guestID)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, errDomainGone) {
			t.Errorf("read: %v", err)
		}
	case <-time.After(plenty):
		t.Fatal("still reading")
	}
	if _, err := dom0.Write([]byte("x")); !errors.Is(err, errDomainGone) {
		t.Errorf("write: %v", err)
	}
}

// lines collects replies as the host would.
type lines struct {
	mu sync.Mutex
	c  chan proto.Reply
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var r proto.Reply
	if err := json.Unmarshal(b, &r); err != nil {
		return 0, err
	}
	l.c <- r
	return len(b), nil
}

func TestRelayAnswersForADomainThatGoes(t *testing.T) {
	s := xenstore(t)
	host := &lines{c: make(chan proto.Reply, 10)}
	r := &relay{
		host: &replies{w: host}, peers: map[int]*peer{},
		dial: func() (io.ReadWriteCloser, error) { return dial(t, s, 0), nil },
	}
	guest, err := upLink(newStore(dial(t, s, guestID)))
	if err != nil {
		t.Fatal(err)
	}
	e, out := newExecutor(), &replies{w: guest}
	go each(guest, func(c proto.Call) error {
		if c.Op == proto.Wait { // never answered
			return nil
		}
		return out.send(e.do(c))
	})
	for _, c := range []proto.Call{
		{ID: 1, Domain: guestID, Op: proto.Run, Argv: sh("echo hello"), Timeout: plenty},
		{ID: 2, Domain: guestID, Op: proto.Wait},
	} {
		if err := r.call(c); err != nil {
			t.Fatal(err)
		}
	}
	receive := func() proto.Reply {
		t.Helper()
		select {
		case reply := <-host.c:
			return reply
		case <-time.After(plenty):
			t.Fatal("no reply")
		}
		panic("not reached")
	}
	if got := receive(); got.ID != 1 || string(got.Stdout) != "hello\n" {
		t.Errorf("%+v", got)
	}
	if err := s.Remove(fmt.Sprintf("/local/domain/%d", guestID)); err != nil {
		t.Fatal(err)
	}
	if got := receive(); got.ID != 2 || got.Err != errDomainGone.Error() {
		t.Errorf("%+v", got)
	}
}
