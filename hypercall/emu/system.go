package emu

import (
	"errors"
	"fmt"
)

// A system is what the domains of a machine in this process take of the operating system, and
// can do without.
type system struct {
	eventfd func() (bell, error)                 // a bell that a thread can block on
	sleeper func(onThread bool) (sleeper, error) // for a group
}

// noSystem is a machine that takes nothing: its domains have goroutines, timers and
// crypto/rand. Everything works but waiting on a thread, for which there is no thread.
var noSystem = system{
	eventfd: func() (bell, error) { return nil, errNoThread },
	sleeper: newChanSleeper,
}

var errNoThread = fmt.Errorf("emu: blocking a thread needs Linux's eventfds: %w", errors.ErrUnsupported)
