// Package hypercall defines what a domain asks of its hypervisor: grants of its memory to
// another domain, mapping and copying of another domain's memory, and event channels.
//
// It holds types and interfaces only. hypercall/xendev implements them on a real Xen
// through Linux's device nodes, hypercall/emu on an emulated Xen.
//
// # Porting
//
// A program on another system, or on none, needs one package: an implementation of [Domain].
// The packages above it, pvnet, xenbus, xenbus/xenstore, arena and telemetry, import neither
// os, syscall nor net, but for the three names of system.go, which call nothing. A test in
// test/hygiene checks their imports. The machine has 64 bits and is little-endian.
//
// Package hypercall/emu is the example: outside of Linux it builds a whole Domain that calls no
// operating system. In test/wasm that Domain passes the suite below in a WebAssembly machine,
// with one thread, a clock, random bytes and an output, and both ends of a vif run on it.
//
// The table names the hypercall or table of Xen behind each method, and the demands on an
// implementation that the method's comment leaves out:
//
//	ID        the domid: from the start info or CPUID, or the key domid of xenstore
//	Memory    page-aligned pages of whole frames, which nothing else uses. They are private,
//	          so no grant is made. Zeroed.
//	Share     such pages, each with an entry of the grant table. The entry's flags are
//	          written last, after a write barrier. Refs 0 to 7 are Xen's. End clears the
//	          flags by compare-and-swap; while GTF_reading or GTF_writing is set the page
//	          is not free, now or ever, and the error is ErrInUse.
//	Map       GNTTABOP_map_grant_ref into consecutive addresses. If a ref fails, the port unmaps
//	          the pages that it has mapped before. The mapping stays until Release,
//	          whatever becomes of the granter; see the trap below.
//	Copy      GNTTABOP_copy. Local areas are Go memory: pieces of a page each, since pages
//	          that follow each other for Go need not do so for Xen; or the port runs an
//	          op in parts. Status is Xen's. It runs on the path of every batch of frames:
//	          no allocation, no lock that is held while something waits.
//	Waiter    where one goroutine sleeps for the event channels opened on it. The handler
//	          of the upcall, or who polls the pending bits, masks the port, notes it for its
//	          Waiter, and wakes the goroutine. A wake from before the sleep counts.
//	Unbound   EVTCHNOP_alloc_unbound
//	Bind      EVTCHNOP_bind_interdomain; the new port is pending at once
//	Notify    EVTCHNOP_send. Everything stored before it is visible to who is woken by it.
//	Close     of a Port: EVTCHNOP_close; afterwards the number may be another's, so an event
//	          on its way must not reach the next port of that number
//	Store     the ring of xenstore (xen/include/public/io/xs_wire.h) as a stream of bytes
//
// A port without processes does not implement [HandoverDomain], and one without threads not
// [ThreadDomain]: pvnet then refuses a hand-over with errors.ErrUnsupported, and a Config with
// LockedThreads by the name of that option.
// [GroupDomain] is worth having: without it there is no pvnet.Poller. A Waiter whose Wait
// parks its goroutine until Go's scheduler looks for events should be a [Nudger].
//
// # Memory
//
// Shared pages are memory in which an aligned 32-bit load or store is one access, in the
// cache like all other memory, at an address that is a multiple of 8. Package arena/shm
// reaches their words only by the functions of sync/atomic, whose order is one for all words
// and all processors: a load does not pass an earlier store to another word. The ring's
// protocol stands on that, as C's does on mb(). A compiler that makes plain accesses of
// sync/atomic, as is right for one processor, is right here only if the other domain runs
// on that processor too. The bytes of frames are copied without order, before the index
// that publishes them is stored.
//
// A page of Memory, Share and Map is nowhere that a garbage collector moves or frees it while
// it is in use. Go's own does not move the heap.
//
// # The runtime
//
//	goroutines   pvnet has some six per device and none that needs a thread of its own. One
//	             thread is enough: a half that spins (pvnet.Busy, pvnet.Adaptive) calls
//	             runtime.Gosched. Without preemption a program's own loop has to do so too.
//	timers       time.Timer and a monotonic clock, of a millisecond or so. Without them the
//	             slow tick does not come: lost events are not found, a guest that stops is not
//	             noticed, and spurious events are not delayed.
//	crypto/rand  names claims and makes a MAC if xenstore has none, and keys of hashes. If it
//	             is no source of entropy, a peer can guess where a frame is queued; if it
//	             fails, Go ends the program.
//	fault trap   see below; pvnet works without it
//
// # The fault trap
//
// pvnet reads pages that another domain granted. Xen keeps a page that is mapped until it is
// unmapped, but Linux may take one away from under a process. There an access faults, and
// runtime/debug.SetPanicOnFault makes a panic of it, whose value has the method Addr() uintptr.
// pvnet catches values with that method where it reaches shared memory: the device ends with
// a pvnet.PeerError, "shared memory is gone", and other devices go on.
//
// A port's page fault handler may do the same: panic on the goroutine that met the fault, with
// an error that has Addr. Where it cannot, SetPanicOnFault has no effect and the program ends
// at the fault; a WebAssembly machine is such a place. The port must then keep what it has
// mapped until Release. A port that maps by GNTTABOP_map_grant_ref does so anyway.
//
// # The suite
//
// domaintest.Run checks all of this but the order of memory, which no test sees: two domains
// on one machine, or one that is its own peer, as on a Xen where nothing else answers.
//
//	func TestDomain(t *testing.T) {
//		domaintest.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
//			d, err := myxen.Open()
//			if err != nil {
//				t.Fatal(err)
//			}
//			return d, d
//		})
//	}
//
// domaintest.Cases has the names of what must have run. A test program for such a system is
// made by "go test -c", for instance with GOOS=wasip1 and GOARCH=wasm.
package hypercall
