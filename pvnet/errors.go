package pvnet

import (
	"errors"
	"fmt"
	"net"

	"barevif/arena"
)

// An errorOf is a sentinel that is also another, wider one.
type errorOf struct {
	text string
	is   error
}

func (e *errorOf) Error() string        { return e.text }
func (e *errorOf) Is(target error) bool { return target == e.is }

var (
	// ErrDisconnected is returned by every call after Disconnect, but by those that
	// give a frame back. It is [net.ErrClosed].
	ErrDisconnected error = &errorOf{"pvnet: the device is disconnected", net.ErrClosed}

	// ErrUnimplemented is returned for what the peer or this end does not do. It
	// is [errors.ErrUnsupported].
	ErrUnimplemented error = &errorOf{"pvnet: not supported by both ends", errors.ErrUnsupported}

	// ErrHandover, as the cause that ends the context given to [Serve], has the
	// backend stop between two frames and leave state and rings as they are, for
	// another process to go on with. Linux's netfront does not come back from an
	// orderly close, and does not notice this.
	ErrHandover error = &errorOf{"pvnet: handed over to another backend", net.ErrClosed}

	// ErrLinkDown is returned by calls that do not wait while the other end is
	// not connected. It passes.
	ErrLinkDown = errors.New("pvnet: the other end is not connected")

	// ErrFull is returned by Send with the count of frames there was room for.
	ErrFull = errors.New("pvnet: no room for more frames now")

	// ErrNoBuffers is returned by Receive, AllocWait and SendWait when they wait
	// for buffers that only the caller, or those it gave frames to, can release.
	ErrNoBuffers = errors.New("pvnet: no free buffer; release frames first")

	// ErrFrameSize is a frame of fewer than MinFrame or more than MaxFrame bytes,
	// one longer than a page to a peer that does not take chains, or one that would
	// be cut into more pieces than the half has pages.
	ErrFrameSize = errors.New("pvnet: frame size not allowed")

	// ErrOffload is a frame whose headers do not fit what its Checksum or GSO say
	// of it.
	ErrOffload = errors.New("pvnet: the frame's headers do not fit its offloads")

	// ErrShortFrame is returned by ReceiveInto when the next frame does not fit
	// the one it was given. The frame stays at the head of the queue.
	ErrShortFrame = errors.New("pvnet: the next frame is longer than the one given")

	// ErrStale is a frame that was released or sent before.
	ErrStale = arena.ErrStale

	// ErrShared is a frame with more than one holder, where its bytes are to be
	// overwritten.
	ErrShared = arena.ErrShared

	// ErrOwned is returned by Device methods for what was handed to an owner, and
	// by OwnTX and OwnRX for a half that has one.
	ErrOwned = errors.New("pvnet: this half of the queue has an owner")

	// ErrPolled is returned by calls that would have to wait for a half that is in a
	// [Poller], which waits for it.
	ErrPolled = errors.New("pvnet: this half of the queue is in a Poller")

	// ErrBusy is returned when two goroutines use one half at the same time.
	ErrBusy = errors.New("pvnet: this half of the queue is in use by another goroutine")
)

// An UnknownError is a failure that has no error of its own: what was being done,
// and what the layer below said.
type UnknownError struct {
	Op  string
	Err error
}

func (e *UnknownError) Error() string { return "pvnet: " + e.Op + ": " + e.Err.Error() }
func (e *UnknownError) Unwrap() error { return e.Err }

// An endedError is why a device ended that was not disconnected by its user. It is
// [ErrDisconnected].
type endedError struct{ cause error }

func (e *endedError) Error() string { return e.cause.Error() }
func (e *endedError) Unwrap() error { return e.cause }
func (e *endedError) Is(target error) bool {
	return target == ErrDisconnected || target == net.ErrClosed
}

// A PeerError is something no correct peer could have done. It is final for the
// device: every later call returns it, and it is [ErrDisconnected].
type PeerError struct {
	Ring   string // "tx" or "rx", seen from the frontend
	Slot   uint32 // free-running index
	Reason string
}

func (e *PeerError) Error() string {
	return fmt.Sprintf("pvnet: the peer broke the protocol: %s ring, slot %d: %s", e.Ring, e.Slot, e.Reason)
}

func (e *PeerError) Is(target error) bool {
	return target == ErrDisconnected || target == net.ErrClosed
}
