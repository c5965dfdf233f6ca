// Command vanish reads memory that is not there, as a program does whose peer's memory was
// taken away, and says whether Go's runtime makes a panic of it that the program survives.
package main

import (
	"fmt"
	"runtime/debug"
	"unsafe"
)

// far is an address at which no program has memory: the last page of 32 bits, which is beyond
// the memory of a WebAssembly machine, and which Go's heap does not reach elsewhere.
const far = 0xFFFF_F000

var near byte

func main() {
	debug.SetPanicOnFault(true)
	defer func() {
		r := recover()
		if f, ok := r.(interface{ Addr() uintptr }); ok {
			fmt.Printf("a panic with the address %#x\n", f.Addr())
			return
		}
		fmt.Println("no fault:", r)
	}()
	// The distance is computed, so the address is never a pointer before it is used: &near is
	// of the program, and nothing of it moves.
	p := unsafe.Pointer(&near)
	fmt.Println("read", *(*byte)(unsafe.Add(p, far-uintptr(p))))
}
