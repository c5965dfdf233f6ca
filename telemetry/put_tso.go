//go:build amd64 && !race

package telemetry

// put stores a word of a mirror. x86 shows stores in program order and no
// goroutine of ours reads these words without the block's lock, so neither the
// words nor the markers around them need a locked instruction.
func put(p *uint64, v uint64) { *p = v }
