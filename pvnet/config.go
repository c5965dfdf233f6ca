package pvnet

import (
	"fmt"
	"log/slog"
	"math"
	"runtime"

	"barevif/hypercall"
	"barevif/telemetry"
)

// Config holds the options of a device. The zero Config suits most programs.
type Config struct {
	// Queues is how many queues to ask the peer for, or to offer as a backend. 0 means 1,
	// and [AutoQueues] as many as the machine and the peer give. The connection has fewer
	// if the peer has fewer; see [Device.Active].
	Queues int

	// LendRx lends received frames in the shared pages themselves, at most half the ring
	// at a time, instead of copying them. The peer can still write such a frame, so set
	// it only for consumers that copy the frame or that trust the peer. A frontend copies
	// what comes from a backend that is not trusted ([Device.Trusted]). A backend lends
	// pages that static grants keep mapped. They are [Frame.ReadOnly], and a backend
	// answers in order: a frame that is held keeps the frontend waiting for the pages of
	// all frames behind it, so release frames in the order in which they came, and soon.
	LendRx bool

	// StaticGrants lets the backend keep the frontend's pages mapped as long as the
	// connection lasts, if both ends set it: then no frame needs a grant operation. It
	// takes a control ring: two shared pages, an event channel and a goroutine for each vif. With
	// another peer it changes nothing. [telemetry.FeatureStaticGrants] shows whether it is
	// in effect.
	StaticGrants bool

	// Offload accepts frames from the peer that are longer than the MTU ([Frame.GSO]) or
	// whose checksum is partial ([ChecksumPartial]). It is for owners that handle both: a
	// TCP/IP stack, or a forwarder to a card that takes such frames. Otherwise the device
	// does not offer to take them, and every received frame has a complete checksum.
	// Sending them needs no Config.
	Offload bool

	// Hash makes the backend of a frontend with at least two queues choose the queue of a
	// frame by its hash, and tell the hash ([Frame.Hash]), which takes a slot more for each
	// frame. nil: the backend chooses as it likes. A backend that does not hash is logged,
	// once, and the device works without. [Device.SetHash] changes it. No effect on a
	// backend's device: its frontend asks.
	Hash *HashConfig

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

	// Inspector shows the device to other processes, which may look at its rings and its
	// frames: package pvnet/inspect. nil: nobody sees it.
	Inspector Inspector

	// Logger gets the state changes, never a line per frame. If a peer changes its state
	// without end, it gets one line every half minute, with the number of lines
	// suppressed. nil: silent.
	Logger *slog.Logger

	auto bool // Queues was AutoQueues: see resolve
}

// AutoQueues, as Config.Queues, makes a device with a queue for each processor that Go may
// use (GOMAXPROCS), and at most 8, which is the number that Linux's netback and netfront
// stop at too. A frontend then takes as many of them as its backend offers, and as there
// are pages to grant for whole queues: 514 pages each, of the limit that
// [hypercall.ErrNoGrants] names. It takes fewer queues rather than smaller ones, and
// leaves room for a whole queue of each other vif of the domain that is still to be
// connected. Device.Budget and the log say what was taken.
//
// It is no default, because a program must serve every queue that it asks for: the peer
// spreads flows over all of them, and frames for one that nobody owns or listens to wait
// in its ring for ever. Listen, netstack and link do serve all, and so should an owner of
// AutoQueues: its program calls OwnRX and OwnTX for each of Device.Queues. One that owns
// queue 0 alone has the zero Config.
const AutoQueues = math.MinInt32

// mostAuto is the most queues that AutoQueues means: MAX_QUEUES_DEFAULT of Linux's
// xen-netback and xen-netfront.
const mostAuto = 8

// resolve returns c with the number that AutoQueues means on this machine now. A device
// keeps it for its life.
func (c Config) resolve() Config {
	if c.Queues == AutoQueues {
		c.Queues, c.auto = min(runtime.GOMAXPROCS(0), mostAuto), true
	}
	return c
}

// An Inspector shows devices to other processes. Its methods may be called from several
// goroutines.
type Inspector interface {
	// Open shows d under the name of info, until the function that it returns is called.
	// It must not wait for d.
	Open(info telemetry.Info, d *Device) (hide func())
}

// equal reports whether o, of a second Connect, agrees with c. The Logger may differ.
func (c Config) equal(o Config) bool {
	return c.Queues == o.Queues && c.LendRx == o.LendRx && c.StaticGrants == o.StaticGrants &&
		c.Offload == o.Offload && c.Buffers == o.Buffers && c.Wait == o.Wait && c.LockedThreads == o.LockedThreads && c.Hash.equal(o.Hash) &&
		c.Counters == o.Counters && c.Inspector == o.Inspector
}

// check refuses a Config that cannot work in dom. A frame of MaxFrame bytes takes
// maxPieces buffers.
func (c *Config) check(dom hypercall.Domain) error {
	if _, ok := dom.(hypercall.ThreadDomain); c.LockedThreads && !ok {
		return fmt.Errorf("Config.LockedThreads is set: a %T cannot block a thread", dom)
	}
	if c.Queues < 0 && c.Queues != AutoQueues {
		return fmt.Errorf("Config.Queues is %d: it must be 1 or more, 0 for 1, or AutoQueues", c.Queues)
	}
	if c.Buffers < 0 || c.Buffers > 0 && c.Buffers < maxFrameBuffers {
		return fmt.Errorf("Config.Buffers is %d: it must be %d or more, which the largest frame takes, or 0 for %d", c.Buffers, maxFrameBuffers, privatePages)
	}
	return c.Hash.check()
}

func (c *Config) queues() int { return max(c.Queues, 1) }

func (c *Config) buffers() int {
	if c.Buffers == 0 {
		return privatePages
	}
	return c.Buffers
}
