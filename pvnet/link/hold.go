package link

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"
)

// errHeld is the result of move when the Joint is held.
var errHeld = errors.New("link: held")

// errNotJoined is returned by Hold while Run does not run, and while the Joint is held.
var errNotJoined = errors.New("link: cannot hold: Run does not run, or the Joint is held already")

// A holds is the state of Joint.Hold and Joint.Resume.
type holds struct {
	stopping atomic.Bool   // the goroutines of move are to end at their deadlines
	patience time.Duration // replaces holdPatience in tests; 0: it does not

	mu      sync.Mutex
	ask     chan struct{} // guarded by mu; holds one, the request of Hold; nil: Run does not run
	reached chan struct{} // guarded by mu; closed when Run rests; nil: not held
	resume  chan struct{} // guarded by mu; closed by Resume; nil: not held
	over    chan struct{} // guarded by mu; closed when Run ends

	changing sync.Mutex // held while unheld or unlessHeld changes a link; before mu
}

func (h *holds) begin() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ask, h.over = make(chan struct{}, 1), make(chan struct{})
	return h.ask
}

func (h *holds) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ask = nil
	close(h.over)
}

// rest waits for Resume. The error says why Run ends instead.
func (h *holds) rest(ctx context.Context, dev *pvnet.Device) error {
	h.mu.Lock()
	resume := h.resume
	if resume == nil { // Hold has given up
		h.mu.Unlock()
		return nil
	}
	close(h.reached)
	h.mu.Unlock()
	select {
	case <-resume:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-dev.Done():
		return pvnet.ErrHandover // or whatever ended the device, which is no error of the Joint
	}
}

func (h *holds) held() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.resume != nil
}

// unheld calls change once the links are not held, and Hold waits for the end of it. It
// reports false if ctx or the device ends first.
func (h *holds) unheld(ctx context.Context, dev *pvnet.Device, change func()) bool {
	for {
		h.mu.Lock()
		resume := h.resume
		h.mu.Unlock()
		if resume != nil {
			select {
			case <-resume:
			case <-ctx.Done():
				return false
			case <-dev.Done():
				return false
			}
		}
		h.changing.Lock()
		free := !h.held()
		if free {
			change()
		}
		h.changing.Unlock()
		if free {
			return true
		}
	}
}

// unlessHeld calls change at the end of what follows the device, unless the links are held: then
// they may have another owner, or are about to.
func (h *holds) unlessHeld(change func()) {
	h.changing.Lock()
	defer h.changing.Unlock()
	if !h.held() {
		change()
	}
}

// Hold stops a Run that is under way, without ending it: every frame that was read from a
// link is sent, every frame that the vif has received is written, and from then on the Joint
// uses neither. So the links and the vif can be handed to another process and no frame is
// lost: those that come meanwhile wait in the kernel and in the vif's ring. Resume goes on.
// A frame for which the vif has no room within 100 ms is dropped and counted as Unfed.
//
// A Run that ends while it is held leaves the links' offloads and carrier as they are: the kernel
// goes on to leave checksums and segmentation to the process that reads the links next.
//
// Hold blocks until the Joint is held. If ctx ends first Hold fails with its cause, and Run goes
// on; Hold also fails if Run does not run or the Joint is held already. One goroutine at a time
// calls Hold and Resume.
func (j *Joint) Hold(ctx context.Context) error {
	h := &j.holds
	h.mu.Lock()
	if h.ask == nil || h.resume != nil {
		h.mu.Unlock()
		return errNotJoined
	}
	h.reached, h.resume = make(chan struct{}), make(chan struct{})
	reached, over := h.reached, h.over
	select {
	case h.ask <- struct{}{}:
	default: // the token of a Hold that gave up
	}
	h.mu.Unlock()
	h.unlessHeld(func() {}) // waits for the end of a change under way; later ones see that the Joint is to be held
	select {
	case <-reached:
		return nil
	case <-over:
		select {
		case <-reached: // Run ended later
			return nil
		default:
		}
		j.Resume()
		return errNotJoined
	case <-ctx.Done():
		j.Resume()
		return context.Cause(ctx)
	}
}

// Resume ends a Hold. It does nothing if the Joint is not held.
func (j *Joint) Resume() {
	h := &j.holds
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.resume != nil {
		close(h.resume)
		h.resume = nil
	}
}

// Change calls change once the Joint is not held, and Hold waits for the end of it: so change
// may configure the interface behind a link, which is another process's once the vif was
// handed over. It does not call it, and reports false, if ctx or the device ends first. change
// must call neither Hold nor Change.
func (j *Joint) Change(ctx context.Context, dev *pvnet.Device, change func()) bool {
	return j.holds.unheld(ctx, dev, change)
}

// Held reports whether the Joint is held, or was when Run ended.
func (j *Joint) Held() bool { return j.holds.held() }

// holdPatience is how long the frames read from a link may wait for room in the vif.
const holdPatience = 100 * time.Millisecond

// quiesce makes the goroutines of move end: it stops reading and receiving at once, and sending
// and writing only if the goroutines have not ended after holdPatience. A feeder that
// has read nothing and waits for empty frames has nothing to send: the vif may not have its
// queue at all, and then it waits as long as the connection lasts.
func (j *Joint) quiesce(ctx context.Context, links []Link, rxs []*pvnet.RX, txs []*pvnet.TX, empty []atomic.Bool) {
	j.holds.stopping.Store(true)
	for _, l := range links {
		_ = l.SetReadDeadline(past) // fails for a link that is closed, where nobody waits
	}
	for _, rx := range rxs {
		rx.SetDeadline(past)
	}
	for i := range empty {
		if empty[i].Load() { // it reads nothing from now on: its link has a deadline
			txs[i].SetDeadline(past) // the queue whose frames it reads into
		}
	}
	t := time.NewTimer(cmp.Or(j.holds.patience, holdPatience))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done(): // they have ended
		return
	}
	for _, l := range links {
		setDeadlines(l, past)
	}
	for _, tx := range txs {
		tx.SetDeadline(past)
	}
}
