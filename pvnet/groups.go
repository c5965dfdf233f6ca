package pvnet

import (
	"context"
	"encoding/binary"
	"sync"
	"sync/atomic"

	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// maxGroups is how many multicast addresses a frontend may list, as with Linux's netback
// (drivers/net/xen-netback/common.h: XEN_NETBK_MCAST_MAX).
const maxGroups = 64

// groups is the multicast filter of a backend's vif, over all its queues: the addresses
// that the frontend has listed with dummy requests on its tx rings. The receiving halves
// change it, and the sending halves look at it without a lock.
type groups struct {
	on      atomic.Bool // the frontend asked for the filter
	mu      sync.Mutex  // one change at a time
	entries [maxGroups]atomic.Uint64
}

// group returns the entry for an address. No entry is 0, which is a free place.
func group(mac [6]byte) uint64 {
	return 1<<48 | uint64(binary.BigEndian.Uint16(mac[:]))<<32 | uint64(binary.BigEndian.Uint32(mac[2:]))
}

// swap puts an entry in the first place that holds another, and reports whether there was
// such a place. Entries never move, so that who looks misses none.
func (g *groups) swap(from, to uint64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range g.entries {
		if g.entries[i].Load() == from {
			g.entries[i].Store(to)
			return true
		}
	}
	return false
}

// add lists an address, again if it is listed already, as netback does. It reports false
// if the list is full.
func (g *groups) add(mac [6]byte) bool { return g.swap(0, group(mac)) }

// remove takes an address off the list, once, if it is there.
func (g *groups) remove(mac [6]byte) { g.swap(group(mac), 0) }

func (g *groups) has(mac [6]byte) bool {
	e := group(mac)
	for i := range g.entries {
		if g.entries[i].Load() == e {
			return true
		}
	}
	return false
}

// clear empties the list, for a new connection, and turns the filter on or off.
func (g *groups) clear(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range g.entries {
		g.entries[i].Store(0)
	}
	g.on.Store(on)
}

// takes reports whether the frontend wants frames to mac: unless it is the address of a
// group that is not listed. Broadcast is for everybody.
func (g *groups) takes(mac [6]byte) bool {
	return mac[0]&1 == 0 || mac == [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} || g.has(mac)
}

// join does what a dummy request of the frontend asks, and reports whether it could. Of
// several such requests in one, netback does the first of ADD and DEL.
func (g *groups) join(x *netif.Extras) bool {
	if x.Has(netif.ExtraMcastAdd) {
		return g.add(x.Of(netif.ExtraMcastAdd).Mcast().MAC)
	}
	g.remove(x.Of(netif.ExtraMcastDel).Mcast().MAC)
	return true
}

// filter returns the frames at the beginning of frames that are to be sent, before the
// first that is not. If the first is not, it drops that one and those after it, up to the
// next that is to be sent, and returns how many.
func (e *backTX) filter(frames []Frame) (run []Frame, dropped int) {
	i := 0
	for ; i < len(frames) && !e.unwanted(&frames[i]); i++ {
	}
	if i > 0 || len(frames) == 0 {
		return frames[:i], 0
	}
	for ; i < len(frames) && e.unwanted(&frames[i]); i++ {
		if b := frames[i].buf; b.Of(e.private) {
			e.private.Release(b)
		} else {
			b.Release()
		}
	}
	e.count.Add(telemetry.Filtered, uint64(i))
	return nil, i
}

// unwanted reports whether the frontend does not want f. What is no frame is for send to
// refuse.
func (e *backTX) unwanted(f *Frame) bool {
	if f.total < MinFrame || !f.buf.Valid() {
		return false
	}
	f.CopyTo(e.dest[:])
	return !e.groups.takes(e.dest)
}

// list returns the addresses that are listed, in their order, each as often as it is.
func (g *groups) list() []MAC {
	g.mu.Lock()
	defer g.mu.Unlock()
	macs := []MAC{}
	for i := range g.entries {
		if e := g.entries[i].Load(); e != 0 {
			var b [8]byte
			binary.BigEndian.PutUint64(b[:], e)
			macs = append(macs, MAC(b[2:]))
		}
	}
	return macs
}

// readFilter reads whether the frontend asks for the multicast filter, and prepares the
// filter for a new connection. The list of a connection that goes on stays.
func (b *back) readFilter(ctx context.Context, xd *xenbus.Device) (wanted bool, err error) {
	peer, err := xd.PeerValues(ctx, netif.KeyRequestMulticast)
	if err != nil {
		return false, err
	}
	dir, _ := xd.Peer()
	wanted = b.filterWanted(peer, dir)
	if !b.resumes {
		b.startFilter(wanted, b.d.epoch.Load() > 0 || xd.Current().Own != xenbus.Connected)
	}
	return wanted, nil
}

// startFilter prepares the filter for a connection, with an empty list. known is false for a
// connection that another process of ours has made: its frontend has told that process which
// groups it has joined, and does not say so again. Then nothing is filtered.
func (b *back) startFilter(wanted, known bool) {
	b.adopted = !known
	if wanted && !known {
		b.d.log.Info("no multicast is filtered until the frontend connects again: its list is not known here", "vif", b.d.id)
	}
	b.d.groups.clear(wanted && known)
}

// filterWanted returns whether the frontend asks for the multicast filter, in the values of
// its directory.
func (b *back) filterWanted(peer xenstore.Values, dir string) bool {
	n, err := peer.Uint(netif.KeyRequestMulticast, 1<<32-1, 0)
	b.d.complain(dir, netif.KeyRequestMulticast, peer, err, "no multicast is filtered")
	return n != 0 && err == nil
}
