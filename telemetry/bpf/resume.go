//go:build linux

package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"barevif/telemetry"
)

// resume reads the totals that a killed owner left in the pins in dir. No pins are no
// error.
func (m *mirror) resume(dir string) error {
	e, err := openPins(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("resume totals: %w", err)
	}
	defer e.Close()
	rec, err := e.info()
	if err != nil {
		return fmt.Errorf("resume totals: %w", err)
	}
	for q := range min(int(rec.Slots), len(m.base)/2) {
		words, torn, err := readQueue(e, q, nil)
		if err != nil {
			return fmt.Errorf("resume totals: %w", err)
		}
		for d := range 2 {
			block := words[d*telemetry.BlockWords : (d+1)*telemetry.BlockWords]
			if torn {
				mendSums(block)
			}
			m.base[2*q+d] = slices.Clone(block)
		}
	}
	m.info.Resumed = rec.Start
	return nil
}

// mendSums recomputes the sums of a block whose owner was killed during a publish.
func mendSums(block []uint64) {
	sums := map[string]uint64{}
	for _, f := range telemetry.Fields() {
		if f.SumIn != "" {
			sums[f.SumIn] += block[f.Word]
		}
	}
	for _, f := range telemetry.Fields() {
		if sum, ok := sums[f.Name]; ok {
			block[f.Word] = sum
		}
	}
}
