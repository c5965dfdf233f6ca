package logtest

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Four goroutines write lines while the test reads: whatever is read begins what is read next,
// and in the end every line is there, whole and once.
func TestALogIsReadWhileItIsWritten(t *testing.T) {
	const writers, each = 4, 500
	var l Log
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if n, err := fmt.Fprintf(&l, "writer %d, line %d\n", w, i); n == 0 || err != nil {
					t.Errorf("%d bytes, %v", n, err)
				}
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		wg.Wait()
		close(ended)
	}()
	for before, over := "", false; !over; {
		select {
		case <-ended:
			over = true
		default:
		}
		now := l.String()
		if !strings.HasPrefix(now, before) {
			t.Fatalf("%q has become %q", before, now)
		}
		before = now
		runtime.Gosched()
	}
	for w := range writers {
		var want []string
		for i := range each {
			want = append(want, fmt.Sprintf("writer %d, line %d\n", w, i))
		}
		if got := l.Lines(fmt.Sprintf("writer %d,", w)); !slices.Equal(got, want) {
			t.Errorf("of writer %d there are %d lines:\n%q", w, len(got), got)
		}
	}
	if n := len(l.Lines("")); n != writers*each {
		t.Errorf("%d lines in all", n)
	}
}

func TestLinesAreThoseWithThePart(t *testing.T) {
	var l Log
	if got := l.Lines(""); got != nil || l.String() != "" {
		t.Errorf("an empty log has lines %q", got)
	}
	io.WriteString(&l, "a vif is up\n\nits link is down\nthe vif")
	for part, want := range map[string][]string{
		"vif":     {"a vif is up\n", "the vif"},
		"is down": {"its link is down\n"},
		"up\nits": nil,
		"":        {"a vif is up\n", "\n", "its link is down\n", "the vif"},
	} {
		if got := l.Lines(part); !slices.Equal(got, want) {
			t.Errorf("with %q: %q", part, got)
		}
	}
}

func TestALoggerWritesALineForEachMessage(t *testing.T) {
	var l Log
	log := l.Logger()
	log.Warn("refused", "key", "mac")
	log.Info("connected")
	log.Debug("not kept")
	lines := l.Lines("")
	if len(lines) != 2 || !strings.Contains(lines[0], "level=WARN msg=refused key=mac\n") || !strings.Contains(lines[1], "level=INFO msg=connected\n") {
		t.Errorf("%q", lines)
	}
}
