// Package link opens what a vif can be joined to on this machine: a TAP, at whose
// other end is the kernel's own network stack, and a packet socket, at whose
// other end is an interface that exists already.
//
// A link carries whole Ethernet frames, without the frame check sequence, one per
// call; a [Joint] moves the frames of a TAP in bursts. The link copies nothing in Go:
// the kernel scatters a frame into the caller's buffers, and gathers it from them.
// Beside its bytes a frame has an [Offload], the kernel's struct virtio_net_hdr: the
// work that the sender left undone. A TAP that is not joined to a vif asks the kernel
// to leave no work, but reports any that the kernel leaves all the same.
//
// The package trusts the kernel, but not the content of the frames: it checks every
// length, offset and type inside a frame before it uses them. It creates no bridges,
// routes or addresses; those are up to the caller.
package link

import (
	"errors"
	"time"

	"barevif/pvnet"
)

// MaxFrame is the size of the largest frame of a link, in bytes: an Ethernet header with a
// VLAN tag and the largest IP packet. Without offloads a frame has at most the MTU and 18
// bytes. The smallest is [pvnet.MinFrame].
const MaxFrame = pvnet.MinFrame + 4 + 65535

// MaxRead is the size of the largest frame that a packet socket reads, in bytes. A frame
// from another interface of this machine may be that long (BIG TCP: GSO_MAX_SIZE of
// Linux's linux/netdevice.h). WriteFrame takes no frame beyond MaxFrame.
const MaxRead = pvnet.MinFrame + 4 + 8*65535

// MaxPieces is how many buffers one frame may lie in.
const MaxPieces = 64

// A Link carries Ethernet frames. [*TAP] and [*Packet] are links.
//
// All methods may be called from any goroutine. Reading and writing do not
// disturb each other; several readers, or several writers, take turns.
type Link interface {
	// ReadFrame waits for a frame and scatters it over bufs, in order, filling
	// each before the next. It returns the frame's size in bytes. The wait ends
	// with a frame, Close or the read deadline. bufs is lent until it returns.
	//
	// [ErrTruncated]: the frame did not fit; its beginning is in bufs, the rest
	// is lost. [ErrOffload], [ErrNoBuffers], [ErrSize]: the kernel lost one frame, which
	// it could not pass on or had no memory for; the next may be read.
	// [ErrDown]: the interface is down; a packet socket returns it at once until the
	// interface is up again, a TAP waits. [ErrGone]: the interface was removed, for good.
	// [ErrTooManyPieces]: nothing was read. os.ErrDeadlineExceeded, net.ErrClosed.
	ReadFrame(bufs [][]byte) (n int, off Offload, err error)

	// WriteFrame gathers bufs, in order, into one frame and sends it. It returns
	// the number of bytes sent: all or none. It waits while the kernel's send
	// buffer is full; Close ends the wait. bufs is lent until it returns.
	//
	// [ErrSize]: shorter than [pvnet.MinFrame] or longer than the interface takes.
	// [ErrOffload]: the kernel refused off. [ErrNoBuffers]: the frame was dropped
	// in the kernel. [ErrDown], [ErrGone], [ErrTooManyPieces], net.ErrClosed.
	WriteFrame(off Offload, bufs [][]byte) (n int, err error)

	// SetReadDeadline ends ReadFrame's wait at t, now and in later calls, with
	// os.ErrDeadlineExceeded. The zero Time means never.
	SetReadDeadline(t time.Time) error

	// Close wakes every caller and frees the link. It is idempotent; after the
	// first call it returns net.ErrClosed to everything but Close.
	Close() error

	// Name returns the interface's name when the link was opened.
	Name() string

	// MTU returns the interface's MTU when the link was opened: the largest payload
	// of a frame in bytes, without the 14 bytes of the Ethernet header.
	MTU() int

	// MAC returns the address of the interface: the kernel's end of a TAP, the card
	// itself for a packet socket.
	MAC() [6]byte
}

// Info describes the interface at the other end of a link.
type Info struct {
	Name string  // of the interface
	MTU  int     // bytes of payload
	MAC  [6]byte // of the interface
}

var (
	ErrTruncated     = errors.New("link: frame larger than the buffers it was read into")
	ErrTooManyPieces = errors.New("link: frame lies in more than 64 buffers")
	ErrSize          = errors.New("link: frame of a size the interface does not take")
	ErrOffload       = errors.New("link: the kernel refused the frame or its offload")
	ErrNoBuffers     = errors.New("link: frame dropped, the kernel is out of buffers")
	ErrDown          = errors.New("link: the interface is down")
	ErrGone          = errors.New("link: the interface was removed")
)

// An OpenError says why a link could not be opened.
type OpenError struct {
	Link string // "tap vif1.0"
	Step string // the step that failed
	Next string // advice for the user; empty if there is none
	Err  error  // the kernel's answer
}

func (e *OpenError) Error() string {
	s := "link: " + e.Link + ": " + e.Step + ": " + e.Err.Error()
	if e.Next != "" {
		s += "; " + e.Next
	}
	return s
}

func (e *OpenError) Unwrap() error { return e.Err }
