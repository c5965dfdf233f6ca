package loglimit

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLinesAreFewAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		h := New(slog.NewTextHandler(&out, nil))
		log := slog.New(h)
		take := func() (lines []string) {
			lines = strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
			out.Reset()
			return lines[:len(lines):len(lines)]
		}
		for i := range 1000 {
			log.With("vif", i%2).WithGroup("of").Info(fmt.Sprint("line ", i))
			h.CatchUp(false)
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
		h.CatchUp(false)
		if got = take(); got[0] != "" {
			t.Fatalf("%q", got)
		}
		time.Sleep(lineEvery)
		h.CatchUp(false)
		if got = take(); len(got) != 1 || !strings.Contains(got[0], "msg=up suppressed=1") {
			t.Fatalf("%q", got)
		}
		h.CatchUp(false)
		if got = take(); got[0] != "" {
			t.Fatalf("said twice: %q", got)
		}
		// So it is at the end of the device.
		log.Info("gone")
		h.CatchUp(true)
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
