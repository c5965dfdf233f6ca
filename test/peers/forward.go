package main

import (
	"errors"
	"fmt"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
)

// A forwardLink has three parties in two goroutines. One goroutine is the source and the
// drain of the frames, and polls. The other, the forwarder, owns two vifs and moves frames
// from one to the other. A frame makes two hops.
type forwardLink struct {
	lab     *lab
	devices []*pvnet.Device
	batch   int
	source  *pvnet.TX // into the first vif
	in      *pvnet.RX // of the forwarder, out of the first vif
	out     *pvnet.TX // of the forwarder, into the second vif
	drain   *pvnet.RX // out of the second vif
}

// forwardPeer is a forwarder with two backends, or with two frontends. mode says how its
// calls wait.
func forwardPeer(frontends bool, mode pvnet.WaitMode, batch int) peer {
	return setupFunc(func(j *job) (link, error) {
		lab, err := newLab("")
		if err != nil {
			return nil, err
		}
		l := &forwardLink{lab: lab, batch: j.limitBatch(batch)}
		if err := l.connect(frontends, pvnet.Config{Wait: mode}); err != nil {
			lab.close()
			return nil, err
		}
		return l, nil
	})
}

// connect makes vifs between the forwarder's domain, 2, and the domains 1 and 3.
func (l *forwardLink) connect(frontends bool, cfg pvnet.Config) error {
	var domains [4]*emu.Domain
	for i := 1; i < len(domains); i++ {
		var err error
		if domains[i], err = l.lab.domain(hypercall.DomID(i)); err != nil {
			return err
		}
	}
	served := map[int]*backend{}
	var ours, theirs [2]*pvnet.Device // the forwarder's devices, and their other ends
	for i, other := range []int{1, 3} {
		front, back := other, 2
		frontConfig, backConfig := pvnet.Config{}, cfg
		if frontends {
			front, back = back, front
			frontConfig, backConfig = backConfig, frontConfig
		}
		if served[back] == nil {
			served[back] = serve(domains[back], backConfig)
			l.lab.onClose(served[back].close)
		}
		if err := l.lab.addVif(hypercall.DomID(front), hypercall.DomID(back), uint32(i)); err != nil {
			return err
		}
		f, err := connect(domains[front], fmt.Sprint(i), frontConfig)
		if err != nil {
			return err
		}
		l.lab.onClose(f.Disconnect)
		b, err := served[back].nextDevice()
		if err != nil {
			return err
		}
		if ours[i], theirs[i] = b, f; frontends {
			ours[i], theirs[i] = f, b
		}
		l.devices = append(l.devices, f, b)
	}
	var errs [4]error
	l.source, errs[0] = theirs[0].OwnTX(0)
	l.in, errs[1] = ours[0].OwnRX(0)
	l.out, errs[2] = ours[1].OwnTX(0)
	l.drain, errs[3] = theirs[1].OwnRX(0)
	return errors.Join(errs[:]...)
}

func (l *forwardLink) close() error {
	l.lab.close()
	return nil
}

func (l *forwardLink) interrupt() {
	l.in.SetDeadline(past)
	l.out.SetDeadline(past)
}

func (l *forwardLink) notifies() uint64 { return notified(l.devices) }

// send runs the source and the drain.
func (l *forwardLink) send(j *job) error {
	out, in := newBatchSender(j, l.source, vifOptions{Batch: l.batch}), newBatchReceiver(j, l.drain, vifOptions{Batch: l.batch})
	defer out.release()
	sent, rcvd := tally{to: &j.sent}, tally{to: &j.rcvd}
	for !j.stopped() {
		n, err := out.poll()
		if err != nil {
			return err
		}
		m, err := in.poll()
		if err != nil {
			return err
		}
		sent.add(n)
		rcvd.add(m)
		if n == 0 && m == 0 {
			spinPause()
		}
	}
	return nil
}

// receive runs the forwarder: it receives into frames of the vif on which it sends them.
func (l *forwardLink) receive(j *job) error {
	frames := make([]pvnet.Frame, l.batch)
	held := 0
	defer func() {
		for i := range frames[:held] {
			frames[i].Release()
		}
	}()
	for !j.stopped() {
		held += l.out.AllocSize(frames[held:], j.size)
		n, err := 0, error(nil)
		if held == 0 {
			held, err = l.out.AllocWait(frames, j.size)
		}
		if err == nil {
			n, err = l.in.ReceiveInto(frames[:held])
		}
		if err == nil {
			var sent int
			sent, err = l.out.SendWait(frames[:n])
			copy(frames, frames[sent:held])
			held -= sent
		}
		if interrupted(j, err) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}
