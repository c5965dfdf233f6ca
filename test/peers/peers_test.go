package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// mainVar makes the test binary run as the program.
const mainVar = "BAREVIF_PEERS_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainVar) != "" || os.Getenv(childVar) != "" {
		main()
		os.Exit(0) // otherwise every child would run the tests, and start children
	}
	os.Exit(m.Run())
}

func TestQuantilesAreBetweenValues(t *testing.T) {
	v := []float64{4, 1, 3, 2}
	for q, want := range map[float64]float64{0: 1, 0.25: 1.75, 0.5: 2.5, 1: 4} {
		if got := quantile(v, q); got != want {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	if got := median([]float64{7}); got != 7 {
		t.Errorf("the median of one value is %v", got)
	}
	if got := spread([]float64{1, 2, 3}); got != 0.5 {
		t.Errorf("the spread is %v, want 0.5", got)
	}
	if !slices.Equal(v, []float64{4, 1, 3, 2}) {
		t.Error("the values were sorted where they lay")
	}
}

func TestBoundaryPartsTwoRegimes(t *testing.T) {
	if got := boundary([]float64{350, 180, 190, 185, 420, 182}); got != 350 {
		t.Errorf("the boundary is %v, want 350", got)
	}
	for _, one := range [][]float64{nil, {200}, {200, 200}, {200, 210, 220, 190}} {
		if got := boundary(one); !math.IsInf(got, 1) {
			t.Errorf("%v has a boundary at %v", one, got)
		}
	}
}

// runs makes runs of one row, with the times ns.
func runs(name, class string, line float64, ns ...float64) (all []Run) {
	for i, x := range ns {
		all = append(all, Run{Row: name, Class: class, Kind: stream, Bytes: 64, Rep: i, Line: line, Ns: x})
	}
	return all
}

func TestDisturbedRunsAreLeftOut(t *testing.T) {
	all := runs("a", ours, 200, 1, 2, 3, 4, 100)
	all[4].Others = 0.5
	c := newTable(all, math.Inf(1)).cells[all[0].key()]
	if len(c.runs) != 4 || c.made != 5 || c.disturbed {
		t.Errorf("%d of %d runs are used, disturbed: %v", len(c.runs), c.made, c.disturbed)
	}
	for i := range 3 {
		all[i].Others = 0.5
	}
	c = newTable(all, math.Inf(1)).cells[all[0].key()]
	if len(c.runs) != 5 || !c.disturbed {
		t.Errorf("of one clean run and four others %d are used, disturbed: %v", len(c.runs), c.disturbed)
	}
}

func TestRatiosAreOfOneRegime(t *testing.T) {
	a, b := key{"a", stream, 64}, key{"b", stream, 64}
	all := slices.Concat(
		runs("a", ours, 200, 20, 22, 24), runs("a", ours, 500, 90),
		runs("b", floor, 200, 10, 10, 10), runs("b", floor, 500, 90, 90))
	tab := newTable(all, boundary(lineTimes(all)))
	r, ok := tab.ratio(a, b)
	if want := (ratio{mid: 2.2, lo: 2.1, hi: 2.3, runs: 3, where: near}); !ok || r != want {
		t.Errorf("the ratio is %+v, want %+v", r, want)
	}
	if r := tab.ratioIn(a, b, far); r.mid != 1 || r.runs != 1 {
		t.Errorf("far it is %+v", r)
	}
	if _, ok := tab.ratio(a, key{"c", stream, 64}); ok {
		t.Error("there is a ratio to a row that is not there")
	}
	if v, _, err := timesAsFast(b, a)(tab); err != nil || v != 2.2 {
		t.Errorf("b is %v times as fast as a: %v", v, err)
	}
}

func TestCompareFindsWhatGotWorse(t *testing.T) {
	base := func(a ...float64) *Result {
		return &Result{Runs: slices.Concat(runs("a", ours, 200, a...),
			runs("p", user, 200, 40, 41, 42), runs("q", user, 200, 80, 82, 84), runs("r", floor, 200, 10, 10, 10))}
	}
	before := base(20, 20.2, 20.4)
	for name, now := range map[string]*Result{
		"the same":             base(20, 20.2, 20.4),
		"better":               base(10, 10.1, 10.2),
		"a little worse":       base(20.6, 20.8, 21),
		"noisy":                base(18, 21, 50),
		"two runs":             base(40, 41),
		"in another regime":    {Runs: slices.Concat(runs("a", ours, 900, 40, 41, 42), runs("p", user, 900, 40, 41, 42))},
		"one peer is better":   {Runs: slices.Concat(base(20, 20.2, 20.4).Runs[:3], runs("p", user, 200, 20, 20, 20), base().Runs[3:])},
		"a row that is new":    {Runs: runs("b", ours, 200, 40, 41, 42)},
		"another frame length": {Runs: []Run{{Row: "a", Class: ours, Kind: stream, Bytes: 1500, Line: 200, Ns: 90}}},
	} {
		if changes, _ := compare(before, now); len(changes) > 0 {
			t.Errorf("%s: %+v", name, changes)
		}
	}
	changes, compared := compare(before, base(40, 41, 42))
	if len(changes) != 3 || compared != 3 {
		t.Errorf("twice the time: %d of %d ratios got worse, want 3 of 3", len(changes), compared)
	}
	var out strings.Builder
	if !reportCompare(&out, "old.json", before, base(40, 41, 42)) || !strings.Contains(out.String(), "| a | 64 | stream | p |") {
		t.Errorf("twice the time is reported as\n%s", &out)
	}
}

func TestGoalsAreMetOrMissedOrNotMeasured(t *testing.T) {
	rows := allRows(noNetwork(errors.ErrUnsupported))
	all := slices.Concat(
		runs(polled(false, 32, 64).row, ours, 200, 20, 20, 20),
		runs(nameMemif, user, 200, 60, 60, 60),
		runs(nameRaw(false, 32), floor, 200, 5, 5, 5))
	var out strings.Builder
	reportGoals(&out, newTable(all, math.Inf(1)), goals(rows))
	for _, want := range []string{
		"gomemif, polled | ≥ 2 | 3 | met | 12 |", "raw ring with the same copies | ≤ 2.5 | 4 | **missed** |  |", "| not measured |  | no peer",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the goals do not say %q:\n%s", want, &out)
		}
	}
}

func TestResultIsReadBack(t *testing.T) {
	r := &Result{
		Machine: Machine{CPU: `a "CPU"`, CPUs: 2, Arch: "amd64", Kernel: "6.1", Go: "go1.26"},
		Date:    "2026-01-02T03:04:05Z", Commit: "0123+", Window: "100ms",
		Runs: append(runs(`x {"row": y`, ours, 200, 1.5, 2), Run{Row: "p", Kind: pingpong, Bytes: 1500, P99: 7, Others: 0.1}),
		Gaps: []Gap{{Row: "TAP", Class: kernel, Kind: stream, Bytes: 64, Reason: "no /dev/net/tun"}},
	}
	name := filepath.Join(t.TempDir(), "r.json")
	if err := r.write(name); err != nil {
		t.Fatal(err)
	}
	got, err := readResult(name)
	if err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("read back %+v, %v\nwant %+v", got, err, r)
	}
	if b, _ := os.ReadFile(name); strings.Count(string(b), "\n") != len(r.Runs)+len(r.Gaps)+1 {
		t.Errorf("not a line for each run:\n%s", b)
	}
	if _, err := readResult(name + ".not"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "-json") {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestRowsHaveNamesOfTheirOwn(t *testing.T) {
	seen := map[key]bool{}
	for _, r := range allRows(noNetwork(errors.ErrUnsupported)) {
		if k := (key{r.name, r.kind, 0}); seen[k] {
			t.Errorf("there are two rows %q", r.name)
		} else {
			seen[k] = true
		}
		for _, size := range r.sizes {
			if !slices.Contains(allSizes, size) {
				t.Errorf("%s is never measured with %d bytes", r.name, size)
			}
		}
	}
}

// Every row of the device, and of every peer that loses no frames, moves the right frames:
// each is different, and the receiver compares it.
func TestEveryRowMovesWhatItSays(t *testing.T) {
	cpus, err := twoCPUs()
	if err != nil {
		t.Skip(err)
	}
	b := &bench{cpus: cpus, verify: true, tmp: t.TempDir()}
	without := noNetwork(errors.New("a test makes none"))
	for _, r := range allRows(without) {
		for _, size := range r.sizes {
			if r.kind == counters || size == sizeMTU {
				continue // counters moves nothing between parties; a frame of sizeMTU has one piece, like a small one
			}
			if err := b.verifies(r, size); errors.Is(err, without.err) {
				if m := new(missing); !errors.As(err, &m) || !strings.Contains(err.Error(), "run as root") {
					t.Errorf("%s does not say what to do: %v", r.name, err)
				}
			} else if err != nil {
				t.Errorf("%s, %s, %d bytes: %v", r.name, r.kind, size, err)
			}
		}
	}
}

// verifies moves some hundred frames of a row.
func (b *bench) verifies(r *row, size int) error {
	const frames = 300
	j, err := b.newJob(r, size)
	if err != nil {
		return err
	}
	defer j.close()
	l, err := r.peer.setup(j)
	if err != nil {
		return err
	}
	if r.kind == pingpong {
		p, rtt := l.(pinger), make([]int64, frames)
		err = parties(j, l, func() error { return p.ping(j, rtt) }, func() error { return p.echo(j) })(false)
		if err == nil && slices.Contains(rtt, 0) {
			err = errors.New("not every frame came back")
		}
		return errors.Join(err, l.close())
	}
	s := l.(streamer)
	wait := parties(j, l, func() error { return s.send(j) }, func() error { return s.receive(j) })
	for start := time.Now(); j.rcvd.Load() < frames && time.Since(start) < hangLimit; {
		time.Sleep(time.Millisecond)
	}
	err = errors.Join(wait(true), l.close())
	if n := j.rcvd.Load(); err == nil && n < frames {
		err = fmt.Errorf("only %d frames arrived", n)
	}
	return err
}

func TestWrongFramesAreFound(t *testing.T) {
	j := &job{size: 64, verify: true}
	src, s := j.source(), j.sink()
	if err := s.check(src.next()); err != nil {
		t.Fatal(err)
	}
	src.next() // this frame is lost
	if err := s.check(src.next()); err == nil {
		t.Error("a lost frame was not noticed")
	}
	if err := j.sink().check(j.source().next()[:63]); err == nil {
		t.Error("a short frame was not noticed")
	}
}

// The whole program prints each row, or why this machine cannot measure it. It writes a result
// and then compares with that.
func TestProgram(t *testing.T) {
	if _, err := twoCPUs(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	result, plot := filepath.Join(dir, "r.json"), filepath.Join(dir, "r.svg")
	program := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
		cmd.Env = append(os.Environ(), mainVar+"=1", "TMPDIR="+dir)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	const some = "^(raw tx ring b1|AF_PACKET TPACKET_V3|AF_XDP copy mode b32, spin)$"
	out, err := program("-reps", "1", "-window", "2ms", "-run", some, "-json", result, "-plot", plot)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r, err := readResult(result)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range r.Gaps {
		t.Logf("%s, %d bytes: %s", g.Row, g.Bytes, g.Reason)
	}
	for _, name := range []string{"raw tx ring b1", "AF_PACKET TPACKET_V3", "AF_XDP copy mode b32, spin"} {
		if !strings.Contains(out, "| "+name+" | 64 |") {
			t.Errorf("%s is not in the table:\n%s", name, out)
		}
	}
	if b, err := os.ReadFile(plot); err != nil || !strings.HasPrefix(string(b), "<svg") || !strings.Contains(string(b), "raw tx ring b1") {
		t.Errorf("no drawing: %v", err)
	}
	if out, err := program("-reps", "1", "-window", "2ms", "-run", "^raw tx ring b1$", "-compare", result); err != nil || !strings.Contains(out, "Nothing got worse") {
		t.Errorf("compared with itself: %v\n%s", err, out)
	}
	for _, args := range [][]string{{"-reps", "0"}, {"row"}, {"-compare", result + ".not"}, {"-run", "no such row"}} {
		if out, err := program(args...); err == nil || !strings.Contains(out, "peers: ") {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "peers*")); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
}
