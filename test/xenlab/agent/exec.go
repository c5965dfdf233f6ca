//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"

	"barevif/test/xenlab/proto"
)

// maxOutput is how many bytes of each stream are kept, from its end.
const maxOutput = 4 << 20

// An executor carries out the calls for its own domain.
type executor struct {
	mu    sync.Mutex
	procs map[int]*process // guarded by mu
	last  int              // guarded by mu
}

// A process is one program started for a call, in a process group of its own.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when the process and its output have ended

	mu      sync.Mutex
	stdout  tail          // guarded by mu
	stderr  tail          // guarded by mu
	printed chan struct{} // guarded by mu; closed and replaced by each write
}

// A tail keeps the last maxOutput bytes of a stream.
type tail struct{ b []byte }

func (t *tail) write(p []byte) {
	t.b = append(t.b, p...)
	if len(t.b) > maxOutput {
		t.b = append([]byte("[...]\n"), t.b[len(t.b)-maxOutput:]...)
	}
}

// A stream is an io.Writer for one of a process's outputs.
type stream struct {
	p *process
	t *tail
}

func (s stream) Write(b []byte) (int, error) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.t.write(b)
	close(s.p.printed)
	s.p.printed = make(chan struct{})
	return len(b), nil
}

func newExecutor() *executor { return &executor{procs: map[int]*process{}} }

// do carries out one call and returns the reply, at the call's timeout at the latest.
func (e *executor) do(c proto.Call) proto.Reply {
	ctx := context.Background()
	if c.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.Timeout)
		defer cancel()
	}
	r, err := e.dispatch(ctx, c)
	if err != nil {
		r.Err = err.Error()
	}
	r.ID = c.ID
	return r
}

func (e *executor) dispatch(ctx context.Context, c proto.Call) (proto.Reply, error) {
	switch c.Op {
	case proto.Start:
		p, err := start(c)
		if err != nil {
			return proto.Reply{}, err
		}
		return proto.Reply{Proc: e.keep(p), Running: true}, nil
	case proto.Wait:
		p, err := e.find(c.Proc)
		if err != nil {
			return proto.Reply{}, err
		}
		return p.wait(ctx, c.Match)
	case proto.Kill:
		p, err := e.find(c.Proc)
		if err != nil {
			return proto.Reply{}, err
		}
		return proto.Reply{}, p.kill(syscall.Signal(c.Signal))
	case proto.Run:
		if c.Until {
			return until(ctx, c)
		}
		return run(ctx, c)
	case proto.Put:
		if err := os.MkdirAll(filepath.Dir(c.Path), 0o755); err != nil {
			return proto.Reply{}, err
		}
		return proto.Reply{}, os.WriteFile(c.Path, c.Stdin, os.FileMode(c.Mode))
	case proto.Get:
		b, err := os.ReadFile(c.Path)
		return proto.Reply{Stdout: b}, err
	}
	return proto.Reply{}, fmt.Errorf("no such op: %q", c.Op)
}

func (e *executor) keep(p *process) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last++
	e.procs[e.last] = p
	return e.last
}

func (e *executor) find(id int) (*process, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if p := e.procs[id]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("no process %d", id)
}

func start(c proto.Call) (*process, error) {
	if len(c.Argv) == 0 {
		return nil, errors.New("nothing to run")
	}
	p := &process{done: make(chan struct{}), printed: make(chan struct{})}
	p.cmd = exec.Command(c.Argv[0], c.Argv[1:]...)
	p.cmd.Stdin = bytes.NewReader(c.Stdin)
	p.cmd.Stdout = stream{p, &p.stdout}
	p.cmd.Stderr = stream{p, &p.stderr}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// A daemon keeps the pipes of the process that started it open.
	p.cmd.WaitDelay = time.Second
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.cmd.Wait() // the status is in ProcessState; another error means that a daemon kept the pipes
		close(p.done)
	}()
	return p, nil
}

// wait waits until the process ends or its output matches. If the process still runs when ctx
// ends, wait returns an error and the output so far.
func (p *process) wait(ctx context.Context, match string) (proto.Reply, error) {
	var re *regexp.Regexp
	if match != "" {
		var err error
		if re, err = regexp.Compile(match); err != nil {
			return proto.Reply{}, err
		}
	}
	for {
		p.mu.Lock()
		printed := p.printed
		matched := re != nil && (re.Match(p.stdout.b) || re.Match(p.stderr.b))
		p.mu.Unlock()
		if matched {
			return p.reply(), nil
		}
		select {
		case <-p.done:
			return p.reply(), nil
		case <-printed:
		case <-ctx.Done():
			return p.reply(), errors.New("still running when time was up")
		}
	}
}

func (p *process) reply() proto.Reply {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := proto.Reply{Stdout: bytes.Clone(p.stdout.b), Stderr: bytes.Clone(p.stderr.b)}
	select {
	case <-p.done:
		r.Exit = exitStatus(p.cmd.ProcessState)
	default:
		r.Running = true
	}
	return r
}

// exitStatus returns the exit status as a shell has it: 128 + signal if a signal ended the process.
func exitStatus(s *os.ProcessState) int {
	if w, ok := s.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return 128 + int(w.Signal())
	}
	return s.ExitCode()
}

// kill signals the whole process group. It is not an error if the process has ended.
func (p *process) kill(sig syscall.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := syscall.Kill(-p.cmd.Process.Pid, sig); err != nil && err != syscall.ESRCH {
		return err
	}
	return nil
}

// run starts a program and waits for its end. If ctx ends first it kills the program's process group.
func run(ctx context.Context, c proto.Call) (proto.Reply, error) {
	p, err := start(c)
	if err != nil {
		return proto.Reply{}, err
	}
	r, err := p.wait(ctx, "")
	if err != nil {
		if kerr := p.kill(syscall.SIGKILL); kerr != nil {
			err = errors.Join(err, kerr)
		}
	}
	return r, err
}

// pollInterval is long enough not to disturb measurements that run at the same time.
const pollInterval = 100 * time.Millisecond

// until runs a program again and again until it succeeds or ctx ends.
func until(ctx context.Context, c proto.Call) (proto.Reply, error) {
	for {
		r, err := run(ctx, c)
		if err != nil || r.Exit == 0 {
			return r, err
		}
		select {
		case <-ctx.Done():
			return r, errors.New("had not succeeded when time was up")
		case <-time.After(pollInterval):
		}
	}
}
