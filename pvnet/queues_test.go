package pvnet_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry/logtest"
	"barevif/xenbus"
	"barevif/xenbus/toolstack"
)

// processors gives Go n processors until the test ends.
func processors(t *testing.T, n int) {
	was := runtime.GOMAXPROCS(n)
	t.Cleanup(func() { runtime.GOMAXPROCS(was) })
}

// AutoQueues is what processors, the backend and the pages that may be granted give: full
// queues, fewer where there are too few pages for all, and some left for other vifs.
func TestAutoQueuesTakesWhatThereIs(t *testing.T) {
	for _, c := range []struct {
		grants, processors, offered, others int // others: vifs of the guest that are not connected yet
		queues, pages                       int // pages: for one queue
	}{
		{1024, 8, 8, 0, 1, 514},
		{2056, 4, 8, 0, 4, 514},
		{2055, 4, 8, 0, 3, 514},
		{513, 4, 8, 0, 1, 258},
		{66, 8, 8, 0, 1, 66},
		{1 << 14, 1, 8, 0, 1, 514},
		{1 << 14, 3, 8, 0, 3, 514},
		{1 << 14, 16, 16, 0, 8, 514},
		{1 << 14, 8, 2, 0, 2, 514},
		{1 << 14, 8, 0, 0, 1, 514},
		{1 << 14, 8, pvnet.AutoQueues, 0, 8, 514},
		{1 << 14, 2, pvnet.AutoQueues, 0, 2, 514},
		{2056, 4, 8, 1, 3, 514},
		{2056, 4, 8, 2, 2, 514},
		{2056, 4, 8, 5, 1, 514},
		{600, 4, 8, 2, 1, 258},
	} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			processors(t, c.processors)
			l := newLabOn(t, emu.Config{Grants: c.grants})
			fdom, bdom := l.domain(1), l.domain(2)
			v := l.add(toolstack.Vif{Front: 1, Back: 2})
			for i := range c.others {
				l.add(toolstack.Vif{Front: 1, Back: 2, ID: uint32(i + 1)})
			}
			backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: c.offered}})
			said := new(logtest.Log)
			front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: pvnet.AutoQueues, Logger: said.Logger()})
			if err != nil {
				t.Fatal(err)
			}
			defer front.Disconnect()
			for range c.others + 1 {
				if back := wait(t, backs); back.ID() == "0" {
					await(t, back, true)
					if back.Active() != c.queues {
						t.Errorf("%d queues at the other end", back.Active())
					}
				}
			}
			if front.Active() != c.queues || front.Queues() != min(c.processors, 8) {
				t.Errorf("%d of %d queues", front.Active(), front.Queues())
			}
			want := c.queues * c.pages
			if room := c.grants - want - 66*c.others; c.queues > 1 && room >= 2 { // for a control ring, too
				want += 2
			}
			if n := front.Budget().SharedPages; n != want || n != l.Ledger().Grants {
				t.Errorf("%d pages are shared, want %d x %d, in all %d", n, c.queues, c.pages, want)
			}
			if c.queues > 1 && l.read(v.FrontDir()+"/multi-queue-num-queues") != fmt.Sprint(c.queues) {
				t.Errorf("it asks for %s", l.read(v.FrontDir()+"/multi-queue-num-queues"))
			}
			for _, want := range []string{
				"msg=queues", fmt.Sprintf("queues=%d processors=%d", c.queues, min(c.processors, 8)),
				fmt.Sprintf("pages=%d", c.queues*c.pages), "KiB",
			} {
				if !strings.Contains(said.String(), want) {
					t.Errorf("the log does not say %q:\n%s", want, said)
				}
			}
			if less := strings.Contains(said.String(), "less than"); less != (c.pages < 514) {
				t.Errorf("it complains %v:\n%s", less, said)
			}
		})
	}
}

// The same Config gives the same device, whatever has become of the processors, and the
// number of its queues stays.
func TestAutoQueuesAreOfTheDevice(t *testing.T) {
	processors(t, 3)
	l := newLabOn(t, emu.Config{Grants: 1 << 14})
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	cfg := pvnet.Config{Queues: pvnet.AutoQueues}
	backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: cfg})
	front, err := pvnet.Connect(ctx(t), fdom, "0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	wait(t, backs)
	runtime.GOMAXPROCS(2)
	if again, err := pvnet.Connect(ctx(t), fdom, "0", cfg); again != front || err != nil {
		t.Errorf("another device: %v", err)
	}
	stop()
	await(t, front, false)
	_, stop = l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: cfg})
	await(t, front, true)
	if front.Queues() != 3 || front.Active() != 2 {
		t.Errorf("%d of %d queues", front.Active(), front.Queues())
	}
	front.Disconnect()
	stop()
}

// Numbers of queues that no backend can mean count as one, and one log line names them. A
// million is more than we want. An empty node is no offer, and no fault either.
func TestNumbersOfQueuesThatMakeNoSense(t *testing.T) {
	for value, c := range map[string]struct {
		queues   int
		unusable bool
	}{
		"1000000": {3, false}, "4294967295": {3, false}, "2": {2, false}, "1": {1, false},
		"0": {1, true}, "": {1, false}, "-1": {1, true}, "4294967296": {1, true}, "many": {1, true}, "02": {1, true},
	} {
		t.Run(value, func(t *testing.T) {
			l := newLabOn(t, emu.Config{Grants: 1 << 14})
			fdom, bdom := l.domain(1), l.domain(2)
			v := l.add(toolstack.Vif{Front: 1, Back: 2})
			backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: 3}})
			wait(t, backs)
			l.reach(v.BackDir()+"/state", fmt.Sprint(int(xenbus.InitWait)))
			l.write(v.BackDir()+"/multi-queue-max-queues", value)
			log := new(logtest.Log)
			front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 3, Logger: log.Logger()})
			if err != nil {
				t.Fatal(err)
			}
			defer front.Disconnect()
			if front.Active() != c.queues || l.exists(v.FrontDir()+"/multi-queue-num-queues") != (c.queues > 1) {
				t.Errorf("%d queues, the number is published %v", front.Active(), l.exists(v.FrontDir()+"/multi-queue-num-queues"))
			}
			want := 0
			if c.unusable {
				want = 1
			}
			if n := len(log.Lines("/backend/vif/1/0/multi-queue-max-queues")); n != want {
				t.Errorf("%d log lines name the key:\n%s", n, log)
			}
		})
	}
}

// reach waits until a node has a value.
func (l *lab) reach(path, value string) {
	l.t.Helper()
	w, err := l.tools.Watch(ctx(l.t), path)
	if err != nil {
		l.t.Fatal(err)
	}
	defer w.Close()
	for l.read(path) != value {
		select {
		case <-w.C():
		case <-ctx(l.t).Done():
			l.t.Fatalf("%s is %q, not %q", path, l.read(path), value)
		}
	}
}
