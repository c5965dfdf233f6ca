//go:build linux

package xenlab

import "strings"

const (
	netfrontWay = "netfront"
	attachWay   = "attach"
)

// baselineAttach runs iperf3 between the guest's kernel and dom0's through two frontends, in
// turns: the kernel's netfront, and ours with a TAP. It notes the ratios and asserts none,
// because rates on an emulated CPU vary.
func baselineAttach(t *T) {
	t.loadNetback(true)
	b := &bench{T: t, guest: t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})}
	b.vif = b.guest.VIF(0)
	t.Dom0().Sh("ip addr add %s/24 dev %s", baselineDom0, b.vif)
	b.guest.Run("modprobe", "-a", "tun", "xen-netfront")
	for round := range baselineRounds {
		if round > 0 {
			b.guest.Run(barevif, "xen", "release", "0")
		}
		b.Dom0().Sh("ip link set %s up", b.vif)
		b.guest.Await("a network interface", "ip link set eth0 up")
		b.guest.Sh("ip addr add %s/24 dev eth0", baselineGuest)
		b.guest.awaitCarrier("eth0")
		b.throughFront(netfrontWay)
		b.guest.Run(barevif, "xen", "take", "0")

		p := b.guest.Start(barevif, "attach", "-v", "--xen", "--tap", "card%i", "--addr", baselineGuest+"/24")
		p.Await("the kernel has it as card0")
		b.throughFront(attachWay)
		p.Terminate()
	}
	b.Save("baseline-attach.jsonl", []byte(strings.Join(b.lines, "\n")+"\n"))
	for _, what := range [...]string{"TCP from the guest", "TCP to the guest"} {
		ours, theirs := b.mbits(what, attachWay), b.mbits(what, netfrontWay)
		t.Note("%s: %.0f Mbit/s, netfront %.0f (%.2f)", what, ours, theirs, ours/theirs)
	}
}

// throughFront measures one frontend.
func (b *bench) throughFront(way string) {
	b.carrier()
	b.Dom0().Await("the guest", "ping -c 1 -W 1 %s", baselineGuest)
	b.tcp(b.guest, "TCP from the guest", way, b.guest, b.Dom0(), baselineDom0)
	b.tcp(b.guest, "TCP to the guest", way, b.Dom0(), b.guest, baselineGuest)
}
