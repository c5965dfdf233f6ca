// Package bpf mirrors counters into BPF maps, where other processes read them by name,
// without help from this process.
//
// A [Store] makes, per device, an array of counters that is mapped into this process and
// written by plain stores. Its type information is made from the table of package
// telemetry, so that
//
//	bpftool map dump pinned /sys/fs/bpf/barevif/front-3-0-0/counters
//
// prints every counter by name, and a pinned BPF iterator makes
//
//	cat /sys/fs/bpf/barevif/front-3-0-0/metrics
//
// print OpenMetrics text, even while this process is stopped and after it was killed.
// Both are assembled in Go, without a compiler or an object file.
//
// Where something is missing the store makes a lesser mirror, whose Reason says what was
// missing: maps without the iterator (no CAP_PERFMON), maps without pins (no BPF file
// system is mounted: mount -t bpf bpf /sys/fs/bpf mounts one; or another user owns the
// directory), a sealed memfd (no CAP_BPF). All hold the same words; [List] and [Open]
// read any of them.
//
// The directory belongs to the process that holds a lock on it. The pins of a killed
// process stay readable until the next owner replaces them or they are removed.
//
// The package runs on Linux only.
package bpf
