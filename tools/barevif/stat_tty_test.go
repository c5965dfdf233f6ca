package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"

	"barevif/telemetry"
	"barevif/tools/internal/stat"

	"charm.land/lipgloss/v2"
	"golang.org/x/sys/unix"
)

// terminal is one of so many columns. screen gives what was written to it, once.
func terminal(t *testing.T, columns uint16) (tty *os.File, screen func() string) {
	t.Helper()
	pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("this machine gives no terminal: ", err)
	}
	t.Cleanup(func() { pty.Close() })
	if err := unix.IoctlSetPointerInt(int(pty.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetUint32(int(pty.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: columns}); err != nil {
		t.Fatal(err)
	}
	out := make(chan string, 1)
	go func() {
		var b bytes.Buffer
		io.Copy(&b, pty) // until nobody has the terminal any more: EIO
		out <- strings.ReplaceAll(b.String(), "\r\n", "\n")
	}()
	return tty, func() string {
		tty.Close()
		return <-out
	}
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
			{"plot", [2]string{"TERM", "xterm"}, []string{"--plot", "--count", "3", "--interval", "100ms"}, true},
			{"plot without colours", [2]string{"NO_COLOR", "1"}, []string{"--plot", "--count", "3", "--interval", "100ms"}, false},
		} {
			t.Run(fmt.Sprintf("%s, %d columns", c.name, columns), func(t *testing.T) {
				t.Setenv("NO_COLOR", "")
				t.Setenv("TERM", "xterm")
				t.Setenv(c.env[0], c.env[1])
				tty, screen := terminal(t, uint16(columns))
				var stderr bytes.Buffer
				if code := run(t.Context(), append(args, c.more...), tty, &stderr); code != exitOK {
					t.Errorf("exit %d: %s", code, &stderr)
				}
				text := screen()
				if coloured := strings.Contains(text, "\x1b"); coloured != c.coloured {
					t.Errorf("colours: %v, want %v", coloured, c.coloured)
				}
				for _, line := range strings.Split(escapes.ReplaceAllString(text, ""), "\n") {
					if n := lipgloss.Width(line); n > columns {
						t.Errorf("%d columns: %q", n, line)
					}
				}
				for _, want := range map[bool][]string{
					false: {"1 125 899 906 843 858", "200/256", "lend_rx trusted"}, true: {"frames/s, last", "ring slots in use", "256 ┤"},
				}[c.more != nil] {
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
	s := &statistics{program: &program{stdout: new(bytes.Buffer)}, interval: 1}
	m := newLive(s, w, w.Look())
	m.plot, m.width, m.height = true, 80, 60
	for range 3 {
		m.Update(m.again()())
	}
	if text := m.text(); strings.Contains(text, "\x1b") || !strings.Contains(text, "r rx, t tx") {
		t.Errorf("%q", text)
	}
}
