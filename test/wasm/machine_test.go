// Package wasm_test runs barevif where there is no operating system: in a WebAssembly machine
// with one thread, a clock, a source of random bytes and an output. The machine is wazero,
// which is Go. The package is a module of its own, whose dependencies are not those of the
// product.
package wasm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"
)

// limit bounds the runs of one program, with its translation. No program comes near it.
const limit = 15 * time.Minute

// asked are the functions that a program may call of what is around it. Those of fd_ are for
// its output: Go's runtime and package os look at descriptors 0 to 2 when they start, and test
// programs print. No file, no directory and no socket is ever asked for.
var asked = []string{
	"args_get", "args_sizes_get", "environ_get", "environ_sizes_get", "proc_exit",
	"clock_time_get", "poll_oneoff", "sched_yield", "random_get",
	"fd_write", "fd_fdstat_get", "fd_fdstat_set_flags", "fd_prestat_get",
}

// build makes a program for the machine of a package of the module in dir, with a go command
// such as "test -c".
func build(t *testing.T, dir, pkg string, command ...string) *program {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program.wasm")
	cmd := exec.CommandContext(t.Context(), "go", append(command, "-o", out, pkg)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "CGO_ENABLED=0", "GOWORK=off")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s %s: %v\n%s", strings.Join(command, " "), pkg, err, text)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return translate(t, b)
}

// A calls notes which functions of the machine a program calls.
type calls map[string]bool

func (c calls) NewFunctionListener(api.FunctionDefinition) experimental.FunctionListener {
	return experimental.FunctionListenerFunc(func(_ context.Context, _ api.Module, f api.FunctionDefinition, _ []uint64, _ experimental.StackIterator) {
		c[f.Name()] = true
	})
}

// A program is translated for the machine, which takes longer than most runs, once.
type program struct {
	ctx     context.Context
	machine wazero.Runtime
	code    wazero.CompiledModule
	seen    calls
}

// translate prepares a program for runs until the test ends.
func translate(t *testing.T, wasm []byte) *program {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	m := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfig().WithCloseOnContextDone(true))
	t.Cleanup(func() {
		m.Close(context.Background())
		cancel()
	})
	p := &program{ctx: ctx, machine: m, seen: calls{}}
	if _, err := wasi_snapshot_preview1.Instantiate(experimental.WithFunctionListenerFactory(ctx, p.seen), m); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.code, err = m.CompileModule(ctx, wasm); err != nil {
		t.Fatal(err)
	}
	return p
}

// run runs the program with a memory of its own, to its end or a fault. The test fails if the
// program calls a function that only an operating system can provide.
func (p *program) run(t *testing.T, args ...string) (output string, err error) {
	t.Helper()
	clear(p.seen)
	var out bytes.Buffer
	_, err = p.machine.InstantiateModule(p.ctx, p.code, wazero.NewModuleConfig().WithName("").
		WithArgs(append([]string{"program"}, args...)...).WithStdout(&out).WithStderr(&out).
		WithSysWalltime().WithSysNanotime().WithSysNanosleep().WithRandSource(rand.Reader))
	if exit := (*sys.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 0 {
		err = nil
	}
	if len(p.seen) == 0 || !p.seen["clock_time_get"] {
		t.Errorf("the program was seen to call only %v", p.seen)
	}
	for name := range p.seen {
		if !slices.Contains(asked, name) {
			t.Errorf("the program called %s", name)
		}
	}
	return out.String(), err
}

// verdict is a line that a test program prints for each test.
var verdict = regexp.MustCompile(`(?m)^ *--- (PASS|FAIL|SKIP): (\S+) \([0-9.]+s\)$`)

// A tested is what became of a program's tests.
type tested struct {
	verdicts map[string]string // by test: "PASS", "FAIL" or "SKIP"
	output   string
}

// runTests runs the tests of a program that match patterns, as -test.run and -test.skip take
// them; an empty one is not given. It fails the test if one of them fails.
func runTests(t *testing.T, p *program, match, skip string) tested {
	t.Helper()
	args := []string{"-test.v", "-test.short", "-test.timeout=0"}
	if match != "" {
		args = append(args, "-test.run="+match)
	}
	if skip != "" {
		args = append(args, "-test.skip="+skip)
	}
	start := time.Now()
	r := tested{verdicts: map[string]string{}}
	var err error
	r.output, err = p.run(t, args...)
	for _, m := range verdict.FindAllStringSubmatch(r.output, -1) {
		r.verdicts[m[2]] = m[1]
		if m[1] == "FAIL" {
			t.Errorf("%s failed", m[2])
		}
	}
	if err != nil || t.Failed() {
		t.Errorf("the tests ended with %v:\n%s", err, r.tail())
	}
	t.Logf("%d tests in %v", len(r.verdicts), time.Since(start).Round(time.Second/10))
	return r
}

// tail is the end of the output without what passed.
func (r tested) tail() string {
	var lines []string
	for line := range strings.Lines(r.output) {
		if s := strings.TrimSpace(line); !strings.HasPrefix(s, "--- PASS") && !strings.HasPrefix(s, "=== ") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-60):], "")
}

// list asks a program for the tests, fuzz targets and examples that it has.
func list(t *testing.T, p *program) []string {
	t.Helper()
	out, err := p.run(t, "-test.list=^(Test|Fuzz|Example)")
	if err != nil {
		t.Fatal(err, out)
	}
	names := strings.Fields(out)
	if len(names) == 0 {
		t.Fatal("the program has no tests")
	}
	return names
}

// ranAll fails the test unless each of names passed, or was skipped as mayBeSkipped says.
func (r tested) ranAll(t *testing.T, names []string, mayBeSkipped func(name string) bool) {
	t.Helper()
	for _, name := range names {
		switch v := r.verdicts[name]; v {
		case "PASS", "FAIL": // FAIL was reported
		case "SKIP":
			if !mayBeSkipped(name) {
				t.Errorf("%s was skipped%s", name, r.reason(name))
			}
		default:
			t.Errorf("%s did not run", name)
		}
	}
}

// reason is what a test that was skipped said.
func (r tested) reason(name string) string {
	_, after, found := strings.Cut(r.output, fmt.Sprintf("=== RUN   %s\n", name))
	if line, _, _ := strings.Cut(after, "\n"); found {
		return ": " + strings.TrimSpace(line)
	}
	return ""
}
