//go:build linux

package main

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/xenbus/toolstack"
)

// sendRounds sends rounds to the frontend of a vif, until the end of the test.
func sendRounds(t *testing.T, w *pvnettest.Wire) {
	c, cancel := context.WithCancel(t.Context())
	var sending sync.WaitGroup
	// The list comes in requests of the frontend, which somebody has to take.
	sending.Go(func() { _ = w.Back.Listen(c, func(pvnet.Frame) {}) })
	sending.Go(func() {
		for c.Err() == nil {
			_, _ = w.Back.WriteBatch(round(net.HardwareAddr{2, 0, 0, 0, 0, 1})) // fails at the end of the vif
			select {
			case <-time.After(2 * time.Millisecond):
			case <-c.Done():
			}
		}
	})
	t.Cleanup(func() { cancel(); sending.Wait() })
}

// A backend that filters as it should is found right.
func TestOurBackendPassesTheMulticastProbe(t *testing.T) {
	w := pvnettest.New(t, toolstack.Vif{}, pvnet.Config{}, pvnet.Config{})
	sendRounds(t, w)
	if err := goThrough(t.Context(), w.Front); err != nil {
		t.Error(err)
	}
}

// A group too many and a group too few are both noticed.
func TestTheMulticastProbeNoticesAWrongFilter(t *testing.T) {
	w := pvnettest.New(t, toolstack.Vif{}, pvnet.Config{}, pvnet.Config{})
	sendRounds(t, w)
	if err := w.Front.SetMulticast(t.Context(), groups(3, 5)); err != nil {
		t.Fatal(err)
	}
	rx, err := w.Front.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	m := new(members)
	go m.receive(rx)
	for want, list := range map[string][]pvnet.MAC{
		"which is not listed":          groups(3, 4),
		"0 of":                         groups(3, 6),
		"frames of group 01:00:5e:09:": nil,
	} {
		if err := m.see("a wrong list", list); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", list, err)
		}
	}
	if err := m.see("the list", groups(3, 5)); err != nil {
		t.Error(err)
	}
}
