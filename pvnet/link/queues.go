package link

import (
	"context"
	"errors"
	"io/fs"

	"barevif/pvnet"
)

// tapQueues are the queues of a TAP with several. The first attached of them get frames.
//
// The kernel numbers the queues that are attached: a new one gets the next number, and one
// that is detached leaves its number to the last (tun_attach and __tun_detach of
// drivers/net/tun.c). So queue i of the TAP stays link i only if links are attached from the
// first on, and detached from the last on; and where one step fails, no further step may be
// taken. A step that the kernel refuses because the queue is as wanted already, by another
// program's doing, has not failed. After another failure the next connection goes on.
type tapQueues struct {
	links    []Link
	attached int
}

// queuesOf finds out which queues are attached: the links may come from another process that
// had detached some.
func queuesOf(links []Link) *tapQueues {
	t := &tapQueues{links: links}
	for t.attached < len(links) {
		if q, ok := links[t.attached].(native); ok && !q.attached() {
			break
		}
		t.attached++
	}
	return t
}

// use attaches the first n queues and detaches the others.
func (t *tapQueues) use(n int) error {
	for ; t.attached > n; t.attached-- {
		if q, ok := t.links[t.attached-1].(native); ok {
			if err := q.attach(false); err != nil && q.attached() {
				return err
			}
		}
	}
	for ; t.attached < n; t.attached++ {
		if q, ok := t.links[t.attached].(native); ok {
			if err := q.attach(true); err != nil && !q.attached() {
				return err
			}
		}
	}
	return nil
}

// followQueues attaches the queues of a TAP that feed queues of the vif, and detaches the
// others, until ctx or the device ends: each connection may have another number of queues,
// and the kernel spreads its flows over all that are attached.
// While the links are held the queues stay as they are: another process may have them already.
func (j *Joint) followQueues(ctx context.Context, dev *pvnet.Device, links []Link) {
	t := queuesOf(links)
	defer j.holds.unlessHeld(func() {
		_ = t.use(len(links)) // fails if the interface is gone
	})
	for ev := range dev.Links(ctx) {
		followed := j.holds.unheld(ctx, dev, func() {
			n := min(dev.Active(), len(links)) // now: a hold may have taken a while
			if !ev.Up || n == 0 {
				return
			}
			if err := t.use(n); err != nil {
				dev.Logger().Warn("the queues of an interface do not follow the vif's: frames may be lost", "vif", dev.ID(),
					"peer", dev.Peer(), "interface", links[0].Name(), "queues", n, "err", err)
			}
		})
		if !followed {
			break
		}
	}
}

// followSteering makes the kernel spread the frames of a TAP over its queues as the vif's
// frontend asks, until ctx or the device ends. The TAP keeps its program if the links have
// another owner then, whose Joint replaces it.
func (j *Joint) followSteering(ctx context.Context, dev *pvnet.Device, links []Link) {
	q, ok := links[0].(native)
	if !ok {
		return
	}
	for s := range dev.Steerings(ctx) {
		steered := j.holds.unheld(ctx, dev, func() {
			if err := q.steer(s); err != nil {
				j.logUnsteered(dev, links[0], err)
			}
		})
		if !steered {
			break
		}
	}
	j.holds.unlessHeld(func() {
		_ = q.steer(nil) // never fails
	})
}

// logUnsteered logs once that a frontend does not get its frames on the queues that it asks
// for.
func (j *Joint) logUnsteered(dev *pvnet.Device, l Link, err error) {
	if j.unsteered || errors.Is(err, ErrGone) {
		return
	}
	j.unsteered = true
	next := "use Linux 5.8 or newer, with eBPF and TUNSETSTEERINGEBPF"
	if errors.Is(err, fs.ErrPermission) {
		next = "run as root outside of a user namespace, or with CAP_BPF (systemd: AmbientCapabilities; setcap), and allow bpf(2) where seccomp or a container filters it"
	}
	dev.Logger().Warn("a frontend asks for its frames by hash, but the kernel chooses their queues", "vif", dev.ID(),
		"peer", dev.Peer(), "interface", l.Name(), "err", err, "next", next)
}
