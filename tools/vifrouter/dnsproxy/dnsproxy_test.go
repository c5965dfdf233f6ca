package dnsproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// limit bounds every wait. The machine may be busy.
const limit = 2 * time.Minute

// A fake is a name server on the loopback.
type fake struct {
	udp   net.PacketConn
	tcp   net.Listener
	asked atomic.Int64
	at    netip.AddrPort
}

// newFake answers what reply makes of a query; nil: nothing.
func newFake(t *testing.T, reply func(m *dnsmessage.Message, tcp bool) [][]byte) *fake {
	t.Helper()
	f := &fake{}
	var err error
	for range 50 { // one port for both
		if f.tcp, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Skip("this machine has no loopback: ", err)
		}
		if f.udp, err = net.ListenPacket("udp", f.tcp.Addr().String()); err == nil {
			break
		}
		f.tcp.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	f.at = netip.MustParseAddrPort(f.tcp.Addr().String())
	t.Cleanup(func() {
		f.udp.Close()
		f.tcp.Close()
	})
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := f.udp.ReadFrom(b)
			if err != nil {
				return
			}
			f.asked.Add(1)
			m := new(dnsmessage.Message)
			if m.Unpack(b[:n]) == nil {
				go func() {
					for _, r := range reply(m, false) {
						f.udp.WriteTo(r, from)
					}
				}()
			}
		}
	}()
	go func() {
		for {
			c, err := f.tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, err := readTCP(c, 4096)
				m := new(dnsmessage.Message)
				if err != nil || m.Unpack(b) != nil {
					return
				}
				f.asked.Add(1)
				for _, r := range reply(m, true) {
					writeTCP(c, r)
				}
			}()
		}
	}()
	return f
}

// answerTo makes an answer with n addresses.
func answerTo(m *dnsmessage.Message, n int, ttl uint32) *dnsmessage.Message {
	r := &dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, RecursionAvailable: true}, Questions: m.Questions}
	for i := range n {
		r.Answers = append(r.Answers, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: ttl},
			Body:   &dnsmessage.AResource{A: [4]byte{192, 0, byte(i >> 8), byte(i)}},
		})
	}
	return r
}

func packed(list ...*dnsmessage.Message) (out [][]byte) {
	for _, m := range list {
		b, err := m.Pack()
		if err != nil {
			panic(err)
		}
		out = append(out, b)
	}
	return out
}

func plain(m *dnsmessage.Message, _ bool) [][]byte { return packed(answerTo(m, 1, 60)) }

// A site is a Server on the loopback, whose clients are told apart by clock and groups of the test.
type site struct {
	*Server
	udp  net.PacketConn
	tcp  net.Listener
	mu   sync.Mutex
	now  time.Time // guarded by mu
	who  Client    // guarded by mu
	gone bool      // guarded by mu: nobody is a client
}

func newSite(t *testing.T, servers ...*fake) *site {
	t.Helper()
	s := &site{now: time.Unix(1e9, 0), who: Client{"guest", "group"}}
	var d net.Dialer
	s.Server = New(Config{
		Dial: func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
			return d.DialContext(ctx, network, to.String())
		},
		Client: func(netip.Addr) (Client, bool) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.who, !s.gone
		},
		Now: func() time.Time {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.now
		},
	})
	var list []netip.AddrPort
	for _, f := range servers {
		list = append(list, f.at)
	}
	s.SetServers(list)
	var err error
	if s.udp, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	if s.tcp, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.ServePacket(s.udp) })
	wg.Go(func() { s.Serve(s.tcp) })
	t.Cleanup(func() {
		s.udp.Close()
		s.tcp.Close()
		s.Close()
		wg.Wait()
		s.Server.mu.Lock()
		defer s.Server.mu.Unlock()
		if s.total != 0 || len(s.under) != 0 || len(s.conns) != 0 || len(s.flights) != 0 {
			t.Errorf("left: %d queries, %v, %v, %d questions", s.total, s.under, s.conns, len(s.flights))
		}
	})
	return s
}

func (s *site) be(c Client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.who = c
}

func (s *site) pass(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = s.now.Add(d)
}

// queryFor returns a query; a size means EDNS.
func queryFor(name string, typ dnsmessage.Type, size int) []byte {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 4711, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: typ, Class: dnsmessage.ClassINET}},
	}
	if size > 0 {
		var h dnsmessage.ResourceHeader
		h.SetEDNS0(size, 0, false)
		m.Additionals = append(m.Additionals, dnsmessage.Resource{Header: h, Body: &dnsmessage.OPTResource{Options: []dnsmessage.Option{{Code: 10, Data: []byte("cookie!!")}, {Code: 8, Data: []byte{0, 1, 24, 0, 10, 0, 0}}}}})
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// askUDP sends a query and returns the answer.
func (s *site) askUDP(t *testing.T, q []byte) *dnsmessage.Message {
	t.Helper()
	c, err := net.Dial("udp", s.udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	if _, err := c.Write(q); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65535)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	if n > maxUDP {
		t.Errorf("%d bytes over UDP", n)
	}
	m := new(dnsmessage.Message)
	if err := m.Unpack(b[:n]); err != nil {
		t.Fatal(err)
	}
	if m.ID != 4711 || !m.Response {
		t.Errorf("%+v", m.Header)
	}
	return m
}

func (s *site) askTCP(t *testing.T, q []byte) *dnsmessage.Message {
	t.Helper()
	c, err := net.Dial("tcp", s.tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	if err := writeTCP(c, q); err != nil {
		t.Fatal(err)
	}
	b, err := readTCP(c, 65535)
	if err != nil {
		t.Fatal(err)
	}
	m := new(dnsmessage.Message)
	if err := m.Unpack(b); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestQueryIsForwardedOnceAndThenRemembered(t *testing.T) {
	f := newFake(t, plain)
	s := newSite(t, f)
	m := s.askUDP(t, queryFor("web.test.", dnsmessage.TypeA, 0))
	if len(m.Answers) != 1 || m.Answers[0].Header.TTL != 60 || len(m.Additionals) != 0 || !m.RecursionAvailable {
		t.Errorf("%+v", m)
	}
	s.pass(20 * time.Second)
	m = s.askUDP(t, queryFor("WEB.test.", dnsmessage.TypeA, 0))
	if len(m.Answers) != 1 || m.Answers[0].Header.TTL != 40 || m.Questions[0].Name.String() != "WEB.test." || f.asked.Load() != 1 {
		t.Errorf("%+v, the server was asked %d times", m, f.asked.Load())
	}
	s.pass(40 * time.Second)
	s.askUDP(t, queryFor("web.test.", dnsmessage.TypeA, 0))
	if f.asked.Load() != 2 {
		t.Errorf("the answer was kept for longer than its time: %d", f.asked.Load())
	}
	s.be(Client{"guest", "other group"})
	s.askUDP(t, queryFor("web.test.", dnsmessage.TypeA, 0))
	if f.asked.Load() != 3 {
		t.Error("a group sees the memory of another")
	}
	s.SetServers([]netip.AddrPort{f.at, netip.MustParseAddrPort("127.0.0.1:1")})
	s.askUDP(t, queryFor("web.test.", dnsmessage.TypeA, 0))
	if f.asked.Load() != 4 {
		t.Error("answers of other servers are remembered")
	}
}

func TestOptionsOfAGuestAreNotSentOn(t *testing.T) {
	saw := make(chan *dnsmessage.Message, 1)
	s := newSite(t, newFake(t, func(m *dnsmessage.Message, tcp bool) [][]byte {
		saw <- m
		return plain(m, tcp)
	}))
	m := s.askUDP(t, queryFor("web.test.", dnsmessage.TypeA, 4096))
	up := <-saw
	if up.ID == 4711 || !up.RecursionDesired || len(up.Additionals) != 1 || len(up.Additionals[0].Body.(*dnsmessage.OPTResource).Options) != 0 || up.Additionals[0].Header.Class != maxUDP {
		t.Errorf("%+v", up)
	}
	if len(m.Additionals) != 1 || m.Additionals[0].Header.Type != dnsmessage.TypeOPT {
		t.Errorf("%+v", m.Additionals)
	}
}

// An answer that does not fit a datagram is asked for again over TCP, on both sides.
func TestLongAnswersTakeTCP(t *testing.T) {
	f := newFake(t, func(m *dnsmessage.Message, tcp bool) [][]byte {
		if tcp {
			return packed(answerTo(m, 200, 60))
		}
		r := answerTo(m, 0, 0)
		r.Truncated = true
		return packed(r)
	})
	s := newSite(t, f)
	m := s.askUDP(t, queryFor("big.test.", dnsmessage.TypeA, 0))
	if !m.Truncated || len(m.Answers) != 0 || len(m.Questions) != 1 {
		t.Errorf("%+v", m.Header)
	}
	if m = s.askTCP(t, queryFor("big.test.", dnsmessage.TypeA, 0)); m.Truncated || len(m.Answers) != 200 {
		t.Errorf("%+v, %d answers", m.Header, len(m.Answers))
	}
	// What fits the size of the guest's EDNS needs no TCP.
	s = newSite(t, newFake(t, func(m *dnsmessage.Message, tcp bool) [][]byte { return packed(answerTo(m, 40, 60)) }))
	if m = s.askUDP(t, queryFor("mid.test.", dnsmessage.TypeA, 0)); !m.Truncated {
		t.Error("more than 512 bytes without EDNS")
	}
	if m = s.askUDP(t, queryFor("mid.test.", dnsmessage.TypeA, 4096)); m.Truncated || len(m.Answers) != 40 {
		t.Errorf("%+v", m.Header)
	}
}

// Datagrams with another number or another question, and ones that cannot be read, are not the
// answer.
func TestOnlyTheAnswerCounts(t *testing.T) {
	f := newFake(t, func(m *dnsmessage.Message, _ bool) [][]byte {
		number := answerTo(m, 2, 60)
		number.ID++
		question := answerTo(m, 3, 60)
		question.Questions = []dnsmessage.Question{{Name: dnsmessage.MustNewName("evil.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}
		typ := answerTo(m, 4, 60)
		typ.Questions = []dnsmessage.Question{{Name: m.Questions[0].Name, Type: dnsmessage.TypeMX, Class: dnsmessage.ClassINET}}
		query := answerTo(m, 5, 60)
		query.Response = false
		two := answerTo(m, 6, 60)
		two.Questions = append(two.Questions[:1:1], two.Questions[0])
		list := packed(number, question, typ, query, two)
		cut := packed(answerTo(m, 7, 60))[0]
		list = append(list, cut[:len(cut)-3], []byte("x"), nil)
		return append(list, packed(answerTo(m, 1, 60))...)
	})
	s := newSite(t, f)
	if m := s.askUDP(t, queryFor("web.test.", dnsmessage.TypeA, 0)); len(m.Answers) != 1 {
		t.Errorf("%d answers", len(m.Answers))
	}
	if n := s.Stats().Mismatch; n != 8 {
		t.Errorf("%d datagrams that were no answer, want 8", n)
	}
}

func TestServerThatDoesNotAnswerIsPassedOver(t *testing.T) {
	silent := newFake(t, func(*dnsmessage.Message, bool) [][]byte { return nil })
	refusing := newFake(t, func(m *dnsmessage.Message, _ bool) [][]byte {
		r := answerTo(m, 0, 0)
		r.RCode = dnsmessage.RCodeRefused
		return packed(r)
	})
	good := newFake(t, plain)
	s := newSite(t, silent, refusing, good)
	if m := s.askUDP(t, queryFor("a.test.", dnsmessage.TypeA, 0)); len(m.Answers) != 1 {
		t.Errorf("%+v", m)
	}
	before := silent.asked.Load()
	if m := s.askUDP(t, queryFor("b.test.", dnsmessage.TypeA, 0)); len(m.Answers) != 1 || silent.asked.Load() != before {
		t.Error("the silent server is asked first again")
	}
	s = newSite(t, refusing)
	if m := s.askUDP(t, queryFor("a.test.", dnsmessage.TypeA, 0)); m.RCode != dnsmessage.RCodeRefused {
		t.Errorf("%+v", m.Header)
	}
	s = newSite(t)
	if m := s.askUDP(t, queryFor("a.test.", dnsmessage.TypeA, 0)); m.RCode != dnsmessage.RCodeServerFailure || s.Stats().Failed != 1 {
		t.Errorf("%+v", m.Header)
	}
}

func TestWhatIsNotForwarded(t *testing.T) {
	f := newFake(t, plain)
	s := newSite(t, f)
	change := func(change func(*dnsmessage.Message)) []byte {
		var m dnsmessage.Message
		if err := m.Unpack(queryFor("web.test.", dnsmessage.TypeA, 0)); err != nil {
			t.Fatal(err)
		}
		change(&m)
		return packed(&m)[0]
	}
	for _, c := range []struct {
		name string
		q    []byte
		want dnsmessage.RCode
	}{
		{"a transfer", queryFor("web.test.", typeAXFR, 0), dnsmessage.RCodeRefused},
		{"another class", change(func(m *dnsmessage.Message) { m.Questions[0].Class = dnsmessage.ClassCHAOS }), dnsmessage.RCodeRefused},
		{"an update", change(func(m *dnsmessage.Message) { m.OpCode = 5 }), dnsmessage.RCodeNotImplemented},
		{"two questions", change(func(m *dnsmessage.Message) { m.Questions = append(m.Questions, m.Questions[0]) }), dnsmessage.RCodeFormatError},
		{"no question", change(func(m *dnsmessage.Message) { m.Questions = nil }), dnsmessage.RCodeFormatError},
		{"a cut message", queryFor("web.test.", dnsmessage.TypeA, 0)[:20], dnsmessage.RCodeFormatError},
	} {
		if m := s.askUDP(t, c.q); m.RCode != c.want {
			t.Errorf("%s: %v, want %v", c.name, m.RCode, c.want)
		}
	}
	if f.asked.Load() != 0 {
		t.Error("something was forwarded")
	}
	// An answer gets no answer, and neither does a stranger: the next query does.
	if s.answer(Client{}, change(func(m *dnsmessage.Message) { m.Response = true }), false) != nil {
		t.Error("an answer was answered")
	}
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
	c, err := net.Dial("udp", s.udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	before := s.Stats().Refused
	c.Write(queryFor("web.test.", dnsmessage.TypeA, 0))
	for end := time.Now().Add(limit); s.Stats().Refused == before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a stranger's query is not counted")
		}
	}
}

// One guest that asks without end has a bounded share, and leaves the others theirs.
func TestFloodOfOneLeavesTheOthersTheirs(t *testing.T) {
	release := make(chan struct{})
	f := newFake(t, func(m *dnsmessage.Message, tcp bool) [][]byte {
		if strings.HasPrefix(m.Questions[0].Name.String(), "flood") {
			<-release
		}
		return plain(m, tcp)
	})
	defer close(release)
	s := newSite(t, f)
	s.be(Client{"flooder", "group"})
	for i := range 10 * PerClient {
		go s.serveTest(Client{"flooder", "group"}, queryFor(fmt.Sprintf("flood%d.test.", i), dnsmessage.TypeA, 0))
	}
	for end := time.Now().Add(limit); s.Stats().Limited < 9*PerClient; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", s.Stats())
		}
	}
	s.be(Client{"other", "group"})
	if m := s.askUDP(t, queryFor("web.test.", dnsmessage.TypeA, 0)); len(m.Answers) != 1 {
		t.Errorf("%+v", m)
	}
}

// serveTest is what ServePacket does with a datagram of c.
func (s *Server) serveTest(c Client, q []byte) {
	if s.enter(c) {
		defer s.leave(c)
		s.answer(c, q, false)
	}
}

func TestEachHasItsShareWhenAllIsTaken(t *testing.T) {
	s := New(Config{Now: time.Now, Client: func(netip.Addr) (Client, bool) { return Client{}, false }})
	for i := range All {
		if !s.enter(Client{ID: fmt.Sprint(i % (All / PerClient))}) {
			t.Fatalf("query %d is refused", i)
		}
	}
	late := Client{ID: "late"}
	for i := range Share {
		if !s.enter(late) {
			t.Errorf("query %d of the share is refused", i)
		}
	}
	if s.enter(late) {
		t.Error("more than the share")
	}
}

// Close waits for a query whose admission is under way, and later ones are not admitted.
func TestCloseWaitsForAQueryThatIsBeingAdmitted(t *testing.T) {
	s := newSite(t)
	s.Server.mu.Lock() // enter has it from its look at ctx until the query counts
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.Close()
	}()
	select {
	case <-s.ctx.Done():
		t.Error("Close has begun to end the queries, and does not know of the one that is admitted next")
	case <-time.After(100 * time.Millisecond):
	}
	s.works.Add(1)
	s.Server.mu.Unlock()
	select {
	case <-closed:
		t.Error("Close has not waited")
	case <-s.ctx.Done():
	case <-time.After(limit):
		t.Fatal("Close does not end the queries")
	}
	s.works.Done()
	select {
	case <-closed:
	case <-time.After(limit):
		t.Fatal("Close does not return")
	}
	if s.enter(Client{"guest", "group"}) || s.admit(Client{"guest", "group"}) {
		t.Error("a query is admitted after Close")
	}
}

func TestConnectionsOfAGuestAreFew(t *testing.T) {
	s := newSite(t, newFake(t, plain))
	for range Connections {
		c, err := net.Dial("tcp", s.tcp.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		s.Server.mu.Lock()
		n := s.conns["guest"]
		s.Server.mu.Unlock()
		if n == Connections {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d connections", n)
		}
	}
	c, err := net.Dial("tcp", s.tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one more connection is not closed: %v", err)
	}
}

func TestSameQuestionsGoTogether(t *testing.T) {
	release := make(chan struct{})
	f := newFake(t, func(m *dnsmessage.Message, tcp bool) [][]byte {
		<-release
		return plain(m, tcp)
	})
	s := newSite(t, f)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { s.serveTest(Client{"guest", "group"}, queryFor("web.test.", dnsmessage.TypeA, 0)) })
	}
	for end := time.Now().Add(limit); s.Stats().Joined < 19; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", s.Stats())
		}
	}
	close(release)
	wg.Wait()
	if n := f.asked.Load(); n > 4 { // repeated, on a slow machine, but not for each
		t.Errorf("the server was asked %d times", n)
	}
}

func TestCacheIsBoundedAndKeepsWhatMayBeKept(t *testing.T) {
	c, now := newCache(), time.Unix(1e9, 0)
	q := &dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("x."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	for i := range 3 * cacheEntries {
		c.put(fmt.Sprint(i), answerTo(q, 5, 60), now)
	}
	if len(c.entries) > cacheEntries || c.records > cacheRecords || c.order.Len() != len(c.entries) {
		t.Errorf("%d entries, %d records", len(c.entries), c.records)
	}
	if c.get("0", now) != nil || c.get(fmt.Sprint(3*cacheEntries-1), now) == nil {
		t.Error("the oldest stays, or the latest went")
	}
	soa := dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName("x."), Class: dnsmessage.ClassINET, TTL: 7200},
		Body:   &dnsmessage.SOAResource{NS: dnsmessage.MustNewName("n."), MBox: dnsmessage.MustNewName("m."), MinTTL: 30},
	}
	none := answerTo(q, 0, 0)
	none.RCode = dnsmessage.RCodeNameError
	withSOA := *none
	withSOA.Authorities = []dnsmessage.Resource{soa}
	failed := answerTo(q, 1, 60)
	failed.RCode = dnsmessage.RCodeServerFailure
	cut := answerTo(q, 1, 60)
	cut.Truncated = true
	for _, one := range []struct {
		name string
		m    *dnsmessage.Message
		want time.Duration
	}{
		{"an answer", answerTo(q, 1, 60), time.Minute}, {"a long time", answerTo(q, 1, 1<<20), longest}, {"no time", answerTo(q, 1, 0), 0},
		{"a negative time", answerTo(q, 1, 1<<31), 0}, {"no name, without a time", none, 0}, {"no name", &withSOA, 30 * time.Second},
		{"a failure", failed, 0}, {"a cut answer", cut, 0},
	} {
		if got := lifetime(one.m); got != one.want {
			t.Errorf("%s is kept for %v, want %v", one.name, got, one.want)
		}
	}
	c.put("many", answerTo(q, entryRecords+1, 60), now)
	if c.get("many", now) != nil {
		t.Error("an answer with too many records is kept")
	}
}

// A guest whose own name server answers with long records has the router keep no more than others.
func TestTheMemoryOfAnswersIsBoundedInBytes(t *testing.T) {
	c, now := newCache(), time.Unix(1e9, 0)
	text := func(n int) *dnsmessage.Message { // of n empty texts, a byte of the message each
		return &dnsmessage.Message{Header: dnsmessage.Header{Response: true}, Answers: []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName("x."), Type: dnsmessage.TypeTXT, Class: dnsmessage.ClassINET, TTL: 60},
			Body:   &dnsmessage.TXTResource{TXT: make([]string, n)},
		}}}
	}
	const texts = 3000
	for i := range cacheEntries {
		c.put(fmt.Sprint(i), text(texts), now)
	}
	if most := cacheBytes / (texts * 16); len(c.entries) > most || len(c.entries) < most/2 {
		t.Errorf("%d entries of %d bytes each", len(c.entries), weight(text(texts)))
	}
	if c.get(fmt.Sprint(cacheEntries-1), now) == nil {
		t.Error("the latest went")
	}
	long := text(entryBytes / 16)
	c.put("long", long, now)
	if c.get("long", now) != nil {
		t.Errorf("an answer of %d bytes is kept", weight(long))
	}
	unknown := text(0)
	unknown.Answers[0].Body = &dnsmessage.UnknownResource{Type: 4711, Data: make([]byte, entryBytes)}
	c.put("unknown", unknown, now)
	if c.get("unknown", now) != nil {
		t.Errorf("an answer of %d bytes is kept", weight(unknown))
	}
	for len(c.entries) > 0 {
		c.remove(c.order.Back())
	}
	if c.bytes != 0 || c.records != 0 {
		t.Errorf("an empty memory has %d bytes, %d records", c.bytes, c.records)
	}
}

func FuzzMessages(f *testing.F) {
	f.Add(queryFor("web.test.", dnsmessage.TypeA, 1232))
	f.Add(queryFor("web.test.", dnsmessage.TypeA, 0))
	q := &dnsmessage.Message{Header: dnsmessage.Header{ID: 1}, Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("x."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	f.Add(packed(answerTo(q, 3, 60))[0])
	s := New(Config{Now: time.Now})
	f.Fuzz(func(t *testing.T, b []byte) {
		if r := s.answer(Client{"g", "g"}, b, false); r != nil {
			var m dnsmessage.Message
			if err := m.Unpack(r); err != nil || len(r) > maxUDP {
				t.Fatalf("%d bytes, %v", len(r), err)
			}
		}
		if q, code, ok := parseQuery(b); ok && code == 0 {
			if _, err := upstreamQuery(q, 1); err != nil {
				t.Fatal(err)
			}
		}
		ask := &query{question: dnsmessage.Question{Name: dnsmessage.MustNewName("x."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}, size: leastUDP}
		if m, ok := parseAnswer(b, 1, ask); ok {
			if r := s.pack(ask, m, false); len(r) > leastUDP {
				t.Fatalf("%d bytes", len(r))
			}
		}
	})
}
