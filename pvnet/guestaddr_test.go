package pvnet_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
)

func guestAddresses(gateway string, addrs ...string) (g pvnet.GuestAddresses) {
	for _, a := range addrs {
		g.Addrs = append(g.Addrs, netip.MustParsePrefix(a))
	}
	if gateway != "" {
		g.Gateway = netip.MustParseAddr(gateway)
	}
	return g
}

// A frontend learns the addresses that the toolstack wrote for it into the backend's
// directory, in either form, and is told of a value that it cannot use.
func TestAFrontendLearnsItsAddresses(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := toolstack.Vif{Front: 1, Back: 2, IP: "10.0.0.7/24 fd00::7"}
	l.add(v)
	l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	key := v.BackDir() + "/ip"
	for i, c := range []struct {
		ip   string
		want pvnet.GuestAddresses
		bad  bool
	}{
		{ip: v.IP, want: guestAddresses("", "10.0.0.7/24", "fd00::7/128")},
		{ip: "10.0.0.7", want: guestAddresses("", "10.0.0.7/32")},
		{ip: "", want: pvnet.GuestAddresses{}},
		{ip: "  10.0.0.7/8   10.0.0.8 ", want: guestAddresses("", "10.0.0.7/8", "10.0.0.8/32")},
		{ip: "10.0.0.7 255.255.255.0", want: guestAddresses("", "10.0.0.7/24")},
		{ip: "10.0.0.7 255.255.0.0 10.0.3.1", want: guestAddresses("10.0.3.1", "10.0.0.7/16")},
		{ip: "10.0.0.7 255.255.255.255", want: guestAddresses("", "10.0.0.7/32")},
		{ip: "10.0.0.7 10.0.0.8 10.0.0.9", want: guestAddresses("", "10.0.0.7/32", "10.0.0.8/32", "10.0.0.9/32")},
		{ip: "10.0.0.7 255.0.255.0", bad: true},                                             // holes
		{ip: "10.0.0.7 255.255.255.0 10.0.1.1", bad: true},                                  // the router is elsewhere
		{ip: "10.0.0.7 255.255.255.0 10.0.0.7", bad: true},                                  // the router is itself
		{ip: "10.0.0.7 255.255.255.0 255.0.0.0", bad: true},                                 // no router's address
		{ip: "10.0.0.7/24 255.255.255.0 10.0.0.1", bad: true},                               // both forms at once
		{ip: "fd00::7 255.255.255.0", bad: true},                                            // a netmask for IPv6
		{ip: "255.255.255.0 255.255.255.0", bad: true},                                      // no station
		{ip: "10.0.0.7 255.255.255.0 10.0.0.1 x", bad: true},                                // a word too many
		{ip: "240.0.0.1", bad: true},                                                        // reserved
		{ip: "::ffff:10.0.0.7", bad: true},                                                  // mapped
		{ip: "10.0.0.7,10.0.0.8", bad: true},                                                // no blanks
		{ip: "10.0.0.7/33", bad: true},                                                      // too long
		{ip: "\x1b[2J", bad: true},                                                          // an escape sequence
		{ip: strings.Repeat("10.0.0.7 ", 65), bad: true},                                    // too many
		{ip: strings.Repeat("1", 3000), bad: true},                                          // long
		{ip: " ", bad: true},                                                                // blank
		{ip: "224.0.0.1", bad: true},                                                        // a group
		{ip: "0.0.0.0 255.0.0.0", bad: true},                                                // no address
		{ip: "10.0.0.7 128.0.0.0", want: guestAddresses("", "10.0.0.7/32", "128.0.0.0/32")}, // a list
	} {
		if i > 0 {
			if err := l.Tools.Write(ctx(t), key, c.ip); err != nil {
				t.Fatal(err)
			}
		}
		got, err := front.GuestAddresses(ctx(t))
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%q: %+v, want %+v", c.ip, got, c.want)
		}
		bad, ok := errors.AsType[*xenstore.ValueError](err)
		switch {
		case !c.bad && err != nil, c.bad && !ok:
			t.Errorf("%q: %v", c.ip, err)
		case c.bad && (bad.Path != key || len(err.Error()) > 600 || strings.ContainsAny(err.Error(), "\x1b\n")):
			t.Errorf("%q: %q, of %s", c.ip, err, bad.Path)
		}
	}
	if err := l.Tools.Remove(ctx(t), key); err != nil {
		t.Fatal(err)
	}
	if got, err := front.GuestAddresses(ctx(t)); err != nil || len(got.Addrs) != 0 {
		t.Errorf("without a key: %+v, %v", got, err)
	}
	front.Disconnect()
	if _, err := front.GuestAddresses(ctx(t)); !errors.Is(err, pvnet.ErrDisconnected) {
		t.Errorf("after the end: %v", err)
	}
}

// A key that the guest may not read counts as none, and a backend has no such addresses.
func TestAddressesThatCannotBeRead(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := toolstack.Vif{Front: 1, Back: 2, IP: "10.0.0.7/24"}
	l.add(v)
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	if err := l.Tools.SetPerms(ctx(t), v.BackDir()+"/ip", xenstore.Perm{Dom: 2, Access: xenstore.None}); err != nil {
		t.Fatal(err)
	}
	if got, err := front.GuestAddresses(ctx(t)); err != nil || len(got.Addrs) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	back := wait(t, backs)
	if _, err := back.GuestAddresses(ctx(t)); !errors.Is(err, pvnet.ErrNotFrontend) {
		t.Errorf("of a backend: %v", err)
	}
}

// What the toolstack writes while the vif is connected is followed: each usable value once, one
// that is not with its error, and nothing while the backend's directory is gone.
func TestAFrontendFollowsItsAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLinked(t, toolstack.Vif{IP: "10.0.0.7/24"})
		key := l.v.BackDir() + "/ip"
		following, stop := context.WithCancel(context.Background())
		news := make(chan string, 100)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for g, err := range l.front.GuestAddressChanges(following) {
				if err != nil {
					if _, bad := errors.AsType[*xenstore.ValueError](err); !bad {
						t.Error(err)
					}
					news <- "bad"
					continue
				}
				news <- fmt.Sprint(g.Addrs, g.Gateway)
			}
		}()
		want := func(change string) {
			t.Helper()
			time.Sleep(time.Minute) // the bubble's clock: whatever is to follow has followed
			got := ""
			for len(news) > 0 {
				got += <-news
			}
			if got != change {
				t.Errorf("%q, want %q", got, change)
			}
		}
		const none = " invalid IP"
		want("[10.0.0.7/24]" + none)
		l.write(key, "10.0.0.8/24 fd00::8/64")
		want("[10.0.0.8/24 fd00::8/64]" + none)
		l.write(key, "10.0.0.8/24  fd00::8/64 ")
		want("") // the same addresses
		l.write(key, "10.0.0.300")
		want("bad")
		l.write(key, "10.0.0.300")
		want("")
		l.write(key, "10.0.0.8/24 fd00::8/64")
		want("[10.0.0.8/24 fd00::8/64]" + none)
		l.write(key, "10.0.0.9 255.255.255.0 10.0.0.1")
		want("[10.0.0.9/24] 10.0.0.1")
		if err := l.Tools.Remove(context.Background(), key); err != nil {
			t.Fatal(err)
		}
		want("[]" + none)
		l.write(key, "10.0.0.9/24")
		want("[10.0.0.9/24]" + none)
		// The key "frontend" is one of the directory's first and last.
		if err := l.Tools.Remove(context.Background(), l.v.BackDir()+"/frontend"); err != nil {
			t.Fatal(err)
		}
		if err := l.Tools.Remove(context.Background(), key); err != nil {
			t.Fatal(err)
		}
		want("")
		l.write(l.v.BackDir()+"/frontend", l.v.FrontDir())
		stop()
		<-ended
		l.front.Disconnect()
		for range l.front.GuestAddressChanges(context.Background()) {
			t.Error("a device that has ended has addresses")
		}
		count := 0
		for _, err := range l.back.GuestAddressChanges(context.Background()) {
			if count++; !errors.Is(err, pvnet.ErrNotFrontend) {
				t.Errorf("of a backend: %v", err)
			}
		}
		if count != 1 {
			t.Errorf("a backend has %d changes", count)
		}
		l.stop()
	})
}

// A backend that writes the key without end is followed at our pace.
func TestAddressesThatChangeWithoutEndAreFollowedSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		v := l.add(toolstack.Vif{Front: 1, Back: 2, IP: "10.0.0.7/24"})
		_, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		var changes atomic.Int32
		var last atomic.Value
		go func() {
			for g := range front.GuestAddressChanges(context.Background()) {
				changes.Add(1)
				last.Store(fmt.Sprint(g.Addrs))
			}
		}()
		for i := range 2000 {
			l.write(v.BackDir()+"/ip", fmt.Sprintf("10.0.%d.%d/8", i/200, i%200+1))
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Minute)
		if n := changes.Load(); n < 20 || n > 150 {
			t.Errorf("%d changes were followed within 2 s", n)
		}
		if last.Load() != "[10.0.9.200/8]" {
			t.Errorf("the last are %v", last.Load())
		}
		front.Disconnect()
		stop()
	})
}
