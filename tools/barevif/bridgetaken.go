package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/tools/cli"

	"golang.org/x/sys/unix"
)

// selectTaken has cfg take over the vifs that this bridge would serve, and leave the others to the
// process that serves them.
func (b *bridged) selectTaken(cfg *pvnet.ServeConfig, takeOver func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error)) {
	client := b.takeovers.client
	if ours := cfg.Select; ours != nil {
		cfg.Select = func(front hypercall.DomID, id string) bool {
			ok := ours(front, id)
			if !ok {
				client.Decline(front, id)
			}
			return ok
		}
	}
	cfg.MayTake = func(front hypercall.DomID, id string, says pvnet.Toolstack) error {
		vif := fmt.Sprintf("%d.%s", front, id)
		err := b.promise(vif, says)
		if err != nil {
			client.Decline(front, id)
			return fmt.Errorf("it stays with the bridge that serves it until that ends: %w", err)
		}
		return nil
	}
	cfg.TakeOver = func(ctx context.Context, front hypercall.DomID, id string) (*pvnet.TakenVif, error) {
		in, err := takeOver(ctx, front, id)
		if in == nil {
			b.forgetPromise(fmt.Sprintf("%d.%s", front, id))
		}
		return in, err
	}
}

// promise keeps a place on the bridge for a vif that is about to be taken over, with the addresses of
// its guard: once it was taken, it cannot be refused without an end to its connection. The error says
// why it would be refused.
func (b *bridged) promise(vif string, says pvnet.Toolstack) error {
	info, _, err := b.plan(vif, says)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	there := func(guard []pvnet.MAC) bool {
		return slices.ContainsFunc(guard, func(mac pvnet.MAC) bool { return slices.Contains(info.guard, mac) })
	}
	taken := false
	for _, port := range b.ports {
		taken = taken || there(port.guard)
	}
	others := 0
	for name, guard := range b.promised {
		if name != vif {
			others++
			taken = taken || there(guard)
		}
	}
	switch {
	case taken:
		return fmt.Errorf("another vif of this bridge has its mac, %s", macs(info.guard))
	case len(b.ports)+others >= b.most:
		return fmt.Errorf("bridge %s has %d ports, which is all that --ports allows", b.bridge, b.most)
	}
	b.promised[vif] = info.guard
	return nil
}

// forgetPromise gives the place of a vif back: it has become a port, or never will.
func (b *bridged) forgetPromise(vif string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.promised, vif)
}

// startUplinks makes the uplinks ports of the bridge until ctx ends. wait waits for the end of that, also of
// those that were started before an error.
//
// A process that takes over begins with them when the other one has none any more: a TAP has one name,
// and a vif one frontend. Errors of that moment do not end it, since it has the vifs by then.
func (b *bridged) startUplinks(ctx context.Context, uplinks []uplink, cfg pvnet.Config) (wait func(), err error) {
	if len(uplinks) == 0 {
		return func() {}, nil
	}
	unlock := func() {}
	var running sync.WaitGroup
	all := func() { running.Wait(); unlock() }
	if b.takeovers.client == nil {
		if unlock, err = b.lockUplinks(ctx, false); err != nil {
			b.slog.Warn("a bridge that takes over may begin with the uplinks too early", "err", err)
			unlock = func() {}
		}
		for _, u := range uplinks {
			wait, err := b.startUplink(ctx, u, cfg)
			if err != nil {
				return all, err
			}
			running.Go(wait)
		}
		return all, nil
	}
	if err := b.mayHave(uplinks); err != nil {
		return all, err
	}
	var starting sync.WaitGroup
	starting.Go(func() {
		free, err := b.lockUplinks(ctx, true)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			b.slog.Warn("the uplinks begin before the other bridge has ended", "err", err)
		default:
			unlock = free
		}
		for _, u := range uplinks {
			running.Go(func() { b.keepStarting(ctx, u, cfg) })
		}
	})
	return func() { starting.Wait(); all() }, nil
}

// keepStarting starts an uplink, and again if that fails, and waits for its end.
func (b *bridged) keepStarting(ctx context.Context, u uplink, cfg pvnet.Config) {
	for said := ""; ctx.Err() == nil; await(ctx, nil, retryUplink) {
		wait, err := b.startUplink(ctx, u, cfg)
		if err == nil {
			wait()
			return
		}
		if err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			b.slog.Error("an uplink is not there, and is tried again", "uplink", u.String(), "err", err)
		}
	}
}

// mayHave checks, before anything was taken over, what could keep the uplinks from starting later.
func (b *bridged) mayHave(uplinks []uplink) error {
	if slices.ContainsFunc(uplinks, func(u uplink) bool { return u.tap != "" }) {
		l, err := link.OpenTAP(link.TAPConfig{Name: "barevif%d"})
		if err != nil {
			return linkRefused(err)
		}
		return l.Close()
	}
	return nil
}

// lockUplinks takes the lock that the bridge has which has the uplinks, at the path of its hand-over.
// With wait it waits for it, until ctx ends; without, it returns an error if another process has it. It
// does nothing where nothing is handed over.
func (b *bridged) lockUplinks(ctx context.Context, wait bool) (unlock func(), err error) {
	if b.takeovers.path == "" {
		return func() {}, nil
	}
	path := b.takeovers.path + ".uplinks"
	for said := false; ; await(ctx, nil, 20*time.Millisecond) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, path) {
			return func() { os.Remove(path); f.Close() }, nil
		}
		f.Close()
		switch {
		case err == nil: // the one before has just removed it
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
		case !wait:
			return nil, &cli.Advice{Err: fmt.Errorf("another process has locked %s", path), Next: "end the other bridge, or start this one with --take-over"}
		case !said:
			said = true
			b.Say("the uplinks wait for the end of the other bridge")
		}
	}
}

// isAt reports whether path is the file f still.
func isAt(f *os.File, path string) bool {
	own, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Lstat(path)
	return err == nil && os.SameFile(own, now)
}
