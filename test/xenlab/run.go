//go:build linux

package xenlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"barevif/test/xenlab/image"
	"barevif/test/xenlab/machine"
	"barevif/test/xenlab/proto"
)

// Options are for [Run]. The zero value runs everything.
type Options struct {
	Select *regexp.Regexp // of scenario names; nil: all
	Dir    string         // directory for logs, made if necessary; "": in the cache folder
	Limit  time.Duration  // for the whole run; 0: 50 minutes
	Again  bool           // run failed scenarios once more, on a fresh machine, to learn more about the failure
	Logger *slog.Logger   // gets the progress; nil: silent
	// Keep, if not nil, is called with the machine of a boot after its last
	// scenario, before the machine is stopped.
	Keep func(context.Context, *machine.Machine)
	Tee  io.Writer // gets a copy of dom0's console; may be nil
}

// overallLimit is three times the duration of a whole run on a quiet machine.
const overallLimit = 50 * time.Minute

// A Report is the outcome of a run.
type Report struct {
	Dir     string // directory of the logs
	Images  image.Set
	Rows    []Row
	Elapsed time.Duration
	// Starved is the largest result of machine.Machine.Starved of all boots.
	Starved float64
}

// A Row is one scenario, or one boot of the machine.
type Row struct {
	Boot, Scenario, Roles string
	Elapsed               time.Duration
	Note                  string
	Err                   error  // nil: passed
	Second                string // the outcome of the second run, if the row failed
}

// Failed counts the rows that did not pass. The outcome of a second run does not count.
func (r *Report) Failed() (n int) {
	for _, row := range r.Rows {
		if row.Err != nil {
			n++
		}
	}
	return n
}

// Run builds the images, boots the machine once for each Boot with a selected scenario, and
// runs its scenarios. After a scenario that broke the machine or left resources behind, Run
// boots the machine again for the following ones.
//
// The error means that the lab could not begin. Failed scenarios are in the Report.
func Run(ctx context.Context, plan []Boot, programs []image.Program, opts Options) (*Report, error) {
	limit := opts.Limit
	if limit == 0 {
		limit = overallLimit
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	done, err := lockLab(ctx, opts.Logger)
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the lab's limit of %v", limit))
	defer cancel()
	dir, err := logDir(opts.Dir)
	if err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp("", "xenlab")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	begin := time.Now()
	set, err := image.Build(ctx, image.Config{
		Programs: programs, Appliance: appliancePackage, Router: routerPackage, RouterConf: routerImageConf, Dir: work, Logger: opts.Logger,
	})
	if err != nil {
		return nil, err
	}
	opts.Logger.Info("images built", "seconds", int(time.Since(begin).Seconds()), "xen", set.XenPackage, "kernel", set.KernelPackage)
	r := &runner{ctx: ctx, opts: opts, images: set, report: &Report{Dir: dir, Images: *set}}
	for _, boot := range plan {
		boot.Scenarios = selectScenarios(boot.Scenarios, opts.Select)
		r.runBoot(boot)
	}
	report := r.report
	if opts.Again {
		failed := report.failures()
		r.opts.Logger = opts.Logger.With("run", "second")
		r.report = &Report{Dir: dir, Images: *set}
		for _, boot := range plan {
			boot.Scenarios = slices.DeleteFunc(selectScenarios(boot.Scenarios, opts.Select),
				func(s Scenario) bool { return !failed[[2]string{boot.Name, s.Name}] })
			if len(boot.Scenarios) > 0 {
				r.runBoot(boot)
			}
		}
		report.addSecondRun(r.report)
	}
	report.Elapsed = time.Since(begin)
	return report, os.WriteFile(filepath.Join(dir, "table.md"), []byte(report.Table()), 0o644)
}

// lockLab waits until no other lab of this user runs on this computer, and keeps others out until
// done is called. Two labs would compete for the processors, exceed their limits, and disturb
// each other's measurements. They also share the cache of packages.
func lockLab(ctx context.Context, log *slog.Logger) (done func(), err error) {
	dir, err := image.CacheDir()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "turn"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for said := false; ; said = true {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case err == nil:
			return func() { f.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			f.Close()
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		if !said {
			log.Info("another lab runs on this machine: waiting for it to end", "lock", f.Name())
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(time.Second):
		}
	}
}

// failures returns the scenarios that failed, by boot and name.
func (r *Report) failures() map[[2]string]bool {
	failed := make(map[[2]string]bool)
	for _, row := range r.Rows {
		if row.Err != nil {
			failed[[2]string{row.Boot, row.Scenario}] = true
		}
	}
	return failed
}

// addSecondRun adds the outcome of the second run to the failed rows. They stay failed: a fault
// that occurs only sometimes is a fault.
func (r *Report) addSecondRun(again *Report) {
	r.Starved = max(r.Starved, again.Starved)
	for i := range r.Rows {
		row := &r.Rows[i]
		if row.Err == nil {
			continue
		}
		for _, a := range again.Rows {
			switch {
			case a.Boot != row.Boot || a.Scenario != row.Scenario:
			case a.Err == nil:
				row.Second = "passed when run again"
			default:
				row.Second = "failed when run again: " + oneLine(a.Err)
			}
		}
	}
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// selectScenarios returns the scenarios whose name matches re. If re is nil, it returns all that do
// not have Asked set.
func selectScenarios(all []Scenario, re *regexp.Regexp) (s []Scenario) {
	for _, sc := range all {
		if re == nil && !sc.Asked || re != nil && re.MatchString(sc.Name) {
			s = append(s, sc)
		}
	}
	return s
}

// keptRuns is how many runs' logs stay in the cache.
const keptRuns = 10

func logDir(dir string) (string, error) {
	if dir == "" {
		cache, err := image.CacheDir()
		if err != nil {
			return "", err
		}
		runs := filepath.Join(cache, "runs")
		if old, err := filepath.Glob(filepath.Join(runs, "*")); err == nil { // sorted: oldest first
			for _, d := range old[:max(0, len(old)-keptRuns+1)] {
				os.RemoveAll(d)
			}
		}
		dir = filepath.Join(runs, time.Now().UTC().Format("20060102-150405"))
	}
	return dir, os.MkdirAll(dir, 0o755)
}

type runner struct {
	ctx    context.Context
	opts   Options
	images *image.Set
	report *Report
	boots  int
}

// runBoot runs a boot's scenarios, on as many machines as necessary.
func (r *runner) runBoot(b Boot) {
	for len(b.Scenarios) > 0 || r.opts.Keep != nil {
		done := r.runOnMachine(b)
		if b.Scenarios = b.Scenarios[done:]; len(b.Scenarios) == 0 {
			return
		}
	}
}

// runOnMachine runs scenarios on one machine until one spoils it, and returns how many have
// their rows in the report. If the machine does not start, these are all.
func (r *runner) runOnMachine(b Boot) (done int) {
	r.boots++
	dir := filepath.Join(r.report.Dir, fmt.Sprintf("boot%d", r.boots))
	begin := time.Now()
	m, err := r.start(b, dir)
	row := Row{Boot: b.Name, Scenario: "(boot)", Roles: "Xen, dom0, its toolstack", Elapsed: time.Since(begin), Err: err}
	r.add(row)
	if err != nil {
		for _, s := range b.Scenarios {
			r.add(Row{Boot: b.Name, Scenario: s.Name, Roles: s.Roles, Err: errors.New("not run: no machine")})
		}
		return len(b.Scenarios)
	}
	defer m.Stop()
	defer func() { r.report.Starved = max(r.report.Starved, m.Starved()) }()
	for i, s := range b.Scenarios {
		row, clean := r.runScenario(m, s, filepath.Join(dir, fmt.Sprintf("%02d-%s", i+1, fileName(s.Name))))
		row.Boot = b.Name
		r.add(row)
		done++
		if !clean {
			break
		}
	}
	if done == len(b.Scenarios) && r.opts.Keep != nil && m.Err() == nil {
		r.opts.Keep(r.ctx, m)
	}
	return done
}

func (r *runner) start(b Boot, dir string) (*machine.Machine, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return machine.Start(r.ctx, machine.Config{Images: r.images, Dir: dir, Xen: b.Xen, Linux: b.Linux, Tee: r.opts.Tee})
}

func (r *runner) add(row Row) {
	r.report.Rows = append(r.report.Rows, row)
	verdict := "PASS"
	if row.Err != nil {
		verdict = "FAIL"
	}
	r.opts.Logger.Info(verdict, "boot", row.Boot, "scenario", row.Scenario, "seconds", fmt.Sprintf("%.1f", row.Elapsed.Seconds()), "note", row.note())
}

// runScenario runs one scenario and cleans up. clean means that the next one may run on the same
// machine.
func (r *runner) runScenario(m *machine.Machine, s Scenario, dir string) (row Row, clean bool) {
	row = Row{Scenario: s.Name, Roles: s.Roles}
	t := &T{machine: m, dir: dir, start: time.Now()}
	defer func() {
		row.Elapsed = time.Since(t.start)
		row.Note = strings.Join(t.notes, "; ")
	}()
	expected, err := compile(s.Complaints)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		t.log, err = os.Create(filepath.Join(dir, "steps.log"))
	}
	if err != nil {
		row.Err = err
		return row, true
	}
	defer t.log.Close()

	limit := s.Limit
	if limit == 0 {
		limit = scenarioLimit
	}
	t.dom0 = &Domain{t: t, Name: "dom0", limit: stepLimit, procs: &procs{}}
	var before, grantsBefore []string
	row.Err = t.attempt(r.ctx, time.Minute, func() {
		before = t.dom0Resources()
		grantsBefore = t.mappedGrants()
		t.xenLog = ""
		t.dom0.Run("dmesg", "-c")
	})
	if row.Err != nil {
		return row, false
	}
	row.Err = t.attempt(r.ctx, limit, func() { s.Run(t) })
	if row.Err != nil {
		t.logState(r.ctx)
	}
	err = t.attempt(r.ctx, 2*time.Minute, func() {
		t.cleanUp()
		t.awaitResources(before, t.dom0Resources)
		if d := difference(grantsBefore, t.mappedGrants()); d != "" {
			t.Fatalf("grants still mapped: %s", d)
		}
		t.requireNoComplaints(expected)
	})
	if row.Err == nil {
		row.Err = err
	}
	return row, err == nil
}

// attempt runs f, which Fatalf may end, and returns its error.
func (t *T) attempt(ctx context.Context, limit time.Duration, f func()) error {
	var cancel context.CancelFunc
	t.ctx, cancel = t.machine.Within(ctx, limit)
	defer cancel()
	t.err = errors.New("ended without a verdict")
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
		t.err = nil
	}()
	<-done
	if t.err != nil && t.machine.Err() != nil {
		return fmt.Errorf("%w (the machine: %w)", t.err, t.machine.Err())
	}
	if t.err != nil && t.ctx.Err() != nil {
		return fmt.Errorf("%w (%w)", t.err, context.Cause(t.ctx))
	}
	return t.err
}

// logState logs the state of dom0 and the guests, to explain a failure.
func (t *T) logState(ctx context.Context) {
	t.attempt(ctx, time.Minute, func() {
		t.Logf("a look around:")
		t.dom0.Try("xl", "list")
		t.dom0.Try("xenstore-ls", "-f", "-p")
		t.dom0.Try("ip", "-s", "link")
		t.dom0.Try("dmesg")
		t.dom0.Try("sh", "-c", "tail -n 40 /var/log/xen/*.log")
	})
}

func (t *T) cleanUp() {
	t.dom0.procs.Lock()
	running := t.dom0.procs.running
	t.dom0.procs.Unlock()
	for _, p := range running {
		t.dom0.try(proto.Call{Op: proto.Kill, Proc: p.id, Signal: 9})
	}
	for _, g := range t.guests {
		if !g.destroyed {
			t.dom0.Try("xl", "destroy", g.Name) // fails if the domain has ended by itself
			t.saveConsole(g)
		}
	}
}

func compile(exprs []string) ([]*regexp.Regexp, error) {
	var res []*regexp.Regexp
	for _, e := range exprs {
		re, err := regexp.Compile(e)
		if err != nil {
			return nil, err
		}
		res = append(res, re)
	}
	return res, nil
}

func fileName(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' {
			return r
		}
		return '-'
	}, s)
}

func (row Row) note() string {
	if row.Err == nil {
		return row.Note
	}
	note := oneLine(row.Err)
	for _, more := range [...]string{row.Second, row.Note} {
		if more != "" {
			note += "; " + more
		}
	}
	return note
}

// Table returns the report as a table in Markdown.
func (r *Report) Table() string {
	cells := [][]string{{"boot", "scenario", "roles", "verdict", "s", "note"}}
	for _, row := range r.Rows {
		verdict := "pass"
		if row.Err != nil {
			verdict = "FAIL"
		}
		note := []rune(strings.ReplaceAll(row.note(), "|", "¦"))
		if len(note) > 300 {
			note = append(note[:300], '…')
		}
		cells = append(cells, []string{row.Boot, row.Scenario, row.Roles, verdict, fmt.Sprintf("%.1f", row.Elapsed.Seconds()), string(note)})
	}
	widths := make([]int, len(cells[0])-1) // the last column is as long as it is
	for _, line := range cells {
		for i := range widths {
			widths[i] = max(widths[i], len([]rune(line[i])))
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s\n\n", r.Images.XenPackage, r.Images.KernelPackage)
	for n, line := range cells {
		for i, w := range widths {
			fmt.Fprintf(&b, "| %-*s ", w, line[i])
		}
		fmt.Fprintf(&b, "| %s |\n", line[len(widths)])
		if n == 0 {
			for _, w := range widths {
				b.WriteString("|" + strings.Repeat("-", w+2))
			}
			b.WriteString("|------|\n")
		}
	}
	fmt.Fprintf(&b, "\n%d rows, %d failed, %.0f s; QEMU waited for a processor %.0f %% of the time it wanted one; logs in %s\n",
		len(r.Rows), r.Failed(), r.Elapsed.Seconds(), 100*r.Starved, r.Dir)
	return b.String()
}
