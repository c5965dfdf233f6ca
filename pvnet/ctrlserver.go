package pvnet

import (
	"fmt"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/ctrl"
)

// A ctrlServer is the backend's end of a control ring.
type ctrlServer struct {
	ctrlLoop
	server *ctrl.Server
	first  func() // to do before the first request is answered; nil: nothing
	pace   ctrlPace
}

// serveCtrl attaches to the control ring of the frontend, whose page is mapped, and binds to
// its event channel. Handlers are added before the connection is brought up.
func (m *setup) serveCtrl(d *Device, page *hypercall.Mapping, k ctrlKeys) (_ *ctrlServer, err error) {
	s := &ctrlServer{ctrlLoop: ctrlLoop{d: d}}
	if s.server, err = ctrl.Attach(page.Memory); err != nil {
		return nil, &PeerError{Ring: "ctrl", Reason: err.Error()}
	}
	err = s.open(m, func(w hypercall.Waiter) (hypercall.Port, error) {
		p, err := w.Bind(m.peer, k.port)
		if err != nil {
			err = fmt.Errorf("control ring: event channel %d of domain %d: %w", k.port, m.peer, err)
		}
		return p, err
	})
	return s, err
}

func (s *ctrlServer) start() { s.run(s.step) }

func (s *ctrlServer) watch() {
	if s.server.Overdue() {
		s.w.Wake()
	}
}

// step answers a request, or arms the ring if there is none.
func (s *ctrlServer) step() (worked, wait bool, err error) {
	if f := s.first; f != nil {
		s.first = nil
		f()
	}
	slot, begun := s.server.Slot(), time.Now()
	served, notify, err := s.server.Serve()
	if err != nil {
		return false, false, s.violation(slot, err.Error())
	}
	if notify {
		s.port.Notify()
	}
	if served {
		now := time.Now()
		if pause := s.pace.pause(now, now.Sub(begun)); pause > 0 {
			select {
			case <-time.After(pause):
			case <-s.end:
			}
		}
		return true, false, nil
	}
	more, err := s.server.Arm()
	if err != nil {
		return false, false, s.violation(slot, err.Error())
	}
	return false, !more, nil
}

// A ctrlPace bounds what a frontend's control requests cost its backend: a frontend makes
// a few at once when it connects, and then hardly any.
type ctrlPace struct {
	left   int // requests that may come at once
	filled time.Time
}

// At most ctrlAtOnce requests are answered at once, and then one every ctrlEvery. A request
// that takes more than a ctrlShare-th of that counts for several: mapping 512 pages takes
// milliseconds. What takes longer than ctrlLong waits for something.
const (
	ctrlAtOnce = 256
	ctrlEvery  = 4 * time.Millisecond
	ctrlShare  = 10
	ctrlLong   = 25 * time.Millisecond
)

// pause counts a request that took so long, and returns how long to wait before the next one
// is served.
func (p *ctrlPace) pause(now time.Time, took time.Duration) time.Duration {
	if p.filled.IsZero() {
		p.left, p.filled = ctrlAtOnce, now
	}
	if n := now.Sub(p.filled) / ctrlEvery; n > 0 {
		p.left = int(min(ctrlAtOnce, time.Duration(p.left)+n))
		p.filled = p.filled.Add(n * ctrlEvery)
	}
	p.left -= 1 + int(min(took, ctrlLong)/(ctrlEvery/ctrlShare))
	if p.left >= 0 {
		return 0
	}
	p.filled = p.filled.Add(time.Duration(-p.left) * ctrlEvery)
	p.left = 0
	return p.filled.Sub(now)
}
