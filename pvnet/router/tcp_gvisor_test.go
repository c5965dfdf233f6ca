package router

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	gtcp "gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"barevif/pvnet/packet"
)

// A wire carries the packets of two of gVisor's stacks through a router: some it loses, some it
// brings twice or late. For each that it brings it forges a RST or FIN of the same flow whose number
// is as far from what is expected as any, and notes those that are not dropped.
type wire struct {
	*world
	t      *testing.T
	eps    [2]*channel.Endpoint
	narrow int // bytes of a packet that links beyond the router bring; 0: any

	mu      sync.Mutex
	random  *rand.Rand // guarded by mu
	forged  int        // guarded by mu
	wrong   int        // guarded by mu
	too     [2]int     // guarded by mu: packets of each stack that were too big for narrow
	believe [2]int     // guarded by mu: errors about them that reached their stack
}

func newWire(t *testing.T, seed uint64, sack bool) (*wire, [2]*stack.Stack) {
	w := &wire{t: t, world: newWorld(t, Limits{}, func(c *Config) { c.Ports[2].Masquerade6 = true }), random: rand.New(rand.NewPCG(seed, 7))}
	var stacks [2]*stack.Stack
	for i, addrs := range [][]string{{"10.1.0.5", "fd01::5"}, {server, server6}} {
		s := stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{gtcp.NewProtocol},
		})
		use := tcpip.TCPSACKEnabled(sack)
		if err := s.SetTransportProtocolOption(gtcp.ProtocolNumber, &use); err != nil {
			t.Fatal(err)
		}
		w.eps[i] = channel.New(4096, 1500, "")
		if err := s.CreateNIC(1, w.eps[i]); err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if err := s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: protocolOf(a), AddressWithPrefix: tcpipAddr(ip(a)).WithPrefix()}, stack.AddressProperties{}); err != nil {
				t.Fatal(err)
			}
		}
		s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}, {Destination: header.IPv6EmptySubnet, NIC: 1}})
		stacks[i] = s
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for i := range w.eps {
		wg.Go(func() { w.carry(ctx, i) })
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		for _, s := range stacks {
			s.Destroy()
		}
	})
	return w, stacks
}

// server6 is the server's other address.
const server6 = "2001:db8:1::9"

func protocolOf(a string) tcpip.NetworkProtocolNumber {
	if ip(a).Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// carry carries what stack i sends.
func (w *wire) carry(ctx context.Context, i int) {
	var late []byte
	for {
		p := w.eps[i].ReadContext(ctx)
		if p == nil {
			return
		}
		v := p.ToView()
		frame := w.ethernet(i, v.AsSlice())
		v.Release()
		p.DecRef()
		w.mu.Lock()
		kind := w.random.IntN(100)
		w.mu.Unlock()
		switch {
		case kind == 0: // lost
		case kind == 1 && late == nil:
			late = frame
			continue
		case kind == 2:
			w.bring(i, bytes.Clone(frame))
			fallthrough
		default:
			w.bring(i, frame)
		}
		if late != nil {
			w.bring(i, late)
			late = nil
		}
	}
}

func (w *wire) ethernet(i int, ip []byte) []byte {
	b := make([]byte, 14, 14+len(ip))
	macs := [2][2][6]byte{{macA, hostA}, {macUp, gatewayMAC}}[i]
	copy(b, macs[0][:])
	copy(b[6:], macs[1][:])
	if b[12] = 8; ip[0]>>4 == 6 {
		b[12], b[13] = 0x86, 0xdd
	}
	return append(b, ip...)
}

// bring brings a frame of stack i to the other.
func (w *wire) bring(i int, frame []byte) {
	in := [2]PortID{clientA, uplink}[i]
	forged := bytes.Clone(frame)
	batch := []Packet{{In: in, Head: frame, Total: len(frame)}}
	w.Process(w.at, batch)
	if batch[0].Verdict != VerdictForward {
		// A stack that has closed answers what comes late with a RST of that late number, which
		// nobody would believe.
		if h, ok := packet.Parse(forged, len(forged)); ok && batch[0].Reason == ReasonWindow && forged[h.L4+13]&tcpRST != 0 {
			return
		}
		w.mu.Lock()
		w.wrong++
		w.mu.Unlock()
		w.t.Errorf("%v because of %v: %x", batch[0].Verdict, batch[0].Reason, frame[14:min(len(frame), 80)])
		return
	}
	w.forge(in, forged)
	if w.narrow != 0 && len(frame)-14 > w.narrow {
		w.tooBig(i, frame)
		return
	}
	w.inject(1-i, frame)
}

func (w *wire) inject(i int, frame []byte) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame[14:])})
	proto := ipv4.ProtocolNumber
	if frame[12] != 8 {
		proto = ipv6.ProtocolNumber
	}
	w.eps[i].InjectInbound(proto, p)
	p.DecRef()
}

// tooBig has a router beyond this one tell stack i that a frame of its is too big for the next link,
// and forges the same about segments that are not under way.
func (w *wire) tooBig(i int, frame []byte) {
	h, ok := packet.Parse(frame, len(frame))
	if !ok || h.Version == 4 && frame[h.L3+6]&0x40 == 0 {
		w.t.Errorf("a packet that may be cut: %x", frame[:min(len(frame), 80)])
		return
	}
	e := spec{in: [2]PortID{uplink, clientA}[i], src: [2]string{"198.51.100.1", "10.1.0.6"}[i], dst: look(frame).src, proto: icmp4, icmp: 3, code: 4, rest: uint32(w.narrow)}
	if h.Version == 6 {
		e.src, e.proto, e.icmp, e.code = [2]string{"2001:db8:2::1", "fd01::6"}[i], icmp6, 2, 0
	}
	w.mu.Lock()
	w.too[i]++
	e.payload = bytes.Clone(frame[h.L3:min(len(frame), h.L3+500)])
	if w.random.IntN(2) == 0 {
		e.payload = e.payload[:h.L4-h.L3+8] // the least that has to be quoted
	}
	far := 1<<31 + w.random.Uint32N(1<<20)
	w.mu.Unlock()
	seq := e.payload[h.L4-h.L3+4:]
	was := binary.BigEndian.Uint32(seq)
	for _, forged := range []uint32{was + far, was - 1<<24, was + 1<<24} {
		binary.BigEndian.PutUint32(seq, forged)
		p := e.packet()
		batch := []Packet{p}
		w.Process(w.at, batch)
		if batch[0].Verdict != VerdictDrop || batch[0].Reason != ReasonQuote {
			w.mu.Lock()
			w.wrong++
			w.mu.Unlock()
			w.t.Errorf("an error about byte %d instead of %d: %v because of %v", forged, was, batch[0].Verdict, batch[0].Reason)
		}
	}
	binary.BigEndian.PutUint32(seq, was)
	p := e.packet()
	batch := []Packet{p}
	w.Process(w.at, batch)
	if p = batch[0]; p.Verdict != VerdictForward {
		// The other side has acknowledged the segment meanwhile, so it is no longer under way.
		if p.Reason != ReasonQuote {
			w.t.Errorf("an error: %v because of %v", p.Verdict, p.Reason)
		}
		return
	}
	w.mu.Lock()
	w.believe[i]++
	w.mu.Unlock()
	w.inject(i, p.Head)
}

func (w *wire) forge(in PortID, frame []byte) {
	h, ok := packet.Parse(frame, len(frame))
	flags := frame[h.L4+13]
	if !ok || flags&(tcpSYN|tcpRST) != 0 {
		return
	}
	l4 := frame[h.L4:]
	binary.BigEndian.PutUint32(l4[4:], binary.BigEndian.Uint32(l4[4:])+1<<31)
	w.mu.Lock()
	if l4[13] = tcpRST; w.random.IntN(2) == 0 {
		l4[13] = tcpFIN | tcpACK
	}
	w.mu.Unlock()
	batch := []Packet{{In: in, Head: frame, Total: len(frame)}}
	w.Process(w.at, batch)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forged++
	if batch[0].Verdict != VerdictDrop || batch[0].Reason != ReasonWindow {
		w.wrong++
		w.t.Errorf("a forged segment: %v because of %v", batch[0].Verdict, batch[0].Reason)
	}
}

// exchange has four connections of the first stack send 600 kB each to the second, at an address, and
// get them back.
func (w *wire) exchange(stacks [2]*stack.Stack, at string) {
	t := w.t
	l, err := gonet.ListenTCP(stacks[1], tcpip.FullAddress{NIC: 1, Port: 80}, protocolOf(at))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // sends back what it gets
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			c, err := gonet.DialTCP(stacks[0], tcpip.FullAddress{NIC: 1, Addr: tcpipAddr(ip(at)), Port: 80}, protocolOf(at))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(2 * time.Minute))
			data := make([]byte, 600000)
			for k := range data {
				data[k] = byte(k*7 + k>>9 + i)
			}
			go c.Write(data)
			// Neither side closes before the last byte has come.
			h := sha256.New()
			if n, err := io.CopyN(h, net.Conn(c), int64(len(data))); err != nil || [32]byte(h.Sum(nil)) != sha256.Sum256(data) {
				t.Errorf("%d bytes came back, and %v", n, err)
			}
			c.CloseWrite()
			if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("behind the last byte: %d, %v", n, err)
			}
		})
	}
	wg.Wait()
	l.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.forged < 1000 || w.wrong != 0 {
		t.Errorf("%d segments were forged, %d were judged wrong", w.forged, w.wrong)
	}
}

// Connections of gVisor's stacks lose nothing to the windows, with loss, reordering, duplicates,
// window scaling and with and without selective acknowledgements; and a segment that is forged
// ends none.
func TestGvisorsConnectionsFitTheirWindows(t *testing.T) {
	for _, sack := range []bool{false, true} {
		w, stacks := newWire(t, 11, sack)
		w.exchange(stacks, server)
	}
}

// A link beyond the router, in either direction, has a smaller MTU. The TCP of both families learns that
// MTU from ICMP errors that quote its segments under way; the router drops errors with other quotes.
func TestGvisorFindsTheMTUOfThePath(t *testing.T) {
	for _, at := range []string{server, server6} {
		w, stacks := newWire(t, 5, true)
		w.narrow = 1300
		w.exchange(stacks, at)
		w.mu.Lock()
		for i := range w.too {
			if w.believe[i] == 0 {
				t.Errorf("%s: of %d packets that were too big, none was told to stack %d", at, w.too[i], i)
			}
		}
		t.Logf("%s: %d and %d packets were too big, %d and %d errors about them were believed", at, w.too[0], w.too[1], w.believe[0], w.believe[1])
		w.mu.Unlock()
	}
}
