// Peers measures how fast a vif moves frames, beside the other ways in which two Go programs
// on one machine can exchange frames, and beside the least time that the machine itself takes
// for it:
//
//	go run .                              # print the table, then the goals
//	go run . -json new.json -plot new.svg
//	go run . -json result.json            # replace the result that is kept in the tree
//	go run . -compare result.json         # exit with status 1 if a ratio got worse
//	go run . -run 'b32, poll|raw|gomemif' # measure some of the rows
//
// It is a module of its own, so run it in its folder. It needs two CPUs and a machine without
// other work: the sender has one CPU, the receiver has the other, and both spin. A run is
// repeated, twice at most, if other work took more than an eighth of the CPUs. As root the
// program measures everything that the machine supports, as another user what a user
// namespace allows. The table lists what could not be measured, with the reason. Peers that
// go through the kernel are in a network namespace which the program makes, and which ends
// with it.
//
// The vif is on the emulated Xen, so its figures show the cost of this project's code and of
// memory, not that of a hypervisor. Compare a figure only with others of the same run, because
// every ring in shared memory depends on where the host of a virtual machine places the two
// CPUs. The program therefore measures the round trip of a cache line before each run, counts
// the run as near or far by it, and computes ratios only between runs of one kind.
//
// The names of the rows mean:
//
//   - owning: the sender calls AllocSize or AllocWait, then Send or SendWait, and the receiver
//     calls Receive or Poll, then Release. The sender writes each frame, and the receiver copies
//     it out.
//   - b1, b8, b32: frames for each call. A ring holds only 15 of the longest frames, so b32 is 8
//     frames for those.
//   - vifs, queues: if it polls, one goroutine uses them in turn; if it parks, each has a
//     goroutine of its own.
//   - raw ring: it has the indexes, the slots, the pages and the copies of a vif, and nothing
//     else.
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
		if err := runChild(text); err != nil {
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
	status, err = rerunInNamespace(tmp)
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
	t := newTable(r.Runs, boundary(lineTimes(r.Runs)))
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
					if run.Others < cleanShare {
						break
					}
				}
			}
		}
		fmt.Fprintf(os.Stderr, "repetition %d of %d took %v\n", rep+1, f.reps, time.Since(began).Round(time.Second))
	}
	return broken
}
