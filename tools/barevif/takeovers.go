package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"barevif/hypercall"
	"barevif/hypercall/userdir"
	"barevif/pvnet"
	"barevif/pvnet/handover"
	"barevif/pvnet/link"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/tools/internal/systemd"

	"github.com/spf13/cobra"
)

// takeovers is the part of a command that takes vifs over and hands them over.
type takeovers struct {
	// Set before register.
	command string // "back"
	pause   string // how to replace the other process without a hand-over

	takeOver bool
	socket   string // "": the default, "none": no hand-over
	program  string // the path of this program, as it was started

	ready func() // called when the vifs are here and can be handed over; nil: tell systemd

	// Set by begin.
	say  func(format string, args ...any)
	slog *slog.Logger
	path string // where this process listens, and the one before it
	id   handover.Identity

	client *handover.Client // nil: nothing was taken over

	mu        sync.Mutex
	listener  *handover.Listener       // guarded by mu; nil: none yet
	vifs      map[*handover.Vif]func() // guarded by mu; by vif: takes it out of the listener
	successor bool                     // guarded by mu; a process that startSuccessor started runs
	closed    bool                     // guarded by mu; close was called
}

func (h *takeovers) register(cmd *cobra.Command, takeOver string) {
	cmd.Flags().BoolVar(&h.takeOver, "take-over", false, takeOver)
	cmd.Flags().StringVar(&h.socket, "handover", "", fmt.Sprintf("where %s listens for the one that takes over: a `socket`, or \"none\" (default: in a directory of this user alone)", h.command))
	h.program, _ = os.Executable() // "": startSuccessor says so
}

// of returns the part for one vif of a command that has several: each is taken over and handed
// over for itself, so that what happens to one is no matter of the others.
func (h *takeovers) of(vif string) *takeovers {
	return &takeovers{command: h.command, pause: h.pause, takeOver: h.takeOver, socket: strings.ReplaceAll(h.socket, vifMark, vif)}
}

// place returns the socket at which a process listens for its successor: file, in a directory
// of the emulated host's socket, or of this user on Xen.
func (h *takeovers) place(flags *domain.Flags, file string) (string, error) {
	if h.socket != "" {
		return h.socket, nil
	}
	if !flags.Xen { // the number of a domain means something beside its host only
		return filepath.Join(filepath.Dir(flags.Socket), file), nil
	}
	dir := os.Getenv("RUNTIME_DIRECTORY") // of a systemd unit
	if dir == "" || strings.Contains(dir, ":") {
		dir = userdir.Temp(os.Geteuid())
		if os.Geteuid() == 0 {
			dir = "/run/barevif"
		}
	}
	return filepath.Join(dir, file), domain.PrivateDir(dir)
}

// begin says where and as what the process hands over.
func (h *takeovers) begin(say func(string, ...any), log *slog.Logger, flags *domain.Flags, file string, id handover.Identity) error {
	h.say, h.slog, h.id = say, log, id
	h.id.Program = fmt.Sprintf("barevif, process %d", os.Getpid())
	if h.socket == "none" {
		if h.takeOver {
			return cli.BadValue("handover", "none", "a socket, with --take-over")
		}
		return nil
	}
	path, err := h.place(flags, file)
	if err == nil {
		h.path = path
	} else if h.takeOver {
		return err
	} else {
		h.slog.Warn("no other process can take over", "err", err)
	}
	return nil
}

// dial connects to the process that has the vifs, with --take-over. A backend that hands
// nothing over does not keep this one from starting: it gets the vifs once that one ends.
// Two frontends would take the vif from each other, so must is true for a frontend: then
// only a process that is not there is no error.
func (h *takeovers) dial(ctx context.Context, must bool) (func(context.Context, hypercall.DomID, string) (*pvnet.TakenVif, error), error) {
	if !h.takeOver {
		return nil, nil
	}
	c, err := handover.Dial(ctx, h.path, h.id)
	refused, isRefused := errors.AsType[*handover.RefusedError](err)
	switch {
	case err == nil:
		h.say("taking the vifs over from %s", c.Program())
		h.client = c
		return c.TakeOver, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		h.say("no %s listens at %s: there is nothing to take over", h.command, h.path)
	case errors.Is(err, fs.ErrPermission):
		return nil, &cli.Advice{Err: err, Next: "run as the user that started the other " + h.command + ", or as root", Refused: true}
	case must:
		return nil, &cli.Advice{Err: err, Next: "to go on with a pause, " + h.pause}
	case isRefused:
		h.say("not taken over: %s; to go on with a pause, %s", refused.Why, h.pause)
	default:
		h.say("not taken over: %v; to go on with a pause, %s", err, h.pause)
	}
	return nil, nil
}

// run takes over, and then listens for the process that takes over from this one. handed
// ends this process without closing its vifs.
func (h *takeovers) run(ctx context.Context, handed func()) {
	if c := h.client; c != nil {
		err := c.Finish(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			h.slog.Warn("the other "+h.command+" may go on", "err", err)
		}
		vifs := "vifs"
		if c.Taken() == 1 {
			vifs = "vif"
		}
		h.say("%d %s taken over from %s", c.Taken(), vifs, c.Program())
	}
	if h.path == "" {
		h.isReady()
		return
	}
	l, err := h.listen()
	if errors.Is(err, net.ErrClosed) { // this process ends
		return
	}
	h.isReady()
	if err != nil {
		h.slog.Warn("no other "+h.command+" can take the vifs over", "err", err)
		return
	}
	select {
	case <-l.Done():
		if pid := l.Successor(); pid > 0 {
			notify("MAINPID=" + strconv.Itoa(pid))
		}
		handed()
	case <-ctx.Done():
	}
}

func (h *takeovers) isReady() {
	if h.ready != nil {
		h.ready()
	} else {
		notify("READY=1")
	}
}

// listen makes the listener. After close it makes none, which nobody would close: net.ErrClosed.
func (h *takeovers) listen() (*handover.Listener, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, net.ErrClosed
	}
	if err := domain.FreePath(h.path); err != nil {
		return nil, err
	}
	l, err := handover.Listen(h.path, h.id, h.slog)
	if err != nil {
		return nil, err
	}
	h.listener = l
	for v := range h.vifs {
		h.vifs[v] = l.Add(*v)
	}
	return l, nil
}

// close ends a hand-over under way, in both directions.
func (h *takeovers) close() {
	if h.client != nil {
		h.client.Close()
	}
	h.mu.Lock()
	h.closed = true
	l := h.listener
	h.mu.Unlock()
	if l != nil {
		l.Close()
	}
}

// add makes a vif one that can be handed over, until remove is called.
func (h *takeovers) add(v *handover.Vif) (remove func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.vifs == nil {
		h.vifs = make(map[*handover.Vif]func())
	}
	h.vifs[v] = func() {}
	if h.listener != nil {
		h.vifs[v] = h.listener.Add(*v)
	}
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.vifs[v]()
		delete(h.vifs, v)
	}
}

// joined is a vif that can be handed over together with the link that it is joined to.
func joined(dev *pvnet.Device, l link.Link, j *link.Joint) *handover.Vif {
	return &handover.Vif{Device: dev, Resume: j.Resume, Hold: func(ctx context.Context) ([]*os.File, error) {
		if err := j.Hold(ctx); err != nil {
			return nil, err
		}
		files, err := filesOf(l, dev.Active())
		if err != nil {
			j.Resume()
		}
		return files, err
	}}
}

// filesOf returns the descriptors of a link: those of the queues that the vif uses. The
// others are detached, and end with this process.
func filesOf(l link.Link, active int) (files []*os.File, err error) {
	queues := queuesOfLink(l)
	for _, q := range queues[:max(1, min(active, len(queues)))] {
		f, err := q.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

// adopt makes a TAP of the descriptors of its queues, which it takes over.
func adopt(files []*os.File) (*tap, error) {
	t := new(tap)
	for i, f := range files {
		q, err := link.AdoptTAP(f)
		if err == nil && i > 0 && q.Name() != t.Name() {
			err = fmt.Errorf("queues of %s and of %s", t.Name(), q.Name())
			q.Close()
		}
		if err != nil {
			for _, f := range files[i+1:] {
				f.Close()
			}
			return nil, errors.Join(err, t.Close())
		}
		if i == 0 {
			t.TAP = q
		}
		t.queues = append(t.queues, q)
	}
	return t, nil
}

// adoptFor is adopt for a vif that has no more queues than it can use.
func adoptFor(dev *pvnet.Device, files []*os.File) (*tap, error) {
	n := min(len(files), dev.Queues())
	for _, f := range files[n:] {
		f.Close()
	}
	return adopt(files[:n])
}

// takenOver returns the link that came with a vif which was taken over; nil: it has to be
// opened.
func (b *back) takenOver(dev *pvnet.Device, vif string) link.Link {
	files := dev.TakenFiles()
	if len(files) == 0 {
		return nil
	}
	var l link.Link
	var err error
	if b.packet == "" {
		l, err = asLink(adoptFor(dev, files))
	} else {
		var i *net.Interface
		if i, err = net.InterfaceByName(b.packet); err == nil {
			info := link.Info{Name: i.Name, MTU: i.MTU}
			copy(info.MAC[:], i.HardwareAddr)
			l, err = asLink(link.NewPacket(files[0], info))
		} else {
			files[0].Close()
		}
	}
	if err != nil {
		b.slog.Warn("the link of a vif that was taken over cannot be used, and is opened anew", "vif", vif, "err", err)
		return nil
	}
	return l
}

// startSuccessor starts this program again, to take over from this process.
func (h *takeovers) startSuccessor(log *slog.Logger) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.successor {
		log.Warn("SIGUSR2: a " + h.command + " that is to take over runs already")
		return
	}
	args := os.Args[1:]
	if !slices.Contains(args, "--take-over") {
		args = append(slices.Clone(args), "--take-over")
	}
	cmd := exec.Command(h.program, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		log.Error("SIGUSR2: cannot start the "+h.command+" that is to take over", "err", err)
		return
	}
	h.successor = true
	go func() {
		err := cmd.Wait()
		log.Error("the "+h.command+" that was to take over has ended", "err", err)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.successor = false
	}()
}

// notify tells systemd about a change.
func notify(state string) { systemd.Notify(state) }
