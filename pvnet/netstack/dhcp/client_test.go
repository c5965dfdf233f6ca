package dhcp

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var (
	testMAC    = [6]byte{0, 0x16, 0x3e, 1, 2, 3}
	testServer = netip.MustParseAddr("192.0.2.1")
	testAddr   = netip.MustParseAddr("192.0.2.77")
)

// A sent is a message of the client.
type sent struct {
	at  time.Duration // after the start
	to  netip.Addr    // zero: broadcast
	msg *dhcpv4.DHCPv4
}

// A rig runs a client in virtual time, whose messages answer gets.
type rig struct {
	t      *testing.T
	begun  time.Time
	answer func(r *rig, s sent) // may be nil
	log    []sent
	leases []*Lease // each call of Leased
	times  []time.Duration
	inUse  bool
	turns  atomic.Int32 // orders what the test did before the client goes on, for the race detector

	received chan []byte
	links    chan Link
}

// inBubble runs test with a client whose link is up.
func inBubble(t *testing.T, answer func(*rig, sent), test func(r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, begun: time.Now(), answer: answer, received: make(chan []byte, 64), links: make(chan Link, 8)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			Run(ctx, r.config())
		}()
		r.links <- Link{Up: true, Ups: 1, MAC: testMAC, Room: 1500}
		synctest.Wait()
		test(r)
		cancel()
		<-done
	})
}

func (r *rig) config() Config {
	took := func(b []byte, to netip.Addr) error {
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			r.t.Error(err)
			return err
		}
		r.turns.Load()
		s := sent{at: time.Since(r.begun), to: to, msg: m}
		r.log = append(r.log, s)
		if r.answer != nil {
			r.answer(r, s)
		}
		return nil
	}
	return Config{
		Broadcast: func(b []byte) error { return took(b, netip.Addr{}) },
		Unicast:   took,
		Received:  r.received,
		Links:     r.links,
		Leased: func(l *Lease) error {
			r.turns.Load()
			r.leases = append(r.leases, l)
			r.times = append(r.times, time.Since(r.begun))
			return nil
		},
		InUse:    func(context.Context, netip.Addr) bool { return r.inUse },
		Hostname: "web",
		Logger:   testLog,
	}
}

// reply answers m with a message of the type. Options replace the server's usual ones.
func (r *rig) reply(m *dhcpv4.DHCPv4, typ dhcpv4.MessageType, change ...func(*dhcpv4.DHCPv4)) {
	r.received <- replyTo(m, typ, change...).ToBytes()
}

func replyTo(m *dhcpv4.DHCPv4, typ dhcpv4.MessageType, change ...func(*dhcpv4.DHCPv4)) *dhcpv4.DHCPv4 {
	a, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(typ),
		dhcpv4.WithServerIP(testServer.AsSlice()), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(testServer.AsSlice())))
	if err != nil {
		panic(err)
	}
	if typ != dhcpv4.MessageTypeNak {
		a.YourIPAddr = testAddr.AsSlice()
		a.UpdateOption(dhcpv4.OptSubnetMask([]byte{255, 255, 255, 0}))
		a.UpdateOption(dhcpv4.OptRouter(testServer.AsSlice()))
		a.UpdateOption(dhcpv4.OptDNS(testServer.AsSlice(), []byte{9, 9, 9, 9}))
		a.UpdateOption(dhcpv4.OptIPAddressLeaseTime(time.Hour))
	}
	for _, f := range change {
		f(a)
	}
	return a
}

// serves answers as a server does.
func serves(r *rig, s sent) {
	switch s.msg.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		r.reply(s.msg, dhcpv4.MessageTypeOffer)
	case dhcpv4.MessageTypeRequest:
		r.reply(s.msg, dhcpv4.MessageTypeAck)
	}
}

// sleep lets virtual time pass.
func (r *rig) sleep(d time.Duration) {
	r.turns.Add(1)
	time.Sleep(d)
	synctest.Wait()
}

// types lists the types of the messages from the n-th on.
func (r *rig) types(n int) string {
	var b strings.Builder
	for _, s := range r.log[n:] {
		b.WriteString(s.msg.MessageType().String()[:1])
	}
	return b.String()
}

func TestAddressIsLeased(t *testing.T) {
	inBubble(t, serves, func(r *rig) {
		if got := r.types(0); got != "DR" || len(r.leases) != 1 {
			t.Fatalf("messages %s, %d leases", got, len(r.leases))
		}
		l := r.leases[0]
		if l.Addr != netip.PrefixFrom(testAddr, 24) || l.Server != testServer || l.Expire != time.Hour ||
			l.Renew != time.Hour/2 || l.Rebind != time.Hour*7/8 || len(l.DNS) != 2 || len(l.Routes) != 1 || l.Routes[0].Via != testServer {
			t.Errorf("%+v", l)
		}
		q := r.log[1].msg
		if !q.RequestedIPAddress().Equal(testAddr.AsSlice()) || !q.ServerIdentifier().Equal(testServer.AsSlice()) || q.HostName() != "web" {
			t.Error(q.Summary())
		}
		if q.TransactionID != r.log[0].msg.TransactionID || !q.IsBroadcast() {
			t.Error("the request is not that of the offer, or asks for no broadcast")
		}
	})
}

func TestLeaseIsRenewed(t *testing.T) {
	inBubble(t, serves, func(r *rig) {
		r.sleep(10*time.Hour + time.Minute)
		if n := len(r.leases); n != 21 || slices.Contains(r.leases, nil) {
			t.Errorf("%d leases in 10 hours, each renewed after half an hour", n)
		}
		for _, s := range r.log[2:] {
			if s.to != testServer || !s.msg.ClientIPAddr.Equal(testAddr.AsSlice()) || s.msg.ServerIdentifier() != nil || s.msg.IsBroadcast() {
				t.Errorf("at %v to %v: %s", s.at, s.to, s.msg.Summary())
			}
		}
	})
}

// A server that falls silent is asked, then any server, until the lease expires; then the client
// begins from the beginning.
func TestSilentServer(t *testing.T) {
	inBubble(t, serves, func(r *rig) {
		r.answer = nil
		r.sleep(time.Hour + time.Second)
		if len(r.leases) != 2 || r.leases[1] != nil || r.times[1] != time.Hour {
			t.Fatalf("%d changes at %v", len(r.leases), r.times)
		}
		unicast, broadcast := 0, 0
		for _, s := range r.log[2:] {
			switch {
			case s.at < time.Hour/2 || s.msg.MessageType() == dhcpv4.MessageTypeRequest && s.at >= time.Hour:
				t.Errorf("%v at %v", s.msg.MessageType(), s.at)
			case s.at < time.Hour*7/8 && s.to == testServer:
				unicast++
			case s.at >= time.Hour*7/8 && s.at < time.Hour && !s.to.IsValid():
				broadcast++
			case s.at < time.Hour:
				t.Errorf("at %v to %v", s.at, s.to)
			}
		}
		if unicast < 3 || broadcast < 2 || unicast+broadcast > 20 {
			t.Errorf("asked %d times, and %d times all", unicast, broadcast)
		}
		if last := r.log[len(r.log)-1]; last.msg.MessageType() != dhcpv4.MessageTypeDiscover {
			t.Error("after the lease: ", last.msg.MessageType())
		}
	})
}

// Another server may extend the lease once the client asks all.
func TestLeaseIsRebound(t *testing.T) {
	inBubble(t, serves, func(r *rig) {
		other := netip.MustParseAddr("192.0.2.9")
		r.answer = func(r *rig, s sent) {
			if !s.to.IsValid() {
				r.reply(s.msg, dhcpv4.MessageTypeAck, func(m *dhcpv4.DHCPv4) {
					m.UpdateOption(dhcpv4.OptServerIdentifier(other.AsSlice()))
				})
			}
		}
		r.sleep(time.Hour - time.Second)
		if len(r.leases) != 2 || r.leases[1] == nil || r.leases[1].Server != other || r.times[1] != time.Hour*7/8 {
			t.Errorf("%d leases at %v", len(r.leases), r.times)
		}
	})
}

func TestServerTakesTheLeaseBack(t *testing.T) {
	inBubble(t, serves, func(r *rig) {
		r.answer = func(r *rig, s sent) {
			if s.to.IsValid() {
				r.reply(s.msg, dhcpv4.MessageTypeNak)
			}
		}
		r.sleep(time.Hour/2 + time.Second)
		if len(r.leases) != 2 || r.leases[1] != nil || r.types(3) != "D" {
			t.Errorf("%d leases, then %s", len(r.leases), r.types(3))
		}
	})
}

// An answer to another request, for another station, or of another server does nothing.
func TestForeignAnswersAreIgnored(t *testing.T) {
	inBubble(t, serves, func(r *rig) {
		for name, change := range map[string]func(*dhcpv4.DHCPv4){
			"number":  func(m *dhcpv4.DHCPv4) { m.TransactionID[0]++ },
			"station": func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = []byte{2, 0, 0, 0, 0, 9} },
			"request": func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootRequest },
		} {
			if _, err := parse(replyTo(r.log[1].msg, dhcpv4.MessageTypeNak, change).ToBytes(), r.log[1].msg.TransactionID, testMAC); err != errForeign {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	inBubble(t, func(r *rig, s sent) {
		serves(r, sent{msg: s.msg})
		if s.msg.MessageType() == dhcpv4.MessageTypeRequest {
			return
		}
		r.answer = func(r *rig, s sent) {
			r.reply(s.msg, dhcpv4.MessageTypeNak, func(m *dhcpv4.DHCPv4) {
				m.UpdateOption(dhcpv4.OptServerIdentifier([]byte{192, 0, 2, 66}))
			})
			r.reply(s.msg, dhcpv4.MessageTypeAck, func(m *dhcpv4.DHCPv4) { m.YourIPAddr = []byte{192, 0, 2, 78} })
			r.reply(s.msg, dhcpv4.MessageTypeAck)
		}
	}, func(r *rig) {
		if len(r.leases) != 1 || r.leases[0].Addr.Addr() != testAddr {
			t.Errorf("%d leases, %s", len(r.leases), r.types(0))
		}
	})
}

// When the link comes up again the lease is confirmed: the card may be in another network.
func TestLinkThatComesUpAgain(t *testing.T) {
	up := func(r *rig, n int) {
		r.links <- Link{Ups: n - 1, MAC: testMAC, Room: 1500}
		r.links <- Link{Up: true, Ups: n, MAC: testMAC, Room: 1500}
		synctest.Wait()
	}
	inBubble(t, serves, func(r *rig) {
		up(r, 2)
		q := r.log[2]
		if r.types(2) != "R" || q.to.IsValid() || q.msg.ServerIdentifier() != nil || !q.msg.RequestedIPAddress().Equal(testAddr.AsSlice()) || !q.msg.ClientIPAddr.IsUnspecified() {
			t.Fatal(r.types(2), q.msg.Summary())
		}
		if len(r.leases) != 2 || r.leases[1] == nil {
			t.Errorf("%d leases", len(r.leases))
		}
		r.answer = nil // nobody answers: the lease holds
		up(r, 3)
		r.sleep(time.Minute)
		if len(r.leases) != 2 || r.types(3) != "RR" {
			t.Errorf("%d leases, %s", len(r.leases), r.types(3))
		}
		r.answer = func(r *rig, s sent) { r.reply(s.msg, dhcpv4.MessageTypeNak); r.answer = nil }
		up(r, 4)
		if len(r.leases) != 3 || r.leases[2] != nil {
			t.Errorf("another network: %d leases", len(r.leases))
		}
	})
}

// While the link is down nothing is sent, and the lease still expires.
func TestLinkThatIsDown(t *testing.T) {
	inBubble(t, serves, func(r *rig) {
		r.links <- Link{Ups: 1, MAC: testMAC}
		n := len(r.log)
		r.sleep(2 * time.Hour)
		if len(r.log) != n || len(r.leases) != 2 || r.leases[1] != nil || r.times[1] != time.Hour {
			t.Errorf("sent %s, %d leases at %v", r.types(n), len(r.leases), r.times)
		}
		r.links <- Link{Up: true, Ups: 2, MAC: testMAC}
		synctest.Wait()
		if len(r.leases) != 3 || r.leases[2] == nil {
			t.Errorf("%d leases", len(r.leases))
		}
	})
}

func TestCardWithAnotherMAC(t *testing.T) {
	inBubble(t, serves, func(r *rig) {
		other := testMAC
		other[5]++
		r.links <- Link{Up: true, Ups: 2, MAC: other}
		synctest.Wait()
		if len(r.leases) != 3 || r.leases[1] != nil || r.leases[2] == nil || r.types(2) != "DR" {
			t.Fatalf("%d leases, %s", len(r.leases), r.types(2))
		}
		if got := r.log[2].msg.ClientHWAddr.String(); got != "00:16:3e:01:02:04" {
			t.Error(got)
		}
	})
}

func TestAddressInUseIsDeclined(t *testing.T) {
	inBubble(t, func(r *rig, s sent) {
		r.inUse = true
		serves(r, s)
	}, func(r *rig) {
		if r.types(0) != "DRD" || r.log[2].msg.MessageType() != dhcpv4.MessageTypeDecline || len(r.leases) != 0 {
			t.Fatal(r.types(0), len(r.leases))
		}
		r.sleep(declinePause)
		if n := len(r.log); n > 4+2 {
			t.Errorf("%d messages within %v", n, declinePause)
		}
	})
}

// Whatever servers answer, they do not make the client send without end.
func TestHostileServersDoNotMakeAStorm(t *testing.T) {
	for name, answer := range map[string]func(*rig, sent){
		"silent": nil,
		"NAK": func(r *rig, s sent) {
			if s.msg.MessageType() == dhcpv4.MessageTypeDiscover {
				r.reply(s.msg, dhcpv4.MessageTypeOffer)
				return
			}
			r.reply(s.msg, dhcpv4.MessageTypeNak)
		},
		"in use": func(r *rig, s sent) { r.inUse = true; serves(r, s) },
		"impossible": func(r *rig, s sent) {
			r.reply(s.msg, dhcpv4.MessageTypeOffer, func(m *dhcpv4.DHCPv4) { m.YourIPAddr = []byte{0, 0, 0, 0} })
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, answer, func(r *rig) {
				r.sleep(time.Hour)
				if n := len(r.log); n < 30 || n > 300 || len(r.leases) > 0 {
					t.Errorf("%d messages in an hour, %d leases", n, len(r.leases))
				}
			})
		})
	}
	t.Run("short", func(t *testing.T) {
		inBubble(t, func(r *rig, s sent) {
			typ := dhcpv4.MessageTypeOffer
			if s.msg.MessageType() == dhcpv4.MessageTypeRequest {
				typ = dhcpv4.MessageTypeAck
			}
			r.reply(s.msg, typ, func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptIPAddressLeaseTime(MinExpire)) })
		}, func(r *rig) {
			r.sleep(time.Hour)
			if n := len(r.log); n > 750 {
				t.Errorf("%d messages in an hour", n)
			}
		})
	})
}

// A client that nobody answers repeats its DISCOVER, less and less often, sends nothing else, and
// asks at once when the link comes up.
func TestDiscoverIsRepeated(t *testing.T) {
	inBubble(t, nil, func(r *rig) {
		r.sleep(10 * time.Second)
		if n := len(r.log); n < 3 || n > 5 {
			t.Errorf("%s within 10 s", r.types(0))
		}
		r.sleep(10 * time.Minute)
		n := len(r.log)
		if strings.Trim(r.types(0), "D") != "" || slices.ContainsFunc(r.log, func(s sent) bool { return s.msg.MessageType() != dhcpv4.MessageTypeDiscover }) {
			t.Error(r.types(0))
		}
		r.turns.Add(1)
		r.links <- Link{Up: true, Ups: 2, MAC: testMAC}
		synctest.Wait()
		if len(r.log) != n+1 {
			t.Errorf("%d messages when the link came up", len(r.log)-n)
		}
	})
}

// What comes when nothing was asked does nothing, and what is refused is logged once per request.
func TestUnaskedAndRefusedMessages(t *testing.T) {
	var log bytes.Buffer
	impossible := func(m *dhcpv4.DHCPv4) { m.YourIPAddr = []byte{0, 0, 0, 0} }
	testLog = slog.New(slog.NewTextHandler(&log, nil))
	defer func() { testLog = nil }()
	inBubble(t, func(r *rig, s sent) {
		foreign := replyTo(s.msg, dhcpv4.MessageTypeOffer, func(m *dhcpv4.DHCPv4) { m.TransactionID[0]++ })
		r.received <- foreign.ToBytes()
		for range 3 {
			r.reply(s.msg, dhcpv4.MessageTypeOffer, impossible)
		}
		serves(r, s)
	}, func(r *rig) {
		if n := strings.Count(log.String(), "is refused"); n != 2 || len(r.leases) != 1 {
			t.Errorf("%d refusals of 2 requests are in the log, %d leases\n%s", n, len(r.leases), log.String())
		}
		r.turns.Add(1)
		for _, typ := range []dhcpv4.MessageType{dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeOffer} {
			r.reply(r.log[1].msg, typ)
			r.reply(r.log[1].msg, typ, impossible)
		}
		synctest.Wait()
		if len(r.leases) != 1 || len(r.log) != 2 || strings.Count(log.String(), "is refused") != 2 {
			t.Errorf("%d leases, %s\n%s", len(r.leases), r.types(0), log.String())
		}
	})
}

// testLog gets what clients log; nil: nobody.
var testLog *slog.Logger
