//go:build linux

package xenlab

import (
	"log/slog"
	"os"
	"testing"
	"time"
)

// reserve is the part of go test's time limit that is kept to stop the machine and print.
const reserve = 30 * time.Second

func TestLab(t *testing.T) {
	if os.Getenv("BAREVIF_XENLAB") != "1" {
		t.Skip("boots a real Xen: asked for by BAREVIF_XENLAB=1")
	}
	// A second run tells a permanent fault from an intermittent one. Both are failures.
	opts := Options{Logger: slog.New(slog.NewTextHandler(os.Stdout, nil)), Again: true}
	if deadline, ok := t.Deadline(); ok {
		opts.Limit = min(overallLimit, time.Until(deadline)-reserve)
	}
	report, err := Run(t.Context(), Plan(), Programs(), opts)
	if err != nil {
		t.Fatal(err)
	}
	os.Stdout.WriteString("\n" + report.Table())
	for _, row := range report.Rows {
		t.Run(row.Boot+"/"+row.Scenario, func(t *testing.T) {
			if row.Err != nil {
				t.Fatalf("%v\n%s", row.Err, row.Second)
			}
		})
	}
}
