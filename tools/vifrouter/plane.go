package main

import (
	"context"
	"errors"
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
type plane struct {
	core  *router.Router
	local *localStack
	began time.Time
	// deliver gets frames for the router itself that are no matter of its TCP/IP, and reports
	// whether it took one. The frame is lent.
	deliver func(p *port, frame []byte, h *packet.Headers) bool

	ports [router.MaxPorts]atomic.Pointer[port]

	wait neighbourWait
	n    planeCounters
}

type planeCounters struct {
	undelivered atomic.Uint64 // frames that a port's Sender had no room for
	own         atomic.Uint64 // frames for the router itself
	control     atomic.Uint64 // frames of the router's own that found no room
	failed      atomic.Uint64 // frames that could not be read or cut
}

// A port is a vif of the router.
type port struct {
	id   router.PortID
	dev  *pvnet.Device
	out  *forward.Sender
	src  *forward.Source
	held atomic.Int32 // frames that wait for a neighbour

	inputs [router.MaxPorts]atomic.Pointer[forward.Input] // of other ports' Senders, for what this one receives
	mu     sync.Mutex                                     // guards the making of inputs
	gone   bool                                           // guarded by mu

	owner any // what the control side has for it
}

func newPlane(core *router.Router, local *localStack) *plane {
	return &plane{core: core, local: local, began: time.Now(), wait: neighbourWait{hops: map[hopKey]*hopWait{}}}
}

// now is the time that the core is told.
func (pl *plane) now() time.Duration { return time.Since(pl.began) }

// waitingFrames is how many frames of each port may wait for each queue of another: what a TCP
// sender may have under way at once.
const waitingFrames = 256

// newPort makes a port of a device, and owns all of its queues.
func (pl *plane) newPort(id router.PortID, dev *pvnet.Device) (*port, error) {
	out, err := forward.NewSender(dev, forward.Config{Frames: waitingFrames})
	if err != nil {
		return nil, err
	}
	return &port{id: id, dev: dev, out: out, src: forward.NewSource(0)}, nil
}

// add makes a port one that frames go to.
func (pl *plane) add(p *port) { pl.ports[p.id].Store(p) }

// remove ends that frames go to a port, and gives back what it holds of others.
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

// input returns the way from port p to port out; nil: there is none.
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
	if pl.ports[out].Load() != to { // it went meanwhile, and did not see this input
		p.inputs[out].CompareAndSwap(in, nil)
		in.Close()
		return nil
	}
	return in
}

// A batch is what a receiving goroutine works with.
type batch struct {
	frames  [forward.Batch]pvnet.Frame
	packets [forward.Batch]router.Packet
	run     [forward.Batch]pvnet.Frame // consecutive frames for one port
	buf     []byte
}

// receive moves what arrives at one queue of a port until its device ends.
func (pl *plane) receive(p *port, rx *pvnet.RX) {
	b := new(batch)
	for {
		n, err := rx.Receive(b.frames[:])
		switch {
		case err == nil:
		case errors.Is(err, pvnet.ErrNoBuffers): // others hold all of them, and give them back soon
			time.Sleep(time.Millisecond)
			continue
		default: // a deadline that ends the goroutine, or the end of the device
			return
		}
		for i := range b.frames[:n] {
			f := &b.frames[i]
			b.packets[i] = router.Packet{In: p.id, Head: f.Bytes(), Total: f.Len(), Partial: f.Checksum() == pvnet.ChecksumPartial, GSO: f.GSO().Size}
		}
		pl.core.Process(pl.now(), b.packets[:n])
		if lost := pl.dispatch(p, b, n); lost > 0 {
			pl.n.undelivered.Add(uint64(lost))
			_ = rx.CountUndelivered(uint64(lost)) // the link may be down by now
		}
	}
}

// dispatch does what the core has decided about n frames, in their order. It returns how many
// were lost on the way to another port.
func (pl *plane) dispatch(p *port, b *batch, n int) (lost int) {
	run, to := 0, router.PortID(0)
	flush := func() {
		if run > 0 {
			lost += pl.send(p, to, b.run[:run])
			run = 0
		}
	}
	for i := range b.frames[:n] {
		f, d := &b.frames[i], &b.packets[i]
		if d.Verdict == router.VerdictForward {
			if d.Translated {
				f.ClearHash()
			}
			if run > 0 && to != d.Out {
				flush()
			}
			to = d.Out
			b.run[run] = *f
			run++
			if d.Ask {
				pl.solicit(d.Out, d.Next)
			}
		} else {
			flush()
			pl.other(p, f, d, b)
		}
		if d.Learnt {
			flush()
			pl.retry(p)
		}
		*f = pvnet.Frame{}
		*d = router.Packet{}
	}
	flush()
	clear(b.run[:])
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

// write sends a frame of the router's own.
func (pl *plane) write(out router.PortID, frame []byte) {
	to := pl.ports[out].Load()
	if len(frame) == 0 || to == nil || !to.out.Write(frame) {
		pl.n.control.Add(1)
	}
}

func (pl *plane) solicit(out router.PortID, next netip.Addr) {
	pl.write(out, pl.core.AppendSolicit(nil, out, next))
}

// other handles a frame that is not forwarded as it is, and takes it over.
func (pl *plane) other(p *port, f *pvnet.Frame, d *router.Packet, b *batch) {
	switch d.Verdict {
	case router.VerdictNeighbour:
		if pl.wait.add(p, *f, nil, d.Out, d.Next, pl.now()) {
			pl.solicit(d.Out, d.Next)
		}
		return
	case router.VerdictLocal:
		pl.n.own.Add(1)
		if f.CompleteChecksum() == nil {
			b.buf = grow(b.buf, f.Len())
			f.CopyTo(b.buf)
			pl.toLocal(p, b.buf)
		} else {
			pl.n.failed.Add(1)
		}
	case router.VerdictReply:
		b.buf = d.AppendReply(b.buf[:0])
		pl.reply(d.Out, b.buf)
	case router.VerdictFragment:
		if f.CompleteChecksum() != nil {
			pl.n.failed.Add(1)
			break
		}
		b.buf = grow(b.buf, f.Len())
		f.CopyTo(b.buf)
		pl.fragment(d, b.buf)
		if d.Ask {
			pl.solicit(d.Out, d.Next)
		}
	}
	f.Release()
}

// reply sends an answer of the core's.
func (pl *plane) reply(out router.PortID, frame []byte) {
	if out != router.LocalPort {
		pl.write(out, frame)
	} else if len(frame) > ethernet {
		pl.local.inject(frame[ethernet:])
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

// fragment cuts a frame to the MTU of the port that it leaves by.
func (pl *plane) fragment(d *router.Packet, frame []byte) {
	to := pl.ports[d.Out].Load()
	var cut router.Fragmenter
	if to == nil || !cut.Init(frame, len(frame), to.dev.MTU()) {
		pl.n.failed.Add(1)
		return
	}
	for {
		head, from, n, ok := cut.Next()
		if !ok {
			return
		}
		pl.write(d.Out, append(append([]byte(nil), head...), frame[from:from+n]...))
	}
}

// toLocal gives a frame to the router itself.
func (pl *plane) toLocal(p *port, frame []byte) {
	h, ok := packet.Parse(frame, len(frame))
	if !ok || pl.deliver != nil && pl.deliver(p, frame, &h) {
		return
	}
	pl.local.inject(frame[h.L3:h.End])
}

// runLocal sends what the router's own TCP/IP sends, until ctx ends.
func (pl *plane) runLocal(ctx context.Context) {
	for {
		b := make([]byte, ethernet, ethernet+localMTU+64)
		b = pl.local.next(ctx, b)
		if b == nil {
			return
		}
		pl.sendLocal(b)
	}
}

// sendLocal sends an IP packet of the router's own; its Ethernet header is filled in.
func (pl *plane) sendLocal(frame []byte) {
	frame[12], frame[13] = packet.IPv4>>8, packet.IPv4&255
	if frame[ethernet]>>4 == 6 {
		frame[12], frame[13] = packet.IPv6>>8, packet.IPv6&255
	}
	d := [1]router.Packet{{In: router.LocalPort, Head: frame, Total: len(frame)}}
	pl.core.Process(pl.now(), d[:])
	pl.sentLocal(frame, &d[0])
}

func (pl *plane) sentLocal(frame []byte, d *router.Packet) {
	switch d.Verdict {
	case router.VerdictForward:
		pl.write(d.Out, frame)
		if d.Ask {
			pl.solicit(d.Out, d.Next)
		}
	case router.VerdictFragment:
		pl.fragment(d, frame)
	case router.VerdictLocal:
		pl.local.inject(frame[ethernet:])
	case router.VerdictReply:
		pl.reply(d.Out, d.AppendReply(nil))
	case router.VerdictNeighbour:
		if pl.wait.add(nil, pvnet.Frame{}, frame, d.Out, d.Next, pl.now()) {
			pl.solicit(d.Out, d.Next)
		}
	}
}
