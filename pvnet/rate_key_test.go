package pvnet_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// What the toolstack writes as a vif's "rate" is in force: from the first frame, and whatever
// it becomes while the link is up. A value that cannot be read changes nothing, and a line
// in the log names it.
func TestTheRateInXenstore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := new(logtest.Log)
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		v := l.add(toolstack.Vif{Front: 1, Back: 2, Rate: "10000,50000"})
		backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: log.Logger()}})
		defer stop()
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer front.Disconnect()
		back := wait(t, backs)
		await(t, back, true)
		var bytes atomic.Int64
		listening, end := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			done <- back.Listen(listening, func(f pvnet.Frame) {
				if bytes.Add(int64(f.Len()))%10000 == 0 {
					time.Sleep(time.Millisecond) // without a limit it takes 10 MB/s
				}
			})
		}()
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			b := frame(1000, 1)
			for {
				if _, err := front.Write(b); err != nil {
					return
				}
			}
		}()
		key := v.BackDir() + "/rate"
		write := func(text string) func() error {
			return func() error { return l.tools.Write(ctx(t), key, text) }
		}
		for i, c := range []struct {
			change func() error
			want   uint64 // bytes/s
			says   string
		}{
			{func() error { return nil }, 200000, "limit=\"200000 bytes/s: 10000 bytes every 50ms\""},
			{write("5000,1000000"), 5000, "limit=\"5000 bytes/s"},
			{write("a lot"), 5000, "key=backend/vif/1/0/rate value=\"a lot\" instead=\"the limit stays as it was: 5000 bytes/s"},
			{write("20000,100000"), 200000, "limit=\"200000 bytes/s"},
			{write(""), 200000, "value=\"\" instead=\"the limit stays as it was: 200000 bytes/s"},
			{write("1000,0"), 0, "limit=none"},
			{write("7000,7000"), 1000000, "limit=\"1000000 bytes/s"},
			{func() error { return l.tools.Remove(ctx(t), key) }, 0, "limit=none"},
		} {
			lines := len(log.Lines(c.says))
			if err := c.change(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * time.Second) // also for what is left under the limit before
			synctest.Wait()
			before := bytes.Load()
			time.Sleep(10 * time.Second)
			synctest.Wait()
			got := uint64(bytes.Load()-before) / 10
			if c.want == 0 && got < 5e6 || c.want != 0 && (got > c.want*101/100 || got < c.want*98/100) {
				t.Errorf("step %d: %d bytes/s, want %d", i, got, c.want)
			}
			if i > 0 && len(log.Lines(c.says)) != lines+1 || i == 0 && lines != 1 {
				t.Errorf("step %d: the log does not say %s once:\n%s", i, c.says, log)
			}
			if n := back.Stats().Queues[0].RX.Gauge(telemetry.RateLimit); n != c.want {
				t.Errorf("step %d: the gauge says %d", i, n)
			}
		}
		// A storm of changes is followed at our pace, and its last value is in force in the end.
		state := back.Counters().Totals().RX.Gauge(telemetry.RateLimit)
		seen := 0
		for i := range 2000 {
			if err := write(fmt.Sprintf("%d,50000", 1000+i))(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
			if now := back.Stats().Queues[0].RX.Gauge(telemetry.RateLimit); now != state {
				state = now
				seen++
			}
		}
		if seen > 200 {
			t.Errorf("%d of 2000 changes were followed in two seconds", seen)
		}
		time.Sleep(5 * time.Second)
		if n := back.Stats().Queues[0].RX.Gauge(telemetry.RateLimit); n != 2999*20 {
			t.Errorf("the last change was missed: %d bytes/s", n)
		}
		end()
		<-done
		front.Disconnect()
		<-sent
	})
}
