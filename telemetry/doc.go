// Package telemetry counts what a network device does.
//
// A [Set] holds two blocks of counters per queue, one for each direction. A
// [Block] has one writer, its queue's owner, who counts in private memory and
// publishes what changed every 32 frames and before it sleeps. Anyone may take a
// consistent [Set.Snapshot] at any time. With a [Store] the published words are
// also mirrored where other processes can read them.
//
// The private words are the truth. Nothing is ever read back from a mirror, and
// a mirror that fails is not a failure of the device.
//
// What each counter means is said in one table, [Fields], from which
// COUNTERS.md is made.
package telemetry
