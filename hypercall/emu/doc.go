// Package emu is an emulated Xen: domains in one process or in many, with grants, event
// channels and domain deaths as on Xen, on any machine.
//
// [New] makes a [Machine] whose domains share one process. Its pages are on the Go heap,
// where the race detector watches them, or, with Config.Mapped, in sealed memfds, which a
// test needs if a peer rewrites memory on purpose. On Linux [Listen] makes a [Host]: a
// machine that other processes [Join], each as one domain. A domain asks the host only
// for set-up; copying, notifying and waiting do not involve it.
//
// The machine checks what Xen checks: every operation on a grant reads the granter's
// grant table, only the domain for which a port was opened may bind to it, and a mapped
// page is not freed. Xen knows a domain by its number alone in some places, and so does
// the emulator: a domain that takes over a number may use the grants to that number, but
// must not find anything that the number's last owner had granted.
//
// The emulator is for development; it is not a security boundary. The processes of a host
// belong to one user and trust each other. A grant that was ended is refused afterwards,
// but a process keeps memory that it has mapped, and its mapping of the event words is
// writable.
//
// The machine of one process starts goroutines only for Config.Store, and waits on
// channels and timers, so that it works in a bubble of testing/synctest.
//
// Outside of Linux that machine takes nothing of an operating system: no os, syscall or net.
// It is the example of a port (see Porting of package hypercall). Memory is on the heap there,
// and no Waiter or Group blocks a thread: both fail with errors.ErrUnsupported.
//
// A Machine owns its domains, and a domain owns its memory, ports and connections. A share or
// waiter that one process of a domain has offered, and another has adopted
// ([hypercall.HandoverDomain]), ends with the last of the two processes.
// [Machine.Ledger] counts all of them, and [Domain.Calls] the calls of a domain.
package emu
