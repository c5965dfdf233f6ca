package hostile

import (
	"fmt"
	"testing"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// The tests of this file replay what other systems write to xenstore, in their order, with
// correct rings behind it. TestT25WindowsClosesFirst is win-xenvif's; the lab has Linux's own
// drivers.

// startAs gives the guest rings as a driver has them that knows one event channel only.
func (g *guest) startAs() xenstore.Values {
	g.l.t.Helper()
	var err error
	if g.Front, err = raw.NewFront(g.l.guest, backID, 32, false); err != nil {
		g.l.t.Fatal(err)
	}
	keys := g.Keys()
	for _, k := range []string{"feature-rx-notify", "feature-sg"} {
		delete(keys, k)
	}
	return keys
}

// removeKeys removes keys of the frontend.
func (g *guest) removeKeys(keys ...string) {
	g.l.t.Helper()
	for _, k := range keys {
		if err := g.l.guestStore.Remove(ctx(g.l.t), g.v.FrontDir()+"/"+k); err != nil {
			g.l.t.Fatal(err)
		}
	}
}

// vifFor adds a vif for a guest whose driver makes its rings itself.
func (l *lab) vifFor() *guest {
	l.t.Helper()
	g := &guest{l: l}
	g.v = l.addVif()
	g.dev = wait(l.t, l.devs)
	g.before = l.Ledger()
	return g
}

// FreeBSD's netfront, sys/dev/xen/netfront/netfront.c: talk_to_backend writes the keys in one
// transaction, netfront_backend_changed the state behind it, and xn_kick_rings posts the
// pages after that. SIOCSIFCAP (ifconfig xn0 -rxcsum) removes the keys of the features
// that changed, closes, and connects with new rings; netfront_backend_changed ends the
// grants only once the backend is Closed.
func TestTraceOfFreeBSDNetfront(t *testing.T) {
	l := newServingLab(t)
	g := l.vifFor()
	connect := func(features xenstore.Values) {
		g.awaitBackend("2")
		keys := g.startAs()
		keys["feature-rx-notify"], keys["feature-sg"] = "1", "1"
		for k, v := range features {
			keys[k] = v
		}
		l.write(l.guestStore, g.v.FrontDir(), keys, "")
		g.setState("4")
		g.TxPort.Notify()
		g.Post(raw.Size)
		g.awaitBackend("4")
		waitLinkUp(t, g.dev)
	}
	connect(xenstore.Values{"feature-gso-tcpv4": "1"})
	g.sink = listen(g.dev)
	g.requireTraffic()
	if !g.dev.PeerTakes(pvnet.GSOTCPv4) {
		t.Error("its LRO is not used")
	}
	for _, features := range []xenstore.Values{
		{"feature-gso-tcpv4": "1", "feature-no-csum-offload": "1"}, {}, {"feature-gso-tcpv4": "1"},
	} {
		g.removeKeys("feature-gso-tcpv4", "feature-no-csum-offload")
		g.setState("5")
		g.awaitBackend("5")
		g.setState("6")
		g.awaitBackend("6")
		if err := g.Close(); err != nil { // netif_disconnect_backend
			t.Fatalf("our backend keeps pages after Closed: %v", err)
		}
		g.setState("1")
		connect(features)
		g.requireTraffic()
		if want := features["feature-gso-tcpv4"] == "1" && features["feature-no-csum-offload"] == ""; g.dev.PeerTakes(pvnet.GSOTCPv4) != want {
			t.Errorf("with %v it takes GSO: %v", features, !want)
		}
	}
	// xl network-detach: it goes to Closed at once, without a Closing of its own.
	removed := make(chan struct{})
	go func() {
		defer close(removed)
		l.removeVif(g.v)
	}()
	g.awaitBackend("5")
	g.setState("6")
	wait(t, g.dev.Done())
	wait(t, g.sink.ended)
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	<-removed
}

// The same with several queues: write_queue_xenstore_keys gives each a directory, and one
// event channel, not two.
func TestTraceOfFreeBSDNetfrontWithQueues(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Queues: 4}})
	g := l.vifFor()
	g.awaitBackend("2")
	keys := xenstore.Values{"multi-queue-num-queues": "4", "request-rx-copy": "1", "feature-rx-notify": "1", "feature-sg": "1", "feature-gso-tcpv4": "1"}
	var fronts []*raw.Front
	for i := range 4 {
		own := g.startAs()
		fronts = append(fronts, g.Front)
		for _, k := range []string{"tx-ring-ref", "rx-ring-ref", "event-channel"} {
			keys[fmt.Sprintf("queue-%d/%s", i, k)] = own[k]
		}
	}
	l.write(l.guestStore, g.v.FrontDir(), keys, "")
	g.setState("4")
	for _, f := range fronts {
		f.TxPort.Notify()
		f.Post(raw.Size)
	}
	g.awaitBackend("4")
	waitLinkUp(t, g.dev)
	if n := g.dev.Active(); n != 4 {
		t.Fatalf("%d queues", n)
	}
	g.sink = listen(g.dev)
	for _, f := range fronts { // frames to it take one queue by their addresses
		g.Front = f
		want := pattern(200, 1)
		copy(f.Pages.Page(0), want)
		f.Put(f.Req(0, 0, 200, 0).Words())
		f.Push()
		g.awaitAnswers(1)
		g.sink.requireFrame(t, want)
	}
	g.closeHandshake()
	l.removeVif(g.v)
	wait(t, g.dev.Done())
	wait(t, g.sink.ended)
	for _, f := range fronts {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Mini-OS's netfront.c: init_netfront posts all pages, and writes its keys and Connected in
// one transaction, whatever state the backend is in. It waits while the backend's state
// is below Connected and gives up when it is above. It publishes no feature at all.
// shutdown_netfront closes, goes back to Initialising, waits for InitWait, and then removes
// its keys and ends the grants.
func TestTraceOfMiniOSNetfront(t *testing.T) {
	l := newServingLab(t)
	g := &guest{l: l}
	g.v = l.addVif() // it does not wait for our backend to notice
	for range 3 {
		keys := g.startAs()
		g.Post(raw.Size)
		l.write(l.guestStore, g.v.FrontDir(), keys, "4")
		if g.dev == nil {
			g.dev = wait(t, l.devs)
		}
		if s := g.awaitBackend("4", "5", "6"); s != "4" {
			t.Fatalf("it gives up: our backend is in %s", s)
		}
		waitLinkUp(t, g.dev)
		if g.sink == nil {
			g.sink = listen(g.dev)
		}
		g.requireTraffic()
		if _, err := g.dev.Write(pattern(5000, 0)); err != pvnet.ErrFrameSize {
			t.Errorf("a frame of two pages: %v", err)
		}
		if g.dev.PeerTakes(pvnet.GSOTCPv4) {
			t.Error("GSO frames, for a driver that takes one page")
		}

		g.setState("5")
		g.awaitBackend("5", "6")
		g.setState("6")
		g.awaitBackend("6")
		g.setState("1")
		g.awaitBackend("2")
		g.removeKeys("tx-ring-ref", "rx-ring-ref", "event-channel", "request-rx-copy")
		if err := g.Close(); err != nil { // free_netfront
			t.Fatalf("our backend keeps pages: %v", err)
		}
	}
	l.removeVif(g.v)
	wait(t, g.dev.Done())
	wait(t, g.sink.ended)
}

// FreeBSD's backend, sys/dev/xen/netback/netback.c: xnb_attach publishes four features, and
// InitWait; xnb_frontend_changed connects with one event channel, unmaps before Closing, and
// follows to Closed. xenbusb_back_otherend_changed (sys/xen/xenbus/xenbusb_back.c) then
// answers Initialising with InitWait.
func TestTraceOfFreeBSDNetback(t *testing.T) {
	l := newLab(t, emu.Config{})
	xnb := xenstore.Values{"feature-sg": "1", "feature-gso-tcpv4": "0", "feature-rx-copy": "1", "feature-rx-flip": "0"}
	drv := l.connectFrontendBy(pvnet.Config{Queues: 2}, func(drv *driver) { drv.offerWith(xnb) })
	if drv.dev.Active() != 1 || drv.TxPort != drv.RxPort {
		t.Errorf("%d queues", drv.dev.Active())
	}
	drv.sink = listen(drv.dev)
	drv.requireTraffic()

	// The backend's domain is shut down, and another attaches to the vif.
	drv.closeHandshake()
	drv.setState("2")
	drv.awaitFrontend("4")
	drv.offerWith(xnb)
	drv.awaitPages()
	drv.requireTraffic()

	// Our frontend leaves: Closing is answered once the rings are unmapped.
	go drv.dev.Disconnect()
	drv.awaitFrontend("5")
	if err := drv.Close(); err != nil {
		t.Fatal(err)
	}
	drv.setState("5")
	drv.awaitFrontend("6")
	drv.setState("6")
	wait(t, drv.dev.Done())
	wait(t, drv.sink.ended)
	l.removeVif(drv.v)
	eventually(t, "everything back", func() bool { return l.Ledger() == drv.before })
}
