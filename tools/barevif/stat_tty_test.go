package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/tools/cli"
	"barevif/tools/internal/stat"

	"charm.land/lipgloss/v2"
	"golang.org/x/sys/unix"
)

// A terminal is a pseudo-terminal: tty is the program's end, user the test's.
type terminal struct {
	tty, user *os.File
	gone      chan struct{}
	screen    logtest.Log // everything that was written to the terminal
}

func newTerminal(t *testing.T, columns uint16) *terminal {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("this machine gives no terminal: ", err)
	}
	term := &terminal{user: user, gone: make(chan struct{})}
	if err := unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetUint32(int(user.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if term.tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(term.tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: columns}); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(term.gone)
		io.Copy(&term.screen, user) // ends with EIO once no process has the terminal open
	}()
	t.Cleanup(func() {
		term.tty.Close()
		<-term.gone
		user.Close()
	})
	return term
}

func (term *terminal) text() string {
	return strings.ReplaceAll(term.screen.String(), "\r\n", "\n")
}

// close closes the program's end and returns everything that was written.
func (term *terminal) close() string {
	term.tty.Close()
	<-term.gone
	return term.text()
}

var escapes = regexp.MustCompile("\x1b\\[[0-9;]*m")

func TestStatFitsItsTerminal(t *testing.T) {
	set, args := counting(t, 61024)
	set.TX(0).Add(telemetry.Bytes, 1<<60)
	set.TX(0).Add(telemetry.Packets, 1<<50)
	set.TX(0).Set(telemetry.RingSize, 256)
	set.TX(0).Set(telemetry.RingUsed, 200)
	set.TX(0).Flush()
	set.SetStatus(telemetry.Status{State: 4, Up: true, Features: 1<<len(telemetry.FeatureNames) - 1})
	for _, columns := range []int{80, 140} {
		for _, c := range []struct {
			name     string
			env      [2]string
			more     []string
			coloured bool
		}{
			{"text", [2]string{"TERM", "xterm"}, nil, true},
			{"text without colours", [2]string{"NO_COLOR", "1"}, nil, false},
			{"text on a dumb terminal", [2]string{"TERM", "dumb"}, nil, false},
			{"text twice", [2]string{"TERM", "xterm"}, []string{"--count", "2", "--interval", "100ms"}, true},
			{"text twice without colours", [2]string{"NO_COLOR", "1"}, []string{"--count", "2", "--interval", "100ms"}, false},
		} {
			t.Run(fmt.Sprintf("%s, %d columns", c.name, columns), func(t *testing.T) {
				t.Setenv("NO_COLOR", "")
				t.Setenv("TERM", "xterm")
				t.Setenv(c.env[0], c.env[1])
				term := newTerminal(t, uint16(columns))
				var stderr bytes.Buffer
				if code := cli.Run(t.Context(), rootCommand, append(args, c.more...), term.tty, &stderr); code != cli.ExitOK {
					t.Errorf("exit %d: %s", code, &stderr)
				}
				text := term.close()
				if coloured := strings.Contains(text, "\x1b"); coloured != c.coloured {
					t.Errorf("colours: %v, want %v", coloured, c.coloured)
				}
				for _, line := range strings.Split(escapes.ReplaceAllString(text, ""), "\n") {
					if n := lipgloss.Width(line); n > columns {
						t.Errorf("%d columns: %q", n, line)
					}
				}
				for _, want := range []string{"1 125 899 906 843 858", "200/256", "lend_rx trusted"} {
					if !strings.Contains(text, want) {
						t.Errorf("no %q in\n%s", want, text)
					}
				}
			})
		}
	}
}

func TestLiveTableWithoutColoursHasNone(t *testing.T) {
	_, args := counting(t, 61025)
	w, err := stat.NewWatcher(args[2], args[3])
	if err != nil {
		t.Fatal(err)
	}
	s := &statistics{Program: &cli.Program{Stdout: new(bytes.Buffer)}, interval: 1}
	m := newLive(s, w, w.Look())
	m.plot, m.width, m.height = true, 80, 60
	for range 3 {
		m.Update(m.again()())
	}
	if text := m.text(); strings.Contains(text, "\x1b") || !strings.Contains(text, "r rx, t tx") {
		t.Errorf("%q", text)
	}
}

func TestLiveTableOnATerminalObeysItsUser(t *testing.T) {
	set, args := counting(t, 61026)
	term := newTerminal(t, 100)
	stdin := os.Stdin
	os.Stdin = term.tty
	defer func() { os.Stdin = stdin }()
	ended := make(chan int, 1)
	go func() {
		ended <- cli.Run(t.Context(), rootCommand, append(args, "--watch", "--interval", "100ms"), term.tty, term.tty)
	}()
	shows := func(what string) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); !strings.Contains(escapes.ReplaceAllString(term.text(), ""), what); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("no %q in %q", what, term.text())
			}
		}
	}
	press := func(key string) {
		t.Helper()
		if _, err := term.user.WriteString(key); err != nil {
			t.Fatal(err)
		}
	}
	shows("\x1b[?1049h") // the alternate screen
	shows("1 234")
	set.TX(0).Add(telemetry.Packets, 4321)
	set.TX(0).Flush()
	shows("5 555")
	press("x")
	shows("tx all")
	press("p")
	shows("frames/s, last")
	press(" ")
	shows("paused")
	press("q")
	select {
	case code := <-ended:
		if code != cli.ExitOK {
			t.Errorf("exit %d", code)
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("q does not end it")
	}
	if text := term.close(); !strings.Contains(text, "\x1b[?1049l") || strings.Contains(text, "panic") {
		t.Errorf("it leaves %q", text[max(0, len(text)-300):])
	}
}
