//go:build linux

package xenlab

import (
	"fmt"
	"strings"
	"syscall"
)

// backRounds is how often each backend is measured.
const backRounds = 3

// baselineBack runs the same traffic of a guest's netfront through two backends, in turns: the
// kernel's netback, and ours with a TAP. It notes the ratios and asserts none, because rates
// on an emulated CPU vary.
func baselineBack(t *T) {
	t.loadNetback(true)
	b := &bench{T: t, guest: t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})}
	b.vif = b.guest.VIF(0)
	t.Dom0().Run("modprobe", "-a", "pktgen", "tun")
	b.guest.Run("modprobe", "-a", "pktgen", "xen-netfront")
	for round := range backRounds {
		if round > 0 {
			t.loadNetback(true)
			t.Attach(b.guest, VIF{})
		}
		t.Dom0().Await("netback's interface", "ip addr add %s/24 dev %s", baselineDom0, b.vif)
		b.throughBack(netbackWay)
		b.detach()

		t.loadNetback(false)
		p := t.startBackend(t.Dom0(), baselineDom0)
		t.Attach(b.guest, VIF{})
		b.throughBack(ourBackWay)
		b.detach()
		p.Signal(syscall.SIGTERM)
		p.Succeed()
	}
	all := []byte(strings.Join(b.lines, "\n") + "\n")
	b.Save("baseline-back.jsonl", all)
	t.Dom0().Put("/tmp/baseline.jsonl", all, 0o644)
	b.Save("baseline-back.txt", t.Dom0().Run(benchProgram, "table", "/tmp/baseline.jsonl").Stdout)
	for _, what := range [...]string{"from the guest", "to the guest"} {
		ours, theirs := b.rate(what, ourBackWay), b.rate(what, netbackWay)
		t.Note("small frames %s: %.0f a second, netback %.0f (%.2f)", what, ours, theirs, ours/theirs)
	}
	for _, what := range [...]string{"TCP from the guest", "TCP to the guest"} {
		ours, theirs := b.mbits(what, ourBackWay), b.mbits(what, netbackWay)
		t.Note("%s: %.0f Mbit/s, netback %.0f (%.2f)", what, ours, theirs, ours/theirs)
	}
}

const (
	netbackWay = "netback"
	ourBackWay = "our back"
)

func (b *bench) detach() {
	b.Dom0().Run("xl", "network-detach", b.guest.Name, "0")
	b.guest.Await("the interface to go", "[ ! -e /sys/class/net/eth0 ]")
	b.Dom0().Await("the interface to go", "[ ! -e /sys/class/net/%s ]", b.vif)
}

// throughBack measures one backend.
func (b *bench) throughBack(way string) {
	b.startNetfront(b.guest, baselineGuest)
	b.guest.Sh("ip neigh replace %s lladdr fe:ff:ff:ff:ff:ff dev eth0 nud permanent", baselineNone)
	b.carrier()
	b.Dom0().Await("the guest", "ping -c 1 -W 1 %s", baselineGuest)

	p := b.guest.Start(benchProgram, "pktgen", "--if", "eth0", "--clone", "1000", "--from", baselineGuest, "--to", baselineNone, "--secs", "50")
	p.Await("bench: sending")
	b.counted(b.Dom0(), b.vif, "from the guest", way)
	b.end(p)

	p = b.flood()
	b.counted(b.guest, "eth0", "to the guest", way)
	b.end(p)

	b.Dom0().Await("rest", "ping -c 1 -W 1 %s", baselineGuest) // the reply comes after all queued frames
	b.tcp(b.Dom0(), "TCP from the guest", way, b.guest, b.Dom0(), baselineDom0)
	b.tcp(b.Dom0(), "TCP to the guest", way, b.Dom0(), b.guest, baselineGuest)
}

// tcp measures TCP from one domain to another, and the processor time that working, one of the two, takes
// for it.
func (b *bench) tcp(working *Domain, what, way string, from, to *Domain, addr string) {
	var rate float64
	b.workOf(working, way+", "+what, func() (bytes float64) {
		rate = b.iperf(from, to, addr, baselineSecs)
		return rate * 1e6 / 8 * baselineSecs
	})
	b.stream(what, way, rate)
}

// counted counts the frames an interface receives.
func (b *bench) counted(d *Domain, name, what, way string) {
	b.working(way+", "+what, func() float64 {
		return float64(b.add(d.Run(benchProgram, "count", "--if", name, "--dir", "rx", "--what", what, "--way", way, secs())).Frames)
	})
}

// working notes dom0's processor time per unit, frame or byte, that move has moved, and how much of
// it our backend's process spent in user mode and in system calls. Dom0 spends the rest in interrupts,
// in its kernel's network stack, and in the program that sends or receives the traffic.
func (b *bench) working(what string, move func() (moved float64)) {
	b.workOf(b.Dom0(), what, move)
}

// workOf does what working does, for any domain and for our process in it.
func (b *bench) workOf(d *Domain, what string, move func() (moved float64)) {
	busy := func() (all, user, system int) {
		out := d.Sh("awk '/^cpu / {print $2 + $3 + $4 + $7 + $8}' /proc/stat; cat /proc/$(pidof barevif)/stat 2>/dev/null | awk '{print $14, $15}'; echo 0 0")
		if _, err := fmt.Sscan(out, &all, &user, &system); err != nil {
			b.Fatalf("/proc/stat: %q", out)
		}
		return all, user, system
	}
	all, user, system := busy()
	moved := move()
	nowAll, nowUser, nowSystem := busy()
	each := func(before, now int) float64 { return float64(now-before) * 1e7 / moved }
	ours := ""
	if nowUser+nowSystem > user+system {
		ours = fmt.Sprintf(", of which our process %.4g in user mode and %.4g in system calls", each(user, nowUser), each(system, nowSystem))
	}
	b.Note("%s: %.0f moved, %.4g ns of %s's processor each%s", what, moved, each(all, nowAll), d.Name, ours)
}

// mbits returns the median of the rounds, in Mbit/s.
func (b *bench) mbits(what, way string) float64 { return b.rateOf(what, way, true) * 8 / 1e6 }
