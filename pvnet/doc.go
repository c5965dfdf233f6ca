// Package pvnet is a Xen paravirtual network card for Go programs: the frontend,
// which a guest owns, and the backend, which serves one.
//
// A [Device] moves Ethernet frames. Its simple calls copy: Write and Writev send one
// frame and WriteBatch several, Listen and ListenBatch give every frame that arrives to a
// function. Its owning calls do not copy: [Device.OwnTX] and [Device.OwnRX] hand one
// direction of one queue to an owner. From then on only the owner uses it, without locks,
// allocations or system calls of its own.
//
// The device survives its peer. When the other end goes away the link goes down: blocking
// calls wait, the others return [ErrLinkDown], and the device connects again when a peer
// comes back. A frontend's link is also down, for what it sends, while its backend has no
// carrier. It survives a suspension of its own domain in the same way: a domain that is
// saved and restored, or migrated, has lost all grants and event channels, and its toolstack
// has made the vif anew. A peer that breaks the protocol ends the device ([PeerError]), and no other
// device.
//
// Features are agreed upon once for each connection, from the keys of both ends. Only
// MTU and carrier change while it lasts; other keys that change take a new connection,
// which either end may begin. A frontend that goes to Reconfiguring, as Linux's does for
// XDP where a backend offers headroom, is answered with Closing.
//
// Each frame is counted once, at one end. The receiving end counts a frame as received,
// or as lost with a reason. When a connection ends, the sender counts the requests
// without a response, and the receiver the responses that it has not taken. In both cases
// that is the frontend, which counts them as [telemetry.DropDisconnected] after the
// backend has let go of the rings; the backend counts nothing. So [telemetry.Unaccounted]
// is 0 after any number of connections that ended with Closing and Closed, or that
// another backend continued. An end that is killed, that does not answer Closing within 4
// s, or whose directory is removed while it is connected, may leave frames uncounted or
// counted twice: at most as many as the rings have slots, 256 for each queue and
// direction.
//
// Everything a peer can write is copied once, checked, and then used. The package
// knows no operating system; the program chooses the [hypercall.Domain].
//
// [Device.HandOver] passes a vif from one process of its domain to another while frames move:
// none is lost, and the other end notices nothing. [ServeConfig].TakeOver takes a backend's
// over, [TakeOver] a frontend's. What a frontend has told goes with the vif: its multicast
// list, how its frames are to be hashed, its static grants, and the place in its control ring.
//
// # Names
//
// A vif has queues, and a queue two halves: a [TX], which sends, and an [RX], which
// receives. netif.h names rings as the frontend sees them, and so do errors and counters
// of the wire: on the tx ring frames go from the frontend to the backend, on the rx ring
// from the backend to the frontend.
//
//	             tx ring        rx ring
//	frontend     its TX         its RX
//	backend      its RX         its TX
//
// The engine of a half is the code that moves frames through one connection's ring:
// frontTX and backRX at the ends of a tx ring, backTX and frontRX at those of an rx ring.
//
// # The way of a frame
//
// Most frames take one slot of a ring and carry no offloads. Each end handles them in one
// pass over the batch:
//
//  1. The sender takes the frame over from its user: one compare-and-swap of the
//     buffer's state, which makes every copy of the [Frame] stale.
//  2. It writes a slot, 12 bytes of the tx ring or, as a backend, the copy operation
//     for a slot that its frontend has posted. Nothing is visible to the peer yet.
//  3. A backend runs the batch of copies, one call of [hypercall.Domain].Copy, and then
//     writes a response into the slot of each request. A frontend copies nothing: its
//     pages are granted for the whole connection.
//  4. One store of the producer index shows the peer the whole batch. It is the one
//     fence of the batch, an XCHG on amd64, and the load behind it tells whether the
//     peer, which may be asleep, asked to be notified.
//  5. The receiver loads the producer index once and each slot once, into private
//     memory, and checks that copy. Its private pages come off the arena's stack many
//     at a time.
//  6. A backend copies the batch as in 3; a frontend copies from the page that the
//     backend wrote, and posts that page again in the next slot.
//  7. Its responses, or the pages posted again, are shown by one store, as in 4.
//  8. The receiver's user gives the frames back: one compare-and-swap each.
//  9. When a frontend lacks slots or pages, it takes all responses that are in the ring,
//     and has the pages of their requests back. A backend that lacks slots loads the
//     producer index again, for pages that were posted meanwhile.
//
// The cache lines that travel are the payload's, the slot's, and the one line of the
// four indexes, which both ends write: the frontend its requests' producer and its
// responses' event, the backend the other two. Everything else, the stacks of pages,
// the cached indexes and the counters, is private to one end.
//
// Frames with several slots, extra infos, a partial checksum or GSO take the general
// path: the engine parses their slots into one description, then copies and answers them.
// A record that leaves the fast path is handed on as the private copy; its slot is never
// loaded again.
//
// With static grants ([Config].StaticGrants) a backend has its frontend's pages mapped, and
// steps 3 and 6 are copies of its own, without the hypervisor. The frontend names the pages
// on the control ring once the link is up; a page that it did not name takes a grant copy
// as before, so both kinds may stand in one batch. With [Config].LendRx the backend does
// not copy long frames at all: its user reads them in the frontend's page, and the
// response waits, with those behind it, until the user has given the page back.
//
// A half that finds nothing to do looks at the ring for as long as [WaitMode] says,
// arms the event of its ring, looks once more, and parks: in Go's scheduler or, with
// [Config].LockedThreads, in the kernel. Only then is it asleep, and only then does its
// peer notify it.
//
// # Who runs what
//
//	goroutine          runs                  owns, or writes                  wakes
//	an owner's         its own code          one half while inside its gate   the peer, by its event channel
//	a caller of Write  its own code          a TX, with TX.mu held and        the peer
//	                                         inside its gate
//	Listen, per queue  RX.listen             an RX while inside its gate      the peer
//	lifecycle, per     lifecycle.run         our xenbus state, connections,   callers, through link and gates;
//	device                                   gates, the link's state          subscribers of Links; a half
//	                                                                          whose event was lost
//	slow tick, one     slowTicker.run        what lifecycle.mu guards, with   the lifecycle goroutine; a TX
//	per domain                               it held; a TX that nobody is     whose peer has given some of the
//	                                         inside; counters of halves       slots it waits for, or has
//	                                         that wait; whether a peer        stopped; subscribers of Links
//	                                         has stopped
//	a caller of Rings  half.visit            a half that nobody is inside,    the peer and a half that
//	or Kick                                  or whose caller waits            waits, for Kick
//	a reader of a Tap  its own code          its end of the tap's buffers     –
//	xenbus, per        xenbus.Device.run     what is known of both ends'      the lifecycle goroutine
//	device                                   states
//	xenstore client,   its reader, and one   the connection to xenstore       all who asked or watch
//	per Connect or     to connect again
//	Serve
//	control ring, one  ctrlLoop.loop         this end of the control ring,    the peer; callers that wait for
//	per device whose                         while the link is up             a response
//	peer has one
//	a frontend's       ctrlClient.whenUp     –                                the control ring's goroutine
//	settings, until
//	the backend has
//	them
//	a caller of Serve  serve                 which directories have a         –
//	                                         goroutine
//	Serve, per vif     server.serveDir, and  the vif's directory              Serve, when it has left the vif
//	                   in it accept
//
// A gate lets one caller at a time into a half. The lifecycle goroutine shuts it and waits
// for the caller to leave before it takes a connection away, so a caller never finds a
// ring gone. Nobody waits for a lock while data moves: the only atomic operations of a
// batch are one compare-and-swap at the gate on the way in, one on the way out, those of
// the frames' buffers, those of the ring and, every 32 frames, a TryLock to publish the
// counters.
//
// # Frontends that stop
//
// A frontend that takes no frames, because its domain is paused or its driver hangs, holds
// up nobody for long. A backend's call that waits for room drops its frames after
// [ServeConfig].DrainTimeout, and later calls drop theirs at once until the frontend takes
// some. After [ServeConfig].StallTimeout the carrier is off ([LinkEvent].Stalled). The slow
// tick measures both, so that no frame reads the clock. What may wait for one frontend is
// bounded by the pages of its sending half: 256, a MiB, for each queue. A goroutine that
// feeds many vifs calls [TX.Send], which never waits.
//
// # Looking inside
//
// [Device.Rings] describes the rings, as a kernel driver does in debugfs, and [Device.Kick]
// does what an event would. [Device.Tap] copies frames for a capture. Package pvnet/inspect
// offers the three to other processes, for "barevif ring" and "barevif dump".
//
// # Rate limits
//
// A vif may have a rate limit, of what its guest sends (the key "rate"). Without one, a
// batch costs a backend one look at a word. With one, its RX has credit for some bytes,
// which it gets from the vif's limiter a window's worth at a time. It reads the clock only
// when that is used up. A frame that has to wait for credit has left the ring and has no
// response; the owner arms no event meanwhile, and waits for the time at which the window
// ends.
//
// # Multicast
//
// A frontend may ask a backend to leave out multicast ("request-multicast-control"), and then
// lists the groups that it wants by dummy requests on its tx ring: [Device.SetMulticast].
// Each takes two slots beside the frames', and the list of a new connection is in the ring
// before the backend attaches it. The backend keeps up to
// 64 addresses for a connection, as Linux's netback does, and counts the frames that it
// leaves out as [telemetry.Filtered]. As long as no frontend asks, a batch costs one look
// at a flag.
//
// # Many vifs and one goroutine
//
// A [Poller] does the same for all halves that one goroutine owns. Each member is either
// polled or asleep. A member that had work is polled in every turn. It falls asleep after
// some turns without work, or once no member has work and the looks of
// [PollerConfig].Wait have found none: the Poller arms its event, polls it once more, and
// then only its event channel wakes it. One wait covers all event channels
// ([hypercall.Group]) and returns those that fired. No wake-up is lost between the last
// look and the sleep, since a peer that publishes after the arming notifies; nor between
// the notification and the wait, since a channel that fired stays pending until it is
// read.
package pvnet
