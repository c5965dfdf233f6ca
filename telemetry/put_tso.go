//go:build amd64 && !race

package telemetry

// put stores a word of a mirror. x86 shows stores in program order, so the words
// between the two markers need no locked instruction of their own; no goroutine
// reads them.
func put(p *uint64, v uint64) { *p = v }
