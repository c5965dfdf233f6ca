// Package telemetry counts what a network device does.
//
// A [Set] holds two blocks of counters per queue, one for each direction. A [Block] has
// one writer, the owner of its queue. The owner counts in private memory, and publishes
// the changed words every 32 frames and before it sleeps. Anyone may take a consistent
// [Set.Snapshot] at any time. With a [Store] the published words are also mirrored to
// memory that other processes read.
//
// The private words are authoritative. Nothing is ever read back from a mirror, and a
// failing mirror does not make the device fail.
//
// One table, [Fields], defines the meaning of each counter; COUNTERS.md is generated from
// it.
package telemetry
