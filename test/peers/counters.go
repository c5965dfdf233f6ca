package main

import (
	"fmt"
	"path/filepath"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/bpf"
)

// counters moves frames over three vifs in turn, in one goroutine and in windows too short
// for the machine to change. The counters of the first vif are mirrored into a map or a
// memfd, those of the other two are not. ratio is the time of a frame with mirrored
// counters, in multiples of the time without. noise is the ratio between the other two vifs.
func (b *bench) counters(size int) (ratio, noise float64, err error) {
	// In a directory outside a BPF file system the store makes no pins, which other
	// programs would see.
	store := &bpf.Store{Root: filepath.Join(b.tmp, "pins")}
	var paths [3]*path
	for i, s := range []telemetry.Store{store, nil, nil} {
		if paths[i], err = newPath(pvnet.Config{Counters: s}, size); err != nil {
			return 0, 0, err
		}
		defer paths[i].lab.close()
	}
	done := make(chan error)
	go func() {
		pin(b.cpus[0])
		var ratios, noises []float64
		for round, end := 0, time.Now().Add(warmUp+b.window); time.Now().Before(end) || round < 9; round++ {
			var ns [3]float64
			for i := range paths {
				at := (i + round) % len(paths) // a different vif is last each round
				if ns[at], err = paths[at].window(); err != nil {
					done <- err
					return
				}
			}
			if round >= len(paths) {
				ratios, noises = append(ratios, ns[0]/ns[1]), append(noises, ns[2]/ns[1])
			}
		}
		ratio, noise = median(ratios), median(noises)
		done <- nil
	}()
	return ratio, noise, <-done
}

// A path is a vif whose frontend sends to its backend, both in one goroutine.
type path struct {
	lab  *lab
	tx   *pvnet.TX
	rx   *pvnet.RX
	size int
	sent [32]pvnet.Frame
	got  [32]pvnet.Frame
}

func newPath(cfg pvnet.Config, size int) (*path, error) {
	lab, err := newLab("")
	if err != nil {
		return nil, err
	}
	p := &path{lab: lab, size: size}
	fronts, backs, err := lab.vifs(1, cfg)
	if err == nil {
		p.tx, err = fronts[0].OwnTX(0)
	}
	if err == nil {
		p.rx, err = backs[0].OwnRX(0)
	}
	if kind, reason := "", ""; err == nil {
		if kind, reason = fronts[0].Counters().Backend(); (kind == "heap") != (cfg.Counters == nil) {
			err = fmt.Errorf("counters are in %s: %s", kind, reason)
		}
	}
	if err != nil {
		lab.close()
		return nil, err
	}
	return p, nil
}

// window moves some thousand frames and returns the nanoseconds per frame.
func (p *path) window() (float64, error) {
	const batches = 64
	start := nano()
	for range batches {
		n := p.tx.AllocSize(p.sent[:], p.size)
		if k, err := p.tx.Send(p.sent[:n]); err != nil || k == 0 {
			return 0, fmt.Errorf("sent %d frames of %d: %w", k, n, err)
		}
		for n > 0 {
			k, err := p.rx.Receive(p.got[:n])
			if err != nil {
				return 0, err
			}
			if err := p.rx.Release(p.got[:k]); err != nil {
				return 0, err
			}
			n -= k
		}
	}
	return float64(nano()-start) / (batches * float64(len(p.sent))), nil
}
