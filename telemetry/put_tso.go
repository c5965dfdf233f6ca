//go:build amd64 && !race

package telemetry

// put stores a word of a mirror. x86 makes stores visible in program order, and our
// goroutines access these words under the block's lock only. So neither the words nor the
// markers around them need a locked instruction.
func put(p *uint64, v uint64) { *p = v }
