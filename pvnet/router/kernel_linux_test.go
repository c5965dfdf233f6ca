//go:build linux

package router

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"barevif/pvnet/link"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// patience is how long a step of the kernel tests may take on a loaded machine.
const patience = 2 * time.Minute

// A space is a network namespace, in which one thread runs.
type space struct{ calls chan func() }

func newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{make(chan func())}
	made, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		made <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range s.calls {
			f()
		}
	}()
	err := <-made
	t.Cleanup(func() { close(s.calls); <-ended })
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs root, for network namespaces:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *space) do(f func()) {
	done := make(chan struct{})
	s.calls <- func() { defer close(done); f() }
	<-done
}

// tap opens a TAP with addresses and default routes.
func (s *space) tap(t *testing.T, addrs []string, via ...string) (tap *link.TAP) {
	t.Helper()
	var err error
	s.do(func() {
		if tap, err = link.OpenTAP(link.TAPConfig{MTU: 1500}); err != nil {
			return
		}
		var l netlink.Link
		if l, err = netlink.LinkByName(tap.Name()); err != nil {
			return
		}
		for _, a := range addrs {
			p := netip.MustParsePrefix(a)
			x := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
			if p.Addr().Is6() {
				x.Flags = unix.IFA_F_NODAD
			}
			err = errors.Join(err, netlink.AddrAdd(l, x))
		}
		for _, a := range via {
			err = errors.Join(err, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(a), Dst: defaultRoute(a)}))
		}
	})
	if err != nil && tap == nil && (errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission)) {
		t.Skip("this machine gives no TAP:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return tap
}

func defaultRoute(via string) *net.IPNet {
	if ip(via).Is4() {
		return &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	}
	return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
}

// A rig moves frames between TAPs through a Router, as an appliance does.
type rig struct {
	t    *testing.T
	r    *Router
	taps map[PortID]*link.TAP
	from time.Time

	mu      sync.Mutex
	waiting []Packet // guarded by mu
}

func (g *rig) now() time.Duration { return time.Since(g.from) }

func (g *rig) serve(in PortID) {
	buf := make([]byte, link.MaxFrame)
	for {
		n, _, err := g.taps[in].ReadFrame([][]byte{buf})
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			g.t.Error(err)
			return
		}
		p := Packet{In: in, Head: bytes.Clone(buf[:n]), Total: n}
		g.process(p)
		if p.Head[12] == 8 && p.Head[13] == 6 || p.Head[12] == 0x86 {
			g.mu.Lock()
			again := g.waiting
			g.waiting = nil
			g.mu.Unlock()
			for _, p := range again {
				g.process(p)
			}
		}
	}
}

func (g *rig) process(p Packet) {
	batch := []Packet{p}
	g.r.Process(g.now(), batch)
	p = batch[0]
	switch p.Verdict {
	case VerdictForward:
		g.write(p.Out, p.Head)
	case VerdictReply:
		g.write(p.Out, p.AppendReply(nil))
	case VerdictFragment:
		var f Fragmenter
		if p.MTU != 1400 || !f.Init(p.Head, p.Total, p.MTU) {
			g.t.Errorf("not to be fragmented to %d bytes: %x", p.MTU, p.Head)
			return
		}
		for {
			head, from, n, ok := f.Next()
			if !ok {
				return
			}
			g.write(p.Out, append(bytes.Clone(head), p.Head[from:from+n]...))
		}
	case VerdictNeighbour:
		g.mu.Lock()
		if len(g.waiting) < 64 {
			g.waiting = append(g.waiting, p)
		}
		g.mu.Unlock()
	}
	if p.Ask || p.Verdict == VerdictNeighbour {
		g.write(p.Out, g.r.AppendSolicit(nil, p.Out, p.Next))
	}
}

func (g *rig) write(out PortID, frame []byte) {
	if _, err := g.taps[out].WriteFrame(link.Offload{}, [][]byte{frame}); err != nil && !errors.Is(err, net.ErrClosed) {
		g.t.Errorf("write to port %d: %v", out, err)
	}
}

// TestKernelsTalkThroughTheRouter joins two kernels, each in a namespace and behind a TAP, by a
// Router: TCP both ways through masquerading and over IPv6, large datagrams in
// fragments, a path with a smaller MTU, pings, and a TTL that runs out.
func TestKernelsTalkThroughTheRouter(t *testing.T) {
	client, far := newSpace(t), newSpace(t)
	c := baseConfig()
	c.Ports = []Port{c.Ports[0], c.Ports[2]}
	c.Ports[1].MTU = 1400
	r, err := New(Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Configure(c); err != nil {
		t.Fatal(err)
	}
	g := &rig{t: t, r: r, from: time.Now(), taps: map[PortID]*link.TAP{
		clientA: client.tap(t, []string{"10.1.0.5/24", "fd01::5/64"}, "10.1.0.1", "fd01::1"),
		uplink:  far.tap(t, []string{"192.0.2.1/24", server + "/32", "2001:db8::1/64", "2001:db8:1::9/128"}),
	}}
	// The server's kernel knows no way to the IPv4 clients: it sees the router alone.
	far.do(func() {
		l, err := netlink.LinkByName(g.taps[uplink].Name())
		if err == nil {
			_, to, _ := net.ParseCIDR("fd01::/64")
			err = netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: to, Gw: net.ParseIP("2001:db8::2")})
		}
		if err != nil {
			t.Error(err)
		}
	})
	var served sync.WaitGroup
	for id := range g.taps {
		served.Go(func() { g.serve(id) })
	}
	defer func() {
		for _, tap := range g.taps {
			tap.Close()
		}
		served.Wait()
	}()
	for _, x := range []struct{ name, server, client string }{{"IPv4 translated", server, "192.0.2.2"}, {"IPv6", "2001:db8:1::9", "fd01::5"}} {
		t.Run(x.name, func(t *testing.T) {
			t.Run("TCP", func(t *testing.T) { exchange(t, client, far, x.server, x.client) })
			t.Run("TTL", func(t *testing.T) { expires(t, client, x.server) })
			t.Run("ping", func(t *testing.T) { ping(t, client, x.server) })
			t.Run("UDP", func(t *testing.T) { datagrams(t, client, far, x.server) })
		})
	}
	s, _ := r.PortStats(clientA)
	if s.Dropped[ReasonTooBig] == 0 || s.Dropped[ReasonTTL] == 0 || s.Replies == 0 || s.Dropped[ReasonMalformed] != 0 || s.Dropped[ReasonChecksum] != 0 {
		t.Errorf("the client's port counts %+v", s)
	}
	t.Logf("client %+v", s)
}

// exchange sends a MiB to the server and has it sent back.
func exchange(t *testing.T, client, far *space, server, seenAs string) {
	var l net.Listener
	var c net.Conn
	var err error
	far.do(func() { l, err = net.Listen("tcp", net.JoinHostPort(server, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			peer <- err.Error()
			return
		}
		defer c.Close()
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		peer <- host
		all, err := io.ReadAll(c)
		if err == nil {
			_, err = c.Write(all)
		}
		if err != nil {
			t.Error(err)
		}
	}()
	client.do(func() { c, err = net.DialTimeout("tcp", l.Addr().String(), patience) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if got := <-peer; got != seenAs {
		t.Errorf("the server sees %s, want %s", got, seenAs)
	}
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i * 7 >> 3)
	}
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	back, err := io.ReadAll(c)
	if err != nil || sha256.Sum256(back) != sha256.Sum256(data) {
		t.Fatalf("%d bytes came back, %v", len(back), err)
	}
}

// expires sends a datagram that reaches the router and no farther, and wants to be told.
func expires(t *testing.T, client *space, server string) {
	var c net.Conn
	var err error
	client.do(func() { c, err = net.Dial("udp", net.JoinHostPort(server, "33434")) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		if ip(server).Is4() {
			set = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 1), unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1))
		} else {
			set = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 1), unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1))
		}
	})
	if err = errors.Join(err, set); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	if _, err = c.Read(make([]byte, 10)); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Fatalf("got %v, want to be told that the TTL ran out", err)
	}
}

// ping pings the server until it answers.
func ping(t *testing.T, client *space, server string) {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if ip(server).Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	var c net.Conn
	var err error
	client.do(func() { c, err = net.Dial(network, server) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := []byte{request, 0, 0, 0, 0x12, 0x34, 0, 1, 'p', 'i', 'n', 'g'}
	if ip(server).Is4() {
		sumInto(1, ip(server), ip(server), b, false, false)
	}
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	for got := make([]byte, 1500); ; {
		n, _, err := c.(*net.IPConn).ReadFrom(got) // without the IP header, unlike Read
		if err != nil {
			t.Fatal(err)
		}
		if n >= 12 && got[0] == reply && binary.BigEndian.Uint16(got[4:]) == 0x1234 && string(got[8:n]) == "ping" {
			return
		}
	}
}

// datagrams sends large datagrams to the server and back.
func datagrams(t *testing.T, client, far *space, server string) {
	var l net.PacketConn
	var c net.Conn
	var err error
	far.do(func() { l, err = net.ListenPacket("udp", net.JoinHostPort(server, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		b := make([]byte, 65536)
		for {
			n, from, err := l.ReadFrom(b)
			if err != nil {
				return
			}
			l.WriteTo(b[:n], from)
		}
	}()
	client.do(func() { c, err = net.Dial("udp", l.LocalAddr().String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if ip(server).Is4() {
		// Without DF, so that the router has to cut what the client's kernel has cut.
		if err := raw.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
		}); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, 65536)
	for _, size := range []int{1, 1372, 1472, 4000, 20000} {
		data := bytes.Repeat([]byte{byte(size)}, size)
		end := time.Now().Add(patience)
		for ok := false; !ok; { // a datagram may be lost, as the first beyond the path's MTU is over IPv6
			if time.Now().After(end) {
				t.Fatalf("no datagram of %d bytes came back", size)
			}
			if _, err := c.Write(data); err != nil && !errors.Is(err, unix.EMSGSIZE) {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			for {
				n, err := c.Read(got)
				if err != nil {
					break
				}
				if ok = bytes.Equal(got[:n], data); ok {
					break
				}
			}
		}
	}
}
