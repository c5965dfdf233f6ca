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
		if !client.Offers(front, id) { // nobody has it whose guest would notice
			return nil
		}
		err := b.promise(fmt.Sprintf("%d.%s", front, id), says)
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
	for _, port := range b.ports {
		if port.name == vif { // it is here already
			return nil
		}
		if overlaps(port.guard, info.guard) {
			return guardedTwice(info.guard, port.name)
		}
	}
	if err := b.leavesRoomLocked(vif, info.guard); err != nil {
		return err
	}
	b.promised[vif] = info.guard
	return nil
}

// leavesRoom returns an error if a vif would take the place or an address of one that is about to be taken over.
func (b *bridged) leavesRoom(vif string, guard []pvnet.MAC) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.leavesRoomLocked(vif, guard)
}

func (b *bridged) leavesRoomLocked(vif string, guard []pvnet.MAC) error {
	others := 0
	for name, theirs := range b.promised {
		if name == vif {
			continue
		}
		if overlaps(theirs, guard) {
			return guardedTwice(guard, name)
		}
		others++
	}
	if len(b.ports)+others >= b.most {
		return b.full()
	}
	return nil
}

func overlaps(a, b []pvnet.MAC) bool {
	return slices.ContainsFunc(a, func(mac pvnet.MAC) bool { return slices.Contains(b, mac) })
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
// While another process has uplinks, this one begins with them when that has none any more: a TAP has one name,
// and a vif one frontend. Errors of that moment do not end it, nor those of a process that takes over, since it
// has the vifs by then.
func (b *bridged) startUplinks(ctx context.Context, uplinks []uplink, cfg pvnet.Config) (wait func(), err error) {
	if len(uplinks) == 0 {
		return func() {}, nil
	}
	unlock := func() {}
	var running sync.WaitGroup
	all := func() { running.Wait(); unlock() }
	free, err := b.lockUplinks(ctx, false)
	held := errors.Is(err, errUplinksHeld)
	if err == nil {
		unlock = free
	} else if !held {
		b.slog.Warn("a bridge that takes over may begin with the uplinks too early", "err", err)
	}
	if !held && b.takeovers.client == nil {
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
		if held {
			free, err := b.lockUplinks(ctx, true)
			if err == nil {
				unlock = free
			} else if ctx.Err() == nil {
				b.slog.Warn("the uplinks begin before the other bridge has ended", "err", err)
			}
		}
		if ctx.Err() != nil {
			return
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

// mayHave checks that this process may make TAPs if it has to later.
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

// errUplinksHeld says that another process has the uplinks.
var errUplinksHeld = errors.New("another process has locked")

// uplinksPatience is the time between two warnings that the uplinks still wait.
const uplinksPatience = 30 * time.Second

// lockUplinks takes the lock that the bridge has which has the uplinks, at the path of its hand-over.
// With wait it waits for it, until ctx ends; without, the error is errUplinksHeld if another process has it. It
// does nothing where nothing is handed over.
func (b *bridged) lockUplinks(ctx context.Context, wait bool) (unlock func(), err error) {
	if b.takeovers.path == "" {
		return func() {}, nil
	}
	path := b.takeovers.path + ".uplinks"
	var since time.Time
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
			return nil, fmt.Errorf("%w: %s", errUplinksHeld, path)
		case !said:
			said, since = true, time.Now()
			b.Say("the uplinks wait for the end of the other bridge")
		case time.Since(since) > uplinksPatience:
			since = time.Now()
			b.slog.Warn("the uplinks still wait for the end of another bridge", "lock", path)
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
