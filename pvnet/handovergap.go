package pvnet

import (
	"fmt"
	"time"

	"barevif/pvnet/netif"
	"barevif/xenbus"
)

// part stops the connection between two frames. After an error the device goes on, or ends.
func (l *lifecycle) part(ch xenbus.Change, asked time.Time) (*passing, error) {
	if err := l.end.rest(l); err != nil {
		return nil, err
	}
	l.handingOver = true
	l.quiesce(ch)
	l.handingOver = false
	if l.cause != nil { // a caller is stuck
		return nil, l.cause
	}
	p, err := l.end.pass(l, handoverTimes{Asked: asked, Stopped: time.Now()})
	if err != nil {
		l.d.log.Warn("a vif cannot be handed over", "vif", l.d.id, "err", err)
	}
	return p, err
}

// rest waits for users of lent pages, and for the control ring: the request under way may
// need the queues.
func (b *back) rest(l *lifecycle) error {
	c := l.conn
	if l.d.renewed != nil { // a claim is passed on with its last id
		<-l.d.renewed
	}
	if err := l.awaitLent(c); err != nil {
		return err
	}
	if c.ctrl != nil {
		c.ctrl.leave()
		_ = c.ctrl.waitGone(time.Now().Add(l.d.callerTimeout)) // quiesce sees it
	}
	return nil
}

// pass closes the event channels. The rings stay mapped until the other process has decided:
// unmapping them, and the pages of static grants, takes time that the frontend would wait.
func (b *back) pass(l *lifecycle, t handoverTimes) (*passing, error) {
	c := l.conn
	state, err := b.handoverState(l, t)
	if err != nil {
		l.lendAgain(c, len(c.queues))
		return nil, err
	}
	grants := c.grants.lists()
	l.d.unhook(c)
	c.closePorts()
	l.conn, l.connGeneration = nil, 0
	return &passing{
		state: state,
		given: func() {
			l.xd.PassClaim()
			l.d.closeMirror() // the other process opens it
			l.d.detach(c)
		},
		kept: func() {
			l.d.detach(c)
			b.resumes, b.grants = true, grants
			l.connect(l.xd.Current(), xenbus.Unknown)
			b.resumes, b.grants = false, nil
		},
	}, nil
}

// handoverState describes the connection to the process that takes it over.
func (b *back) handoverState(l *lifecycle, t handoverTimes) ([]byte, error) {
	offers, _ := b.offers()
	return marshalState(&handoverState{
		Front: dom(l.xd), ID: l.d.id, Type: b.cfg.typ(),
		Claim: l.xd.ClaimState(), Keys: l.conn.frontKeys, Offers: offers,
		Told: b.toldState(l.conn), Times: t,
	})
}

// awaitLent makes the receivers of c copy what they would lend, and waits until their users
// have released what they hold of the frontend's pages, while frames pass: the frontend
// fills such a page again once its request is answered, and another process cannot wait for
// that. It fails if a user holds one for too long, and then pages are lent again.
func (l *lifecycle) awaitLent(c *conn) error {
	end := time.Now().Add(lentTimeout)
	for i := range c.queues {
		if err := l.awaitLentOf(c, i, end); err != nil {
			l.lendAgain(c, i+1)
			return err
		}
	}
	return nil
}

// lendAgain undoes awaitLent for the first n queues.
func (l *lifecycle) lendAgain(c *conn, n int) {
	for i := range n {
		e := c.queues[i].rx.(*backRX)
		l.atReceiver(i, func() { e.most = netif.TxRingSize / 2 })
	}
}

func (l *lifecycle) awaitLentOf(c *conn, queue int, end time.Time) error {
	e := c.queues[queue].rx.(*backRX)
	if !e.lends {
		return nil
	}
	for {
		held := 0
		if !l.atReceiver(queue, func() {
			e.most = 0
			e.answerReturned()
			held = e.lentNow
		}) {
			return fmt.Errorf("pvnet: queue %d: its owner has no moment to say what it holds of the frontend's pages", queue)
		}
		switch {
		case held == 0:
			return nil
		case !time.Now().Before(end):
			return fmt.Errorf("pvnet: queue %d: %d of the frontend's pages are in frames that were received and not released", queue, held)
		}
		time.Sleep(time.Millisecond)
	}
}

// atReceiver runs f on the engine of a queue's receiver. It reports false if the receiver's
// owner has no moment for it.
func (l *lifecycle) atReceiver(queue int, f func()) bool {
	if !l.running { // nobody is there
		return catchFault(f) == nil
	}
	return l.d.rx[queue].visit(time.Now().Add(useTimeout), f)
}

// A handoverTimes says when the process that hands a vif over has got how far. Both
// processes are of one machine, and read one clock.
type handoverTimes struct {
	Asked   time.Time // HandOver was called
	Stopped time.Time // the last frame has passed
}

// A standstill is the time in which the frontend of a vif that is taken over is not served.
type standstill struct {
	held     time.Duration // the link came to rest
	old      handoverTimes
	got      time.Time // the state has come
	accepted time.Time // the state is checked, the connection made, and the other process told
	bound    time.Time // the event channels are ours
}

// log says how long the vif stood still, now that frames move again, and of what that was
// made.
func (s *standstill) log(d *Device) {
	now := time.Now()
	from := s.old.Asked.Add(-s.held)
	d.log.Info("a vif was taken over", "vif", d.id, "still", between(from, now),
		"hold", s.held, "stop", between(s.old.Asked, s.old.Stopped), "pass", between(s.old.Stopped, s.got),
		"accept", between(s.got, s.accepted),
		"bind", between(s.accepted, s.bound), "start", between(s.bound, now))
}

// between returns the time from one event to another; 0 if the clock was set in between.
func between(from, to time.Time) time.Duration { return max(0, to.Sub(from).Round(time.Microsecond)) }
