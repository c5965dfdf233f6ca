package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/pvnet/handover"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"

	"github.com/spf13/cobra"
)

// A front is a command that owns vifs of its domain.
type front struct {
	*cli.Program
	domain    domain.Flags
	counters  counterFlag
	inspect   inspectFlag
	takeovers takeovers
	vifs      []string
	wait      time.Duration
	queues    string
	take      bool
	offload   bool // the user of the vif takes long frames and partial checksums
}

func (f *front) register(cmd *cobra.Command) {
	f.domain.Register(cmd, 1)
	f.counters.register(cmd)
	f.inspect.register(cmd)
	f.takeovers.command, f.takeovers.pause = cmd.Name(), "end the other "+cmd.Name()
	f.takeovers.register(cmd, "take each vif over from the "+cmd.Name()+" that has it now, which then ends")
	cmd.Flags().Lookup("handover").Usage += "; " + vifMark + " in it is the vif"
	cmd.Flags().StringArrayVar(&f.vifs, "vif", []string{"0"}, "`id` of a vif; repeatable")
	cmd.Flags().DurationVar(&f.wait, "wait", 30*time.Second, "give a vif up if no backend connects within this `time`; 0: wait for ever")
	cmd.Flags().StringVar(&f.queues, "queues", autoQueues, queuesUsage("to ask for"))
	completes(cmd, f.completeVifs, "vif")
	cli.FixedValues(cmd, "queues", autoQueues)
	completes(cmd, completeNothing, "wait")
	cmd.Flags().BoolVar(&f.take, "take", false, "with --xen: unbind the vif from the kernel's driver first")
}

// severalVifs is part of the help of these commands.
const severalVifs = `A vif that does not connect, or ends with an
error, is an error in the log and no matter of the others: it ends with status 1 once the
last has ended. The others keep passing frames when it is started again with --take-over,
or by SIGUSR2, which tries that vif again.`

// vifMark stands for the vif in the flags of a command that may have several.
const vifMark = "%i"

// autoQueues is the default of --queues.
const autoQueues = "auto"

// queuesUsage is the help of --queues.
func queuesUsage(what string) string {
	return "`queues` " + what + ": 1 to 64, or auto: one for each processor, at most 8, as far as the other end and the memory that may be shared allow"
}

// deviceQueues returns the value of --queues for a pvnet.Config.
func deviceQueues(s string) (int, error) {
	if s == autoQueues {
		return pvnet.AutoQueues, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 64 {
		return 0, cli.BadValue("queues", s, "a number from 1 to 64, or auto")
	}
	return n, nil
}

// queuesOf names the queues of a device's connection.
func queuesOf(dev *pvnet.Device) string {
	if dev.Active() == 1 {
		return "1 queue"
	}
	return fmt.Sprintf("%d queues", dev.Active())
}

// A use is the user of a vif, such as a server or a TAP. It runs beside the device.
type use struct {
	says   string              // a message for the user of the command
	failed <-chan error        // gets the error if the use ends by itself
	renew  func() error        // called when the device may have another MAC or MTU; may be nil
	link   func(up bool) error // called when the link comes up or goes down; may be nil
	hold   *handover.Vif       // how the vif is handed over
	close  func() error        // called after the device has ended
}

// own connects to the vifs and uses each until a signal, or until the device, the use or the
// host ends by itself. The error of one vif does not end the others.
func (f *front) own(ctx context.Context, begin func(*domain.Domain, *pvnet.Device) (*use, error)) error {
	if err := f.check(); err != nil {
		return err
	}
	queues, err := deviceQueues(f.queues)
	if err != nil {
		return err
	}
	counters, err := f.counters.store()
	if err != nil {
		return err
	}
	replace := make(chan os.Signal, 1) // a signal that comes too early waits
	signal.Notify(replace, syscall.SIGUSR2)
	defer signal.Stop(replace)
	cards, err := f.predecessors(ctx)
	if err != nil {
		return err
	}
	for _, c := range cards {
		defer c.takeovers.close()
		f.domain.Beside = f.domain.Beside || c.ask != nil
	}
	dom, err := f.domain.Open(ctx)
	if err != nil {
		return err
	}
	defer dom.End()
	inspector, endInspect, err := f.inspect.listen(f.Log())
	if err != nil {
		return err
	}
	defer endInspect()
	cfg := pvnet.Config{
		Queues: queues, LendRx: true, StaticGrants: true, Offload: f.offload, Counters: counters, Inspector: inspector, Logger: f.Log(),
	}
	return f.ownAll(ctx, dom, cards, cfg, replace, begin)
}

// check checks the flags that cobra does not check.
func (f *front) check() error {
	if f.wait < 0 {
		return cli.BadValue("wait", f.wait.String(), "a time to wait")
	}
	if f.take && !f.domain.Xen {
		return &cli.Advice{Err: errors.New("--take is for a real Xen"), Next: "give --xen too", Usage: true}
	}
	for i, vif := range f.vifs {
		if strings.Contains(vif, ",") {
			return &cli.Advice{Err: fmt.Errorf("--vif %q: not the id of one vif", vif), Next: "give --vif once for each vif: --vif 0 --vif 1", Usage: true}
		}
		if slices.Contains(f.vifs[:i], vif) {
			return cli.BadValue("vif", vif, "given once only; name each vif once")
		}
	}
	if s := f.takeovers.socket; len(f.vifs) > 1 && s != "" && s != "none" && !strings.Contains(s, vifMark) {
		return &cli.Advice{
			Err:  fmt.Errorf("--handover %q: one socket, and each of %d vifs needs one of its own", s, len(f.vifs)),
			Next: "put " + vifMark + " into it, which is the vif: --handover " + filepath.Join(filepath.Dir(s), "vif"+vifMark+".sock"), Usage: true,
		}
	}
	return nil
}

// ownAll runs all vifs in the domain, until the last has ended.
func (f *front) ownAll(ctx context.Context, dom *domain.Domain, cards []*card, cfg pvnet.Config, replace <-chan os.Signal, begin func(*domain.Domain, *pvnet.Device) (*use, error)) error {
	signals := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go f.startSuccessors(ctx, replace)
	var starting sync.WaitGroup
	var running sync.WaitGroup
	for _, c := range cards {
		starting.Add(1)
		c.takeovers.ready = sync.OnceFunc(starting.Done)
		running.Go(func() {
			defer c.takeovers.ready()
			if c.err == nil {
				c.err = c.own(ctx, signals, dom, cfg, begin)
			}
			if c.err != nil && len(cards) > 1 && ctx.Err() == nil {
				f.lost(c)
			}
		})
	}
	told := make(chan struct{})
	go func() {
		defer close(told)
		starting.Wait() // each vif has begun, or failed
		if slices.ContainsFunc(cards, func(c *card) bool { return c.begun }) {
			notify("READY=1")
		}
	}()
	ended := make(chan error, 1)
	go func() {
		running.Wait()
		ended <- outcome(cards)
		close(ended)
	}()
	var err error
	select {
	case err = <-ended:
		<-told
	case <-dom.Gone:
	}
	select {
	case <-dom.Gone: // and vifs may have ended with an error because of that
		// End the devices so that the pins of their counters do not outlive this process.
		cancel(domain.ErrHostGone)
		return dom.Lost(f.Say, ended)
	default:
		return err
	}
}

// lost logs that a vif has ended with an error while others go on.
func (f *front) lost(c *card) {
	attrs := []any{"vif", c.vif, "err", c.err}
	if a, ok := errors.AsType[*cli.Advice](c.err); ok && a.Next != "" {
		attrs = append(attrs, "next", a.Next)
	}
	f.Log().Error("a vif has ended, and the others go on", attrs...)
}

// outcome is the error of all vifs. That a signal came before a vif was connected is an error
// only if no vif was.
func outcome(cards []*card) error {
	begun := slices.ContainsFunc(cards, func(c *card) bool { return c.begun })
	var errs []error
	for _, c := range cards {
		if c.err != nil && !(begun && errors.Is(c.err, context.Canceled)) {
			errs = append(errs, c.err)
		}
	}
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return errors.Join(errs...)
}

// A card is one vif of a front.
type card struct {
	*front
	vif       string
	takeovers *takeovers // of this vif alone
	ask       askFunc
	begun     bool // it was connected, and used
	err       error
}

// own connects to the vif and uses it until it ends.
func (c *card) own(ctx, signals context.Context, dom *domain.Domain, cfg pvnet.Config, begin func(*domain.Domain, *pvnet.Device) (*use, error)) error {
	if c.domain.Xen {
		if err := c.domain.Free(c.vif, c.take); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c.Say("domain %d: vif %s waits for its backend", dom.ID(), c.vif)
	dev, err := c.connect(ctx, dom, cfg)
	if err != nil {
		return err
	}
	u, err := begin(dom, dev)
	if err != nil {
		dev.Disconnect()
		return err
	}
	c.begun = true
	counters := ""
	if c.takeovers.client == nil { // else they come later
		counters = "counters: " + mirrored(dev) + "\n"
	}
	c.Say("vif %s: MAC %v, MTU %d, backend in domain %d, %s, %s\n%s%s; a signal ends it",
		c.vif, dev.MAC(), dev.MTU(), dev.Peer(), queuesOf(dev), dev.Budget(), counters, u.says)
	go func() {
		select {
		case err := <-u.failed:
			cancel(err)
		case <-ctx.Done():
		}
	}()
	go c.takeovers.run(ctx, func() { cancel(pvnet.ErrHandover) })
	defer c.takeovers.add(u.hold)()
	return c.use(ctx, signals, dev, u)
}

// use follows the vif until ctx, the device, the use or the host ends, and ends the others.
// signals is the part of ctx that signals end.
func (c *card) use(ctx, signals context.Context, dev *pvnet.Device, u *use) (err error) {
	last := c.follow(ctx, dev, u)
	if errors.Is(context.Cause(ctx), pvnet.ErrHandover) { // the other process goes on, and the device is about to end
		select {
		case <-dev.Done():
		case <-time.After(farewell):
		}
	}
	if errors.Is(dev.SetDeadline(time.Time{}), pvnet.ErrHandover) {
		return errors.Join(c.handedOver(ctx), u.close())
	}
	if ctx.Err() == nil {
		err = fmt.Errorf("vif %s has ended: %s", c.vif, last.Reason)
	} else if signals.Err() == nil {
		err = context.Cause(ctx)
	}
	dev.Disconnect()
	return errors.Join(err, u.close())
}

// follow prints when the vif goes down, connects again or gets another MTU, until ctx or
// the device ends. The use follows it.
func (c *card) follow(ctx context.Context, dev *pvnet.Device, u *use) (last pvnet.LinkEvent) {
	last.Up, last.MTU = true, dev.MTU()
	for ev := range dev.Links(ctx) {
		if ev.Up && (!last.Up || ev.MTU != last.MTU) && u.renew != nil {
			if err := u.renew(); err != nil {
				c.Log().Error("a vif is another card, and what uses it does not follow", "vif", c.vif, "err", err)
			}
		}
		if ev.Up != last.Up && u.link != nil {
			if err := u.link(ev.Up); err != nil {
				c.Log().Error("what uses a vif does not learn of its link", "vif", c.vif, "up", ev.Up, "err", err)
			}
		}
		switch {
		case ev.Up && !last.Up:
			c.Say("vif %s: connected again, backend in domain %d, MAC %v, MTU %d", c.vif, dev.Peer(), ev.MAC, ev.MTU)
		case ev.Up && ev.MTU != last.MTU:
			c.Say("vif %s: its MTU is now %d", c.vif, ev.MTU)
		case !ev.Up && last.Up:
			c.Say("vif %s: down: %s", c.vif, ev.Reason)
		}
		last = ev
	}
	return last
}

// connect waits for the backend.
func (c *card) connect(ctx context.Context, dom *domain.Domain, cfg pvnet.Config) (*pvnet.Device, error) {
	if c.wait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, c.wait, fmt.Errorf("waited %v", c.wait))
		defer cancel()
	}
	var dev *pvnet.Device
	var err error
	if c.ask == nil {
		dev, err = pvnet.Connect(ctx, dom.Domain, c.vif, cfg)
	} else {
		dev, err = pvnet.TakeOver(ctx, dom.Domain, c.vif, cfg, c.ask)
	}
	if err == nil {
		return dev, nil
	}
	if cause := context.Cause(ctx); errors.Is(cause, context.Canceled) || errors.Is(cause, domain.ErrHostGone) {
		return nil, cause
	}
	if none, ok := errors.AsType[*xenbus.NoDeviceError](err); ok {
		next := "the host gives this domain none: see its --vif"
		if len(none.Have) > 0 {
			next = "choose one of those with --vif"
		}
		return nil, &cli.Advice{Err: err, Next: next}
	}
	if errors.Is(err, xenstore.ErrQuota) {
		return nil, &cli.Advice{Err: err, Next: "this domain has used up its quota in xenstore: remove what it does not need there, or have dom0 raise the quota"}
	}
	// On a slow machine the time may be over before Connect has begun to wait.
	if _, ok := errors.AsType[*xenbus.WaitError](err); ok || ctx.Err() != nil {
		return nil, &cli.Advice{Err: err, Next: `is the backend running? "barevif back", or the kernel's in its domain; --wait gives it longer`}
	}
	return nil, err
}

// An askFunc is that of pvnet.TakeOver; nil: the vif is nobody's.
type askFunc = func(ctx context.Context, back hypercall.DomID, id string) (*pvnet.TakenVif, error)

// predecessors connects to the processes that have the vifs, with --take-over. It comes before
// this process is one of the domain: an emulated domain has only one, unless one takes over
// from another. A process that refuses to hand a vif over is the error of that vif.
func (f *front) predecessors(ctx context.Context) (cards []*card, err error) {
	for _, vif := range f.vifs {
		c := &card{front: f, vif: vif, takeovers: f.takeovers.of(vif)}
		c.ask, c.err = c.predecessor(ctx)
		if ctx.Err() != nil || c.err != nil && len(f.vifs) == 1 {
			for _, other := range cards {
				other.takeovers.close()
			}
			return nil, c.err
		}
		cards = append(cards, c)
	}
	return cards, nil
}

// predecessor connects to the process that has the vif.
func (c *card) predecessor(ctx context.Context) (askFunc, error) {
	own := hypercall.DomID(c.domain.Dom)
	file := fmt.Sprintf("front-%d-%s.handover", own, strings.ReplaceAll(c.vif, "/", "_"))
	if c.domain.Xen { // there is one domain, whose number may change
		own, file = 0, fmt.Sprintf("front-%s.handover", strings.ReplaceAll(c.vif, "/", "_"))
	}
	id := handover.Identity{Domain: own, Frontend: true}
	if err := c.takeovers.begin(c.Say, c.Log(), &c.domain, file, id); err != nil {
		return nil, err
	}
	return c.takeovers.dial(ctx, true)
}

// startSuccessors starts a process that takes all vifs over for each signal of replace, until
// ctx ends.
func (f *front) startSuccessors(ctx context.Context, replace <-chan os.Signal) {
	for {
		select {
		case <-replace:
			f.takeovers.startSuccessor(f.Log())
		case <-ctx.Done():
			return
		}
	}
}

// farewell is how long a process that has taken the vif over may take to say that it goes on.
const farewell = 10 * time.Second

// handedOver waits until the process that has taken the vif over says that this one can end.
func (c *card) handedOver(ctx context.Context) error {
	t := time.NewTimer(farewell)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-t.C:
		return fmt.Errorf("vif %s was handed over, and the process that took it does not answer", c.vif)
	}
}
