package xenlab

import (
	"fmt"
)

// ourBackPaused pauses a domain whose netfront takes frames of our backend, while dom0 sends
// to it. The frames that wait are dropped, its TAP loses the carrier, and another guest of
// the same backend notices nothing. When the domain goes on, so does its traffic.
func ourBackPaused(t *T) {
	t.loadNetback(false)
	dom0 := t.Dom0()
	dom0.Run("modprobe", "tun")
	p := dom0.Start(barevif, "back", "-v", "--xen", "--tap", "vif%d.%i", "--drain", "3s", "--stall", "8s")
	p.Await("serves vifs")
	var guests [2]*Domain
	for i := range guests {
		g := t.Create(Guest{Name: fmt.Sprintf("domU%d", i), Type: PV, VIFs: []VIF{{}}})
		t.startNetfront(g, fmt.Sprintf("10.90.%d.2", i))
		dom0.Sh("ip addr add 10.90.%d.1/24 dev %s", i, g.VIF(0))
		dom0.awaitCarrier(g.VIF(0))
		t.Ping(dom0, fmt.Sprintf("10.90.%d.2", i), 1472, 5)
		// Otherwise dom0 asks for the address of the paused guest instead of sending to it.
		dom0.Sh("ip neigh replace 10.90.%d.2 lladdr $(ip neigh show 10.90.%d.2 | sed 's/.*lladdr //; s/ .*//') dev %s nud permanent", i, i, g.VIF(0))
		guests[i] = g
	}
	paused, other := guests[0], guests[1]
	count := func(g *Domain, name string) uint64 { return t.counterTotal(t.dumpCounters(dom0, backName(g, 0)), name) }
	if n := count(paused, "tx_drop_guest_stalled") + count(other, "tx_drop_guest_stalled"); n != 0 {
		t.Fatalf("%d frames dropped already", n)
	}
	before := t.iperf(dom0, other, "10.90.1.2", 3)

	dom0.Run("xl", "pause", paused.Name)
	// Enough to fill what may wait for the guest in a second, and not so much that the sender
	// takes the emulated processor from the other guest.
	flood := dom0.Start("ping", "-q", "-i", "0.005", "-s", "1000", "10.90.0.2")
	during := t.iperf(dom0, other, "10.90.1.2", 6)
	p.Await(paused.VIF(0)[3:] + `: takes no frames, carrier off`)
	dom0.Await("no carrier", `[ "$(cat /sys/class/net/%s/carrier)" = 0 ]`, paused.VIF(0))
	for range 10 { // a half that is idle shows its counters with the next tick
		if count(paused, "tx_carrier_off") > 0 {
			break
		}
		dom0.Run("sleep", "0.5")
	}
	lost, off := count(paused, "tx_drop_guest_stalled"), count(paused, "tx_carrier_off")
	if lost == 0 || off != 1 {
		t.Fatalf("%d frames dropped, the carrier went off %d times", lost, off)
	}
	t.Note("%d frames dropped for the paused guest; the other one: %.0f Mbit/s before, %.0f meanwhile", lost, before, during)
	if during < before/3 {
		t.Fatalf("the other guest gets %.0f Mbit/s, and got %.0f", during, before)
	}
	t.Ping(dom0, "10.90.1.2", 1472, 10)
	if n := count(other, "tx_drop_guest_stalled") + count(other, "tx_carrier_off"); n != 0 {
		t.Fatalf("the other guest lost %d frames", n)
	}
	flood.Kill()

	dom0.Run("xl", "unpause", paused.Name)
	p.Await(paused.VIF(0)[3:] + `: takes frames again, carrier on`)
	dom0.awaitCarrier(paused.VIF(0))
	dom0.Await("the guest that goes on", "ping -c 1 -W 1 10.90.0.2")
	t.Ping(dom0, "10.90.0.2", 1472, 10)
	t.Ping(paused, "10.90.0.1", 1472, 10)
	for _, g := range guests {
		t.Destroy(g)
	}
	p.Terminate()
}
