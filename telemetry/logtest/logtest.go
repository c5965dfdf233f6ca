// Package logtest keeps what a logger or a program writes, for a test that reads it meanwhile.
package logtest

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
)

// A Log keeps all that is written to it. The zero Log is empty and ready. Its methods may be
// called at any time from any goroutine, so it may be the log of both ends of a vif, both output
// streams of a program, or what a pseudo-terminal shows. It grows without bound and must not be
// copied.
type Log struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

// Write appends a copy of b and never fails. What two goroutines write is not mixed within one
// call.
func (l *Log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// String returns all that has been written so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// Lines returns the lines written so far that contain part, in order and each with its newline.
// A last line that has not been ended yet is among them.
func (l *Log) Lines(part string) (found []string) {
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, part) {
			found = append(found, line)
		}
	}
	return found
}

// Logger returns a logger that writes to l: a line of text for each message, from level Info on.
func (l *Log) Logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }
