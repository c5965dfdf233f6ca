package main

import (
	"context"
	"errors"

	"barevif/pvnet"
)

// A copyLink uses the copying calls of a Device: Write and Listen, or WriteBatch and
// ListenBatch.
type copyLink struct {
	lab      *lab
	from, to *pvnet.Device
	batch    int
	ctx      context.Context // of Listen
	cancel   context.CancelFunc
}

func newCopyLink(l *lab, from, to *pvnet.Device, batch int) *copyLink {
	ctx, cancel := context.WithCancel(context.Background())
	return &copyLink{lab: l, from: from, to: to, batch: batch, ctx: ctx, cancel: cancel}
}

func (l *copyLink) close() error {
	l.cancel()
	l.lab.close()
	return nil
}

func (l *copyLink) interrupt() {
	l.cancel()
	l.from.SetWriteDeadline(past)
}

func (l *copyLink) notifies() uint64 { return notified([]*pvnet.Device{l.from, l.to}) }

func (l *copyLink) send(j *job) error {
	src, sent := j.batchSource(l.batch), tally{to: &j.sent}
	for !j.stopped() {
		batch := src.next()
		n, err := 1, error(nil)
		if l.batch == 1 {
			_, err = l.from.Write(batch[0])
		} else {
			n, err = l.from.WriteBatch(batch)
		}
		if interrupted(j, err) {
			return nil
		} else if err != nil {
			return err
		}
		sent.add(n)
	}
	return nil
}

// receive pins the goroutine on which Listen calls back; it is not the caller's.
func (l *copyLink) receive(j *job) error {
	s, rcvd := j.sink(), tally{to: &j.rcvd}
	var wrong error
	pinned := false
	take := func(f *pvnet.Frame) {
		if !pinned {
			pinned = true
			j.pin(1)
		}
		n := f.CopyTo(s.frame)
		if err := s.check(s.frame[:n]); err != nil && wrong == nil {
			wrong = err
			l.cancel()
		}
	}
	var err error
	if l.batch == 1 {
		err = l.to.Listen(l.ctx, func(f pvnet.Frame) {
			take(&f)
			rcvd.add(1)
		})
	} else {
		err = l.to.ListenBatch(l.ctx, func(frames []pvnet.Frame) {
			for i := range frames {
				take(&frames[i])
			}
			rcvd.add(len(frames))
		})
	}
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return errors.Join(wrong, err)
}
