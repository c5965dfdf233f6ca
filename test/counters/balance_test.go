package counters

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/telemetry/bpf"
	"barevif/telemetry/bpf/bpftest"
)

// flood sends as fast as the queue takes it and receives at the other end, until
// stop. Every frame sent has been received by then.
func flood(t *testing.T, p *path, size int) (stop func()) {
	t.Helper()
	var wg sync.WaitGroup
	ending, total := make(chan struct{}), make(chan int, 1)
	wg.Go(func() {
		sent := 0
		defer func() { total <- sent }()
		for frames := make([]pvnet.Frame, len(p.frames)); ; {
			select {
			case <-ending:
				return
			default:
			}
			n := p.tx.AllocSize(frames, size)
			k, err := p.tx.SendWait(frames[:n])
			if sent += k; err != nil {
				t.Error(err)
				return
			}
		}
	})
	wg.Go(func() {
		var end time.Time
		for received, sent := 0, -1; received != sent; {
			p.rx.SetDeadline(time.Now().Add(20 * time.Millisecond))
			k, err := p.rx.Receive(p.frames)
			received += k
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil
			}
			if err = errors.Join(err, p.rx.Release(p.frames[:k])); err != nil {
				t.Error(err)
				return
			}
			select {
			case sent = <-total:
				end = time.Now().Add(limit)
			default:
			}
			if sent >= 0 && time.Now().After(end) {
				t.Errorf("received %d of %d frames", received, sent)
				return
			}
		}
	})
	stop = sync.OnceFunc(func() { close(ending); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// watchFlows looks at the two flows of the vif while frames move both ways. It returns what of that nobody saw, if anything.
func watchFlows(t *testing.T) (missing string) {
	t.Helper()
	const looks = 12
	lines := strings.Split(strings.TrimSpace(bpftest.Run(t, command(t), "stat", "--json", "--watch", "--count", strconv.Itoa(looks), "--interval", "100ms", frontName, backName)), "\n")
	if len(lines) != looks {
		t.Fatalf("%d looks", len(lines))
	}
	type flow struct {
		Sent, Received uint64
		Least          int64 `json:"difference_least"`
		Most           int64 `json:"difference_most"`
		Verdict        string
	}
	verdicts := map[string]int{}
	var first, last []flow
	for _, line := range lines {
		var j struct{ Pairs []struct{ Flows []flow } }
		if err := json.Unmarshal([]byte(line), &j); err != nil || len(j.Pairs) != 1 {
			t.Fatalf("%v: %s", err, line)
		}
		for _, f := range j.Pairs[0].Flows {
			verdicts[f.Verdict]++
			if !slices.Contains([]string{"balanced", "moving", "in flight", "not shown yet"}, f.Verdict) || f.Least > f.Most {
				t.Errorf("%+v", f)
			}
		}
		if last = j.Pairs[0].Flows; first == nil {
			first = last
		}
	}
	t.Logf("%v", verdicts)
	for i := range last {
		if last[i].Sent <= first[i].Sent || last[i].Received <= first[i].Received {
			missing = fmt.Sprintf("nothing moved: %+v after %+v", last[i], first[i])
		}
	}
	if verdicts["balanced"] == 2*looks {
		missing = "nobody saw a frame on its way"
	}
	return missing
}

// Whoever looks at a vif in full flight is told neither that it loses frames nor
// more than can be known; once it rests the two ends are equal to the frame.
func TestBalanceHoldsWhileFramesMove(t *testing.T) {
	bpftest.Need(t)
	cfg := pvnet.Config{Queues: 2, Counters: &bpf.Store{}}
	w := newWire(t, cfg, cfg)
	bpftest.Eventually(t, "both ends use all queues", func() bool { return w.Front.Active() == 2 && w.Back.Active() == 2 })
	stops := []func(){
		flood(t, newPath(t, w.Front, w.Back, 0, 32), 1500),
		flood(t, newPath(t, w.Front, w.Back, 1, 5), 60),
		flood(t, newPath(t, w.Back, w.Front, 0, 16), 300),
	}
	// A machine that leaves the floods no time shows that nothing moves: then it is watched again.
	for end := time.Now().Add(limit); ; {
		what := watchFlows(t)
		if what == "" {
			break
		}
		if time.Now().After(end) {
			t.Error(what)
			break
		}
	}
	for _, stop := range stops {
		stop()
	}
	bpftest.Eventually(t, "the ends are equal", func() bool {
		s := statJSON(t, nil, frontName, backName)
		for _, f := range s.Pairs[0].Flows {
			if f.Verdict != "balanced" || f.Sent != f.Received+f.Dropped || f.Sent == 0 {
				return false
			}
		}
		return true
	})
}
