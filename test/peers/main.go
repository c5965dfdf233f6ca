// Peers measures the device of this project beside what a Go program could use
// instead, and beside what the machine itself takes for it, in one interleaved run:
//
//	go run .                              # one table, then the goals
//	go run . -json new.json -plot new.svg
//	go run . -json result.json            # the result to compare with, kept in the tree
//	go run . -compare result.json         # status 1 if a ratio got worse beyond noise
//	go run . -run 'b32, poll|raw|gomemif' # some of the rows
//
// The device runs on the emulated Xen: its figures are of its own code and of memory,
// not of a hypervisor. A figure means something beside the others of its run only, and
// with the line round trip that was measured before it: where the host of a virtual
// machine places two CPUs decides over every ring in shared memory. So each run is
// near or far, and ratios are of one regime.
//
// The sender has one CPU and the receiver another; both spin, so that nothing else
// should run meanwhile. A run during which other work took more than an eighth of the
// CPUs is made again, twice at most. What goes through the kernel is in a network
// namespace of the program's own and vanishes with it. As root everything is measured
// that the machine has; as another user whatever a user namespace allows. What is
// missing is in the table, with the reason.
//
// Of the rows: owning calls are AllocSize or AllocWait, Send or SendWait, Receive or
// Poll, and Release; the sender writes each frame and the receiver copies it out. b1,
// b8 and b32 are frames for each call; of the longest frames a ring holds 15, and b32
// is 8. Vifs and queues are used in turn by one
// goroutine that polls, or have one each that parks. A raw ring has the indexes, slots,
// pages and copies of a vif and nothing else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if text := os.Getenv(childVar); text != "" {
		if err := runErrand(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	status, err := start()
	if err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		status = 1
	}
	os.Exit(status)
}

// flags holds the program's command-line flags.
type flags struct {
	reps                int
	window              time.Duration
	only                *regexp.Regexp
	json, plot, compare string
}

func parse() (f flags, err error) {
	run := flag.String("run", "", "only rows whose names match this `expression`")
	flag.IntVar(&f.reps, "reps", 5, "how often every row is measured")
	flag.DurationVar(&f.window, "window", 100*time.Millisecond, "how long a stream is measured")
	flag.StringVar(&f.json, "json", "", "write every single run to this `file`")
	flag.StringVar(&f.plot, "plot", "", "write a drawing of every run to this `file`, as SVG")
	flag.StringVar(&f.compare, "compare", "", "say what got worse since the `file` that -json wrote, and end with status 1 if anything did")
	flag.Parse()
	if flag.NArg() > 0 {
		return f, fmt.Errorf("there are no arguments, but %q was given (rows are chosen with -run)", flag.Arg(0))
	}
	if f.reps < 1 || f.window < time.Millisecond {
		return f, errors.New("-reps must be at least 1, -window at least 1ms")
	}
	f.only, err = regexp.Compile(*run)
	return f, err
}

func start() (status int, err error) {
	f, err := parse()
	if err != nil {
		return 0, err
	}
	if tmp := os.Getenv(netVar); tmp != "" {
		return measure(f, newNetwork(), tmp)
	}
	tmp, err := os.MkdirTemp("", "peers")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(tmp)
	status, err = again(tmp)
	if err != nil {
		return measure(f, noNetwork(err), tmp)
	}
	return status, nil
}

// measure measures all rows and prints the result. An interrupt ends it after the current
// row, and it prints the rows so far.
func measure(f flags, n *network, tmp string) (status int, err error) {
	var before *Result
	if f.compare != "" {
		if before, err = readResult(f.compare); err != nil {
			return 0, err
		}
	}
	cpus, err := twoCPUs()
	if err != nil {
		return 0, err
	}
	// Two threads spin on two CPUs. The goroutine that stops them must run, too.
	runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0)))
	// AF_XDP locks its memory on kernels before 5.11.
	_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second one ends the program

	b := &bench{cpus: cpus, window: f.window, tmp: tmp}
	r := &Result{Machine: thisMachine(), Date: time.Now().UTC().Format(time.RFC3339), Commit: commit(), Window: f.window.String()}
	rows := allRows(n)
	err = b.all(ctx, rows, f, r)
	if len(r.Runs)+len(r.Gaps) == 0 {
		return 0, errors.Join(err, errors.New("nothing was measured (does -run match a row?)"))
	}
	t := newTable(r.Runs, boundary(lines(r.Runs)))
	r.report(os.Stdout, t)
	reportGoals(os.Stdout, t, goals(rows))
	if f.json != "" {
		err = errors.Join(err, r.write(f.json))
	}
	if f.plot != "" {
		err = errors.Join(err, r.plot(f.plot, t))
	}
	if before != nil && reportCompare(os.Stdout, f.compare, before, r) {
		status = 1
	}
	return status, err
}

// tries is how often a run is made at most if other work disturbs it.
const tries = 3

// all measures every row, one after the other, f.reps times. Its error is that of a row of
// ours that failed, or of any row that did not end.
func (b *bench) all(ctx context.Context, rows []*row, f flags, r *Result) error {
	failed := map[key]bool{}
	var broken error
	for rep := range f.reps {
		began := time.Now()
		for _, size := range allSizes {
			for _, row := range rows {
				k := key{row.name, row.kind, size}
				if !row.has(size) || !f.only.MatchString(row.name) || failed[k] {
					continue
				}
				for range tries {
					if ctx.Err() != nil {
						return errors.Join(broken, errors.New("interrupted: what was measured by then is above"))
					}
					run, err := b.run(row, size)
					if err != nil {
						failed[k] = true
						r.Gaps = append(r.Gaps, Gap{Row: row.name, Class: row.class, Kind: row.kind, Bytes: size, Reason: oneLine(err)})
						err = fmt.Errorf("%s, %s, %d bytes: %w", row.name, row.kind, size, err)
						if errors.Is(err, errHung) {
							return errors.Join(broken, err)
						}
						if row.class == ours {
							broken = errors.Join(broken, err)
						}
						break
					}
					run.Class, run.Rep = row.class, rep
					r.Runs = append(r.Runs, run)
					if run.Others < clean {
						break
					}
				}
			}
		}
		fmt.Fprintf(os.Stderr, "repetition %d of %d took %v\n", rep+1, f.reps, time.Since(began).Round(time.Second))
	}
	return broken
}
