// Package guestinit is process 1 of a guest that runs one program. It mounts the kernel's
// file systems, loads the modules through which the program reaches Xen, starts the program,
// collects the processes that end, and powers the guest off when the toolstack asks for it or
// when the program has ended.
//
// It says on the console, with the seconds since the kernel started, what it does, and what is
// missing. Nothing that is missing makes it give up: only the program knows what it needs. It
// never ends itself, which would be a panic of the kernel.
//
// It takes its settings from the kernel's command line, which is extra= in a configuration of
// xl: see [Parse].
//
// The package uses only the standard library, because barevif builds it from a copy of its source that
// it carries, in a module without requirements and without a network.
package guestinit
