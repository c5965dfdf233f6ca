package pvnet

import (
	"errors"
	"fmt"

	"barevif/arena"
	"barevif/hypercall"
)

// An errorOf is a sentinel error that matches a wider sentinel too.
type errorOf struct {
	text string
	is   error
}

func (e *errorOf) Error() string        { return e.text }
func (e *errorOf) Is(target error) bool { return target == e.is }

var (
	// ErrDisconnected is returned by every call after Disconnect, except calls that
	// release frames. It is [net.ErrClosed].
	ErrDisconnected error = &errorOf{"pvnet: the device is disconnected", hypercall.ErrClosed}

	// ErrUnimplemented is returned for what the domain cannot do. It is
	// [errors.ErrUnsupported].
	ErrUnimplemented error = &errorOf{"pvnet: the domain does not support it", errors.ErrUnsupported}

	// ErrHandover, as the cause that ends the context of [Serve], makes the backend stop
	// between two frames and leave its state and rings as they are, so that another
	// process can continue. Linux's netfront does not come back after an orderly close; a
	// handover it does not notice. A device that [Device.HandOver] has passed on, of
	// either end, ends with it.
	ErrHandover error = &errorOf{"pvnet: handed over to another process", hypercall.ErrClosed}

	// ErrLinkDown is returned by calls that do not wait, while the other end is not
	// connected, and by those that send, while it has no carrier ([Device.Carrier]). It is
	// temporary.
	ErrLinkDown = errors.New("pvnet: the other end is not connected")

	// ErrNotBackend is returned to a frontend by methods with which a backend's device
	// tells its frontend something. It is [errors.ErrUnsupported].
	ErrNotBackend error = &errorOf{"pvnet: only a backend's device can say that", errors.ErrUnsupported}

	// ErrFull is returned by Send, with the number of frames that it had room for.
	ErrFull = errors.New("pvnet: no room for more frames now")

	// ErrNoBuffers is returned by Receive, AllocWait and SendWait instead of waiting,
	// when only the caller, or those it gave frames to, can release the buffers they
	// need.
	ErrNoBuffers = errors.New("pvnet: no free buffer; release frames first")

	// ErrFrameSize is returned for a frame of fewer than MinFrame or more than MaxFrame
	// bytes, for a frame longer than a page to a peer that does not take chains, and for
	// a frame that would be cut into more pieces than the half has pages.
	ErrFrameSize = errors.New("pvnet: frame size not allowed")

	// ErrOffload is returned for a frame whose headers do not match its Checksum or GSO.
	ErrOffload = errors.New("pvnet: the frame's headers do not fit its offloads")

	// ErrShortFrame is returned by ReceiveInto when the next frame is longer than the
	// caller's frame. It stays at the head of the queue.
	ErrShortFrame = errors.New("pvnet: the next frame is longer than the one given")

	// ErrStale is returned for a frame that was released or sent before.
	ErrStale = arena.ErrStale

	// ErrShared is returned when a frame is to be overwritten that has more than one
	// holder.
	ErrShared = arena.ErrShared

	// ErrOwned is returned by Device methods for a half that has an owner, and by OwnTX
	// and OwnRX for a half that has one already.
	ErrOwned = errors.New("pvnet: this half of the queue has an owner")

	// ErrPolled is returned by calls that would have to wait on a half in a [Poller]: the
	// Poller waits for it. [Poller.Add] returns it for a half that is in a Poller.
	ErrPolled = errors.New("pvnet: this half of the queue is in a Poller")

	// ErrBusy is returned when two goroutines use one half at the same time.
	ErrBusy = errors.New("pvnet: this half of the queue is in use by another goroutine")
)

// An UnknownError is a failure without a sentinel of its own. Op is the operation, Err
// the error of the layer below.
type UnknownError struct {
	Op  string
	Err error
}

func (e *UnknownError) Error() string { return "pvnet: " + e.Op + ": " + e.Err.Error() }
func (e *UnknownError) Unwrap() error { return e.Err }

// An endedError is the cause of a device that ended although its user did not disconnect
// it. It is [ErrDisconnected].
type endedError struct{ cause error }

func (e *endedError) Error() string { return e.cause.Error() }
func (e *endedError) Unwrap() error { return e.cause }
func (e *endedError) Is(target error) bool {
	return target == ErrDisconnected || target == hypercall.ErrClosed
}

// A PeerError reports what no correct peer could have done. It is final for the device:
// every later call returns it. It is [ErrDisconnected].
type PeerError struct {
	Ring   string // "tx" or "rx", seen from the frontend, or "ctrl"
	Slot   uint32 // free-running index
	Reason string
}

func (e *PeerError) Error() string {
	return fmt.Sprintf("pvnet: the peer broke the protocol: %s ring, slot %d: %s", e.Ring, e.Slot, e.Reason)
}

func (e *PeerError) Is(target error) bool {
	return target == ErrDisconnected || target == hypercall.ErrClosed
}

var errTimeout error = hypercall.ErrDeadlineExceeded

// errInterrupted is the error of a receive that interrupt ended.
var errInterrupted = errors.New("pvnet: interrupted")

// errMustCut asks the caller of send to cut the frame.
var errMustCut = errors.New("pvnet: the frame has to be cut")

// Orderly reports whether an error of a call on a device, or on one of its halves, says that the device has
// ended as it is meant to: it was disconnected, its vif was removed, its Serve ended, or another process has
// the vif now. A [*PeerError], which is [ErrDisconnected] too, is no such end.
func Orderly(err error) bool {
	if _, broken := errors.AsType[*PeerError](err); broken {
		return false
	}
	return errors.Is(err, ErrDisconnected) || errors.Is(err, ErrHandover)
}
