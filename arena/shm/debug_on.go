//go:build shmdebug

package shm

import (
	"fmt"
	"sync/atomic"
)

// Debug reports whether this build checks every load (-tags shmdebug).
const Debug = true

// slotDebug holds, for every word of the slots, the free-running index of the last load,
// plus one.
type slotDebug struct{ last []uint64 }

func newSlotDebug(words int) slotDebug { return slotDebug{last: make([]uint64, words)} }

func (d slotDebug) load(i, word uint32) {
	if d.last[word] == uint64(i)+1 {
		panic(fmt.Sprintf("shm: word %d loaded twice in slot generation %d", word, i))
	}
	d.last[word] = uint64(i) + 1
}

var tamper atomic.Pointer[func(uint32) uint32]

// Tamper makes every load of shared memory return f of the loaded word, until restore is
// called. Only builds with -tags shmdebug have it.
func Tamper(f func(word uint32) uint32) (restore func()) {
	old := tamper.Swap(&f)
	return func() { tamper.Store(old) }
}

func observe(v uint32) uint32 {
	if f := tamper.Load(); f != nil {
		return (*f)(v)
	}
	return v
}
