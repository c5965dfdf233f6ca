package pvnet

import (
	"fmt"
	"log/slog"

	"barevif/hypercall"
	"barevif/telemetry"
)

// Config holds the options of a device. The zero Config suits most programs.
type Config struct {
	// Queues is how many queues to ask the peer for. 0 means 1. The connection has fewer
	// if the peer offers fewer; see [Device.Active].
	Queues int

	// LendRx lends received frames in the shared pages themselves, at most half the ring
	// at a time, instead of copying them. The peer can still write such a frame, so set
	// it only for consumers that copy the frame or that trust the peer. It applies to
	// frontends; a backend always copies.
	LendRx bool

	// Offload accepts frames from the peer that are longer than the MTU ([Frame.GSO]) or
	// whose checksum is partial ([ChecksumPartial]). It is for owners that handle both: a
	// TCP/IP stack, or a forwarder to a card that takes such frames. Otherwise the device
	// does not offer to take them, and every received frame has a complete checksum.
	// Sending them needs no Config.
	Offload bool

	// Buffers is the number of private pages per queue for received frames, at least 17.
	// 0 means 512. A receiver that holds all of them gets no more frames.
	Buffers int

	// Wait is how a blocking call waits.
	Wait WaitMode

	// LockedThreads says that the goroutines that wait are locked to their threads
	// (runtime.LockOSThread), as in a program that gives each queue a CPU. They then
	// block in the kernel, which saves Go's scheduler several thread switches per
	// wake-up. A goroutine that is not locked occupies a thread while it waits. Where two
	// halves share an event channel ("feature-split-event-channels" is 0), it applies to
	// the half that waits first.
	LockedThreads bool

	// Counters is a store that mirrors the counters for other processes. nil: they are on
	// the heap only.
	Counters telemetry.Store

	// Logger gets the state changes, never a line per frame. If a peer changes its state
	// without end, it gets one line every half minute, with the number of lines
	// suppressed. nil: silent.
	Logger *slog.Logger
}

// equal reports whether o, of a second Connect, agrees with c. The Logger may differ.
func (c Config) equal(o Config) bool {
	return c.Queues == o.Queues && c.LendRx == o.LendRx && c.Offload == o.Offload && c.Buffers == o.Buffers &&
		c.Wait == o.Wait && c.LockedThreads == o.LockedThreads && c.Counters == o.Counters
}

// check refuses a Config that cannot work in dom. A frame of MaxFrame bytes takes
// maxPieces buffers.
func (c *Config) check(dom hypercall.Domain) error {
	if _, ok := dom.(hypercall.ThreadDomain); c.LockedThreads && !ok {
		return fmt.Errorf("Config.LockedThreads is set: a %T cannot block a thread", dom)
	}
	if c.Queues < 0 {
		return fmt.Errorf("Config.Queues is %d", c.Queues)
	}
	if c.Buffers < 0 || c.Buffers > 0 && c.Buffers < maxFrameBuffers {
		return fmt.Errorf("Config.Buffers is %d: the largest frame takes %d", c.Buffers, maxFrameBuffers)
	}
	return nil
}

func (c *Config) queues() int { return max(c.Queues, 1) }

func (c *Config) buffers() int {
	if c.Buffers == 0 {
		return privatePages
	}
	return c.Buffers
}
