package main

import (
	"time"

	"barevif/tools/cli"

	"github.com/schollz/progressbar/v3"
)

// A progress shows how many of size bytes were written to it: as a bar on a terminal,
// otherwise as a line, or a record, per quarter.
type progress struct {
	p          *cli.Program
	size, done int64
	bar        *progressbar.ProgressBar // nil: lines
	quarter    int64
}

func newProgress(program *cli.Program, size int64) *progress {
	p := &progress{p: program, size: size}
	w := program.Stdout
	if program.Format == cli.LogText && isTerminal(w) {
		p.bar = progressbar.NewOptions64(size,
			progressbar.OptionSetWriter(w),
			progressbar.OptionSetDescription("          "),
			progressbar.OptionShowBytes(true),
			progressbar.OptionShowCount(),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionSetWidth(40),
			progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionClearOnFinish(),
		)
		_ = p.bar.RenderBlank() // the rate counts from here
	}
	return p
}

// Write counts b. It never fails: a terminal that is gone must not end a transfer.
func (p *progress) Write(b []byte) (int, error) {
	p.done += int64(len(b))
	if p.bar != nil {
		_ = p.bar.Set64(p.done)
		return len(b), nil
	}
	for p.quarter < 4 && p.size > 0 && p.done >= p.size*(p.quarter+1)/4 {
		p.quarter++
		p.p.Say("%-10s %3d %%  %s", "", 25*p.quarter, cli.BinarySize(uint64(p.size*p.quarter/4)))
	}
	return len(b), nil
}

// finish ends the bar and leaves the terminal clean.
func (p *progress) finish() {
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}
