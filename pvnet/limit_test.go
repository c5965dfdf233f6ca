package pvnet_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// All queues get the same number of pages, and there are as many queues as fit.
func TestQueuesShareALimitEvenly(t *testing.T) {
	for _, c := range []struct {
		grants, asked, queues, pages int // pages: for one queue
	}{
		{1024, 1, 1, 514},
		{1024, 2, 2, 258},
		{1024, 4, 4, 130},
		{1024, 8, 8, 66},
		{1024, 16, 15, 66},
		{2056, 4, 4, 514},
		{2055, 4, 4, 258},
		{263, 4, 3, 66},
		{132, 8, 2, 66},
		{131, 2, 1, 130},
		{66, 8, 1, 66},
	} {
		t.Run(fmt.Sprintf("%d pages, %d queues", c.grants, c.asked), func(t *testing.T) {
			l := newLabOn(t, emu.Config{Grants: c.grants})
			fdom, bdom := l.domain(1), l.domain(2)
			v := l.add(toolstack.Vif{Front: 1, Back: 2})
			backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: 16}})
			said := new(logtest.Log)
			front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: c.asked, Logger: said.Logger()})
			if err != nil {
				t.Fatal(err)
			}
			defer front.Disconnect()
			back := wait(t, backs)
			await(t, back, true)
			if front.Active() != c.queues || back.Active() != c.queues || l.exists(v.FrontDir()+"/multi-queue-num-queues") != (c.queues > 1) {
				t.Errorf("%d queues, %d at the other end", front.Active(), back.Active())
			}
			want := c.queues * c.pages
			if c.queues > 1 && c.grants >= want+2 { // there is room for a control ring, too
				want += 2
			}
			if n := front.Budget().SharedPages; n != want || n != l.Ledger().Grants {
				t.Errorf("%d pages are shared, want %d x %d, in all %d", n, c.queues, c.pages, want)
			}
			asked, got := queues(c.asked, 514), queues(c.queues, c.pages)
			for _, want := range []string{`asked="` + asked, `got="` + got, "emu.Config.Grants", fmt.Sprint(c.grants)} {
				if asked != got && !strings.Contains(said.String(), want) {
					t.Errorf("nothing says %q:\n%s", want, said)
				}
			}
			if asked == got && strings.Contains(said.String(), "less than") {
				t.Errorf("it says\n%s", said)
			}
		})
	}
}

func queues(n, pages int) string {
	if n == 1 {
		return fmt.Sprintf("1 queue of %d pages", pages)
	}
	return fmt.Sprintf("%d queues of %d pages", n, pages)
}

func TestALimitThatIsTooLowIsNamed(t *testing.T) {
	for name, c := range map[string]struct {
		cfg  emu.Config
		is   error
		says []string
	}{
		"grants":         {emu.Config{Grants: 65}, hypercall.ErrNoGrants, []string{"emu.Config.Grants", "65"}},
		"event channels": {emu.Config{Ports: 1}, hypercall.ErrNoPorts, []string{"emu.Config.Ports", "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLabOn(t, c.cfg)
			fdom, bdom := l.domain(1), l.domain(2)
			l.add(toolstack.Vif{Front: 1, Back: 2})
			l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: 4}})
			_, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 4})
			if !errors.Is(err, c.is) {
				t.Fatal(err)
			}
			for _, want := range append(c.says, "4 queues of 514 pages asked for", "1 queue of 66 pages") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
			if led := l.Ledger(); led.Grants != 0 || led.Ports > 1 { // one is the backend's presence
				t.Errorf("left behind: %+v", led)
			}
		})
	}
}

func TestFewerQueuesThanTheEventChannelsAllow(t *testing.T) {
	l := newLabOn(t, emu.Config{Ports: 5})
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: 4}})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 4})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	back := wait(t, backs)
	await(t, back, true)
	if front.Active() != 2 || back.Active() != 2 || front.Budget().SharedPages != 2*258+2 {
		t.Errorf("%d queues, %d at the other end, %v", front.Active(), back.Active(), front.Budget())
	}
	for i := range 2 {
		if _, err := front.OwnTX(i); err != nil {
			t.Error(err)
		}
	}
}

// The first of two vifs leaves room for the second, if it can. If it cannot, the error of
// the second names the first.
func TestVifsShareALimit(t *testing.T) {
	for _, c := range []struct{ grants, first, second int }{
		{1024, 4*130 + 2, 258}, // two more for the control ring
		{200, 2*66 + 2, 66},
		{199, 2 * 66, 66}, // where there is room for it
		{132, 66, 66},
		{131, 66, 0},
	} {
		t.Run(fmt.Sprintf("%d pages", c.grants), func(t *testing.T) {
			l := newLabOn(t, emu.Config{Grants: c.grants})
			fdom, bdom := l.domain(1), l.domain(2)
			l.add(toolstack.Vif{Front: 1, Back: 2})
			l.add(toolstack.Vif{Front: 1, Back: 2, ID: 1})
			l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: 4}})
			first, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 4})
			if err != nil {
				t.Fatal(err)
			}
			defer first.Disconnect()
			if n := first.Budget().SharedPages; n != c.first {
				t.Errorf("the first shares %d pages, want %d", n, c.first)
			}
			second, err := pvnet.Connect(ctx(t), fdom, "1", pvnet.Config{})
			if c.second == 0 {
				if want := fmt.Sprintf("vif 0 holds %d pages", c.first); !errors.Is(err, hypercall.ErrNoGrants) || !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not say %q", err, want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer second.Disconnect()
			if n := second.Budget().SharedPages; n != c.second {
				t.Errorf("the second shares %d pages, want %d", n, c.second)
			}
		})
	}
}
