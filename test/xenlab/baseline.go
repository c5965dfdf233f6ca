//go:build linux

package xenlab

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Numbers of the baseline scenario. Rates on an emulated CPU vary by half, so only ratios
// within the scenario mean anything, and only those with a wide margin are asserted.
const (
	baselineRounds = 2
	baselineSecs   = 3
	leastSent      = 1.2 // times the kernel's generator; measured above 2 on a quiet machine
	leastReceived  = 0.5 // times the kernel's netfront
)

const (
	baselineDom0  = "10.90.0.1"
	baselineGuest = "10.90.0.2"
	baselineNone  = "10.90.0.9" // either kernel drops frames to this address
)

// A bench is the baseline scenario's guest and its results, the JSON lines of test/bench.
type bench struct {
	*T
	guest *Domain
	vif   string // name of dom0's interface
	lines []string
}

// baseline runs the same traffic through one vif with the kernel's netfront and with ours, in
// turns.
func baseline(t *T) {
	t.loadNetback(true)
	b := &bench{T: t, guest: t.Create(Guest{
		Name: "domU", Type: PV, VIFs: []VIF{{}},
		Linux: []string{"xen_privcmd.unrestricted=1"}, // for notifications by hypercall
	})}
	b.vif = b.guest.VIF(0)
	t.Dom0().Sh("ip addr add %s/24 dev %s; modprobe pktgen", baselineDom0, b.vif)
	b.guest.Run("modprobe", "-a", "pktgen", "xen-netfront")
	for round := range baselineRounds {
		if round > 0 {
			b.guest.Run(barevif, "xen", "release", "0")
		}
		b.kernel()
		b.guest.Run(barevif, "xen", "take", "0")
		b.ours()
	}
	b.report()
	alone := b.guest.Within(2*time.Minute).Run(benchProgram, "--xen", "--from", baselineGuest, "--to", baselineNone, "--rounds", "2", "--secs", "2").Text()
	b.Save("alone.txt", []byte(alone))
	for _, way := range [...]string{"kernel pktgen", "Go UDP socket", "ours, batch 32, busy"} {
		if !strings.Contains(alone, way) {
			b.Fatalf("bench --xen has no row %q:\n%s", way, alone)
		}
	}
}

// kernel measures one round of the kernel's netfront.
func (b *bench) kernel() {
	b.guest.Await("a network interface", "ip link set eth0 up")
	b.guest.Sh("ip addr add %s/24 dev eth0; ip neigh replace %s lladdr fe:ff:ff:ff:ff:ff dev eth0 nud permanent", baselineGuest, baselineNone)
	b.guest.awaitCarrier("eth0")
	b.carrier()
	frame := []string{"--from", baselineGuest, "--to", baselineNone}
	b.send("kernel pktgen", append([]string{"pktgen", "--if", "eth0"}, frame...)...)
	b.send("kernel pktgen, frames reused", append([]string{"pktgen", "--if", "eth0", "--clone", "1000"}, frame...)...)
	b.send("Go UDP socket", append([]string{"udp-send"}, frame...)...)
	b.send("Go packet socket", append([]string{"packet-send", "--if", "eth0"}, frame...)...)
	flood := b.flood()
	b.add(b.guest.Run(benchProgram, "count", "--if", "eth0", "--dir", "rx", "--what", "receive", "--way", "kernel netfront", secs()))
	b.end(flood)
	b.add(b.guest.Run(benchProgram, "ping-socket", "--to", baselineDom0, "--way", "kernel netfront", "--secs", "10"))
	b.stream("stream out", "kernel netfront, iperf3", b.iperf(b.guest, b.Dom0(), baselineDom0, baselineSecs))
	b.stream("stream in", "kernel netfront, iperf3", b.iperf(b.Dom0(), b.guest, baselineGuest, baselineSecs))
	b.streams("kernel netfront, Go TCP socket", []string{"tcp-send", "--to", baselineDom0}, []string{"tcp-recv"})
}

// streams measures TCP from the guest to a socket of dom0's kernel, and back. The receiver's
// line counts.
func (b *bench) streams(way string, send, recv []string) {
	line := func(what string) []string { return []string{"--what", what, "--way", way, secs()} }
	piece := func(d *Domain, args ...string) *Process {
		return d.Start(append([]string{benchProgram}, args...)...)
	}

	sink := piece(b.Dom0(), append([]string{"tcp-recv"}, line("stream out")...)...)
	sink.Await("bench: receiving")
	piece(b.guest, append(send, secs())...).Succeed()
	b.add(sink.Succeed())

	sink = piece(b.guest, append(recv, line("stream in")...)...)
	sink.Await("bench: receiving")
	b.carrier()
	piece(b.Dom0(), "tcp-send", "--to", baselineGuest, secs()).Succeed()
	b.add(sink.Succeed())
}

// ours measures one round of our frontend.
func (b *bench) ours() {
	frame := []string{"send", "--xen", "--from", baselineGuest, "--to", baselineNone}
	b.send("ours, batch 32", frame...)
	b.send("ours, batch 32, hypercall", append(frame, "--doorbell", "hypercall")...)
	b.send("ours, batch 32, busy", append(frame, "--wait-mode", "busy")...)
	b.send("ours, batch 1", append(frame, "--batch", "1")...)
	b.send("ours, batch 1, hypercall", append(frame, "--batch", "1", "--doorbell", "hypercall")...)
	for _, doorbell := range [...]string{"ioctl", "hypercall"} {
		way := "ours"
		if doorbell != "ioctl" {
			way += ", " + doorbell
		}
		p := b.guest.Start(benchProgram, "recv", "--xen", "--way", way, "--doorbell", doorbell, secs())
		p.Await("bench: receiving")
		b.carrier()
		flood := b.flood()
		b.add(p.Succeed())
		b.end(flood)
		b.add(b.guest.Run(benchProgram, "ping", "--xen", "--from", baselineGuest, "--to", baselineDom0, "--way", way, "--doorbell", doorbell, "--secs", "10"))
	}
	b.streams("ours, our own TCP/IP",
		[]string{"stream-send", "--xen", "--from", baselineGuest + "/24", "--to", baselineDom0},
		[]string{"stream-recv", "--xen", "--from", baselineGuest + "/24"})
}

func secs() string { return fmt.Sprintf("--secs=%d", baselineSecs) }

// carrier waits until dom0's interface has a carrier.
func (b *bench) carrier() { b.Dom0().awaitCarrier(b.vif) }

// send makes the guest send while dom0 counts at its interface.
func (b *bench) send(way string, argv ...string) {
	p := b.guest.Start(append(append([]string{benchProgram}, argv...), "--secs", "50")...)
	p.Await("bench: sending")
	r := b.Dom0().Run(benchProgram, "count", "--if", b.vif, "--dir", "rx", "--way", way, secs())
	b.end(p)
	// An interface's queue may hold the frames of a whole second of a slow sender.
	b.Dom0().Await("the last frame", `cd /sys/class/net/%s/statistics; a=$(cat rx_packets); sleep 0.3; [ "$(cat rx_packets)" = $a ]`, b.vif)
	line := b.add(r)
	// Frames have 106 bytes, which the interface counts without the Ethernet header. The
	// kernel also sends a few frames by itself.
	if size := float64(line.Bytes) / max(1, float64(line.Frames)); size < 87 || size > 97 {
		b.Fatalf("%s: dom0 counted %d frames and %d bytes", way, line.Frames, line.Bytes)
	}
}

// flood makes dom0's packet generator send to the guest.
func (b *bench) flood() *Process {
	p := b.Dom0().Start(benchProgram, "pktgen", "--if", b.vif, "--from", baselineDom0, "--to", baselineNone, "--dst-mac", MAC(0), "--secs", "50")
	p.Await("bench: sending")
	return p
}

// end interrupts a bench command that would go on.
func (b *bench) end(p *Process) {
	p.Signal(syscall.SIGTERM)
	if r := p.Wait(); r.Exit != 130 {
		b.Fatalf("%s: %w", p.name, r.problem())
	}
}

// A benchLine has the fields of a line of test/bench that are used here.
type benchLine struct {
	What, Way     string
	Seconds       float64
	Frames, Bytes uint64
	GrantOps      uint64 `json:"grant_ops"`
}

func (b *bench) add(r Result) (line benchLine) {
	text := r.Text()
	if err := json.Unmarshal([]byte(text), &line); err != nil {
		b.Fatalf("%q: %w", text, err)
	}
	b.lines = append(b.lines, text)
	return line
}

func (b *bench) stream(what, way string, rate float64) {
	b.lines = append(b.lines, fmt.Sprintf(`{"what":%q,"way":%q,"bytes":%.0f,"seconds":1}`, what, way, rate*1e6/8))
}

// report saves the table and asserts the ratios.
func (b *bench) report() {
	all := []byte(strings.Join(b.lines, "\n") + "\n")
	b.Save("baseline.jsonl", all)
	b.Dom0().Put("/tmp/baseline.jsonl", all, 0o644)
	table := b.Dom0().Run(benchProgram, "table", "/tmp/baseline.jsonl")
	b.Save("baseline.txt", table.Stdout)
	// The kernel's generator makes each frame anew, like ours, and never sleeps, like ours
	// in mode busy. If it reuses frames, it shows the backend's capacity.
	sent, busy := b.rate("send", "ours, batch 32"), b.rate("send", "ours, batch 32, busy")
	pktgen, reused := b.rate("send", "kernel pktgen"), b.rate("send", "kernel pktgen, frames reused")
	received, kernel := b.rate("receive", "ours"), b.rate("receive", "kernel netfront")
	b.Note("sent %.1f times (busy: %.1f times) the kernel's generator, %.1f (%.1f) times one that reuses frames, %.0f times a Go UDP socket; received %.2f times the kernel's netfront",
		sent/pktgen, busy/pktgen, sent/reused, busy/reused, sent/b.rate("send", "Go UDP socket"), received/kernel)
	if sent < leastSent*pktgen {
		b.Fatalf("sent %.0f frames a second, the kernel's generator %.0f", sent, pktgen)
	}
	if received < leastReceived*kernel {
		b.Fatalf("received %.0f frames a second, the kernel's netfront %.0f", received, kernel)
	}
}

// rate returns the median of the rounds, in frames per second.
func (b *bench) rate(what, way string) float64 { return b.rateOf(what, way, false) }

// rateOf returns the median rate of frames, or of bytes, per second.
func (b *bench) rateOf(what, way string, bytes bool) float64 {
	var rates []float64
	for _, text := range b.lines {
		var l benchLine
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			b.Fatalf("%q: %w", text, err)
		}
		if l.What == what && l.Way == way {
			n := l.Frames
			if bytes {
				n = l.Bytes
			}
			rates = append(rates, float64(n)/l.Seconds)
		}
	}
	if len(rates) == 0 {
		b.Fatalf("no measurement of %s by %s", what, way)
	}
	slices.Sort(rates)
	return rates[len(rates)/2]
}
