// Package emu is an emulated Xen: domains in one process or in many, with the
// grants, event channels and deaths of the real one, on any machine.
//
// [New] makes a [Machine] whose domains share one process. Its pages are on the
// Go heap, where the race detector sees them, or, with Config.Mapped, in sealed
// memfds, which a test needs when a peer rewrites memory on purpose. On Linux
// [Listen] makes a [Host]: a machine that other processes [Join], each as one
// domain. The host is asked when something is set up; copying, notifying and
// waiting ask nobody.
//
// What a domain may do is checked as Xen checks it: every operation on a grant
// looks at the granter's grant table, only the domain a port was opened for binds
// to it, a page that is mapped is not freed. Where Xen knows a domain by its
// number alone, so does the emulator: a domain that takes over a number may use
// what was granted to that number, and must not find anything the last owner of
// the number had granted.
//
// It is a development machine, not a boundary. Processes that join a host are of
// one user and trust each other: a grant that was ended is refused from then on,
// but memory a process has mapped cannot be taken from it, and its own mapping of
// the event words is writable.
//
// The machine of one process starts goroutines for Config.Store only, and waits on
// channels and timers, so that it works in a bubble of testing/synctest.
//
// A Machine owns its domains, and they their memory, ports and connections;
// [Machine.Ledger] counts them all, and [Domain.Calls] what a domain asked for.
package emu
