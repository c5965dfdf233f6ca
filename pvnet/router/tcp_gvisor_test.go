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
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	gtcp "gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"barevif/pvnet/packet"
)

// A wire carries the packets of two of gVisor's stacks through a router: some it loses, some it
// brings twice or late. For each that it brings it forges a RST or FIN of the same flow whose number
// is as far from what is expected as any, and notes those that are not dropped.
type wire struct {
	*world
	t   *testing.T
	eps [2]*channel.Endpoint

	mu     sync.Mutex
	random *rand.Rand // guarded by mu
	forged int        // guarded by mu
	wrong  int        // guarded by mu
}

func newWire(t *testing.T, seed uint64, sack bool) (*wire, [2]*stack.Stack) {
	w := &wire{t: t, world: newWorld(t, Limits{}, nil), random: rand.New(rand.NewPCG(seed, 7))}
	var stacks [2]*stack.Stack
	for i, a := range []string{"10.1.0.5", server} {
		s := stack.New(stack.Options{NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol}, TransportProtocols: []stack.TransportProtocolFactory{gtcp.NewProtocol}})
		use := tcpip.TCPSACKEnabled(sack)
		if err := s.SetTransportProtocolOption(gtcp.ProtocolNumber, &use); err != nil {
			t.Fatal(err)
		}
		w.eps[i] = channel.New(4096, 1500, "")
		if err := s.CreateNIC(1, w.eps[i]); err != nil {
			t.Fatal(err)
		}
		if err := s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpipAddr(ip(a)).WithPrefix()}, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
		s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})
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
	b[12] = 8
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
		if batch[0].Reason == ReasonWindow && forged[14+20+13]&tcpRST != 0 {
			return
		}
		w.mu.Lock()
		w.wrong++
		w.mu.Unlock()
		w.t.Errorf("%v because of %v: %x", batch[0].Verdict, batch[0].Reason, frame[14:min(len(frame), 80)])
		return
	}
	w.forge(in, forged)
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(batch[0].Head[14:])})
	w.eps[1-i].InjectInbound(ipv4.ProtocolNumber, p)
	p.DecRef()
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

// Connections of gVisor's stacks lose nothing to the windows, with loss, reordering, duplicates,
// window scaling and with and without selective acknowledgements; and a segment that is forged
// ends none.
func TestGvisorsConnectionsFitTheirWindows(t *testing.T) {
	for _, sack := range []bool{false, true} {
		w, stacks := newWire(t, 11, sack)
		l, err := gonet.ListenTCP(stacks[1], tcpip.FullAddress{NIC: 1, Port: 80}, ipv4.ProtocolNumber)
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
				c, err := gonet.DialTCP(stacks[0], tcpip.FullAddress{NIC: 1, Addr: tcpipAddr(ip(server)), Port: 80}, ipv4.ProtocolNumber)
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
		if w.forged < 1000 || w.wrong != 0 {
			t.Errorf("%d segments were forged, %d were judged wrong", w.forged, w.wrong)
		}
		w.mu.Unlock()
	}
}
