// Package clitest tries command lines, as a user's shell would give them.
package clitest

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"

	"barevif/hypercall/emu/emutest"
	"barevif/tools/cli"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// A Build makes the command to try.
type Build func(*cli.Program) *cobra.Command

// Run runs the command with args.
func (build Build) Run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = cli.Run(t.Context(), build, args, &out, &errs)
	return code, out.String(), errs.String()
}

// rawTexts are parts of error texts of package net and of the libraries that parse the
// command line. A command must not print them.
var rawTexts = []string{
	"strconv.", "if any flags", "accepts at most", "accepts 1 arg", "unknown shorthand", "unknown flag", "flag needs an argument",
	"invalid argument", "bad flag syntax", "time: invalid", "time: unknown", "time: missing", "parsing ", "dial udp", "listen tcp", "listen udp", "bind: ", "lookup ", "unknown command",
}

// Fails checks that the command ends with code, says each of says in plain words, and
// what to do next.
func (build Build) Fails(t *testing.T, code int, args []string, says ...string) {
	t.Helper()
	got, stdout, stderr := build.Run(t, args...)
	if got != code || code == cli.ExitUsage && stdout != "" {
		t.Errorf("%q: exit %d, %q", args, got, stdout)
	}
	for _, want := range append(says, "\n  next: ") {
		if !strings.Contains(stderr, want) {
			t.Errorf("%q: no %q in %q", args, want, stderr)
		}
	}
	for _, raw := range rawTexts {
		if strings.Contains(stderr, raw) {
			t.Errorf("%q: %q in %q", args, raw, stderr)
		}
	}
}

// EveryFlag checks that every flag that does not take any text refuses an invalid value.
// The error names the flag, the value and the valid values. least is the least number of
// commands and subcommands.
func (build Build) EveryFlag(t *testing.T, least int) {
	t.Helper()
	n := 0
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.RunE != nil {
			n++
			build.everyFlagOf(t, c)
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk((&cli.Program{Stdout: io.Discard, Stderr: io.Discard}).Command(build))
	if n < least {
		t.Errorf("%d commands", n)
	}
}

func (build Build) everyFlagOf(t *testing.T, c *cobra.Command) {
	t.Helper()
	path := c.CommandPath()
	words := strings.Fields(path)[1:]
	wrong := func(arg string, says ...string) {
		t.Helper()
		build.Fails(t, cli.ExitUsage, append(words[:len(words):len(words)], strings.Fields(arg)...), says...)
	}
	wrong("--no-such-flag", `"--no-such-flag"`, path, "--")
	wrong("-Z", `"-Z"`, path, "--")
	wrong("---", `"---"`, path, "--")
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if f.NoOptDefVal == "" {
			wrong("--"+f.Name, "--"+f.Name+" needs a value", f.Usage[strings.LastIndexByte(f.Usage, '`')+1:])
		}
		kind := f.Value.Type()
		if kind == "string" || kind == "stringArray" {
			return
		}
		for _, value := range []string{"moon", "99999999999999999999", "1,5"} {
			if kind == "float64" && value == "99999999999999999999" {
				continue // which is a number
			}
			want := "not "
			if kind == "bool" {
				want = "not true or false"
			}
			wrong("--"+f.Name+"="+value, fmt.Sprintf("--%s %q", f.Name, value), want)
		}
	})
	if c.Args != nil {
		wrong("extra more", `"`, c.Name())
	}
}

// Stranger is the number of a user other than the one that runs the tests.
const Stranger = 65534

// AsStranger runs do on a thread of another user. The thread ends with do.
func AsStranger(t *testing.T, do func() error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocks: nothing else runs on this thread
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), Stranger, ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		done <- do()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TempDir makes a directory that every user may write the one for temporary files, and
// nobody the user who ran sudo.
func TempDir(t *testing.T) (dir string) {
	t.Helper()
	dir = emutest.SocketDir(t)
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", dir)
	t.Setenv("SUDO_UID", "")
	return dir
}
