//go:build linux

// Machines runs the tests of this project on every kind of machine that a user may have.
// It makes these machines on this one from namespaces, users and mounts:
//
//	go run ./test/machines                       # every row, the whole suite
//	go run ./test/machines user offline          # two rows
//	go run ./test/machines -list
//	go run ./test/machines -pkgs './test/command ./test/xenstored' tun0600
//	go run ./test/machines -n 20 busy            # 20 runs with two busy loops beside them
//	go run ./test/machines -busy 2               # every row, with two busy loops beside each
//
// It needs root. For each machine it prints the failures, and the skipped tests with the
// reason. It keeps the output of go test in a directory, and exits with status 1 if
// anything failed. It never runs a failed test again.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A row describes a machine.
type row struct {
	Name, About string

	Tun     string   // /dev/net/tun: a mode, "none", or "" for this machine's
	User    bool     // run as an ordinary user with a clone of its own
	NoUsers bool     // forbid user namespaces
	Offline bool     // a network namespace with nothing but lo, and an empty cache
	Tmp     string   // TMPDIR: "tmpfs", "disk", or "" for this machine's
	Busy    int      // busy loops beside it
	Env     []string // added to the environment
}

var rows = []row{
	{Name: "tun0600", About: "root, /dev/net/tun for root alone", Tun: "0600"},
	{Name: "tun0666", About: "root, /dev/net/tun for everybody", Tun: "0666"},
	{Name: "no-tun", About: "root, no /dev/net/tun", Tun: "none"},
	{Name: "user", About: "an ordinary user, /dev/net/tun for everybody", Tun: "0666", User: true},
	{Name: "user-tun0600", About: "an ordinary user, /dev/net/tun for root alone", Tun: "0600", User: true},
	{Name: "user-no-userns", About: "an ordinary user, no user namespaces", Tun: "0666", User: true, NoUsers: true},
	{Name: "offline", About: "root, no network and an empty cache", Offline: true},
	{Name: "user-offline", About: "an ordinary user, no network and an empty cache", User: true, Offline: true},
	{Name: "xenstored-oldest", About: "the oldest xenstored that Debian's mirrors serve", Env: []string{"BAREVIF_XENSTORED=oldest"}},
	{Name: "xenstored-newest", About: "the newest xenstored that Debian's mirrors serve", Env: []string{"BAREVIF_XENSTORED=newest"}},
	{Name: "tmpfs", About: "TMPDIR on a tmpfs", Tmp: "tmpfs"},
	{Name: "disk", About: "TMPDIR on a disk", Tmp: "disk"},
	{Name: "gomaxprocs1", About: "GOMAXPROCS=1", Env: []string{"GOMAXPROCS=1"}},
	{Name: "busy", About: "two busy loops beside it", Busy: 2},
}

func main() {
	if text := os.Getenv(stageEnv); text != "" {
		fmt.Fprintln(os.Stderr, "machines:", runInside(text)) // it returns only with an error
		os.Exit(insideFailed)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	failed, err := run(ctx)
	stop()
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "machines:", err)
		os.Exit(2)
	case failed:
		os.Exit(1)
	}
}

type options struct {
	packages []string
	count    int
	dir      string
	limit    time.Duration
	busy     int // minimum of busy loops beside each machine
	more     []string
}

func run(ctx context.Context) (failed bool, err error) {
	list := flag.Bool("list", false, "only list the machines")
	packages := flag.String("pkgs", "./...", "test these `packages`")
	count := flag.Int("n", 1, "run the suite so often on each machine")
	dir := flag.String("dir", "", "keep what go test prints in this `folder`; default: a new one in the temporary directory")
	limit := flag.Duration("timeout", 20*time.Minute, "for the tests of one package, as go test has it")
	busy := flag.Int("busy", 0, "at least so many busy `loops` beside each machine")
	arguments := flag.String("args", "", "more `arguments` for go test, such as -race")
	flag.Parse()
	chosen, err := choose(rows, flag.Args())
	if err != nil {
		return false, err
	}
	if *list {
		for _, r := range chosen {
			fmt.Printf("%-18s %s\n", r.Name, r.About)
		}
		return false, nil
	}
	if os.Geteuid() != 0 {
		return false, errors.New("machines are made of mounts and users, which needs root: sudo -E go run ./test/machines")
	}
	o := options{packages: strings.Fields(*packages), count: *count, dir: *dir, limit: *limit, busy: *busy, more: strings.Fields(*arguments)}
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "machines"); err != nil {
			return false, err
		}
	} else if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return false, err
	}
	s, err := newSite(ctx, chosen)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, s.remove()) }()

	var results []result
	for _, r := range chosen {
		for i := range o.count {
			name := r.Name
			if o.count > 1 {
				name = fmt.Sprintf("%s/%d", r.Name, i+1)
			}
			fmt.Fprintf(os.Stderr, "machines: %s\n", name)
			res, err := s.run(ctx, r, name, o)
			if err != nil {
				return false, fmt.Errorf("%s: %w", name, err)
			}
			results = append(results, res)
			if ctx.Err() != nil {
				return false, context.Cause(ctx)
			}
		}
	}
	text := table(results)
	fmt.Print(text)
	fmt.Printf("\nwhat go test printed is in %s\n", o.dir)
	err = os.WriteFile(filepath.Join(o.dir, "table.md"), []byte(text), 0o644)
	return slices.ContainsFunc(results, result.failed), err
}

// choose returns the rows of these names, or all rows if there are no names.
func choose(all []row, names []string) (chosen []row, err error) {
	if len(names) == 0 {
		return all, nil
	}
	for _, name := range names {
		i := slices.IndexFunc(all, func(r row) bool { return r.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("no machine %q: -list shows those there are", name)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

// run runs the suite on a machine.
func (s *site) run(ctx context.Context, r row, name string, o options) (result, error) {
	file := filepath.Join(o.dir, strings.ReplaceAll(name, "/", "-")+".json")
	out, err := os.Create(file)
	if err != nil {
		return result{}, err
	}
	defer out.Close()
	tests := append([]string{"test", "-json", "-count=1", "-timeout", o.limit.String()}, o.more...)
	cmd, done, err := s.command(ctx, r, append(tests, o.packages...))
	if err != nil {
		return result{}, err
	}
	defer done()
	stopBusyLoops := startBusyLoops(max(r.Busy, o.busy))
	defer stopBusyLoops()
	cmd.Stdout, cmd.Stderr = out, out
	begin := time.Now()
	status := cmd.Run()
	exit, isExit := errors.AsType[*exec.ExitError](status)
	if status != nil && !isExit {
		return result{}, status
	}
	if isExit && exit.ExitCode() == insideFailed {
		text, _ := os.ReadFile(file)
		return result{}, fmt.Errorf("the machine could not be made: %s", strings.TrimSpace(string(text)))
	}
	if _, err := out.Seek(0, 0); err != nil {
		return result{}, err
	}
	res, err := summarize(out)
	res.name, res.about, res.took, res.status = name, r.About, time.Since(begin), status
	return res, err
}

// startBusyLoops keeps n processors busy until stop is called.
func startBusyLoops(n int) (stop func()) {
	var loops []*exec.Cmd
	for range n {
		// Separate processes compete as another program would.
		cmd := exec.Command("/bin/sh", "-c", "while :; do :; done")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if cmd.Start() == nil {
			loops = append(loops, cmd)
		}
	}
	return func() {
		for _, cmd := range loops {
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
}

func encode(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // a value of strings and booleans has no error
	}
	return string(b)
}
