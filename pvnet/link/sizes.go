package link

import (
	"sync/atomic"

	"barevif/pvnet"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

// A loss is why a frame of a link does not reach the vif, in the words of the device's
// counters.
type loss int

const (
	tooLong loss = iota
	tooShort
	badGSO
	badSum
	undelivered // by the kernel
	endLosses
)

var reasons = [endLosses]telemetry.Reason{
	tooLong: telemetry.DropTooLong, tooShort: telemetry.DropTooShort,
	badGSO: telemetry.DropBadGSO, badSum: telemetry.DropBadCsum,
}

// drop counts a frame that is lost, in the joint's counter, and with count in the
// device's.
func (f *feeder) drop(why loss, counter *atomic.Uint64) {
	counter.Add(1)
	f.lost[why]++
}

// count adds the losses to the device's counters; while the vif is down it keeps them.
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

// headers is the size of the Ethernet header of a frame and its VLAN tags, of which
// the MTU of an interface does not speak.
func headers(frame []byte) int {
	h, _ := packet.Parse(frame, len(frame))
	return MinFrame + 4*int(h.Tags)
}

// fits reports whether the vif carries n bytes behind the headers whole begins with:
// up to its MTU, or up to the MTU of the link, if it was raised while they are joined.
// The other end of a vif is not told of that, but takes every frame its ring can carry.
// read says that n is the size of a frame the link has read.
func (f *feeder) fits(whole []byte, n int, read bool) bool {
	payload, mtu := n-headers(whole), f.dev.MTU()
	if n <= pvnet.MaxFrame && payload <= max(mtu, f.raised) {
		return true
	}
	opened := f.l.MTU()
	now := opened
	if f.quick != nil {
		if now = f.quick.mtuNow(); now == 0 && read {
			now = payload
		}
	}
	if now > opened {
		f.raised = now
	}
	if n > pvnet.MaxFrame || payload > f.raised {
		f.j.tell(beyondVif, f.dev, f.l, n, max(now, opened))
		return false
	}
	f.j.tell(raisedLink, f.dev, f.l, n, f.raised)
	return true
}

// refuse drops a frame of n bytes that the vif or its other end does not take.
func (f *feeder) refuse(n int) {
	f.drop(tooLong, &f.j.refused)
	f.j.tell(beyondPeer, f.dev, f.l, n, f.l.MTU())
}

// tellUntaken says that a link does not take a frame of n bytes.
func (j *Joint) tellUntaken(dev *pvnet.Device, l Link, n int) {
	if j.told[beyondLink].Load() {
		return
	}
	mtu := l.MTU()
	if q, ok := l.(quick); ok {
		mtu = q.mtuNow()
	}
	j.tell(beyondLink, dev, l, n, mtu)
}

// Kinds of sizes that do not fit. Each is said once: a line for each frame would be
// the sender's to write.
const (
	raisedLink = iota
	beyondVif
	beyondPeer
	beyondLink
	kinds
)

var words = [kinds]struct{ what, next string }{
	raisedLink: {"the MTU of a vif's interface was raised; frames up to it are passed on to the vif",
		"to have it stay so after a restart, give the vif that MTU (mtu=... in the domain's configuration)"},
	beyondVif: {"frames for a vif are longer than its MTU, and dropped",
		"give the vif a larger MTU (mtu=... in the domain's configuration), or the interface the vif's (ip link set ... mtu ...)"},
	beyondPeer: {"frames for a vif are longer than its other end takes, and dropped",
		"lower the interface's MTU (ip link set ... mtu ...); a frontend without feature-sg takes 4096 bytes"},
	beyondLink: {"frames of a vif are longer than its interface takes, and dropped",
		"raise the interface's MTU (ip link set ... mtu ...), or lower that of the guest's card"},
}

// tell says once that a frame of n bytes does not fit. mtu is the interface's.
func (j *Joint) tell(kind int, dev *pvnet.Device, l Link, n, mtu int) {
	if j.told[kind].Swap(true) {
		return
	}
	log := dev.Logger().Warn
	if kind == raisedLink {
		log = dev.Logger().Info
	}
	w := &words[kind]
	log(w.what, "vif", dev.ID(), "peer", dev.Peer(), "interface", l.Name(), "frame", n,
		"vif_mtu", dev.MTU(), "interface_mtu", mtu, "next", w.next)
}
