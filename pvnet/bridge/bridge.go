package bridge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
)

// A Config holds the options of a [Bridge]. The zero Config suits most.
type Config struct {
	// Stations is how many addresses the bridge learns at most, in all. 0 means 4096.
	Stations int

	// PerPort is how many addresses it learns of one port at most. 0 means 256.
	PerPort int

	// Ports is how many ports there may be at a time, at most 1024. Each has a queue at each
	// other, of 64 frames for each of its vif's queues, which takes 3 KiB once it was used. 0 means
	// 64.
	Ports int

	// Age is how long the bridge remembers a station that sends nothing, at least 1 s; it
	// may be an eighth longer. 0 means 5 minutes, as IEEE 802.1D does.
	Age time.Duration

	// Pool receives for the ports, if it is not nil: it is to be of the domain whose vifs they
	// are, and outlives the bridge. nil: a goroutine for each queue of each vif. The pool
	// keeps a guest that floods from delaying what others send: [forward.Pool].
	Pool *forward.Pool
}

const (
	standardStations = 4096
	standardPerPort  = 256
	standardPorts    = 64
	mostPorts        = 1024
	mostStations     = 1 << 20
	standardAge      = 5 * time.Minute
)

// ErrClosed is returned after [Bridge.Close], and is why ports end then.
var ErrClosed = errors.New("bridge: closed")

// ErrRemoved is why a port has ended that was removed by [Port.Close].
var ErrRemoved = errors.New("bridge: the port was removed")

// ErrPorts is returned by [Bridge.Add] while [Config].Ports ports are in use.
var ErrPorts = errors.New("bridge: all ports are in use")

// ErrGuarded is returned by [Bridge.Add] for an address that another port guards.
var ErrGuarded = errors.New("bridge: another port guards the address")

// A Bridge connects vifs. Its methods may be called from any goroutine.
type Bridge struct {
	cfg   Config
	table table
	stop  context.CancelFunc
	wg    sync.WaitGroup // of the goroutines of the table and of ports

	mu     sync.Mutex
	ports  []*Port // guarded by mu: by number; nil: no such port now
	closed bool    // guarded by mu
}

// New makes a bridge without ports. An error names the option that makes no sense.
func New(cfg Config) (*Bridge, error) {
	for _, o := range []struct {
		name            string
		value           *int
		standard, least int
		most            int
	}{
		{"Stations", &cfg.Stations, standardStations, 1, mostStations},
		{"PerPort", &cfg.PerPort, standardPerPort, 1, mostStations},
		{"Ports", &cfg.Ports, standardPorts, 2, mostPorts},
	} {
		switch {
		case *o.value == 0:
			*o.value = o.standard
		case *o.value < o.least || *o.value > o.most:
			return nil, fmt.Errorf("bridge: Config.%s is %d: it must be %d to %d, or 0 for %d", o.name, *o.value, o.least, o.most, o.standard)
		}
	}
	switch {
	case cfg.Age == 0:
		cfg.Age = standardAge
	case cfg.Age < time.Second:
		return nil, fmt.Errorf("bridge: Config.Age is %v: it must be 1s or more, or 0 for %v", cfg.Age, standardAge)
	}
	b := &Bridge{cfg: cfg, table: newTable(cfg)}
	ctx, stop := context.WithCancel(context.Background())
	b.stop = stop
	b.wg.Go(func() { b.table.age(ctx, cfg.Age/ages) })
	return b, nil
}

// A PortConfig holds the options of a [Port]. The zero PortConfig is a port like that of a
// switch.
type PortConfig struct {
	// Guard are the only addresses that frames which the port sends may come from: those of a
	// tenant, which then cannot take another station's. Frames from other addresses are
	// dropped. The addresses are known to be behind this port, and behind no other. nil: any
	// address that is not in the Guard of another port. At most 256.
	Guard []pvnet.MAC

	// Isolated ports exchange frames only with ports that are not.
	Isolated bool

	// Frames is how many frames of each other port may wait for each queue of this one:
	// [forward.Config].Frames.
	Frames int

	// Pages is how many pages of this port may wait at all others together. 0 means
	// [forward.StandardPages]. See [forward.NewSource].
	Pages int

	// Pool receives for this port in place of [Config].Pool, if it is not nil: for a vif of
	// another domain than the others', since a pool is of one.
	Pool *forward.Pool
}

const mostGuards = 256

// Add makes a vif a port of the bridge, with its link up or down, and owns all halves of its
// queues, for good: a device that was removed can be no port again, and no other owner's.
// The port is removed when the device ends, or by [Port.Close].
//
// Errors: [ErrClosed], [ErrPorts], [ErrGuarded]: then the device is not owned yet, and may be added
// later. One that names the option; those of [pvnet.Device.OwnTX], such as [pvnet.ErrOwned].
func (b *Bridge) Add(dev *pvnet.Device, cfg PortConfig) (*Port, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	n := slices.Index(b.ports, nil)
	switch {
	case b.closed:
		return nil, ErrClosed
	case n < 0 && len(b.ports) == b.cfg.Ports:
		return nil, fmt.Errorf("%w: raise Config.Ports, which is %d", ErrPorts, b.cfg.Ports)
	case n < 0:
		n = len(b.ports)
		b.ports = append(b.ports, nil)
	}
	p := &Port{
		b: b, dev: dev, number: n, isolated: cfg.Isolated, guarded: cfg.Guard != nil,
		src: forward.NewSource(cfg.Pages), pool: cmp.Or(cfg.Pool, b.cfg.Pool), gone: make(chan struct{}),
	}
	if err := b.table.guard(p, cfg.Guard); err != nil {
		return nil, err
	}
	var err error
	if p.sender, err = forward.NewSender(dev, forward.Config{Frames: cfg.Frames, Pool: p.pool}); err != nil {
		b.table.forget(p, true)
		return nil, fmt.Errorf("bridge: %w", err)
	}
	b.ports[n] = p
	if err := b.connectLocked(p); err != nil { // the device has just ended
		b.disconnectLocked(p)
		p.sender.Close()
		return nil, fmt.Errorf("bridge: %w", err)
	}
	p.sorters = make([]sorter, dev.Queues())
	ctx, stop := context.WithCancelCause(context.Background())
	p.stop = stop
	b.wg.Go(func() { p.run(ctx) })
	return p, nil
}

func (c *PortConfig) check() error {
	if len(c.Guard) > mostGuards {
		return fmt.Errorf("bridge: PortConfig.Guard has %d addresses: at most %d", len(c.Guard), mostGuards)
	}
	for i, mac := range c.Guard {
		if !station(mac) {
			return fmt.Errorf("bridge: PortConfig.Guard has %v, which is no address of one station", mac)
		}
		if slices.Contains(c.Guard[:i], mac) {
			return fmt.Errorf("bridge: PortConfig.Guard has %v twice", mac)
		}
	}
	if c.Pages < 0 {
		return fmt.Errorf("bridge: PortConfig.Pages is %d: it must be positive, or 0 for %d", c.Pages, forward.StandardPages)
	}
	return nil
}

// connectLocked gives p an Input at each port that it may reach, and each of these ports one at p.
func (b *Bridge) connectLocked(p *Port) error {
	mine := &outs{to: make([]*forward.Input, len(b.ports))}
	for _, o := range b.ports {
		if o == nil || o == p || o.isolated && p.isolated {
			continue
		}
		in, err := o.sender.Input(p.src)
		if err != nil {
			continue // the device of o has just ended
		}
		mine.add(o, in)
		if in, err = p.sender.Input(o.src); err != nil {
			p.outs.Store(mine)
			return err
		}
		theirs := o.outs.Load().clone(len(b.ports))
		theirs.add(p, in)
		o.outs.Store(theirs)
	}
	p.outs.Store(mine)
	return nil
}

// disconnectLocked takes p out of b.ports, closes its Inputs at other ports and theirs at p, and forgets its
// stations.
func (b *Bridge) disconnectLocked(p *Port) {
	b.ports[p.number] = nil
	for _, o := range b.ports {
		if o == nil {
			continue
		}
		if theirs := o.outs.Load(); p.number < len(theirs.to) && theirs.to[p.number] != nil {
			in := theirs.to[p.number]
			theirs = theirs.clone(len(b.ports))
			theirs.remove(p)
			o.outs.Store(theirs)
			in.Close()
		}
	}
	for _, in := range p.outs.Load().to {
		if in != nil {
			in.Close()
		}
	}
	p.outs.Store(new(outs))
	b.table.forget(p, true)
}

// Ports returns the ports that there are now.
func (b *Bridge) Ports() []*Port {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(b.ports), func(p *Port) bool { return p == nil })
}

// Close removes all ports and ends the bridge. The devices stay as they are, and stay owned.
// It is idempotent and returns nil.
func (b *Bridge) Close() error {
	b.mu.Lock()
	b.closed = true
	ports := slices.Clone(b.ports)
	b.mu.Unlock()
	for _, p := range ports {
		if p != nil {
			p.stop(ErrClosed)
		}
	}
	b.stop()
	b.wg.Wait()
	return nil
}

// A Port is a vif on a [Bridge]. Its methods may be called from any goroutine.
type Port struct {
	b                 *Bridge
	dev               *pvnet.Device
	number            int
	guarded, isolated bool
	src               *forward.Source
	pool              *forward.Pool // nil: none
	sender            *forward.Sender
	sorters           []sorter // by queue of the device
	outs              atomic.Pointer[outs]
	stop              context.CancelCauseFunc
	counts            [counters]atomic.Uint64
	learned           int // guarded by table.mu: how many stations the table has learned at this port

	gone chan struct{} // closed once the port has been removed
	err  error         // written before gone is closed: why it was removed
}

// run moves what the port receives until ctx ends or the device does, and then removes the
// port.
func (p *Port) run(ctx context.Context) {
	following, enough := context.WithCancel(ctx)
	var follower sync.WaitGroup
	follower.Go(func() {
		for ev := range p.dev.Links(following) {
			if !ev.Up {
				p.b.table.forget(p, false) // its stations may be elsewhere when it comes back
			}
		}
	})
	receive := forward.Receive
	if p.pool != nil {
		receive = p.pool.Receive
	}
	err := receive(ctx, p.dev, p.forward)
	if err == nil {
		err = pvnet.ErrDisconnected
	}
	enough()
	follower.Wait()
	p.b.mu.Lock()
	p.b.disconnectLocked(p)
	p.b.mu.Unlock()
	p.sender.Close()
	p.err = err
	p.stop(nil)
	close(p.gone)
}

// Close removes the port, and returns once nothing of it runs any more: its frames that wait
// at other ports are dropped, and the bridge forgets its stations. The device stays as it is,
// and stays owned. It is idempotent and returns nil.
func (p *Port) Close() error {
	p.stop(ErrRemoved)
	<-p.gone
	return nil
}

// Done returns a channel that is closed when the port has been removed, for whatever reason.
func (p *Port) Done() <-chan struct{} { return p.gone }

// Err returns why the port was removed: [ErrRemoved], [ErrClosed], or the error that ended
// its device, [pvnet.ErrDisconnected] if that was disconnected. nil while it is a port.
func (p *Port) Err() error {
	select {
	case <-p.gone:
		return p.err
	default:
		return nil
	}
}

// Device returns the port's vif.
func (p *Port) Device() *pvnet.Device { return p.dev }

// PortStats counts frames of a port.
type PortStats struct {
	// Of the frames that the port received:
	Received uint64 // all
	Unicast  uint64 // for a station that the bridge knows, and given to its port
	Flooded  uint64 // given to several ports, or to all that there are
	Local    uint64 // not passed on: for a station behind the port itself
	Isolated uint64 // dropped: for a station behind a port that the port may not reach, since both are isolated
	Spoofed  uint64 // dropped: from an address that is not in the port's Guard, or is in another's
	Invalid  uint64 // dropped: from a group address or none
	Reserved uint64 // dropped: for a reserved group
	Alone    uint64 // dropped: there is no other port to reach

	// Of the addresses that they came from:
	Moved     uint64 // frames from a station that was behind another port before
	Unlearned uint64 // frames from a station that the bridge did not learn, since its table or the port's share is full

	// Out are the frames for this port, from all others.
	Out forward.Stats
}

// counters are the indexes of Port.counts.
const (
	received = iota
	unicast
	flooded
	local
	isolated
	spoofed
	invalid
	reserved
	alone
	moved
	unlearned
	counters
)

// Stats returns the counters. They stay when the port is gone.
func (p *Port) Stats() PortStats {
	at := func(i int) uint64 { return p.counts[i].Load() }
	return PortStats{
		Received: at(received), Unicast: at(unicast), Flooded: at(flooded), Local: at(local), Isolated: at(isolated),
		Spoofed: at(spoofed), Invalid: at(invalid), Reserved: at(reserved), Alone: at(alone),
		Moved: at(moved), Unlearned: at(unlearned),
		Out: p.sender.Stats(),
	}
}

// outs are the ports that one port may reach. They are immutable once stored.
type outs struct {
	to      []*forward.Input // by number of the port; nil: it is not to be reached
	all     []int            // the numbers of all these ports
	unknown []int            // the numbers of those without a Guard: a station that the bridge does not know may be there
}

func (o *outs) clone(ports int) *outs {
	c := &outs{to: make([]*forward.Input, ports), all: slices.Clone(o.all), unknown: slices.Clone(o.unknown)}
	copy(c.to, o.to)
	return c
}

func (o *outs) add(p *Port, in *forward.Input) {
	o.to[p.number] = in
	o.all = append(o.all, p.number)
	if !p.guarded {
		o.unknown = append(o.unknown, p.number)
	}
}

func (o *outs) remove(p *Port) {
	not := func(n int) bool { return n == p.number }
	o.to[p.number] = nil
	o.all = slices.DeleteFunc(o.all, not)
	o.unknown = slices.DeleteFunc(o.unknown, not)
}

// input returns the Input at a port; nil if the port may not be reached.
func (o *outs) input(number int) *forward.Input {
	if number < len(o.to) {
		return o.to[number]
	}
	return nil
}
