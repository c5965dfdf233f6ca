package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
)

// A Run is one measurement of one row.
type Run struct {
	Row      string  `json:"row"`
	Class    string  `json:"class"`
	Kind     string  `json:"kind"`
	Bytes    int     `json:"bytes"`
	Rep      int     `json:"rep"`
	Line     float64 `json:"line"`               // round trip of a cache line before the run, ns
	Ns       float64 `json:"ns"`                 // stream: per received frame; ping-pong: median; counters: the ratio
	P99      float64 `json:"p99,omitempty"`      // ping-pong: 99th percentile, ns
	CPU      float64 `json:"cpu,omitempty"`      // ns of all threads and processes, per frame
	Allocs   float64 `json:"allocs,omitempty"`   // allocations of this process, per frame
	Notifies float64 `json:"notifies,omitempty"` // notifications of both parties, per frame
	Lost     float64 `json:"lost,omitempty"`     // share of the frames sent
	Noise    float64 `json:"noise,omitempty"`    // counters: the ratio of two equal vifs
	Others   float64 `json:"others,omitempty"`   // share of all CPUs that other work used
}

func (r Run) key() key { return key{r.Row, r.Kind, r.Bytes} }

// A Gap is a row that could not be measured, and why.
type Gap struct {
	Row    string `json:"row"`
	Class  string `json:"class"`
	Kind   string `json:"kind"`
	Bytes  int    `json:"bytes"`
	Reason string `json:"reason"`
}

func (g Gap) key() key { return key{g.Row, g.Kind, g.Bytes} }

// A Result is everything about a run of the program.
type Result struct {
	Machine Machine `json:"machine"`
	Date    string  `json:"date"` // RFC 3339
	Commit  string  `json:"commit"`
	Window  string  `json:"window"` // of one stream
	Runs    []Run   `json:"runs"`
	Gaps    []Gap   `json:"gaps"`
}

func (r *Result) write(name string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	// Put each run on a line of its own. A quote inside a string is escaped, so this text
	// occurs only at the beginning of a run.
	b = bytes.ReplaceAll(b, []byte(`{"row":`), []byte("\n{\"row\":"))
	return os.WriteFile(name, append(b, '\n'), 0o644)
}

func readResult(name string) (*Result, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("%w (a run with -json %s makes one)", err, name)
	}
	var r Result
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%s: %w (is it what -json wrote?)", name, err)
	}
	if len(r.Runs) == 0 {
		return nil, fmt.Errorf("%s holds no runs (is it what -json wrote?)", name)
	}
	return &r, nil
}
