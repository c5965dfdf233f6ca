package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"
)

// LogFormat is the value of --log: how a command writes what it logs and says.
type LogFormat bool

// The formats. JSON is a record a line, on both streams: what is text on stdout otherwise is a
// record of level INFO there, and the error with which a command ends is one on stderr. What a
// command was asked to print, such as a table, stays as it is.
const (
	LogText LogFormat = false
	LogJSON LogFormat = true
)

// String returns the value of the flag.
func (f *LogFormat) String() string {
	if *f == LogJSON {
		return "json"
	}
	return "text"
}

// Set reads the value of the flag.
func (f *LogFormat) Set(s string) error {
	switch s {
	case "text":
		*f = LogText
	case "json":
		*f = LogJSON
	default:
		return errors.New("text or json")
	}
	return nil
}

// Type is what help calls the value.
func (f *LogFormat) Type() string { return "format" }

func (p *Program) registerFormat(root *cobra.Command) {
	root.PersistentFlags().Var(&p.Format, "log", "`format` of what it logs and says: text, or json, a record a line")
	FixedValues(root, "log", "text", "json")
}

// Log returns a logger at level warn; -v lowers the level to info, -vv to debug.
func (p *Program) Log() *slog.Logger {
	level := slog.LevelWarn
	switch {
	case p.Verbose == 1:
		level = slog.LevelInfo
	case p.Verbose > 1:
		level = slog.LevelDebug
	}
	opts := &slog.HandlerOptions{Level: level}
	if p.Format == LogJSON {
		return slog.New(slog.NewJSONHandler(p.Stderr, opts))
	}
	return slog.New(slog.NewTextHandler(p.Stderr, opts))
}

// Say tells the user of a command that runs for long what has happened. Several goroutines may
// call it.
func (p *Program) Say(format string, args ...any) {
	p.sayMu.Lock()
	defer p.sayMu.Unlock()
	p.tell(p.Stdout, slog.LevelInfo, fmt.Sprintf(format, args...))
}

// Note is Say for stderr: a remark beside the output that the user has asked for.
func (p *Program) Note(format string, args ...any) {
	p.tell(p.Stderr, slog.LevelWarn, fmt.Sprintf(format, args...))
}

// tell writes text with a line end, or in JSON a record for each line that is not empty.
func (p *Program) tell(w io.Writer, level slog.Level, text string) {
	if p.Format == LogText {
		fmt.Fprintln(w, text)
		return
	}
	log := slog.New(slog.NewJSONHandler(w, nil))
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			log.Log(context.Background(), level, line)
		}
	}
}

// fail writes the error with which a command ends.
func (p *Program) fail(command, text, next string, code int) {
	if p.Format == LogJSON {
		attrs := []any{"command", command, "exit", code}
		if next != "" {
			attrs = append(attrs, "next", next)
		}
		slog.New(slog.NewJSONHandler(p.Stderr, nil)).Error(text, attrs...)
		return
	}
	fmt.Fprintf(p.Stderr, "%s: %s\n", command, text)
	if next != "" {
		fmt.Fprintf(p.Stderr, "  next: %s\n", next)
	}
}
