//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Outcomes of a mutant.
const (
	killed   = "killed"
	hung     = "hung" // killed by the time limit
	survived = "survived"
	broken   = "broken" // it does not compile
	listed   = "listed" // in equivalent.txt, so not run
)

// A result is the outcome of a mutant: a line of the file of results.
type result struct {
	key
	Line    int     `json:"line"`
	Sum     string  `json:"sum"` // hash of the mutated file
	Status  string  `json:"status"`
	By      string  `json:"by,omitempty"` // the suite that noticed the mutant
	Seconds float64 `json:"seconds"`
}

// A runner runs go test with mutants laid over the tree.
type runner struct {
	root   string
	tmp    string                  // directory for overlays and for files that tests leave
	limits map[suite]time.Duration // time after which tests count as hung, from their time without a mutant
	failed map[suite]error         // suites that fail without a mutant
}

// compileLimit bounds the time that go test takes besides the tests.
const compileLimit = 10 * time.Minute

// test runs one suite, with an overlay unless it is "". status is survived if all tests
// passed.
func (r *runner) test(ctx context.Context, s suite, overlay string) (status, output string, err error) {
	limit, ok := r.limits[s]
	if !ok {
		limit = s.timeout()
	}
	tmp, err := os.MkdirTemp(r.tmp, "run")
	if err != nil {
		return "", "", err
	}
	defer os.RemoveAll(tmp)
	args := []string{"test", "-vet=off", "-count=1", "-failfast", "-timeout", limit.String()}
	if s.run != "" {
		args = append(args, "-run", s.run)
	}
	if s.tags != "" {
		args = append(args, "-tags", s.tags)
	}
	if overlay != "" {
		args = append(args, "-overlay", overlay)
	}
	limited, cancel := context.WithTimeout(ctx, compileLimit+limit)
	defer cancel()
	cmd := exec.CommandContext(limited, "go", append(args, s.pkg)...)
	cmd.Dir = r.root
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// Processes that tests started are killed with go test.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	runErr := cmd.Run()
	if cmd.Process != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "", "", ctx.Err()
	case runErr == nil:
		return survived, out.String(), nil
	case limited.Err() != nil || bytes.Contains(out.Bytes(), []byte("panic: test timed out after")):
		return hung, out.String(), nil
	case !errors.As(runErr, &exit) && !errors.Is(runErr, exec.ErrWaitDelay):
		return "", "", runErr
	case bytes.Contains(out.Bytes(), []byte("[build failed]")) || bytes.Contains(out.Bytes(), []byte("[setup failed]")):
		return broken, out.String(), nil
	}
	return killed, out.String(), nil
}

// mutate tries one mutant on the suites until one notices it.
func (r *runner) mutate(ctx context.Context, m *mutant, suites []suite) (res result, err error) {
	began := time.Now()
	res = result{key: m.key, Line: m.Line, Sum: m.sum, Status: survived}
	changed := filepath.Join(r.tmp, "mutant.go")
	overlay := filepath.Join(r.tmp, "overlay.json")
	original, err := filepath.Abs(filepath.Join(r.root, filepath.FromSlash(m.File)))
	if err != nil {
		return res, err
	}
	text, err := json.Marshal(map[string]map[string]string{"Replace": {original: changed}})
	if err != nil {
		return res, err
	}
	if err := errors.Join(os.WriteFile(changed, m.text(), 0o600), os.WriteFile(overlay, text, 0o600)); err != nil {
		return res, err
	}
	for _, s := range suites {
		status, _, err := r.test(ctx, s, overlay)
		if err != nil {
			return res, err
		}
		if status != survived {
			res.Status, res.By = status, s.String()
			break
		}
	}
	if res.Status == broken {
		res.By = ""
	}
	res.Seconds = time.Since(began).Round(10 * time.Millisecond).Seconds()
	return res, nil
}

// baseline checks that a suite passes without a mutant: with a test that fails anyway,
// every mutant would count as killed.
func (r *runner) baseline(ctx context.Context, s suite) error {
	if _, ok := r.limits[s]; ok {
		return r.failed[s]
	}
	began := time.Now()
	status, out, err := r.test(ctx, s, "")
	if err != nil {
		return err
	}
	r.limits[s] = min(s.timeout(), max(hangLimit, 8*time.Since(began)))
	if status != survived {
		r.failed[s] = fmt.Errorf("%s does not pass without a mutant (%s), so it says nothing about one:\n%s", s, status, tail(out, 30))
	}
	return r.failed[s]
}

// hangLimit is the minimum time after which tests count as hung.
const hangLimit = 30 * time.Second

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// A resultFile is the file of results. A mutant with a result is not run again as long as its
// file is the same.
type resultFile struct {
	earlier map[key]result
	f       *os.File // nil: results are not stored
}

func openResults(name string) (*resultFile, error) {
	l := &resultFile{earlier: make(map[key]result)}
	if name == "" {
		return l, nil
	}
	text, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, 1<<20)
	whole := 0 // bytes of complete lines
	for n := 1; lines.Scan(); n++ {
		var res result
		if err := json.Unmarshal(lines.Bytes(), &res); err != nil {
			if whole+len(lines.Bytes()) == len(text) {
				break // an earlier run was killed while it wrote this line
			}
			return nil, fmt.Errorf("%s:%d: not a result of this program (give -results another file): %w", name, n, err)
		}
		whole += len(lines.Bytes()) + 1
		l.earlier[res.key] = res
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if l.f, err = os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o644); err != nil {
		return nil, err
	}
	whole = min(whole, len(text))
	if err := l.f.Truncate(int64(whole)); err != nil {
		return nil, err
	}
	if _, err := l.f.Seek(int64(whole), 0); err != nil {
		return nil, err
	}
	if whole > 0 && text[whole-1] != '\n' {
		_, err = l.f.WriteString("\n")
	}
	return l, err
}

// lookup returns the result of an earlier run, if it is still valid.
func (l *resultFile) lookup(m *mutant, retry bool) (result, bool) {
	res, ok := l.earlier[m.key]
	if !ok || res.Sum != m.sum || retry && res.Status == survived {
		return result{}, false
	}
	res.Line = m.Line
	return res, true
}

func (l *resultFile) add(res result) error {
	if l.f == nil {
		return nil
	}
	text, err := json.Marshal(res)
	if err != nil {
		return err
	}
	_, err = l.f.Write(append(text, '\n'))
	return err
}

func (l *resultFile) close() error {
	if l.f == nil {
		return nil
	}
	return l.f.Close()
}
