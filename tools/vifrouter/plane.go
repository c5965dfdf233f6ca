package main

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/pvnet/packet"
	"barevif/pvnet/router"
)

// A plane moves frames between ports as the router core decides. A goroutine for each queue of
// each port receives a batch, has it decided about at once, and gives the frames on: a frame
// that is forwarded is copied once, by the device that sends it.
//
// A batch costs one look at the clock, the lock of the core once, and for each run of consecutive
// frames that leave by one port the lock of its queue twice, before and after they are sent
// ([forward.Input.Send]); TestABatchTakesNoLockPerFrame counts them. A frame that is
// forwarded costs neither, and nothing that is allocated. Nor does the router's own traffic
// allocate here: replies, solicitations, fragments, what waits for a neighbour, and the packets of
// its own TCP/IP are in memory that belongs to the goroutine (worker) or the plane, and is bounded.
// What that TCP/IP allocates itself is gVisor's.
type plane struct {
	core  *router.Router
	local *localStack
	clock func() time.Duration // what the core is told; it does not go back
	// deliver gets frames for the router itself that are no matter of its TCP/IP, and reports
	// whether it took one. The frame is lent.
	deliver func(p *port, frame []byte, h *packet.Headers) bool

	ports [router.MaxPorts]atomic.Pointer[port]

	wait neighbourWait
	n    planeCounters
}

type planeCounters struct {
	undelivered atomic.Uint64 // frames of vifs that found no room at the port they should leave by, or no such port
	control     atomic.Uint64 // frames of the router's own that found no room, or no such port
	knocks      atomic.Uint64 // SYNs to the router itself beyond what a port may send
	failed      atomic.Uint64 // frames whose checksum could not be completed, or that could not be cut into fragments
}

// A port is a vif of the router.
type port struct {
	id     router.PortID
	dev    *pvnet.Device
	out    *forward.Sender
	src    *forward.Source
	held   atomic.Int32 // frames that wait for a neighbour
	knocks knocks       // at the router's own TCP

	inputs [router.MaxPorts]atomic.Pointer[forward.Input] // by number of the other port: the way into its Sender
	mu     sync.Mutex                                     // held while an input is made
	gone   bool                                           // guarded by mu: no more inputs are made

	owner any // the *guest or the *uplink whose port it is
}

func newPlane(core *router.Router, local *localStack) *plane {
	began := time.Now()
	return &plane{core: core, local: local, clock: func() time.Duration { return time.Since(began) }, wait: neighbourWait{hops: map[hopKey]*hopWait{}}}
}

// waitingFrames is how many frames of each port may wait for each queue of another, so that a TCP sender
// loses none while it has that many under way.
const waitingFrames = 256

// newPort makes a port of a device and owns the sending halves of all its queues. receive owns the others.
func (pl *plane) newPort(id router.PortID, dev *pvnet.Device) (*port, error) {
	out, err := forward.NewSender(dev, forward.Config{Frames: waitingFrames})
	if err != nil {
		return nil, err
	}
	return &port{id: id, dev: dev, out: out, src: forward.NewSource(0)}, nil
}

// add makes frames go to a port from now on.
func (pl *plane) add(p *port) { pl.ports[p.id].Store(p) }

// remove takes a port out of the plane. It drops the frames that wait for it, and those of its own that wait
// for other ports or for neighbours. The port receives nothing any more.
func (pl *plane) remove(p *port) {
	pl.ports[p.id].CompareAndSwap(p, nil)
	p.mu.Lock()
	p.gone = true
	p.mu.Unlock()
	for i := range p.inputs {
		if in := p.inputs[i].Swap(nil); in != nil {
			in.Close()
		}
	}
	p.out.Close()
	for i := range pl.ports { // inputs that others have to this port
		if q := pl.ports[i].Load(); q != nil {
			if in := q.inputs[p.id].Swap(nil); in != nil {
				in.Close()
			}
		}
	}
	pl.wait.drop(p)
}

// input returns the Input by which frames of port p go to port out, and makes it at first use. nil: port out is
// not there, or p was removed.
func (pl *plane) input(p *port, out router.PortID) *forward.Input {
	if in := p.inputs[out].Load(); in != nil {
		return in
	}
	to := pl.ports[out].Load()
	if to == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if in := p.inputs[out].Load(); in != nil {
		return in
	}
	if p.gone {
		return nil
	}
	in, err := to.out.Input(p.src)
	if err != nil {
		return nil
	}
	p.inputs[out].Store(in)
	if pl.ports[out].Load() != to { // remove took it out meanwhile, and did not see this input
		p.inputs[out].CompareAndSwap(in, nil)
		in.Close()
		return nil
	}
	return in
}

// A worker is the memory of one goroutine that moves frames. It grows to the longest frame that
// the goroutine has handled by itself, at most 64 KiB twice.
type worker struct {
	packets [forward.Batch]router.Packet
	run     [forward.Batch]pvnet.Frame // consecutive frames for one port
	frame   []byte                     // a copy of a frame that is not forwarded as it is
	piece   []byte                     // a fragment of that frame, a reply or a solicitation

	// The frames that waited for a neighbour and are processed again, and one of them.
	waited  []waiter
	frames  [1]pvnet.Frame
	decided [1]router.Packet
}

// receive moves what arrives at a port until its device ends, and returns nil if the device ended in an orderly
// way. Any other error says why the port receives nothing any more. Unless it is a [*pvnet.PeerError], with
// which the device has ended, the device may go on.
func (pl *plane) receive(p *port) error {
	workers := make([]worker, p.dev.Queues())
	return forward.Receive(context.Background(), p.dev, func(queue int, frames []pvnet.Frame) (lost int, err error) {
		return pl.move(p, &workers[queue], frames), nil
	})
}

// move takes a batch of frames over, lets the core decide about them, and does what it decides. It returns how
// many were lost on the way to another port.
func (pl *plane) move(p *port, w *worker, frames []pvnet.Frame) (lost int) {
	packets := w.packets[:len(frames)]
	for i := range frames {
		packets[i] = packetOf(p, &frames[i])
	}
	pl.core.Process(pl.clock(), packets)
	lost = pl.dispatch(p, w, frames, packets)
	if lost > 0 {
		pl.n.undelivered.Add(uint64(lost))
	}
	return lost
}

// packetOf describes a frame that came in at a port.
func packetOf(p *port, f *pvnet.Frame) router.Packet {
	return router.Packet{In: p.id, Head: f.Bytes(), Total: f.Len(), Partial: f.Checksum() == pvnet.ChecksumPartial, GSO: f.GSO().Size}
}

// dispatch does what the core has decided about frames, in their order. It returns how many
// were lost on the way to another port.
func (pl *plane) dispatch(p *port, w *worker, frames []pvnet.Frame, packets []router.Packet) (lost int) {
	run, to := 0, router.PortID(0)
	flush := func() {
		if run > 0 {
			lost += pl.send(p, to, w.run[:run])
			run = 0
		}
	}
	for i := range frames {
		f, d := &frames[i], &packets[i]
		if d.Verdict == router.VerdictForward {
			if d.Translated {
				f.ClearHash()
			}
			if run > 0 && to != d.Out {
				flush()
			}
			to = d.Out
			w.run[run] = *f
			run++
			if d.Ask {
				pl.solicit(w, d.Out, d.Next)
			}
		} else {
			flush()
			pl.other(p, w, f, d)
		}
		learnt, next := d.Learnt, d.Next
		*f = pvnet.Frame{}
		*d = router.Packet{}
		if learnt { // never by a frame that has waited, so that this does not come back here
			flush()
			pl.retry(p, w, next)
		}
	}
	flush()
	clear(w.run[:len(frames)])
	return lost
}

// send gives frames to a port.
func (pl *plane) send(p *port, out router.PortID, frames []pvnet.Frame) (lost int) {
	if in := pl.input(p, out); in != nil {
		lost, _ := in.Send(frames)
		return lost
	}
	for i := range frames {
		frames[i].Release()
	}
	return len(frames)
}

// write sends a copy of a frame of the router's own. A frame that finds no room or no port is counted and lost.
func (pl *plane) write(out router.PortID, frame []byte) {
	to := pl.ports[out].Load()
	if len(frame) == 0 || to == nil || !to.out.Write(frame) {
		pl.n.control.Add(1)
	}
}

// solicit sends an ARP request or a neighbour solicitation for a neighbour. It uses w.piece.
func (pl *plane) solicit(w *worker, out router.PortID, next netip.Addr) {
	w.piece = pl.core.AppendSolicit(w.piece[:0], out, next)
	pl.write(out, w.piece)
}

// other handles a frame that is not forwarded as it is, and takes it over.
func (pl *plane) other(p *port, w *worker, f *pvnet.Frame, d *router.Packet) {
	switch d.Verdict {
	case router.VerdictNeighbour:
		if pl.wait.add(p, *f, nil, d.Out, d.Next, pl.clock()) {
			pl.solicit(w, d.Out, d.Next)
		}
		return
	case router.VerdictLocal:
		if pl.copyOut(w, f) {
			pl.toLocal(p, w.frame)
		}
	case router.VerdictReply:
		pl.reply(w, d)
	case router.VerdictFragment:
		if pl.copyOut(w, f) {
			pl.fragment(w, d, w.frame)
			if d.Ask {
				pl.solicit(w, d.Out, d.Next)
			}
		}
	}
	f.Release()
}

// copyOut completes the checksum of a frame and copies the frame to w.frame.
func (pl *plane) copyOut(w *worker, f *pvnet.Frame) bool {
	if f.CompleteChecksum() != nil {
		pl.n.failed.Add(1)
		return false
	}
	w.frame = grow(w.frame, f.Len())
	f.CopyTo(w.frame)
	return true
}

// reply sends an answer of the core's. It uses w.piece.
func (pl *plane) reply(w *worker, d *router.Packet) {
	w.piece = d.AppendReply(w.piece[:0])
	if d.Out != router.LocalPort {
		pl.write(d.Out, w.piece)
	} else if len(w.piece) > ethernet {
		pl.local.inject(w.piece[ethernet:])
	}
}

// ethernet is the length of an Ethernet header.
const ethernet = 14

// grow returns b with length n.
func grow(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n)
	}
	return b[:n]
}

// fragment cuts a frame to the MTU that the core has for the port which it leaves by: routers may
// have announced one below the device's. It uses w.piece.
func (pl *plane) fragment(w *worker, d *router.Packet, frame []byte) {
	to := pl.ports[d.Out].Load()
	var cut router.Fragmenter
	if to == nil || !cut.Init(frame, len(frame), min(d.MTU, to.dev.MTU())) {
		pl.n.failed.Add(1)
		return
	}
	for {
		head, from, n, ok := cut.Next()
		if !ok {
			return
		}
		w.piece = append(append(w.piece[:0], head...), frame[from:from+n]...)
		pl.write(d.Out, w.piece)
	}
}

// toLocal gives a frame to deliver, or else to the router's own TCP/IP.
func (pl *plane) toLocal(p *port, frame []byte) {
	h, ok := packet.Parse(frame, len(frame))
	if !ok || pl.deliver != nil && pl.deliver(p, frame, &h) {
		return
	}
	if h.Proto == packet.TCP && h.L5 != 0 && frame[h.L4+13]&(flagSYN|flagACK) == flagSYN && !p.knocks.allow(pl.clock()) {
		pl.n.knocks.Add(1)
		return
	}
	pl.local.inject(frame[h.L3:h.End])
}

// TCP flags.
const (
	flagSYN = 0x02
	flagACK = 0x10
)

// knocks bounds how many connections to the router itself begin at a port. The router's TCP/IP keeps a few
// KiB for each that was made, for seconds after its end too (finishing), and a guest has a /64 to make them from.
type knocks struct {
	mu     sync.Mutex
	left   float64       // guarded by mu: connections that may begin now
	filled time.Duration // guarded by mu: when left was computed
	used   bool          // guarded by mu: left says something
}

const (
	knockRate  = 50  // connections a second
	knockBurst = 200 // connections at once
)

// allow counts a connection that begins, or reports false: there are too many.
func (k *knocks) allow(now time.Duration) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.used {
		k.used, k.left, k.filled = true, knockBurst, now
	}
	if now > k.filled {
		k.left = min(knockBurst, k.left+(now-k.filled).Seconds()*knockRate)
		k.filled = now
	}
	if k.left < 1 {
		return false
	}
	k.left--
	return true
}

// runLocal sends what the router's own TCP/IP sends, until ctx ends.
func (pl *plane) runLocal(ctx context.Context) {
	w := new(worker)
	room := make([]byte, ethernet, ethernet+localMTU+64)
	for {
		b := pl.local.next(ctx, room)
		if b == nil {
			return
		}
		pl.sendOwn(w, b)
	}
}

// sendLocal sends an IP packet of the router's own, which has room for an Ethernet header; it is
// filled in. The frame is the caller's again afterwards.
func (pl *plane) sendLocal(frame []byte) { pl.sendOwn(new(worker), frame) }

func (pl *plane) sendOwn(w *worker, frame []byte) {
	frame[12], frame[13] = packet.IPv4>>8, packet.IPv4&255
	if frame[ethernet]>>4 == 6 {
		frame[12], frame[13] = packet.IPv6>>8, packet.IPv6&255
	}
	w.decided[0] = router.Packet{In: router.LocalPort, Head: frame, Total: len(frame)}
	pl.core.Process(pl.clock(), w.decided[:])
	pl.sentOwn(w, frame, &w.decided[0])
	w.decided[0] = router.Packet{}
}

// sentOwn does what the core has decided about a frame of the router's own. It keeps nothing of
// the frame.
func (pl *plane) sentOwn(w *worker, frame []byte, d *router.Packet) {
	switch d.Verdict {
	case router.VerdictForward:
		pl.write(d.Out, frame)
		if d.Ask {
			pl.solicit(w, d.Out, d.Next)
		}
	case router.VerdictFragment:
		pl.fragment(w, d, frame)
	case router.VerdictLocal:
		pl.local.inject(frame[ethernet:])
	case router.VerdictReply:
		pl.reply(w, d)
	case router.VerdictNeighbour:
		if pl.wait.add(nil, pvnet.Frame{}, frame, d.Out, d.Next, pl.clock()) {
			pl.solicit(w, d.Out, d.Next)
		}
	}
}
