package link

import (
	"sync/atomic"

	"barevif/pvnet"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

// A loss is a reason why a frame of a link does not reach the vif; each has a counter of
// the device.
type loss int

const (
	tooLong loss = iota
	tooShort
	badGSO
	badSum
	undelivered // by the kernel
	losses
)

var reasons = [losses]telemetry.Reason{
	tooLong: telemetry.DropTooLong, tooShort: telemetry.DropTooShort,
	badGSO: telemetry.DropBadGSO, badSum: telemetry.DropBadCsum,
}

// drop counts a lost frame in the joint's counter at once, and keeps it for count, which
// adds it to the device's.
func (f *feeder) drop(why loss, counter *atomic.Uint64) {
	counter.Add(1)
	f.lost[why]++
}

// count adds the losses to the device's counters. While the vif is down it keeps them for
// a later call.
func (f *feeder) count() {
	for why, n := range f.lost {
		if n == 0 {
			continue
		}
		var err error
		if loss(why) == undelivered {
			err = f.tx.CountUndelivered(n)
		} else {
			err = f.tx.CountDropped(reasons[why], n)
		}
		if err != nil {
			return
		}
		f.lost[why] = 0
	}
}

// headers returns the size of a frame's Ethernet header and VLAN tags, in bytes. The MTU
// of an interface does not count them.
func headers(frame []byte) int {
	h, _ := packet.Parse(frame, len(frame))
	return pvnet.MinFrame + 4*int(h.Tags)
}

// fits reports whether the vif carries a frame of n bytes that begins with the headers of
// whole: up to the vif's MTU, or up to the link's MTU if that was raised since the link
// was opened. Nothing announces the raised MTU to the vif's other end, which takes every
// frame that fits in a ring. read means that the link has read a frame of n bytes; n is
// otherwise the size of a segment.
func (f *feeder) fits(whole []byte, n int, read bool) bool {
	payload, mtu := n-headers(whole), f.dev.MTU()
	if n <= pvnet.MaxFrame && payload <= max(mtu, f.raised) {
		return true
	}
	opened := f.l.MTU()
	now := opened
	if f.native != nil {
		if now = f.native.mtuNow(); now == 0 && read {
			now = payload
		}
	}
	if now > opened {
		f.raised = now
	}
	if n > pvnet.MaxFrame || payload > f.raised {
		f.j.logOnce(beyondVif, f.dev, f.l, n, max(now, opened))
		return false
	}
	f.j.logOnce(raisedLink, f.dev, f.l, n, f.raised)
	return true
}

// refuse drops a frame of n bytes that the vif or its other end does not take.
func (f *feeder) refuse(n int) {
	f.drop(tooLong, &f.j.refused)
	f.j.logOnce(beyondPeer, f.dev, f.l, n, f.l.MTU())
}

// logBeyondLink logs once that a link does not take a frame of n bytes.
func (j *Joint) logBeyondLink(dev *pvnet.Device, l Link, n int) {
	if j.logged[beyondLink].Load() {
		return
	}
	mtu := l.MTU()
	if q, ok := l.(native); ok {
		mtu = q.mtuNow()
	}
	j.logOnce(beyondLink, dev, l, n, mtu)
}

// Kinds of sizes that do not fit. Each is logged once; with a line per frame, a sender
// could flood the log.
const (
	raisedLink = iota
	beyondVif
	beyondPeer
	beyondLink
	sizeKinds
)

var messages = [sizeKinds]struct{ what, next string }{
	raisedLink: {"the MTU of a vif's interface was raised; frames up to it are passed on to the vif",
		"to have it stay so after a restart, give the vif that MTU (mtu=... in the domain's configuration)"},
	beyondVif: {"frames for a vif are longer than its MTU, and dropped",
		"give the vif a larger MTU (mtu=... in the domain's configuration), or the interface the vif's (ip link set ... mtu ...)"},
	beyondPeer: {"frames for a vif are longer than its other end takes, and dropped",
		"lower the interface's MTU (ip link set ... mtu ...); a frontend without feature-sg takes 4096 bytes"},
	beyondLink: {"frames of a vif are longer than its interface takes, and dropped",
		"raise the interface's MTU (ip link set ... mtu ...), or lower that of the guest's card"},
}

// logOnce logs once per kind that a frame of n bytes does not fit. mtu is the interface's.
func (j *Joint) logOnce(kind int, dev *pvnet.Device, l Link, n, mtu int) {
	if j.logged[kind].Swap(true) {
		return
	}
	log := dev.Logger().Warn
	if kind == raisedLink {
		log = dev.Logger().Info
	}
	w := &messages[kind]
	log(w.what, "vif", dev.ID(), "peer", dev.Peer(), "interface", l.Name(), "frame", n,
		"vif_mtu", dev.MTU(), "interface_mtu", mtu, "next", w.next)
}
