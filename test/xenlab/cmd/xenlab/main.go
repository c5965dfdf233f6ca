//go:build linux

// Xenlab runs scenarios of the lab in a terminal, or opens a shell in dom0, or both:
//
//	go run ./test/xenlab/cmd/xenlab               # run all scenarios
//	go run ./test/xenlab/cmd/xenlab -run 'PVH'    # run those whose name matches
//	go run ./test/xenlab/cmd/xenlab -shell        # open only dom0's console
//	go run ./test/xenlab/cmd/xenlab -run x -shell # run scenarios, then open the console
//
// Package [barevif/test/xenlab] says what it needs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"regexp"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"barevif/test/xenlab"
	"barevif/test/xenlab/machine"
	"barevif/test/xenlab/proto"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "xenlab:", err)
		os.Exit(1)
	}
}

// kept is how long a machine may run for -keep or -shell.
const kept = 24 * time.Hour

func run(ctx context.Context) error {
	expr := flag.String("run", "", "run the scenarios whose name matches this `regexp`")
	dir := flag.String("dir", "", "keep logs in this `folder`, not in the cache")
	keep := flag.Bool("keep", false, "leave the machine running after its last scenario, until interrupted")
	shell := flag.Bool("shell", false, "connect the terminal to dom0's console after the last scenario; without -run, run none")
	verbose := flag.Bool("v", false, "show the console")
	list := flag.Bool("list", false, "only list the scenarios, as README.md does")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unknown argument %q", flag.Arg(0))
	}
	plan := xenlab.Plan()
	if *list {
		fmt.Print(xenlab.Roles(plan))
		return nil
	}
	opts := xenlab.Options{Dir: *dir, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if *expr != "" {
		var err error
		if opts.Select, err = regexp.Compile(*expr); err != nil {
			return err
		}
	}
	tee := &gate{w: os.Stdout}
	tee.open.Store(*verbose)
	opts.Tee = tee
	switch {
	case *shell:
		if *expr == "" {
			plan = plan[:1]
			plan[0].Scenarios = nil
		}
		opts.Limit = kept
		opts.Keep = func(ctx context.Context, m *machine.Machine) {
			if err := console(ctx, m, tee); err != nil {
				fmt.Fprintln(os.Stderr, "xenlab:", err)
			}
		}
	case *keep:
		opts.Limit = kept
		opts.Keep = func(ctx context.Context, m *machine.Machine) {
			fmt.Fprintln(os.Stderr, "xenlab: the machine stays until this is interrupted")
			select {
			case <-ctx.Done():
			case <-m.Ended():
			}
		}
	}
	report, err := xenlab.Run(ctx, plan, xenlab.Programs(), opts)
	if err != nil {
		return err
	}
	fmt.Print("\n", report.Table())
	if n := report.Failed(); n > 0 {
		return fmt.Errorf("%d of %d rows failed", n, len(report.Rows))
	}
	return nil
}

// A gate passes writes on while it is open, and drops them otherwise.
type gate struct {
	w    io.Writer
	open atomic.Bool
}

func (g *gate) Write(b []byte) (int, error) {
	if g.open.Load() {
		return g.w.Write(b)
	}
	return len(b), nil
}

// detach is Ctrl-], the escape character of telnet.
const detach = 0x1d

// console joins the terminal to a shell in dom0 until detach, or the machine's end.
func console(ctx context.Context, m *machine.Machine, tee *gate) error {
	fmt.Fprint(os.Stderr, "xenlab: dom0's console. Ctrl-] ends the machine; so does \"poweroff -f\".\n\n")
	restore, err := raw(os.Stdin)
	if err != nil {
		return err
	}
	defer restore()
	tee.open.Store(true)
	if _, err := m.Call(ctx, proto.Call{Op: proto.Shell, Timeout: 10 * time.Second}); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		buf := make([]byte, 256)
		for {
			n, err := os.Stdin.Read(buf)
			for _, b := range buf[:n] {
				if b == detach {
					err = io.EOF
				}
			}
			if err == nil {
				_, err = m.Console().Write(buf[:n])
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	select {
	case err = <-done:
	case <-m.Ended():
	case <-ctx.Done():
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// raw puts a terminal into raw mode, so that each key is passed on at once. It does nothing to
// a file that is not a terminal.
func raw(f *os.File) (restore func(), err error) {
	old, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err == unix.ENOTTY {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	t := *old
	t.Iflag &^= unix.ICRNL | unix.IXON
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &t); err != nil {
		return nil, err
	}
	return func() { unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, old) }, nil
}
