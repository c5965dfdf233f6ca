//go:build linux

// Vectors checks that Xen keeps the vector registers of a domain. For a while it copies and
// clears blocks of memory, for which Go uses these registers, and exits with status 1 if a
// block has other bytes than it wrote. The lab runs it in more domains than the machine has
// processors, so that Xen has to save and restore the registers.
package main

import (
	"bytes"
	"fmt"
	"os"
	"time"
)

const duration = 5 * time.Second

// block is cleared with the register that Go keeps at zero.
type block [64]byte

//go:noinline
func clearBlock(b *block) { *b = block{} }

func main() {
	own := fmt.Sprintf("process %d of %s ", os.Getpid(), os.Args[1])
	want := bytes.Repeat([]byte(own), 4096/len(own))
	got := make([]byte, len(want))
	rounds, wrong := 0, 0
	for end := time.Now().Add(duration); time.Now().Before(end); {
		for range 200 { // takes far longer than a reading of the clock
			rounds++
			clear(got)
			copy(got, want)
			b := block{1, 2, 3}
			clearBlock(&b)
			if bytes.Equal(got, want) && b == (block{}) {
				continue
			}
			if wrong++; wrong == 1 {
				fmt.Printf("a cleared block holds %q\n", b)
			}
		}
	}
	fmt.Printf("%d rounds, %d wrong\n", rounds, wrong)
	if wrong > 0 {
		os.Exit(1)
	}
}
