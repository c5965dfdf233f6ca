//go:build linux

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/test/xenlab/proto"
)

func sh(script string) []string { return []string{"sh", "-c", script} }

const plenty = 30 * time.Second

func TestRunTellsOutputAndStatus(t *testing.T) {
	e := newExecutor()
	for _, c := range []struct {
		script, stdin, stdout, stderr string
		exit                          int
	}{
		{"echo out; echo err >&2", "", "out\n", "err\n", 0},
		{"cat; exit 3", "given", "given", "", 3},
		{"kill -9 $$", "", "", "", 137},
	} {
		r := e.do(proto.Call{ID: 5, Op: proto.Run, Argv: sh(c.script), Stdin: []byte(c.stdin), Timeout: plenty})
		if r.ID != 5 || r.Err != "" || string(r.Stdout) != c.stdout || string(r.Stderr) != c.stderr || r.Exit != c.exit || r.Running {
			t.Errorf("%s: %+v", c.script, r)
		}
	}
	for _, argv := range [][]string{nil, {"/no/such/program"}} {
		if r := e.do(proto.Call{Op: proto.Run, Argv: argv, Timeout: plenty}); r.Err == "" {
			t.Errorf("%q: no error", argv)
		}
	}
	if r := e.do(proto.Call{Op: "dance"}); r.Err == "" {
		t.Error("an unknown op is no error")
	}
}

func TestTimeoutKillsTheWholeGroup(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	e := newExecutor()
	r := e.do(proto.Call{Op: proto.Run, Argv: sh("echo before; sleep 1000 & echo $! >'" + pidFile + "'; wait"), Timeout: 3 * time.Second})
	if r.Err == "" || string(r.Stdout) != "before\n" {
		t.Errorf("%+v", r)
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(plenty); ; time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return // gone, or waiting for this machine's init
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is still there: %s", pid, stat)
		}
	}
}

func TestUntilRepeatsUntilItSucceeds(t *testing.T) {
	file := filepath.Join(t.TempDir(), "count")
	e := newExecutor()
	r := e.do(proto.Call{Op: proto.Run, Until: true, Argv: sh("echo >>'" + file + "'; [ $(wc -l <'" + file + "') -ge 3 ]"), Timeout: plenty})
	if r.Err != "" || r.Exit != 0 {
		t.Errorf("%+v", r)
	}
	if b, _ := os.ReadFile(file); len(b) != 3 {
		t.Errorf("ran %d times", len(b))
	}
	r = e.do(proto.Call{Op: proto.Run, Until: true, Argv: sh("exit 4"), Timeout: 300 * time.Millisecond})
	if r.Err == "" || r.Exit != 4 && !r.Running { // its last run may have been cut short
		t.Errorf("never true: %+v", r)
	}
}

func TestWaitSeesOutputOrTheEnd(t *testing.T) {
	e := newExecutor()
	r := e.do(proto.Call{Op: proto.Start, Argv: sh("echo one >&2; read go; echo two"), Timeout: plenty})
	if r.Err != "" || r.Proc == 0 || !r.Running {
		t.Fatalf("%+v", r)
	}
	id := r.Proc
	if r = e.do(proto.Call{Op: proto.Wait, Proc: id, Match: "^tw", Timeout: plenty}); r.Err != "" || !bytes.Contains(r.Stdout, []byte("two")) {
		t.Errorf("%+v", r)
	}
	if r = e.do(proto.Call{Op: proto.Wait, Proc: id, Timeout: plenty}); r.Err != "" || r.Running || string(r.Stderr) != "one\n" {
		t.Errorf("%+v", r)
	}
	if r = e.do(proto.Call{Op: proto.Wait, Proc: id, Match: "three", Timeout: plenty}); r.Err != "" || r.Running {
		t.Errorf("an ended process that never matched: %+v", r)
	}
	if r = e.do(proto.Call{Op: proto.Wait, Proc: id, Match: "(", Timeout: plenty}); r.Err == "" {
		t.Error("a broken expression is no error")
	}
	if r = e.do(proto.Call{Op: proto.Wait, Proc: 99, Timeout: plenty}); r.Err == "" {
		t.Error("an unknown process is no error")
	}
}

func TestKillSignalsAndForgivesTheDead(t *testing.T) {
	e := newExecutor()
	id := e.do(proto.Call{Op: proto.Start, Argv: sh("trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done"), Timeout: plenty}).Proc
	if r := e.do(proto.Call{Op: proto.Wait, Proc: id, Match: "up", Timeout: plenty}); r.Err != "" {
		t.Fatalf("%+v", r)
	}
	if r := e.do(proto.Call{Op: proto.Wait, Proc: id, Timeout: 50 * time.Millisecond}); r.Err == "" || !r.Running {
		t.Errorf("a wait that ends by its time: %+v", r)
	}
	for range 2 {
		if r := e.do(proto.Call{Op: proto.Kill, Proc: id, Signal: int(syscall.SIGTERM), Timeout: plenty}); r.Err != "" {
			t.Errorf("%+v", r)
		}
		if r := e.do(proto.Call{Op: proto.Wait, Proc: id, Timeout: plenty}); r.Err != "" || r.Exit != 7 {
			t.Errorf("%+v", r)
		}
	}
}

func TestFilesComeAndGo(t *testing.T) {
	e := newExecutor()
	file := filepath.Join(t.TempDir(), "new", "file")
	if r := e.do(proto.Call{Op: proto.Put, Path: file, Stdin: []byte("x"), Mode: 0o700, Timeout: plenty}); r.Err != "" {
		t.Fatalf("%+v", r)
	}
	if r := e.do(proto.Call{Op: proto.Get, Path: file, Timeout: plenty}); string(r.Stdout) != "x" {
		t.Errorf("%+v", r)
	}
	if r := e.do(proto.Call{Op: proto.Get, Path: file + "?", Timeout: plenty}); r.Err == "" {
		t.Error("a missing file is no error")
	}
}

func TestOutputKeepsItsEnd(t *testing.T) {
	var o tail
	for range 3 {
		o.write(bytes.Repeat([]byte("a"), maxOutput/2))
	}
	o.write([]byte("the end"))
	if len(o.b) > maxOutput+10 || !bytes.HasSuffix(o.b, []byte("athe end")) || !bytes.HasPrefix(o.b, []byte("[...]\n")) {
		t.Errorf("%d bytes, %q ... %q", len(o.b), o.b[:10], o.b[len(o.b)-10:])
	}
}
