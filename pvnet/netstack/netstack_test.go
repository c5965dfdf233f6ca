package netstack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/packet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"

	"golang.org/x/net/nettest"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// limit bounds every wait of a test; no working test comes near it.
const limit = 2 * time.Minute

var (
	frontMAC = pvnet.MAC{0, 0x16, 0x3e, 0, 0, 1}
	frontIP  = netip.MustParsePrefix("192.0.2.1/24")
	backIP   = netip.MustParsePrefix("192.0.2.2/24")
)

func newWire(t testing.TB, mtu int, cfg pvnet.Config) *pvnettest.Wire {
	t.Helper()
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	return pvnettest.New(t, toolstack.Vif{MAC: frontMAC, MTU: mtu}, cfg, cfg)
}

func newStack(t testing.TB, dev *pvnet.Device, cfg Config) *Stack {
	t.Helper()
	s, err := New(dev, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// two returns a stack at each end of a vif.
func two(t testing.TB, mtu int, cfg pvnet.Config) (front, back *Stack) {
	t.Helper()
	w := newWire(t, mtu, cfg)
	return newStack(t, w.Front, Config{Addr: frontIP}), newStack(t, w.Back, Config{Addr: backIP})
}

func listen(t testing.TB, s *Stack, address string) net.Listener {
	t.Helper()
	l, err := s.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// connect returns both ends of a connection from a to b.
func connect(t testing.TB, a, b *Stack) (client, server net.Conn) {
	t.Helper()
	l := listen(t, b, ":0")
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	address := fmt.Sprintf("%s:%d", b.Addr(), l.Addr().(*net.TCPAddr).Port)
	client, err := a.DialContext(ctx, "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	client.SetDeadline(time.Now().Add(limit))
	server.SetDeadline(time.Now().Add(limit))
	return client, server
}

func TestHTTPOverAVif(t *testing.T) {
	front, back := two(t, 1500, pvnet.Config{})
	body := bytes.Repeat([]byte("barevif "), 1<<16)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Write(got)
	})}
	l := listen(t, front, ":80")
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	tr := &http.Transport{DialContext: back.DialContext}
	client := &http.Client{Transport: tr, Timeout: limit}
	for range 3 {
		resp, err := client.Post("http://192.0.2.1/", "text/plain", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, body) {
			t.Fatalf("%d bytes of %d, %v", len(got), len(body), err)
		}
	}
	tr.CloseIdleConnections()
	srv.Close()
	if err := <-served; err != http.ErrServerClosed {
		t.Error(err)
	}
}

// nettest's requirements for a net.Conn.
func TestConnIsANetConn(t *testing.T) {
	front, back := two(t, 1500, pvnet.Config{})
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		c1, c2 = connect(t, front, back)
		c1.SetDeadline(time.Time{})
		c2.SetDeadline(time.Time{})
		return c1, c2, func() { c1.Close(); c2.Close() }, nil
	})
}

func TestBulkIsWhole(t *testing.T) {
	for _, c := range []struct {
		name string
		mtu  int
		cfg  pvnet.Config
	}{
		{"1500", 1500, pvnet.Config{}},
		{"9000", 9000, pvnet.Config{}},
		{"576", 576, pvnet.Config{}},
		{"lent", 1500, pvnet.Config{LendRx: true}},
		{"queues", 1500, pvnet.Config{Queues: 3}},
		{"offload", 1500, pvnet.Config{Offload: true}},
		{"offload, lent", 1500, pvnet.Config{Offload: true, LendRx: true}},
		{"offload, 9000", 9000, pvnet.Config{Offload: true}},
		{"offload, queues", 1500, pvnet.Config{Offload: true, Queues: 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			front, back := two(t, c.mtu, c.cfg)
			var wg sync.WaitGroup
			for i := range 4 {
				a, b := front, back
				if i%2 == 1 {
					a, b = back, front
				}
				client, server := connect(t, a, b)
				const size = 4 << 20
				wg.Go(func() {
					defer client.Close()
					r := rand.NewChaCha8([32]byte{byte(i)})
					if _, err := io.CopyN(client, r, size); err != nil {
						t.Error(err)
					}
				})
				wg.Go(func() {
					got, want := sha256.New(), sha256.New()
					io.CopyN(want, rand.NewChaCha8([32]byte{byte(i)}), size)
					n, err := io.Copy(got, server)
					if n != size || err != nil || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
						t.Errorf("%d bytes, %v", n, err)
					}
				})
			}
			wg.Wait()
			for _, s := range []*Stack{front, back} {
				if st := s.Stats(); st.Unsent != 0 || st.Foreign != 0 {
					t.Errorf("%+v", st)
				}
				if st := s.card.dev.Stats(); (st.TX.Get(telemetry.GSOPackets) > 0) != c.cfg.Offload {
					t.Errorf("%d long frames sent", st.TX.Get(telemetry.GSOPackets))
				}
			}
		})
	}
}

// Neither end sends a packet longer than its MTU.
func TestMTUIsHonoured(t *testing.T) {
	w := newWire(t, 9000, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: frontIP, MTU: 1000})
	back := newStack(t, w.Back, Config{Addr: backIP})
	client, server := connect(t, front, back)
	go func() { client.Write(make([]byte, 1<<20)); client.Close() }()
	if n, err := io.Copy(io.Discard, server); n != 1<<20 || err != nil {
		t.Fatal(n, err)
	}
	front.Close()
	st := w.Front.Stats()
	bytes, packets := st.TX.Get(telemetry.Bytes), st.TX.Get(telemetry.Packets)
	if mean := bytes / packets; mean > 1014 || mean < 900 {
		t.Errorf("%d bytes in %d packets: %d each", bytes, packets, mean)
	}
}

func TestUDP(t *testing.T) {
	front, back := two(t, 1500, pvnet.Config{})
	server, err := front.ListenPacket("udp", ":53")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := server.ReadFrom(b)
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			if _, err := server.WriteTo(b[:n], from); err != nil {
				t.Error(err)
			}
		}
	}()
	c, err := back.Dial("udp", "192.0.2.1:53")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	for _, size := range []int{0, 1, 512, 1472, 1473, 20000} { // the last two need fragments
		want := bytes.Repeat([]byte{byte(size)}, size)
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 1<<16)
		n, err := c.Read(got)
		if err != nil || !bytes.Equal(got[:n], want) {
			t.Fatalf("%d bytes of %d, %v", n, size, err)
		}
	}
	if _, err := server.WriteTo(nil, nil); err == nil || !strings.Contains(err.Error(), "not a *net.UDPAddr") {
		t.Errorf("a datagram to nobody: %v", err)
	}
	if _, err := server.WriteTo(nil, (*net.UDPAddr)(nil)); err == nil {
		t.Error("a datagram to a nil address was sent")
	}
	if _, err := server.WriteTo(nil, &net.TCPAddr{}); err == nil {
		t.Error("wrote to a TCP address")
	}
	if _, err := server.WriteTo(nil, &net.UDPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1}); err == nil {
		t.Error("wrote to an address of another family")
	}
}

func TestIPv6(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: netip.MustParsePrefix("2001:db8::1/64")})
	back := newStack(t, w.Back, Config{Addr: netip.MustParsePrefix("2001:db8::2/64"), Gateway: netip.MustParseAddr("2001:db8::1")})
	l := listen(t, front, "[2001:db8::1]:80")
	go func() {
		if c, err := l.Accept(); err == nil {
			io.Copy(c, c)
			c.Close()
		}
	}()
	c, err := back.Dial("tcp6", "[2001:db8::1]:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	io.WriteString(c, "hello")
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}
}

func TestErrorsAreThoseOfTheNetPackage(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: frontIP})
	back := newStack(t, w.Back, Config{Addr: backIP, Gateway: netip.MustParseAddr("192.0.2.9")})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	over, end := context.WithCancelCause(context.Background())
	cause := errors.New("enough")
	end(cause)
	listen(t, front, ":80")
	for _, c := range []struct {
		what string
		do   func() error
		want error
		text string
	}{
		{"refused", func() error { _, err := back.Dial("tcp", "192.0.2.1:9"); return err }, syscall.ECONNREFUSED, ""},
		{"no route", func() error { _, err := front.Dial("tcp", "198.51.100.1:9"); return err }, syscall.ENETUNREACH, ""},
		{"nobody there", func() error { _, err := back.Dial("tcp", "192.0.2.77:9"); return err }, syscall.EHOSTUNREACH, ""},
		{"timeout", func() error { _, err := back.DialContext(ctx, "tcp", "192.0.2.78:9"); return err }, context.DeadlineExceeded, ""},
		{"over", func() error { _, err := back.DialContext(over, "tcp", "192.0.2.1:80"); return err }, cause, ""},
		{"in use", func() error { _, err := front.Listen("tcp", ":80"); return err }, syscall.EADDRINUSE, ""},
		{"not ours", func() error { _, err := front.Listen("tcp", "192.0.2.3:80"); return err }, syscall.EADDRNOTAVAIL, ""},
		{"UDP not ours", func() error { _, err := front.ListenPacket("udp", "192.0.2.3:80"); return err }, syscall.EADDRNOTAVAIL, ""},
		{"name", func() error { _, err := front.Dial("tcp", "example.org:80"); return err }, nil, "not an IP address"},
		{"family", func() error { _, err := front.Dial("tcp", "[2001:db8::1]:80"); return err }, nil, "family"},
		{"family", func() error { _, err := front.Dial("tcp6", "192.0.2.2:80"); return err }, nil, "family"},
		{"network", func() error { _, err := front.Dial("sctp", "192.0.2.2:80"); return err }, nil, "unknown network"},
		{"network", func() error { _, err := front.Listen("udp", ":80"); return err }, nil, "unknown network"},
		{"network", func() error { _, err := front.ListenPacket("tcp", ":80"); return err }, nil, "unknown network"},
		{"port", func() error { _, err := front.Listen("tcp", ":http"); return err }, nil, "port"},
	} {
		err := c.do()
		var op *net.OpError
		if !errors.As(err, &op) || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.what, err)
		}
	}

	a, b := connect(t, front, back)
	a.SetReadDeadline(time.Now().Add(-1))
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	a.Close()
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := a.Write(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := b.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("peer closed: %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	for _, cfg := range []Config{
		{},
		{Addr: netip.MustParsePrefix("0.0.0.0/0")},
		{Addr: netip.MustParsePrefix("224.0.0.1/24")},
		{Addr: frontIP, MTU: 1501},
		{Addr: frontIP, MTU: 67},
		{Addr: netip.MustParsePrefix("2001:db8::1/64"), MTU: 1279},
		{Addr: frontIP, Gateway: netip.MustParseAddr("198.51.100.1")},
		{Addr: frontIP, Gateway: netip.MustParseAddr("2001:db8::1")},
	} {
		if s, err := New(w.Front, cfg); err == nil {
			s.Close()
			t.Errorf("%+v was taken", cfg)
		}
	}
	// None of the refused configurations took the device's halves.
	newStack(t, w.Front, Config{Addr: frontIP})
	if _, err := New(w.Front, Config{Addr: frontIP}); !errors.Is(err, pvnet.ErrOwned) || !strings.Contains(err.Error(), "vif 0 has another stack or owner") {
		t.Errorf("a second stack on one device: %v", err)
	}
}

func TestCloseWakesEveryone(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(w *pvnettest.Wire, s *Stack)
	}{
		{"stack", func(_ *pvnettest.Wire, s *Stack) { s.Close() }},
		{"device", func(w *pvnettest.Wire, _ *Stack) { w.Front.Disconnect() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWire(t, 1500, pvnet.Config{})
			front := newStack(t, w.Front, Config{Addr: frontIP})
			back := newStack(t, w.Back, Config{Addr: backIP})
			a, b := connect(t, front, back)
			l := listen(t, front, ":80")
			u, err := front.ListenPacket("udp", ":53")
			if err != nil {
				t.Fatal(err)
			}
			full, _ := connect(t, front, back)
			a.SetDeadline(time.Time{})
			full.SetDeadline(time.Time{})
			calls := map[string]func() error{
				"Accept":   func() error { _, err := l.Accept(); return err },
				"Read":     func() error { _, err := a.Read(make([]byte, 1)); return err },
				"ReadFrom": func() error { _, _, err := u.ReadFrom(make([]byte, 1)); return err },
				"Write": func() error { // blocks once all buffers are full
					_, err := full.Write(make([]byte, 64<<20))
					return err
				},
				"Dial": func() error { _, err := front.Dial("tcp", "192.0.2.99:1"); return err },
			}
			type result struct {
				name string
				err  error
			}
			results := make(chan result, len(calls))
			var started sync.WaitGroup
			for name, call := range calls {
				started.Add(1)
				go func() {
					started.Done()
					results <- result{name, call()}
				}()
			}
			started.Wait()
			c.end(w, front)
			for range calls {
				select {
				case r := <-results:
					if !errors.Is(r.err, net.ErrClosed) {
						t.Errorf("%s: %v", r.name, r.err)
					}
				case <-time.After(limit):
					buf := make([]byte, 1<<16)
					t.Fatalf("someone still waits\n%s", buf[:runtime.Stack(buf, true)])
				}
			}
			if _, err := front.Listen("tcp", ":81"); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Listen afterwards: %v", err)
			}
			if _, err := front.Dial("udp", "192.0.2.2:1"); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Dial afterwards: %v", err)
			}
			if c.name == "stack" { // the peer gets a reset
				if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the other end: %v", err)
				}
			}
			for range 2 {
				if err := front.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestConnectionsOutliveAReconnect(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	back := newStack(t, w.Back, Config{Addr: backIP})
	front := newStack(t, w.Front, Config{Addr: frontIP})
	a, _ := connect(t, front, back)
	// The guest's device ends, and its stack with it; the backend's stack goes on.
	w.Front.Disconnect()
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
	front.Close()
	w.Connect()
	front = newStack(t, w.Front, Config{Addr: frontIP})
	c, d := connect(t, front, back)
	go io.WriteString(c, "hello")
	got := make([]byte, 5)
	if _, err := io.ReadFull(d, got); err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}
}

// The vif is plugged again with another MAC and MTU. The stack uses these for old
// connections and new ones.
func TestTheStackFollowsItsCard(t *testing.T) {
	for _, offload := range []bool{false, true} {
		t.Run(fmt.Sprint("offload=", offload), func(t *testing.T) {
			w := newWire(t, 9000, pvnet.Config{Offload: offload})
			front := newStack(t, w.Front, Config{Addr: frontIP, MTU: 8000})
			back := newStack(t, w.Back, Config{Addr: backIP})
			old, far := connect(t, front, back)
			go io.WriteString(old, "hello")
			if _, err := io.ReadFull(far, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}

			// The backend's end of the old connection has ended with its device, which
			// it would not behind a bridge. So the test inspects the frames.
			other := pvnet.MAC{0, 0x16, 0x3e, 7, 7, 7}
			w.Plug(other, 1400)
			if front.card.MTU() != 1400 || front.card.LinkAddress() != tcpip.LinkAddress(other[:]) {
				t.Errorf("MTU %d, address %v", front.card.MTU(), front.card.LinkAddress())
			}
			if info := front.network.net.NICInfo()[nic]; info.MTU != 1400 || info.LinkAddress != tcpip.LinkAddress(other[:]) {
				t.Errorf("the stack's card has MTU %d, address %v", info.MTU, info.LinkAddress)
			}
			frames := make(chan []byte, 1024)
			listening, stop := context.WithCancel(context.Background())
			heard := make(chan error, 1)
			go func() {
				heard <- w.Back.Listen(listening, func(f pvnet.Frame) {
					if g := f.GSO(); g.Size > 1400-52 {
						t.Errorf("to be cut every %d bytes", g.Size)
					}
					b := make([]byte, f.Len())
					f.CopyTo(b)
					if f.Checksum() == pvnet.ChecksumPartial {
						b = b[:14] // a GSO frame has no checksum yet, and may be longer than the MTU
					}
					select {
					case frames <- b:
					default:
					}
				})
			}()
			old.SetDeadline(time.Now().Add(limit))
			go old.Write(make([]byte, 1<<18))
			for range 5 {
				b := <-frames
				eth := header.Ethernet(b)
				if eth.SourceAddress() != tcpip.LinkAddress(other[:]) {
					t.Errorf("a frame from %v", eth.SourceAddress())
				}
				if len(b) > 1414 {
					t.Errorf("a frame of %d bytes", len(b))
				}
				if eth.Type() != header.IPv4ProtocolNumber || len(b) == 14 {
					continue
				}
				ip := header.IPv4(b[14:])
				segment := header.TCP(ip.Payload())
				data := segment[segment.DataOffset():]
				if !segment.IsChecksumValid(ip.SourceAddress(), ip.DestinationAddress(), checksum.Checksum(data, 0), uint16(len(data))) {
					t.Errorf("a segment of %d bytes with a wrong checksum", len(data))
				}
			}
			stop()
			<-heard

			back = newStack(t, w.Back, Config{Addr: backIP})
			c, d := connect(t, front, back)
			before := w.Front.Stats()
			go func() { c.Write(make([]byte, 1<<20)); c.Close() }()
			if n, err := io.Copy(io.Discard, d); n != 1<<20 || err != nil {
				t.Fatal(n, err)
			}
			if after := w.Front.Stats(); !offload {
				bytes := after.TX.Get(telemetry.Bytes) - before.TX.Get(telemetry.Bytes)
				packets := after.TX.Get(telemetry.Packets) - before.TX.Get(telemetry.Packets)
				if mean := bytes / packets; mean > 1414 || mean < 1200 {
					t.Errorf("%d bytes in %d packets: %d each", bytes, packets, mean)
				}
			}
		})
	}
}

// requireFrame waits until a frame arrives at dev, among others.
func requireFrame(t *testing.T, dev *pvnet.Device, frame []byte) {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	came := false
	err := dev.Listen(ctx, func(f pvnet.Frame) {
		b := make([]byte, f.Len())
		f.CopyTo(b)
		if bytes.Equal(b, frame) {
			came = true
			stop()
		}
	})
	if !came {
		t.Fatalf("%x did not come: %v", frame, err)
	}
}

func TestTheStackAnnouncesItselfAtEachLinkUp(t *testing.T) {
	other := pvnet.MAC{0, 0x16, 0x3e, 7, 7, 7}
	for _, addr := range []string{"192.0.2.1/24", "2001:db8::1/64"} {
		w := newWire(t, 1500, pvnet.Config{})
		prefix := netip.MustParsePrefix(addr)
		newStack(t, w.Front, Config{Addr: prefix})
		requireFrame(t, w.Back, packet.AppendAnnouncement(nil, frontMAC, prefix.Addr()))
		w.Plug(other, 1500)
		requireFrame(t, w.Back, packet.AppendAnnouncement(nil, other, prefix.Addr()))
	}
}

// The stack has cut and summed a segment, and then the MTU shrinks. The card must send the
// segment with GSO and a partial checksum.
func TestASegmentToBeCutAgainHasAPartialChecksum(t *testing.T) {
	w := newWire(t, 1400, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: frontIP})
	src, dst := tcpip.AddrFrom4([4]byte{192, 0, 2, 1}), tcpip.AddrFrom4([4]byte{192, 0, 2, 2})
	for _, name := range []string{"IPv4", "IPv6"} {
		const data = 7920
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{
			ReserveHeaderBytes: 100, Payload: buffer.MakeWithData(make([]byte, data)),
		})
		defer p.DecRef()
		header.TCP(p.TransportHeader().Push(header.TCPMinimumSize)).Encode(&header.TCPFields{DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagAck, Checksum: 0x1234})
		at, typ := 14+header.IPv4MinimumSize, pvnet.GSOTCPv4
		p.NetworkProtocolNumber = header.IPv4ProtocolNumber
		if name == "IPv4" {
			header.IPv4(p.NetworkHeader().Push(header.IPv4MinimumSize)).Encode(&header.IPv4Fields{
				TotalLength: uint16(p.Size()), TTL: 64, Protocol: uint8(header.TCPProtocolNumber), SrcAddr: src, DstAddr: dst,
			})
		} else {
			at, typ = 14+header.IPv6MinimumSize, pvnet.GSOTCPv6
			src, dst = tcpip.AddrFrom16([16]byte{0xfd, 1}), tcpip.AddrFrom16([16]byte{0xfd, 2})
			p.NetworkProtocolNumber = header.IPv6ProtocolNumber
			header.IPv6(p.NetworkHeader().Push(header.IPv6MinimumSize)).Encode(&header.IPv6Fields{
				PayloadLength: header.TCPMinimumSize + data, TransportProtocol: header.TCPProtocolNumber, HopLimit: 64, SrcAddr: src, DstAddr: dst,
			})
		}
		front.card.AddHeader(p)
		p.GSOOptions = stack.GSO{Type: stack.GSOGvisor, MSS: data}
		s := front.card.tx[0]
		s.mu.Lock()
		if n := s.tx.AllocSize(s.frames[:1], p.Size()); n != 1 {
			t.Fatal("no frame")
		}
		f := &s.frames[0]
		s.fill(f, p)
		if g := f.GSO(); int(g.Size) != 1400+14-at-header.TCPMinimumSize || g.Type != typ {
			t.Errorf("%s: to be cut as %+v", name, g)
		}
		for head := range f.Pieces() {
			want := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, header.TCPMinimumSize+data)
			if got := header.TCP(head[at:]).Checksum(); got != want {
				t.Errorf("%s: checksum %#x, not %#x", name, got, want)
			}
			break
		}
		f.Release()
		s.mu.Unlock()
	}
}

// A peer sends random frames. The stack drops those that are not for it, and still works.
func TestForeignFramesAreDropped(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: frontIP})
	l := listen(t, front, ":80")
	r := rand.New(rand.NewPCG(1, 2))
	foreign := uint64(0)
	for range 2000 {
		f := make([]byte, 14+r.IntN(200))
		for i := range f {
			f[i] = byte(r.Uint32())
		}
		switch r.IntN(3) {
		case 0: // IPv4 or IPv6 for us, the rest random
			copy(f, frontMAC[:])
			copy(f[12:], []byte{8, 0, 0x45})
			if r.IntN(2) == 0 {
				copy(f[12:], []byte{0x86, 0xdd, 0x60})
			}
		case 1:
			copy(f, bytes.Repeat([]byte{0xff}, 6))
		default:
			f[0] = 2
			foreign++
		}
		if _, err := w.Back.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	back := newStack(t, w.Back, Config{Addr: backIP})
	c, err := back.Dial("tcp", "192.0.2.1:80")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if s, err := l.Accept(); err != nil {
		t.Fatal(err)
	} else {
		s.Close()
	}
	if got := front.Stats().Foreign; got != foreign {
		t.Errorf("%d foreign frames of %d", got, foreign)
	}
}

// Packets for which the ring has no room wait in a bounded queue, and never block the
// stack.
func TestSenderNeverBlocks(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: frontIP})
	rx, err := w.Back.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	rx.SetDeadline(time.Now().Add(limit))
	tx := front.card.tx[0]
	const size = 1000
	const most = maxWaiting / size
	packet := func(n int) *stack.PacketBuffer {
		b := make([]byte, size)
		copy(b, []byte{2, 0, 0, 0, 0, 9})
		binary.BigEndian.PutUint32(b[14:], uint32(n))
		return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	}
	// A packet that is too long for any vif is lost, but no other.
	long := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(make([]byte, pvnet.MaxFrame+1))})
	defer long.DecRef()
	around := []*stack.PacketBuffer{packet(0), long, packet(1)}
	if n := tx.write(around); n != 3 || front.Stats().Unsent != 1 {
		t.Fatalf("%d taken, %+v", n, front.Stats())
	}
	around[0].DecRef()
	around[2].DecRef()
	// Nobody receives at the other end: the ring fills, then the queue.
	accepted := 2
	for {
		if accepted == most {
			tx.write([]*stack.PacketBuffer{long}) // among those that wait
		}
		p := packet(accepted)
		n := tx.write([]*stack.PacketBuffer{p})
		p.DecRef()
		if n == 0 {
			break
		}
		accepted++
	}
	if accepted < most || accepted > 2*most || front.Stats().Overflow == 0 {
		t.Fatalf("%d taken, %+v", accepted, front.Stats())
	}
	// Once the other end receives, all waiting packets arrive in order.
	var frames [32]pvnet.Frame
	for n := 0; n < accepted; {
		k, err := rx.Receive(frames[:])
		if err != nil {
			t.Fatalf("after %d of %d: %v", n, accepted, err)
		}
		for i := range frames[:k] {
			b := frames[i].Bytes()
			if [6]byte(b) != ([6]byte{2, 0, 0, 0, 0, 9}) {
				continue // what the stack says by itself
			}
			if got := binary.BigEndian.Uint32(b[14:]); got != uint32(n) {
				t.Fatalf("frame %d came as number %d", got, n)
			}
			n++
		}
		rx.Release(frames[:k])
	}
	if st := front.Stats(); st.Unsent != 2 {
		t.Errorf("%+v", st)
	}
	// Packets that can no longer be sent are released.
	for range 2 * most {
		p := packet(0)
		tx.write([]*stack.PacketBuffer{p})
		p.DecRef()
	}
	front.Close()
	if st := front.Stats(); st.Unsent < most/2 {
		t.Errorf("%+v", st)
	}
	p := packet(0)
	defer p.DecRef()
	if tx.write([]*stack.PacketBuffer{p}) != 0 {
		t.Error("accepted after Close")
	}
}

func TestPacketsOfAFlowStayInOneQueue(t *testing.T) {
	const queues, packets = 3, 60
	w := newWire(t, 1500, pvnet.Config{Queues: queues})
	front := newStack(t, w.Front, Config{Addr: frontIP})
	var list stack.PacketBufferList
	defer list.Reset()
	for i := range packets {
		b := make([]byte, 100)
		copy(b, []byte{2, 0, 0, 0, 0, 9})
		b[14], b[15] = byte(i/4%queues), byte(i)
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
		p.Hash = uint32(b[14])
		list.PushBack(p)
	}
	if n, err := front.card.WritePackets(list); n != packets || err != nil {
		t.Fatal(n, err)
	}
	for q := range queues {
		rx, err := w.Back.OwnRX(q)
		if err != nil {
			t.Fatal(err)
		}
		rx.SetDeadline(time.Now().Add(limit))
		var f [1]pvnet.Frame
		last := -1
		for n := 0; n < packets/queues; {
			if _, err := rx.Receive(f[:]); err != nil {
				t.Fatal(err)
			}
			b := bytes.Clone(f[0].Bytes())
			rx.Release(f[:])
			if b[5] != 9 {
				continue // what the stack says by itself
			}
			if int(b[14]) != q || int(b[15]) <= last {
				t.Fatalf("queue %d: packet %d of flow %d after %d", q, b[15], b[14], last)
			}
			last = int(b[15])
			n++
		}
	}
	front.Close()
	if n, err := front.card.WritePackets(list); n != 0 || err == nil {
		t.Error("accepted after Close", n, err)
	}
}

func BenchmarkTCP(b *testing.B) {
	for _, mtu := range []int{1500, 9000} {
		b.Run(fmt.Sprintf("mtu=%d", mtu), func(b *testing.B) {
			front, back := two(b, mtu, pvnet.Config{})
			client, server := connect(b, front, back)
			client.SetDeadline(time.Time{})
			server.SetDeadline(time.Time{})
			const size = 64 << 10
			b.SetBytes(size)
			go func() {
				buf := make([]byte, size)
				for {
					if _, err := client.Write(buf); err != nil {
						return
					}
				}
			}()
			buf := make([]byte, size)
			for b.Loop() {
				if _, err := io.ReadFull(server, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRoundTrip shows that Adaptive, which spins while the stack may need the CPU, is
// no worse than Park.
func BenchmarkRoundTrip(b *testing.B) {
	for _, mode := range []pvnet.WaitMode{pvnet.Park, pvnet.Adaptive} {
		b.Run([]string{pvnet.Park: "Park", pvnet.Adaptive: "Adaptive"}[mode], func(b *testing.B) { roundTrips(b, mode) })
	}
}

func roundTrips(b *testing.B, mode pvnet.WaitMode) {
	front, back := two(b, 1500, pvnet.Config{Wait: mode})
	client, server := connect(b, front, back)
	client.SetDeadline(time.Time{})
	server.SetDeadline(time.Time{})
	go io.Copy(server, server)
	buf := make([]byte, 64)
	for b.Loop() {
		if _, err := client.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(client, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// The MTU changes while the link is up. Connections that are open go on, with packets of the
// new size if it is smaller; new connections use the new size.
func TestTheStackFollowsTheMTU(t *testing.T) {
	w := newWire(t, 9000, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: frontIP})
	back := newStack(t, w.Back, Config{Addr: backIP})
	old, far := connect(t, front, back)
	move := func(from, to net.Conn) (mean uint64) {
		t.Helper()
		before := w.Front.Stats()
		go from.Write(make([]byte, 1<<20))
		if _, err := io.ReadFull(to, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		after := w.Front.Stats()
		return (after.TX.Get(telemetry.Bytes) - before.TX.Get(telemetry.Bytes)) / (after.TX.Get(telemetry.Packets) - before.TX.Get(telemetry.Packets))
	}
	if mean := move(old, far); mean < 6000 {
		t.Errorf("%d bytes a packet", mean)
	}
	for _, c := range []struct {
		mtu               int
		oldLeast, oldMost uint64 // bytes a packet, on the old connection
	}{{1400, 1200, 1414}, {4000, 3000, 4014}, {9000, 6000, 9014}} {
		if err := w.Back.SetMTU(c.mtu); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		for ev := range w.Front.Links(ctx) {
			if ev.MTU == c.mtu {
				break
			}
		}
		cancel()
		if info := front.network.net.NICInfo()[nic]; int(info.MTU) != c.mtu {
			t.Errorf("the stack's card has MTU %d", info.MTU)
		}
		if mean := move(old, far); mean < c.oldLeast || mean > c.oldMost {
			t.Errorf("MTU %d: %d bytes a packet of the old connection", c.mtu, mean)
		}
		young, other := connect(t, front, back)
		if mean := move(young, other); mean < uint64(c.mtu)*3/4 || mean > uint64(c.mtu)+14 {
			t.Errorf("MTU %d: %d bytes a packet of a new connection", c.mtu, mean)
		}
	}
	if st := front.Stats(); st.Unsent != 0 {
		t.Errorf("%+v", st)
	}
}
