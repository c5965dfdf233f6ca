package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
)

// setupLimit bounds the time in which a vif connects.
const setupLimit = 10 * time.Second

// backDomain is the domain of the backends. Each frontend has a domain of its own, from
// frontDomain on.
const (
	backDomain  hypercall.DomID = 1
	frontDomain hypercall.DomID = 2
)

// A lab is an emulated machine with a xenstore and a toolstack.
type lab struct {
	machine *emu.Machine
	host    *emu.Host // nil: all domains are in this process
	path    string    // of the host's socket
	store   *server.Store
	tools   *xenstore.Client
	driver  *emu.Domain // the domain of the backends that vifs has made
	undo    []func()
}

// newLab makes a machine whose domains are all in this process, or, if path is not empty, a
// host that other processes join.
func newLab(path string) (l *lab, err error) {
	// The backend's domain is privileged: the usual quota of 1000 nodes is enough
	// for 58 vifs.
	l = &lab{path: path, store: server.New(server.Config{Privileged: []hypercall.DomID{backDomain}})}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	l.onClose(func() { l.store.Close() })
	cfg := emu.Config{
		Mapped: true,
		Grants: 4096,
		Store:  func(dom hypercall.DomID, c io.ReadWriteCloser) { l.store.ServeConn(c, dom) },
	}
	if path != "" {
		if l.host, err = emu.Listen(path, cfg); err != nil {
			return nil, err
		}
		l.machine = l.host.Machine
		l.onClose(func() { l.host.Close() })
	} else {
		if l.machine, err = emu.New(cfg); err != nil {
			return nil, err
		}
		l.machine.OnDeath(l.store.DomainDied)
		l.onClose(func() { l.machine.Close() })
	}
	dom0, err := l.domain(0)
	if err != nil {
		return nil, err
	}
	ctx, cancel := timeout()
	defer cancel()
	if l.tools, err = xenstore.Dial(ctx, dom0.Store, xenstore.Config{Pipeline: 8}); err != nil {
		return nil, err
	}
	l.onClose(func() { l.tools.Close() })
	return l, nil
}

func (l *lab) onClose(f func()) { l.undo = append(l.undo, f) }

func (l *lab) close() {
	for len(l.undo) > 0 {
		last := len(l.undo) - 1
		l.undo[last]()
		l.undo = l.undo[:last]
	}
}

func (l *lab) domain(id hypercall.DomID) (*emu.Domain, error) {
	l.store.Introduce(id)
	return l.machine.NewDomain(id)
}

// addVif makes a vif between two domains.
func (l *lab) addVif(front, back hypercall.DomID, id uint32) error {
	ctx, cancel := timeout()
	defer cancel()
	for _, dom := range []hypercall.DomID{front, back} {
		l.store.Introduce(dom)
		if err := toolstack.Home(ctx, l.tools, dom); err != nil {
			return err
		}
	}
	return toolstack.Add(ctx, l.tools, toolstack.Vif{Front: front, Back: back, ID: id,
		MAC: [6]byte{2, 0, 0, byte(back), byte(front), byte(id)}})
}

// A backend serves the vifs of a domain.
type backend struct {
	devices chan *pvnet.Device
	ended   chan error
	cancel  context.CancelFunc
}

func serve(d hypercall.Domain, cfg pvnet.Config) *backend {
	ctx, cancel := context.WithCancel(context.Background())
	b := &backend{make(chan *pvnet.Device, 64), make(chan error, 1), cancel}
	go func() {
		b.ended <- pvnet.Serve(ctx, d, pvnet.ServeConfig{Config: cfg, Hotplug: true}, func(d *pvnet.Device) { b.devices <- d })
	}()
	return b
}

func (b *backend) close() {
	b.cancel()
	<-b.ended
}

// nextDevice waits for the next device to come up.
func (b *backend) nextDevice() (*pvnet.Device, error) {
	select {
	case d := <-b.devices:
		ctx, cancel := timeout()
		defer cancel()
		for ev := range d.Links(ctx) {
			if ev.Up {
				return d, nil
			}
		}
		return nil, fmt.Errorf("the backend of domain %d's vif did not come up in %v", d.Peer(), setupLimit)
	case err := <-b.ended:
		b.ended <- err // put it back for close
		return nil, fmt.Errorf("pvnet.Serve ended: %w", err)
	case <-time.After(setupLimit):
		return nil, fmt.Errorf("no backend appeared in %v", setupLimit)
	}
}

func connect(d hypercall.Domain, id string, cfg pvnet.Config) (*pvnet.Device, error) {
	ctx, cancel := timeout()
	defer cancel()
	return pvnet.Connect(ctx, d, id, cfg)
}

// vifs connects n vifs. Their backends share one domain; each frontend has its own.
func (l *lab) vifs(n int, cfg pvnet.Config) (fronts, backs []*pvnet.Device, err error) {
	if l.driver, err = l.domain(backDomain); err != nil {
		return nil, nil, err
	}
	served := serve(l.driver, cfg)
	l.onClose(served.close)
	for i := range n {
		id := frontDomain + hypercall.DomID(i)
		guest, err := l.domain(id)
		if err != nil {
			return nil, nil, err
		}
		if err := l.addVif(id, backDomain, 0); err != nil {
			return nil, nil, err
		}
		front, err := connect(guest, "0", cfg)
		if err != nil {
			return nil, nil, err
		}
		l.onClose(front.Disconnect)
		back, err := served.nextDevice()
		if err != nil {
			return nil, nil, err
		}
		fronts, backs = append(fronts, front), append(backs, back)
	}
	return fronts, backs, nil
}

// notified returns how many notifications the devices have sent.
func notified(devices []*pvnet.Device) (n uint64) {
	for _, d := range devices {
		s := d.Stats()
		n += s.RX.Get(telemetry.NotifiesSent) + s.TX.Get(telemetry.NotifiesSent)
	}
	return n
}

// past is a deadline that has passed; it ends waits at once.
var past = time.Unix(1, 0)

// interrupted reports whether err is the error of a call that was interrupted because the job was
// stopped.
func interrupted(j *job, err error) bool {
	return j.stopped() && (errors.Is(err, errDeadline) || errors.Is(err, context.Canceled))
}

func timeout() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), setupLimit)
}
