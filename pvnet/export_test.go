package pvnet

import (
	"context"
	"time"

	"barevif/pvnet/netif"
)

// SetPatience sets how long quiesce waits for a caller to leave a half.
func (d *Device) SetPatience(t time.Duration) { d.callerTimeout = t }

// Parked returns how many waits the receiver of queue i has begun, if it waits now.
func (d *Device) Parked(i int) int {
	if n := d.rx[i].waitSeq.Load(); n%2 == 1 {
		return int(n+1) / 2
	}
	return 0
}

// Join lists a group in a backend's filter.
func (d *Device) Join(mac MAC) bool { return d.groups.add(mac) }

// Tell makes a request of a frontend on its control ring, with entries in the list page. It
// returns the statuses that the backend has written there.
func (d *Device) Tell(ctx context.Context, typ netif.CtrlType, queue int, entries ...netif.GrefEntry) (status netif.CtrlStatus, n uint32, statuses []uint16, err error) {
	c := d.ctrl.Load()
	if c == nil {
		return 0, 0, nil, ErrLinkDown
	}
	status, n, err = c.callWith(ctx, typ, func() [3]uint32 {
		copy(c.args, putGrefs(nil, entries))
		return [3]uint32{uint32(queue), uint32(c.ref), uint32(len(entries))}
	})
	for _, e := range getGrefs(c.args[:len(entries)*netif.GrefEntrySize]) {
		statuses = append(statuses, e.Status)
	}
	return status, n, statuses, err
}

// SentPages returns the entries of the pages that a frontend's queue sends from, as it adds
// them.
func (d *Device) SentPages(queue int) (list []netif.GrefEntry) {
	for _, ref := range d.tx[queue].eng.(*frontTX).refs {
		list = append(list, netif.GrefEntry{Ref: ref, Flags: netif.GrefReadOnly})
	}
	return list
}
