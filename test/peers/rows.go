package main

import (
	"fmt"
	"slices"

	"barevif/pvnet"

	"golang.org/x/sys/unix"
)

// The classes of rows.
const (
	ours   = "barevif"
	floor  = "floor"  // the least that the machine can take
	user   = "user"   // peers in user space, through shared memory
	kernel = "kernel" // peers through the kernel
)

// A row is one way to move frames, in one kind of measurement. Results are compared by the
// names of rows.
type row struct {
	name  string
	class string
	kind  string
	sizes []int
	free  bool // the goroutines are not pinned
	peer  peer
}

func (r *row) has(size int) bool { return slices.Contains(r.sizes, size) }

var (
	allSizes   = []int{sizeSmall, sizeMTU, sizeGSO}
	frameSizes = []int{sizeSmall, sizeMTU}
	smallSize  = []int{sizeSmall}
)

// manyVifs is how many vifs, or raw rings, a party has in the rows of more than one.
var manyVifs = [...]int{8, 64}

// Names of rows that goals refer to.
const (
	nameCounters = "barevif counters mirrored / not"
	nameMemif    = "gomemif poll"
	nameRawPing  = "raw ring, polled"
)

func nameRaw(rx bool, batch int) string { return nameRawMany(rx, batch, 1) }

func nameRawMany(rx bool, batch, rings int) string {
	s := "raw tx ring"
	if rx {
		s = "raw rx ring"
	}
	s += fmt.Sprintf(" b%d", batch)
	if rings > 1 {
		s += fmt.Sprintf(", %d rings", rings)
	}
	return s
}

func nameEndpoint(batch int) string { return fmt.Sprintf("gVisor sharedmem endpoint b%d", batch) }

// name returns the name of a row with these options; it mentions every option.
func (o vifOptions) name() string {
	s := "barevif front→back"
	if o.Back {
		s = "barevif back→front"
	}
	how := [...]string{pvnet.Park: "Park", pvnet.Adaptive: "Adaptive", pvnet.Busy: "Busy"}[o.Wait]
	if o.Poll {
		how = "poll"
	}
	call := "owning"
	switch {
	case o.Copying && o.Batch == 1:
		call = "Write/Listen"
	case o.Copying:
		call = "WriteBatch/ListenBatch"
	case o.Into:
		call = "owning, PollInto"
	}
	if o.Static {
		call += ", static grants"
	}
	if o.Lend {
		call += ", lent"
	}
	if o.InPlace {
		call += ", in place"
	}
	s += fmt.Sprintf(", %s, b%d, %s", call, o.Batch, how)
	if o.Vifs > 1 {
		s += fmt.Sprintf(", %d vifs", o.Vifs)
	}
	if o.Poller {
		s += ", poller"
	}
	if o.Idle > 0 {
		s += fmt.Sprintf(", %d idle", o.Idle)
	}
	if o.Queues > 1 {
		s += fmt.Sprintf(", %d queues", o.Queues)
	}
	if o.Two {
		s += ", two processes"
	}
	return s
}

func namePing(o vifOptions, free bool) string {
	o.Batch = 1
	s := o.name()
	if free {
		s += ", free goroutines"
	}
	return s
}

// allRows returns all rows. Rows that goals compare are near each other in the order.
func allRows(n *network) []*row {
	var rows []*row
	add := func(class, kind, name string, sizes []int, p peer) {
		rows = append(rows, &row{name: name, class: class, kind: kind, sizes: sizes, peer: p})
	}
	for _, rx := range []bool{false, true} {
		for _, batch := range []int{1, 32} {
			add(floor, stream, nameRaw(rx, batch), allSizes, rawPeer(1, batch, rx))
		}
		for _, rings := range manyVifs {
			add(floor, stream, nameRawMany(rx, 32, rings), smallSize, rawPeer(rings, 32, rx))
		}
	}
	add(floor, pingpong, nameRawPing, frameSizes, rawPeer(1, 1, false))
	add(floor, pingpong, nameEventfd, smallSize, eventfdPeer(false))
	add(floor, pingpong, nameEventfdTwo, smallSize, setupFunc(newEventfdProcess))
	rows = append(rows, &row{name: nameNetpoller, class: floor, kind: pingpong, sizes: smallSize, free: true, peer: eventfdPeer(true)})

	add(user, stream, nameMemif, allSizes, memifPeer(false))
	add(user, stream, "gomemif burst 32", allSizes, memifPeer(true))
	add(user, pingpong, nameMemif, frameSizes, memifPeer(false))
	rows = append(rows, ourRows()...)
	add(user, stream, "gVisor sharedmem queue, poll", allSizes, setupFunc(queuePeer))
	for _, batch := range []int{1, 32} {
		add(user, stream, nameEndpoint(batch), allSizes, endpointPeer(batch))
	}
	add(user, pingpong, "gVisor sharedmem endpoint", frameSizes, endpointPeer(1))

	for _, s := range []struct {
		name string
		kind int
	}{{"unix DGRAM", unix.SOCK_DGRAM}, {"unix SEQPACKET", unix.SOCK_SEQPACKET}} {
		add(kernel, stream, s.name+" write/read", allSizes, unixPeer(s.kind, 1))
		add(kernel, stream, s.name+" sendmmsg/recvmmsg 32", allSizes, unixPeer(s.kind, 32))
		add(kernel, pingpong, s.name, frameSizes, unixPeer(s.kind, 1))
	}
	add(kernel, stream, "TAP, bridge, TAP", allSizes, setupFunc(n.tapPeer))
	add(kernel, pingpong, "TAP, bridge, TAP", frameSizes, setupFunc(n.tapPeer))
	add(kernel, stream, "AF_PACKET write/read", allSizes, n.packetPeer(1))
	add(kernel, stream, "AF_PACKET sendmmsg/recvmmsg 32", allSizes, n.packetPeer(32))
	add(kernel, stream, "AF_PACKET TPACKET_V3", allSizes, setupFunc(n.ringPeer))
	add(kernel, pingpong, "AF_PACKET", frameSizes, n.packetPeer(1))
	// A frame of AF_XDP must fit in one page.
	for _, spin := range []bool{true, false} {
		how := map[bool]string{true: "spin", false: "poll(2)"}[spin]
		add(kernel, stream, "AF_XDP copy mode b32, "+how, frameSizes, n.xdpPeer(spin))
		add(kernel, pingpong, "AF_XDP copy mode, "+how, frameSizes, n.xdpPeer(spin))
	}
	return rows
}

// ourRows returns the rows of the device.
func ourRows() []*row {
	var rows []*row
	add := func(o vifOptions, sizes []int) {
		rows = append(rows, &row{name: o.name(), class: ours, kind: stream, sizes: sizes, peer: o})
	}
	waits := []vifOptions{{Poll: true}, {Wait: pvnet.Busy}, {Wait: pvnet.Adaptive}, {Wait: pvnet.Park}}
	for _, two := range []bool{false, true} {
		for _, back := range []bool{false, true} {
			for _, batch := range []int{1, 8, 32} {
				sizes := allSizes
				if batch == 32 {
					sizes = frameSizes // see job.limitBatch
				}
				for _, o := range waits {
					o.Back, o.Batch, o.Two = back, batch, two
					add(o, sizes)
					if o.Copying = true; !two && !o.Poll {
						add(o, sizes)
					}
				}
			}
			if !two {
				add(vifOptions{Back: back, Batch: 32, Poll: true, Into: true}, frameSizes)
			}
		}
	}
	// The cost of a frame that only the device copies, and the cost if the device lends the
	// page instead.
	for _, o := range []vifOptions{{InPlace: true}, {InPlace: true, Back: true}, {Lend: true, Back: true}, {Lend: true, InPlace: true, Back: true}} {
		o.Poll = true
		o.Batch = 32
		add(o, frameSizes)
		o.Batch = 8
		add(o, []int{sizeGSO})
	}
	// The same with pages that stay mapped.
	for _, o := range []vifOptions{{}, {Back: true}, {Lend: true}, {InPlace: true, Lend: true}} {
		o.Static, o.Poll = true, true
		o.Batch = 32
		add(o, frameSizes)
		o.Batch = 8
		add(o, []int{sizeGSO})
	}
	for _, more := range []vifOptions{{Queues: 2}, {Queues: 4}, {Queues: 8}, {Vifs: manyVifs[0]}, {Vifs: manyVifs[1]}} {
		for _, o := range []vifOptions{{Poll: true}, {Poll: true, Back: true}, {Wait: pvnet.Park}} {
			o.Batch, o.Queues, o.Vifs = 32, more.Queues, more.Vifs
			add(o, smallSize)
		}
	}
	for _, o := range []vifOptions{{Wait: pvnet.Busy}, {Wait: pvnet.Busy, Back: true}, {Wait: pvnet.Park}} {
		o.Batch, o.Poller = 32, true
		for _, many := range []vifOptions{{Vifs: 1}, {Vifs: 64, Idle: 63}, {Vifs: 64}} {
			o.Vifs, o.Idle = many.Vifs, many.Idle
			add(o, smallSize)
		}
	}
	for _, frontends := range []bool{false, true} {
		ends := map[bool]string{true: "frontends", false: "backends"}[frontends]
		for _, mode := range []pvnet.WaitMode{pvnet.Park, pvnet.Adaptive} {
			how := [...]string{pvnet.Park: "Park", pvnet.Adaptive: "Adaptive"}[mode]
			rows = append(rows, &row{name: fmt.Sprintf("barevif forward, two hops, %s, b32, %s", ends, how),
				class: ours, kind: stream, sizes: frameSizes, peer: forwardPeer(frontends, mode, 32)})
		}
	}
	for _, two := range []bool{false, true} {
		for _, o := range waits {
			o.Batch, o.Two = 1, two
			for _, free := range []bool{false, true} {
				if free && (two && o.Wait != pvnet.Park || o.Poll) {
					continue
				}
				rows = append(rows, &row{name: namePing(o, free), class: ours, kind: pingpong, sizes: frameSizes, free: free, peer: o})
			}
		}
	}
	return append(rows, &row{name: nameCounters, class: ours, kind: counters, sizes: smallSize})
}
