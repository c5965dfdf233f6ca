package pvnet

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// global is the only state of the package: every frontend of the process, so that a
// second Connect finds the first, and the slow tick that the devices of a domain share.
var global = struct {
	mu      sync.Mutex
	devices map[deviceKey]*entry // guarded by mu
	clocks  map[any]*slowTicker  // guarded by mu; by hypercall.Domain, for domains with devices
}{devices: make(map[deviceKey]*entry), clocks: make(map[any]*slowTicker)}

type deviceKey struct {
	domain hypercall.Domain
	id     string
}

// An entry is a device from the first call of Connect until all of it is freed.
type entry struct {
	cfg   Config
	ready chan struct{} // closed when dev or err is set
	gone  chan struct{} // closed when the entry has been removed from devices
	dev   *Device
	err   error
}

// failed reports whether the attempt is over and has failed.
func (e *entry) failed() bool {
	select {
	case <-e.ready:
		return e.err != nil
	default:
		return false
	}
}

// Connect returns the frontend of this domain's vif id ("0") once it is connected, with or
// without a carrier ([Device.Carrier]). It
// waits for the toolstack to finish the vif and for the backend to answer, until ctx
// ends. The error then names the states that it saw, or what xenstore refused last.
//
// A second Connect with the same domain and id returns the same device, and needs the
// same Config. One Disconnect ends the device for every caller.
//
// If id is no vif of the domain, the error lists its vifs ([xenbus.NoDeviceError]). A
// device that does not connect is closed before Connect returns. After ctx has ended,
// Connect waits at most one more second for that. If xenstore or the peer does not
// answer, the closing continues in the background, and a Connect that comes meanwhile
// waits for it.
func Connect(ctx context.Context, domain hypercall.Domain, id string, cfg Config) (*Device, error) {
	return connectWith(ctx, domain, id, cfg, nil)
}

// An askFunc is that of TakeOver; nil: nobody is asked.
type askFunc = func(ctx context.Context, back hypercall.DomID, id string) (*TakenVif, error)

func connectWith(ctx context.Context, domain hypercall.Domain, id string, cfg Config, ask askFunc) (*Device, error) {
	if err := cfg.check(domain); err != nil {
		return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, err)
	}
	key := deviceKey{domain, id}
	for {
		global.mu.Lock()
		e, there := global.devices[key]
		if !there {
			e = &entry{cfg: cfg, ready: make(chan struct{}), gone: make(chan struct{})}
			global.devices[key] = e
		}
		global.mu.Unlock()
		if !there {
			e.dev, e.err = connect(ctx, domain, id, cfg, ask, func() {
				global.mu.Lock()
				delete(global.devices, key)
				global.mu.Unlock()
				close(e.gone)
			})
			close(e.ready)
			return e.dev, e.err
		}
		failed := e.failed() // before this call began
		if !failed && !e.cfg.equal(cfg) {
			return nil, fmt.Errorf("pvnet: vif %s is connected with another Config", id)
		}
		select {
		case <-e.ready:
		case <-ctx.Done():
			return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, context.Cause(ctx))
		}
		switch {
		case failed || errors.Is(e.err, context.Canceled) || errors.Is(e.err, context.DeadlineExceeded):
			// The other caller's context ended, or its attempt failed before this one
			// began: try again.
		case e.err != nil:
			return nil, e.err
		case !e.dev.leaving.Load() && e.dev.link.Load() != linkGone:
			return e.dev, nil
		}
		select {
		case <-e.gone:
		case <-ctx.Done():
			return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, context.Cause(ctx))
		}
	}
}

// connect makes the device and connects it. forget runs once all of it is freed.
func connect(ctx context.Context, domain hypercall.Domain, id string, cfg Config, ask askFunc, forget func()) (d *Device, err error) {
	begun := false
	defer func() {
		if err != nil {
			err = fmt.Errorf("pvnet: connect vif %s: %w", id, err)
		}
		if !begun {
			forget()
		}
	}()
	client, err := xenstore.Dial(ctx, domain.Store, xenstore.Config{Logger: cfg.Logger})
	if err != nil {
		return nil, err
	}
	xd, err := xenbus.OpenFrontend(ctx, client, "vif", id)
	if err != nil {
		client.Close()
		return nil, err
	}
	d = newDevice(id, telemetry.Frontend, domain, cfg.resolve())
	d.fromBackend = func(ctx context.Context, key string) (value, path string, err error) {
		dir, _ := xd.Peer()
		v, err := xd.PeerValues(ctx, key)
		return v[key], dir + "/" + key, err
	}
	first := make(chan error, 1)
	f := &front{d: d}
	l := &lifecycle{d: d, xd: xd, end: f, firstResult: first}
	if ask != nil {
		if err := l.takeOver(ctx, f, ask); err != nil {
			closing, cancel := context.WithTimeout(context.Background(), storeTimeout)
			xd.Close(closing)
			cancel()
			client.Close()
			return nil, err
		}
	}
	begun = true
	d.startWith(l, func() {
		client.Close()
		forget()
	})
	select {
	case err = <-first:
		if err == nil {
			return d, nil
		}
		select {
		case <-d.done:
			return nil, err
		case <-ctx.Done():
		}
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectGrace)
	defer cancel()
	if err == nil {
		err = f.withPeerReason(grace, d.connectError(xd, context.Cause(ctx)), xd)
		d.stop(err)
	}
	select {
	case <-d.done:
	case <-grace.Done():
	}
	return nil, err
}

// connectGrace is how long Connect waits, once its context has ended, for a device
// that did not connect to be closed.
const connectGrace = time.Second

// connectError returns the error of a Connect that gives up: why the device is not connected yet.
func (d *Device) connectError(xd *xenbus.Device, cause error) error {
	trouble := xd.Trouble()
	if step := d.lastError.Load(); step != nil {
		trouble = *step
	}
	if trouble != nil {
		return fmt.Errorf("%w; given up: %w", trouble, cause)
	}
	ch := xd.Current()
	return &xenbus.WaitError{Dir: xd.Dir(), Own: ch.Own, Seen: xd.Seen(), Err: cause}
}

// holders names the other vifs of this program that hold pages under the same limit, as
// the end of an error message.
func (d *Device) holders() string {
	var held []string
	global.mu.Lock()
	defer global.mu.Unlock()
	for key, e := range global.devices {
		if key.domain != d.domain || key.id == d.id {
			continue
		}
		select {
		case <-e.ready:
			if e.dev != nil && e.dev.Budget().SharedPages > 0 {
				held = append(held, fmt.Sprintf("vif %s holds %d pages", key.id, e.dev.Budget().SharedPages))
			}
		default:
		}
	}
	if held == nil {
		return ""
	}
	slices.Sort(held)
	return "; of this program, " + strings.Join(held, ", ") + ": fewer Config.Queues there leave more here"
}
