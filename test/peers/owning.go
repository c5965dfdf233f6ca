package main

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/telemetry"
)

var errDeadline = os.ErrDeadlineExceeded

// vifOptions describe one way to use vifs.
type vifOptions struct {
	Back    bool           // the backend sends
	Batch   int            // frames per call
	Wait    pvnet.WaitMode // how calls wait
	Poll    bool           // use calls that do not wait, in a loop
	Into    bool           // receive with PollInto, into frames of the receiver
	Lend    bool           // lend the peer's pages to the receiver
	Static  bool           // the backend keeps the frontend's pages mapped
	InPlace bool           // neither party copies: the sender leaves the pages' content, the receiver reads it in place
	Copying bool           // Device.Write and Listen, or WriteBatch and ListenBatch
	Two     bool           // the receiver is in a process of its own
	Vifs    int            // 0 means 1
	Queues  int            // per vif; 0 means 1
	Poller  bool           // one goroutine for all vifs of a party, with a pvnet.Poller that waits as Wait says
	Idle    int            // number of vifs without traffic
}

func (o vifOptions) config(j *job) pvnet.Config {
	each := !o.Poller && (o.Vifs > 1 || o.Queues > 1) // each half has a goroutine of its own, which is not pinned
	return pvnet.Config{Wait: o.Wait, Queues: o.Queues, LendRx: o.Lend, StaticGrants: o.Static, LockedThreads: !j.free && !each}
}

func (o vifOptions) setup(j *job) (link, error) {
	if o.Batch = j.limitBatch(o.Batch); o.Two {
		return newTwoProcesses(o, j)
	}
	lab, err := newLab("")
	if err != nil {
		return nil, err
	}
	fronts, backs, err := lab.vifs(max(o.Vifs, 1), o.config(j))
	if err != nil {
		lab.close()
		return nil, err
	}
	if o.Static {
		if err := awaitStatic(backs); err != nil {
			lab.close()
			return nil, err
		}
	}
	j.warm *= uint64((max(o.Vifs, 1) - o.Idle) * max(o.Queues, 1))
	from, to := fronts, backs
	if o.Back {
		from, to = backs, fronts
	}
	if o.Copying {
		return newCopyLink(lab, from[0], to[0], o.Batch), nil
	}
	l := &vifLink{end: lab.close, o: o}
	err = errors.Join(l.from.ownHalves(from, o), l.to.ownHalves(to, o))
	if err == nil && o.Poller {
		err = errors.Join(l.from.addToPoller(lab.driver, o, j, true), l.to.addToPoller(lab.driver, o, j, false))
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// awaitStatic waits until the backends have mapped their frontends' pages.
func awaitStatic(backs []*pvnet.Device) error {
	for end := time.Now().Add(setupLimit); ; time.Sleep(time.Millisecond) {
		mapped := 0
		for _, d := range backs {
			if d.Features()&telemetry.FeatureStaticGrants != 0 {
				mapped++
			}
		}
		if mapped == len(backs) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d of %d vifs have static grants", mapped, len(backs))
		}
	}
}

// halves holds the halves of the devices that one party owns.
type halves struct {
	devices []*pvnet.Device
	tx      []*pvnet.TX
	rx      []*pvnet.RX
	poller  *pvnet.Poller // for the sending or the receiving halves; may be nil
}

// addToPoller adds the sending or the receiving halves to a Poller. The frontends belong to many
// domains; the emulator allows one Poller for them.
func (h *halves) addToPoller(d hypercall.Domain, o vifOptions, j *job, sends bool) (err error) {
	h.poller, err = pvnet.NewPoller(d, pvnet.PollerConfig{Wait: o.Wait, LockedThread: !j.free})
	for i := 0; i < len(h.tx) && err == nil; i++ {
		switch {
		case !sends:
			err = h.poller.Add(h.rx[i], i)
		case i < len(h.tx)-o.Idle:
			err = h.poller.Add(h.tx[i], i)
		}
	}
	return err
}

func (h *halves) ownHalves(devices []*pvnet.Device, o vifOptions) error {
	h.devices = devices
	for _, d := range devices {
		if got, want := d.Active(), max(o.Queues, 1); got != want {
			return errors.New("the peer did not offer as many queues as were asked for")
		}
		for q := range d.Active() {
			tx, err := d.OwnTX(q)
			if err != nil {
				return err
			}
			rx, err := d.OwnRX(q)
			if err != nil {
				return err
			}
			h.tx, h.rx = append(h.tx, tx), append(h.rx, rx)
		}
	}
	return nil
}

func (h *halves) interrupt() {
	if h.poller != nil {
		h.poller.SetDeadline(past)
	}
	for i := range h.tx {
		h.tx[i].SetDeadline(past)
		h.rx[i].SetDeadline(past)
	}
}

// A batchSender is a sending half and the frames it has yet to send.
type batchSender struct {
	tx      *pvnet.TX
	frames  []pvnet.Frame
	n, done int // frames[done:n] are filled
	src     *source
	inPlace bool // send frames with the old content of their pages
}

func newBatchSender(j *job, tx *pvnet.TX, o vifOptions) *batchSender {
	out := &batchSender{tx: tx, frames: make([]pvnet.Frame, o.Batch), src: j.source()}
	out.inPlace = o.InPlace && !out.src.verify
	return out
}

func (o *batchSender) fill(n int) {
	o.n, o.done = n, 0
	if o.inPlace {
		return
	}
	for i := range o.frames[:n] {
		f, b := &o.frames[i], o.src.next()
		if f.Single() {
			copy(f.Bytes(), b)
		} else {
			f.CopyFrom(b)
		}
	}
}

// poll sends the frames that it can send without waiting, and returns how many.
func (o *batchSender) poll() (int, error) {
	if o.done == o.n {
		o.fill(o.tx.AllocSize(o.frames, len(o.src.frame)))
	}
	if o.done == o.n {
		return 0, nil
	}
	n, err := o.tx.Send(o.frames[o.done:o.n])
	o.done += n
	if err == pvnet.ErrFull {
		err = nil
	}
	return n, err
}

// wait sends a batch, and waits for room.
func (o *batchSender) wait() (int, error) {
	n, err := o.tx.AllocWait(o.frames, len(o.src.frame))
	if err != nil {
		return 0, err
	}
	o.fill(n)
	o.done, err = o.tx.SendWait(o.frames[:n])
	return o.done, err
}

func (o *batchSender) release() {
	for ; o.done < o.n; o.done++ {
		o.frames[o.done].Release()
	}
}

// A batchReceiver is a receiving half. It copies frames out, or reads their headers in place.
type batchReceiver struct {
	rx      *pvnet.RX
	frames  []pvnet.Frame
	into    bool // frames are the receiver's own
	inPlace bool
	headers int // sum of the header bytes that were read in place
	sink    *sink
}

func newBatchReceiver(j *job, rx *pvnet.RX, o vifOptions) *batchReceiver {
	in := &batchReceiver{rx: rx, frames: make([]pvnet.Frame, o.Batch), sink: j.sink()}
	in.inPlace = o.InPlace && !in.sink.want.verify
	return in
}

// own makes it receive into frames of tx, a half of the same device.
func (i *batchReceiver) receiveInto(tx *pvnet.TX, size int) {
	i.into = true
	i.frames = i.frames[:tx.AllocSize(i.frames, size)]
}

func (i *batchReceiver) poll() (n int, err error) {
	if i.into {
		n, err = i.rx.PollInto(i.frames)
	} else {
		n, err = i.rx.Poll(i.frames)
	}
	if n > 0 {
		err = i.consume(n)
	}
	return n, err
}

func (i *batchReceiver) wait() (int, error) {
	n, err := i.rx.Receive(i.frames)
	if n > 0 {
		err = i.consume(n)
	}
	return n, err
}

func (i *batchReceiver) consume(n int) error {
	for k := range i.frames[:n] {
		if i.inPlace { // read only the headers, like a router
			for _, b := range i.frames[k].Bytes()[:34] {
				i.headers += int(b)
			}
			continue
		}
		m := i.frames[k].CopyTo(i.sink.frame)
		if err := i.sink.check(i.sink.frame[:m]); err != nil {
			return err
		}
	}
	if i.into {
		return nil
	}
	return i.rx.Release(i.frames[:n])
}

func (i *batchReceiver) release() {
	if i.into {
		for k := range i.frames {
			i.frames[k].Release()
		}
	}
}

// A vifLink is one or more vifs whose halves have owners. A party that polls loops over its
// halves; a party that waits has a goroutine per half.
type vifLink struct {
	o        vifOptions
	from, to halves
	end      func()
}

func (l *vifLink) close() error {
	for _, p := range []*pvnet.Poller{l.from.poller, l.to.poller} {
		if p != nil {
			p.Close()
		}
	}
	l.end()
	return nil
}

func (l *vifLink) interrupt() {
	l.from.interrupt()
	l.to.interrupt()
}

func (l *vifLink) notifies() uint64 { return notified(l.from.devices) + notified(l.to.devices) }

func (l *vifLink) send(j *job) error    { return l.from.send(j, l.o) }
func (l *vifLink) receive(j *job) error { return l.to.receive(j, l.o) }

func (l *vifLink) ping(j *job, rtt []int64) error { return l.from.ping(j, l.o, rtt) }
func (l *vifLink) echo(j *job) error              { return l.to.echo(j, l.o) }

func (h *halves) send(j *job, o vifOptions) error {
	senders := make([]*batchSender, len(h.tx))
	for i, tx := range h.tx {
		senders[i] = newBatchSender(j, tx, o)
		defer senders[i].release()
	}
	sent := tally{to: &j.sent}
	if o.Poller {
		return h.sendPolled(j, senders, sent)
	}
	return move(j, o.Poll, senders, sent)
}

func (h *halves) receive(j *job, o vifOptions) error {
	receivers := make([]*batchReceiver, len(h.rx))
	for i, rx := range h.rx {
		receivers[i] = newBatchReceiver(j, rx, o)
		if o.Into {
			receivers[i].receiveInto(h.tx[i], j.size)
		}
		defer receivers[i].release()
	}
	rcvd := tally{to: &j.rcvd}
	if o.Poller {
		return h.receivePolled(j, receivers, rcvd)
	}
	return move(j, o.Poll, receivers, rcvd)
}

// move sends or receives on all halves until the job is stopped, and counts the frames. With
// poll the caller's goroutine polls them in turn; otherwise each has a goroutine that waits.
func move[H interface {
	poll() (int, error)
	wait() (int, error)
}](j *job, poll bool, halves []H, count tally) error {
	if !poll {
		return concurrently(halves, func(h H) error {
			count := count
			for !j.stopped() {
				n, err := h.wait()
				count.add(n)
				if interrupted(j, err) {
					return nil
				} else if err != nil {
					return err
				}
			}
			return nil
		})
	}
	for !j.stopped() {
		idle := true
		for _, h := range halves {
			n, err := h.poll()
			if err != nil {
				return err
			}
			if n > 0 {
				count.add(n)
				idle = false
			}
		}
		if idle {
			spinPause()
		}
	}
	return nil
}

// sendPolled sends a batch on each half that has room, in turn, and waits once none has.
func (h *halves) sendPolled(j *job, senders []*batchSender, sent tally) error {
	var open []*batchSender
	for !j.stopped() {
		left := 0
		for _, out := range open {
			n, err := out.poll()
			if err != nil {
				return err
			}
			if sent.add(n); n > 0 {
				open[left] = out
				left++
			}
		}
		if open = open[:left]; left > 0 {
			continue
		}
		ready, err := h.poller.Wait()
		if interrupted(j, err) {
			return nil
		} else if err != nil {
			return err
		}
		for _, r := range ready {
			if r.Err != nil {
				return r.Err
			}
			open = append(open, senders[r.Value.(int)])
		}
	}
	return nil
}

// receivePolled receives a batch from each half that is ready.
func (h *halves) receivePolled(j *job, receivers []*batchReceiver, rcvd tally) error {
	for !j.stopped() {
		ready, err := h.poller.Wait()
		if interrupted(j, err) {
			return nil
		} else if err != nil {
			return err
		}
		for _, r := range ready {
			if r.Err != nil {
				return r.Err
			}
			n, err := receivers[r.Value.(int)].poll()
			if err != nil {
				return err
			}
			rcvd.add(n)
		}
	}
	return nil
}

// concurrently calls f for each of v, concurrently if there are several.
func concurrently[T any](v []T, f func(T) error) error {
	if len(v) == 1 {
		return f(v[0])
	}
	errs := make([]error, len(v))
	var wg sync.WaitGroup
	for i := range v {
		wg.Go(func() { errs[i] = f(v[i]) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (h *halves) ping(j *job, o vifOptions, rtt []int64) error {
	out, in := newBatchSender(j, h.tx[0], o), newBatchReceiver(j, h.rx[0], o)
	for i := range rtt {
		start := nano()
		if err := h.moveOne(j, o, out.poll, out.wait); err != nil || j.stopped() {
			return err
		}
		if err := h.moveOne(j, o, in.poll, in.wait); err != nil || j.stopped() {
			return err
		}
		rtt[i] = nano() - start
	}
	return nil
}

// echo sends back each frame that arrives. The other end compares it.
func (h *halves) echo(j *job, o vifOptions) error {
	out, in := newBatchSender(j, h.tx[0], o), newBatchReceiver(j, h.rx[0], o)
	out.src = &source{frame: in.sink.frame}
	in.sink.want.verify = false
	for !j.stopped() {
		if err := h.moveOne(j, o, in.poll, in.wait); err != nil || j.stopped() {
			return err
		}
		if err := h.moveOne(j, o, out.poll, out.wait); err != nil {
			return err
		}
	}
	return nil
}

// moveOne sends or receives one frame, with poll or wait as o says.
func (h *halves) moveOne(j *job, o vifOptions, poll, wait func() (int, error)) error {
	if !o.Poll {
		_, err := wait()
		if interrupted(j, err) {
			return nil
		}
		return err
	}
	for !j.stopped() {
		if n, err := poll(); n > 0 || err != nil {
			return err
		}
	}
	return nil
}
