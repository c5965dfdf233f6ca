package pvnet

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// toggles simulates a peer that never rests, for d, and returns how many moves were made.
func toggles(p *pace, d time.Duration) (moves int) {
	for end := time.Now().Add(d); time.Now().Before(end); moves++ {
		p.move(time.Now())
		time.Sleep(time.Until(p.until))
	}
	return moves
}

func TestAPaceIsForgivingFirstAndAfterAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		for range 2 {
			for i := range movesAtOnce - 1 {
				p.move(time.Now())
				if !p.until.IsZero() {
					t.Fatalf("move %d is followed by a pause", i)
				}
			}
			if n := toggles(&p, 10*time.Second); n < 9*movesBetween || n > 14*movesBetween {
				t.Errorf("%d moves in 10 s", n)
			}
			if n := toggles(&p, time.Hour); n > 3601*movesBetween {
				t.Errorf("%d moves in an hour", n)
			}
			time.Sleep(forgetAfter + time.Second)
		}
	})
}

func TestLogLinesOfAPeerThatNeverRestsAreFewAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		q := newQuiet(slog.NewTextHandler(&out, nil))
		log := slog.New(q)
		take := func() (lines []string) {
			lines = strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
			out.Reset()
			return lines[:len(lines):len(lines)]
		}
		for i := range 1000 {
			log.With("vif", i%2).WithGroup("of").Info(fmt.Sprint("line ", i))
			q.catchUp(false)
		}
		got := take()
		if len(got) != linesAtOnce || !strings.Contains(got[linesAtOnce-1], fmt.Sprintf(`"line %d"`, linesAtOnce-1)) {
			t.Fatalf("%d lines of 1000: %q", len(got), got)
		}
		// An error is logged at once, with the number of suppressed lines.
		log.Error("the end")
		if got = take(); len(got) != 1 || !strings.Contains(got[0], `"the end" suppressed=980`) {
			t.Fatalf("%q", got)
		}
		// The last suppressed line is logged later.
		log.Info("down")
		log.Info("up")
		q.catchUp(false)
		if got = take(); got[0] != "" {
			t.Fatalf("%q", got)
		}
		time.Sleep(lineEvery)
		q.catchUp(false)
		if got = take(); len(got) != 1 || !strings.Contains(got[0], "msg=up suppressed=1") {
			t.Fatalf("%q", got)
		}
		q.catchUp(false)
		if got = take(); got[0] != "" {
			t.Fatalf("said twice: %q", got)
		}
		// So it is at the end of the device.
		log.Info("gone")
		q.catchUp(true)
		if got = take(); len(got) != 1 || strings.Contains(got[0], "suppressed") || !strings.Contains(got[0], "msg=gone") {
			t.Fatalf("%q", got)
		}
		time.Sleep(2*lineEvery + time.Second)
		for range 10 {
			log.Info("again")
		}
		if got = take(); len(got) != 2 {
			t.Fatalf("%d lines after a minute: %q", len(got), got)
		}
		time.Sleep(24 * time.Hour)
		for range 1000 {
			log.Info("new day")
		}
		if got = take(); len(got) != linesAtOnce || !strings.Contains(got[0], "suppressed=8") {
			t.Fatalf("%d lines after a day: %q", len(got), got)
		}
	})
}
