package server_test

import (
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire"
)

// model is the simplest possible store: paths and values, one request after another.
type model map[string]string

func (m model) apply(op wire.Op, payload string) string {
	path, value, _ := strings.Cut(payload, "\x00")
	value = strings.TrimSuffix(value, "\x00")
	_, exists := m[path]
	up := func(p string) string { return p[:max(strings.LastIndex(p, "/"), 0)] }
	switch op {
	case wire.Write, wire.Mkdir:
		if !exists || op == wire.Write {
			m[path] = value
		}
		for p := up(path); p != ""; p = up(p) {
			if _, exists := m[p]; !exists {
				m[p] = ""
			}
		}
	case wire.Rm:
		if _, parent := m[up(path)]; !exists && !parent && up(path) != "" {
			return "ENOENT"
		}
		maps.DeleteFunc(m, func(p, _ string) bool { return p == path || strings.HasPrefix(p, path+"/") })
	case wire.Read:
		if !exists {
			return "ENOENT"
		}
		return m[path]
	case wire.Directory:
		if !exists {
			return "ENOENT"
		}
		var names []string
		for p := range m {
			if up(p) == path {
				names = append(names, p[len(path)+1:])
			}
		}
		slices.Sort(names)
		return strings.Join(names, " ")
	}
	return ok
}

// TestTransactionsAreSerialisable makes clients work in turns, in transactions and
// outside. A committed transaction must have read and written the same as if all of it
// had happened at the commit.
func TestTransactionsAreSerialisable(t *testing.T) {
	committed, refused := 0, 0
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		e := newEmbedded(t, server.Config{})
		m := model{"/tool": "", "/tool/xenstored": ""}

		type step struct {
			op             wire.Op
			payload, reply string
		}
		type client struct {
			*raw
			tx  uint32
			log []step
		}
		var clients []*client
		for range 4 {
			clients = append(clients, &client{raw: e.dom0()})
		}
		for range 400 {
			c := clients[rnd.IntN(len(clients))]
			k := rnd.IntN(12)
			if k == 0 && c.tx == 0 {
				c.tx, c.log = c.Start(), nil
				continue
			}
			if k <= 1 && c.tx != 0 {
				got := c.Do(wire.TransactionEnd, c.tx, z("T"))
				c.tx = 0
				if got == "EAGAIN" {
					refused++
					continue
				}
				if got != ok {
					t.Fatalf("seed %d: commit: %s", seed, got)
				}
				committed++
				for _, s := range c.log {
					if want := m.apply(s.op, s.payload); s.reply != want {
						t.Fatalf("seed %d: op %d %q in a committed transaction gave %q, one after the other %q",
							seed, s.op, s.payload, s.reply, want)
					}
				}
				continue
			}
			path := ""
			for range 1 + rnd.IntN(3) {
				path += "/" + string(rune('a'+rnd.IntN(3)))
			}
			op := []wire.Op{wire.Write, wire.Write, wire.Mkdir, wire.Rm, wire.Read, wire.Read, wire.Directory}[rnd.IntN(7)]
			payload := z(path)
			if op == wire.Write {
				payload = path + "\x00" + strconv.Itoa(rnd.IntN(1000))
			}
			got := c.Do(op, c.tx, payload)
			if op == wire.Directory && got != "ENOENT" {
				names := strings.Split(strings.TrimSuffix(got, "\x00"), "\x00")
				slices.Sort(names)
				got = strings.Join(names, " ")
			}
			if c.tx != 0 {
				c.log = append(c.log, step{op, payload, got})
			} else if want := m.apply(op, payload); got != want {
				t.Fatalf("seed %d: op %d %q: %q, want %q", seed, op, payload, got, want)
			}
		}
		var want []string
		for p, v := range m {
			want = append(want, fmt.Sprintf("%s = %q", p, v))
		}
		slices.Sort(want)
		if got := e.Dump(); got != "/ = \"\"\n"+strings.Join(want, "\n") {
			t.Fatalf("seed %d: store holds\n%s\nwant\n%s", seed, got, strings.Join(want, "\n"))
		}
	}
	if committed < 100 || refused < 100 {
		t.Errorf("%d commits and %d conflicts: too few to mean anything", committed, refused)
	}
}

// TestConcurrentTransfersKeepTheSum is the same for clients that run concurrently.
func TestConcurrentTransfersKeepTheSum(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	for i := range 4 {
		if err := e.Write(fmt.Sprint("/account/", i), "100"); err != nil {
			t.Fatal(err)
		}
	}
	var clients sync.WaitGroup
	for i := range 4 {
		c := e.dom0()
		clients.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 3))
			for done := 0; done < 50; {
				tx := c.Start()
				sum, have := 0, [4]int{}
				for a := range have {
					have[a], _ = strconv.Atoi(c.Do(wire.Read, tx, z(fmt.Sprint("/account/", a))))
					sum += have[a]
				}
				from, to := rnd.IntN(4), rnd.IntN(4)
				have[from]--
				have[to]++
				for _, a := range []int{from, to} {
					c.Do(wire.Write, tx, fmt.Sprintf("/account/%d\x00%d", a, have[a]))
				}
				if c.Do(wire.TransactionEnd, tx, z("T")) == ok {
					if done++; sum != 400 {
						t.Errorf("a committed transaction saw a sum of %d", sum)
					}
				}
			}
		})
	}
	clients.Wait()
	sum := 0
	for i := range 4 {
		v, err := e.Read(fmt.Sprint("/account/", i))
		if err != nil {
			t.Fatal(err)
		}
		n, _ := strconv.Atoi(v)
		sum += n
	}
	if sum != 400 {
		t.Errorf("accounts add up to %d", sum)
	}
}

// stream is a connection whose client has sent all its requests and reads nothing.
type stream struct{ *strings.Reader }

func (stream) Write(p []byte) (int, error) { return len(p), nil }
func (stream) Close() error                { return nil }

// turns is a connection whose client sends when told to. Read gives the turn back once
// everything sent has been handled.
type turns struct {
	stream
	next chan []byte
	idle chan struct{}
	buf  []byte
}

func (c *turns) Read(p []byte) (int, error) {
	if len(c.buf) == 0 {
		c.idle <- struct{}{}
		if c.buf = <-c.next; c.buf == nil {
			return 0, io.EOF
		}
	}
	n := copy(p, c.buf)
	c.buf = c.buf[n:]
	return n, nil
}

// aftermath checks the invariants, whatever a guest has sent.
func aftermath(t *testing.T, s *server.Store) {
	t.Helper()
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	if m := s.MemoryOf(3); m > 3<<20 {
		t.Fatalf("the guest makes the store hold %d bytes", m)
	}
	s.DomainDied(3)
	if err := s.Check(); err != nil {
		t.Fatal("after its death: ", err)
	}
	s.Close()
	if st := s.Stats(); st.Connections != 0 || st.Watches != 0 || st.Transactions != 0 {
		t.Fatalf("after Close: %+v", st)
	}
}

// withGuest makes a store with a domain 3, and nodes to attack.
func withGuest(t testing.TB) *server.Store {
	s := server.New(server.Config{})
	for _, err := range []error{
		s.Write("/local/domain/3/device/vif/0/state", "1"),
		s.Write("/local/domain/0/backend/vif/3/0/state", "1"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s.Introduce(3)
	for path, perms := range map[string][]string{
		"/local/domain/3":                 {"n3"},
		"/local/domain/3/device":          {"n3", "r0"},
		"/local/domain/0/backend/vif/3/0": {"n0", "r3"},
	} {
		if err := s.SetPerms(path, perms...); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// FuzzBytes feeds arbitrary bytes to a guest's connection.
func FuzzBytes(f *testing.F) {
	for _, m := range []struct {
		op      wire.Op
		tx      uint32
		payload string
	}{
		{wire.Write, 0, "x\x00value"}, {wire.TransactionStart, 0, "\x00"}, {wire.Write, 1, "y/z\x00value"},
		{wire.TransactionEnd, 1, "T\x00"}, {wire.Watch, 0, "x\x00t\x00"}, {wire.SetPerms, 0, "x\x00n3\x00r0\x00"},
		{wire.DirectoryPart, 0, "device\x0012\x00"}, {99, 0, ""}, {wire.Rm, 0, "device\x00"},
	} {
		b, err := wire.Append(nil, wire.Header{Op: m.op, TxID: m.tx}, m.payload)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
		f.Add(string(b) + string(b[:len(b)-1]))
	}
	f.Fuzz(func(t *testing.T, input string) {
		s := withGuest(t)
		s.ServeConn(stream{strings.NewReader(input)}, 3)
		aftermath(t, s)
	})
}

// FuzzRequests feeds requests to it: an operation, a transaction, a length, and as many
// bytes. Every other request comes from a second connection.
func FuzzRequests(f *testing.F) {
	f.Add("\x0b\x00\x05a/b\x00v" + "\x06\x00\x01\x00" + "\x0d\x01\x02a\x00" + "\x07\x01\x02T\x00")
	f.Add("\x04\x00\x04a\x00t\x00" + "\x0c\x00\x04a/b\x00" + "\x0d\x00\x02a\x00" + "\x15\x00\x00")
	f.Add("\x0e\x00\x10device/vif/0\x00n3\x00" + "\x16\x00\x09device\x000\x00" + "\x03\x00\x07device\x00")
	f.Add("\x06\x00\x01\x00\x06\x00\x01\x00\x0b\x01\x04a\x00vv\x0b\x01\x04a\x00ww\x07\x01\x02T\x00\x07\x01\x02T\x00")
	f.Fuzz(func(t *testing.T, input string) {
		s := withGuest(t)
		var served sync.WaitGroup
		var conns [2]*turns
		for i := range conns {
			c := &turns{next: make(chan []byte), idle: make(chan struct{})}
			served.Go(func() { s.ServeConn(c, 3) })
			<-c.idle
			conns[i] = c
		}
		for i := 0; len(input) >= 3; i++ {
			h := wire.Header{Op: wire.Op(input[0] & 31), TxID: uint32(input[1] & 3), ReqID: uint32(i)}
			n := min(int(input[2]), len(input)-3)
			b, _ := wire.Append(nil, h, input[3:3+n]) // fits: n is at most 255
			conns[i&1].next <- b
			<-conns[i&1].idle
			input = input[3+n:]
		}
		if err := s.Check(); err != nil {
			t.Fatal(err)
		}
		for _, c := range conns {
			close(c.next)
		}
		served.Wait()
		aftermath(t, s)
	})
}
