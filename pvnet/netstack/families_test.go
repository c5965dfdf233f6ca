package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"barevif/pvnet"

	"golang.org/x/net/dns/dnsmessage"
)

var (
	front6 = netip.MustParsePrefix("2001:db8::1/64")
	back6  = netip.MustParsePrefix("2001:db8::2/64")
)

// both returns a stack of both families at each end of a vif. The front's has two IPv4 addresses.
func both(t *testing.T, cfg Config) (front, back *Stack) {
	t.Helper()
	w := newWire(t, 1500, pvnet.Config{})
	cfg.Addr, cfg.Addrs = frontIP, []netip.Prefix{front6, netip.MustParsePrefix("198.51.100.1/24")}
	front = newStack(t, w.Front, cfg)
	return front, newStack(t, w.Back, Config{Addr: backIP, Addrs: []netip.Prefix{back6, netip.MustParsePrefix("198.51.100.2/24")}})
}

func TestOneListenerTakesAllAddresses(t *testing.T) {
	front, back := both(t, Config{})
	for i, c := range []struct{ network, address, takes string }{
		{"tcp", ":", "192.0.2.1 198.51.100.1 2001:db8::1"},
		{"tcp", "[::]:", "192.0.2.1 198.51.100.1 2001:db8::1"},
		{"tcp4", ":", "192.0.2.1 198.51.100.1"},
		{"tcp6", ":", "2001:db8::1"},
		{"tcp", "0.0.0.0:", "192.0.2.1 198.51.100.1"},
		{"tcp", "198.51.100.1:", "198.51.100.1"},
	} {
		port := strconv.Itoa(80 + i)
		l, err := front.Listen(c.network, c.address+port)
		if err != nil {
			t.Fatal(c, err)
		}
		for _, host := range []string{"192.0.2.1", "198.51.100.1", "2001:db8::1"} {
			conn, err := back.DialContext(within(t), "tcp", net.JoinHostPort(host, port))
			if want := strings.Contains(c.takes, host); (err == nil) != want || !want && !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%v: %s: %v", c, host, err)
			}
			if err != nil {
				continue
			}
			a, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if from := a.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); from.Is4() != netip.MustParseAddr(host).Is4() {
				t.Errorf("%v: from %v", c, from)
			}
			a.Close()
			conn.Close()
		}
		l.Close()
	}
}

func TestOneSocketAnswersBothFamilies(t *testing.T) {
	front, back := both(t, Config{})
	echo, err := front.ListenPacket("udp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 100)
		for {
			n, from, err := echo.ReadFrom(b)
			if err != nil {
				return
			}
			if _, err := echo.WriteTo(b[:n], from); err != nil {
				t.Error(err)
			}
		}
	}()
	for _, host := range []string{"192.0.2.1", "198.51.100.1", "2001:db8::1"} {
		c, err := back.Dial("udp", net.JoinHostPort(host, "7"))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(limit))
		io.WriteString(c, host)
		b := make([]byte, 100)
		if n, err := c.Read(b); string(b[:n]) != host {
			t.Errorf("%q, %v", b[:n], err)
		}
		c.Close()
	}
	only4, err := front.ListenPacket("udp4", ":8")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := only4.WriteTo(nil, &net.UDPAddr{IP: net.ParseIP("2001:db8::2"), Port: 7}); err == nil || !strings.Contains(err.Error(), "family") {
		t.Error("udp4 to IPv6: ", err)
	}
}

func TestPing(t *testing.T) {
	front, back := both(t, Config{})
	for _, host := range []string{"192.0.2.1", "198.51.100.1", "2001:db8::1", "::ffff:192.0.2.1"} {
		if d, err := back.Ping(within(t), netip.MustParseAddr(host)); err != nil || d <= 0 {
			t.Errorf("%s: %v, %v", host, d, err)
		}
	}
	short, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	for to, want := range map[string]error{"203.0.113.1": syscall.ENETUNREACH, "192.0.2.99": context.DeadlineExceeded} {
		if _, err := back.Ping(short, netip.MustParseAddr(to)); !errors.Is(err, want) {
			t.Errorf("%s: %v", to, err)
		}
	}
	front.Close()
	if _, err := front.Ping(within(t), backIP.Addr()); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// names answers queries at port 53 of s: web.example. has addresses of both families. While mute
// it does not answer.
func names(t *testing.T, s *Stack, address string, mute *atomic.Bool, asked *atomic.Int32) {
	t.Helper()
	c, err := s.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			asked.Add(1)
			var m dnsmessage.Message
			if err := m.Unpack(b[:n]); err != nil || len(m.Questions) != 1 {
				t.Errorf("%v, %d questions", err, len(m.Questions))
				continue
			}
			if mute.Load() {
				continue
			}
			q := m.Questions[0]
			m.Response, m.Additionals = true, nil
			head := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type, TTL: 60}
			switch {
			case q.Name.String() != "web.example.":
				m.RCode = dnsmessage.RCodeNameError
			case q.Type == dnsmessage.TypeA:
				m.Answers = []dnsmessage.Resource{{Header: head, Body: &dnsmessage.AResource{A: [4]byte{203, 0, 113, 1}}},
					{Header: head, Body: &dnsmessage.AResource{A: backIP.Addr().As4()}}}
			case q.Type == dnsmessage.TypeAAAA:
				m.Answers = []dnsmessage.Resource{{Header: head, Body: &dnsmessage.AAAAResource{AAAA: back6.Addr().As16()}}}
			}
			out, err := m.Pack()
			if err != nil {
				t.Error(err)
			}
			c.WriteTo(out, from)
		}
	}()
}

// A program asks the stack's name servers, over the stack, and net/http takes URLs with names.
func TestNamesAreLookedUpOverTheStack(t *testing.T) {
	front, back := both(t, Config{DNS: []netip.Addr{backIP.Addr()}})
	var mute atomic.Bool
	var asked atomic.Int32
	names(t, back, ":53", &mute, &asked)
	addrs, err := front.Resolver().LookupNetIP(within(t), "ip", "web.example")
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	if err != nil || len(addrs) != 3 || !slices.Contains(addrs, backIP.Addr()) || !slices.Contains(addrs, back6.Addr()) {
		t.Fatal(addrs, err)
	}
	var missing *net.DNSError
	if _, err := front.Dial("tcp", "none.example:80"); !errors.As(err, &missing) || !missing.IsNotFound {
		t.Errorf("%v", err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Host) })}
	go srv.Serve(listen(t, back, ":80"))
	defer srv.Close()
	tr := &http.Transport{DialContext: front.DialContext, DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr, Timeout: limit}).Get("http://web.example/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, _ := io.ReadAll(resp.Body); string(b) != "web.example" {
		t.Errorf("%q", b)
	}
	for network, want := range map[string]string{"tcp4": "192.0.2.2:80", "tcp6": "[2001:db8::2]:80", "udp4": "203.0.113.1:80 192.0.2.2:80"} {
		c, err := front.DialContext(within(t), network, "web.example:80")
		if err != nil {
			t.Errorf("%s: %v", network, err)
			continue
		}
		if !strings.Contains(want, c.RemoteAddr().String()) {
			t.Errorf("%s: %v", network, c.RemoteAddr())
		}
		c.Close()
	}
	if _, err := front.Listen("tcp", "web.example:80"); err == nil || !strings.Contains(err.Error(), "not an IP address") {
		t.Error("a name of ours: ", err)
	}
	if _, err := front.Dial("tcp", "web.example:http"); err == nil || !strings.Contains(err.Error(), "port") {
		t.Error(err)
	}
	if _, err := back.Resolver().LookupHost(within(t), "web.example"); err == nil || !strings.Contains(err.Error(), "no name servers") {
		t.Error(err)
	}
}

// A name server that does not answer is asked last from then on.
func TestSilentNameServerIsAskedLast(t *testing.T) {
	front, back := both(t, Config{DNS: []netip.Addr{backIP.Addr(), back6.Addr()}})
	var mute, loud atomic.Bool
	var first, second atomic.Int32
	mute.Store(true)
	names(t, back, fmt.Sprintf("%v:53", backIP.Addr()), &mute, &first)
	names(t, back, fmt.Sprintf("[%v]:53", back6.Addr()), &loud, &second)
	r := front.Resolver()
	if _, err := r.LookupNetIP(within(t), "ip4", "web.example"); err != nil {
		t.Fatal(err)
	}
	if first.Load() == 0 || second.Load() == 0 {
		t.Fatalf("asked %d and %d times", first.Load(), second.Load())
	}
	was := first.Load()
	if _, err := r.LookupNetIP(within(t), "ip4", "web.example"); err != nil || first.Load() != was {
		t.Errorf("%v, and the silent one was asked again", err)
	}
}

func TestConfigOfBothFamiliesIsChecked(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	ip, prefix := netip.MustParseAddr, netip.MustParsePrefix
	for name, cfg := range map[string]Config{
		"twice":             {Addr: frontIP, Addrs: []netip.Prefix{frontIP}},
		"mapped":            {Addrs: []netip.Prefix{prefix("::ffff:192.0.2.1/120")}},
		"broadcast":         {Addrs: []netip.Prefix{prefix("255.255.255.255/32")}},
		"loopback":          {Addr: prefix("127.0.0.1/8")},
		"loopback6":         {Addr: prefix("::1/64")},
		"the network's own": {Addr: prefix("10.0.0.0/24")},
		"its broadcast":     {Addr: prefix("10.0.3.255/22")},
		"zero":              {Addr: frontIP, Addrs: []netip.Prefix{{}}},
		"two routers":       {Addr: frontIP, Gateway: ip("192.0.2.8"), Gateways: []netip.Addr{ip("192.0.2.9")}},
		"itself":            {Addr: frontIP, Gateway: frontIP.Addr()},
		"router elsewhere":  {Addr: frontIP, Gateways: []netip.Addr{ip("2001:db8::1")}},
		"link-local alone":  {Addr: frontIP, Gateway: ip("fe80::1")},
		"zone":              {Addr: front6, Gateway: ip("fe80::1%eth0")},
		"DNS":               {Addr: frontIP, DNS: []netip.Addr{ip("224.0.0.1")}},
		"DNS zero":          {Addr: frontIP, DNS: []netip.Addr{{}}},
		"MTU of both":       {Addr: frontIP, Addrs: []netip.Prefix{front6}, MTU: 1279},
		"MTU of RA":         {Addr: frontIP, RA: true, MTU: 1279},
		"nothing but a DNS": {DNS: []netip.Addr{ip("192.0.2.53")}},
	} {
		if s, err := New(w.Front, cfg); err == nil {
			s.Close()
			t.Errorf("%s was taken", name)
		}
	}
	for _, p := range []string{"10.0.0.0/31", "10.0.0.1/31", "10.0.0.0/32", "10.0.0.255/23"} {
		if err := (&Config{Addr: prefix(p)}).check(1500); err != nil {
			t.Error(err)
		}
	}
	s := newStack(t, w.Front, Config{Addr: frontIP, Gateway: ip("192.0.2.9"), Addrs: []netip.Prefix{front6}, Gateways: []netip.Addr{ip("fe80::9")}})
	if now := s.Settings(); len(now.Routes) != 2 || len(now.Addrs) != 2 {
		t.Errorf("%+v", now)
	}
	if !s.routed(ip("203.0.113.1")) || !s.routed(ip("2001:db8:1::1")) {
		t.Error("no default routes")
	}
}
