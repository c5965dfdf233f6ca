//go:build linux

package xenlab

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// JoinKernel gives an address to both ends of a guest's i-th vif, if both belong to kernels:
// dom0's backend interface and the guest's eth<i>. Each vif has a subnet of its own, because
// replies would otherwise take another vif. It waits for the link.
func (t *T) JoinKernel(guest *Domain, i int) (dom0Addr, guestAddr string) {
	net := fmt.Sprintf("10.77.%d", (guest.ID*4+i)%250)
	dom0Addr, guestAddr = net+".1", net+".2"
	guest.Await("a network interface", "ip link set eth%d up", i)
	guest.Sh("ip addr replace %s/24 dev eth%d", guestAddr, i)
	vif := guest.VIF(i)
	t.Dom0().Await("the backend's interface", "ip link set %s up", vif)
	t.Dom0().Sh("ip addr replace %s/24 dev %s", dom0Addr, vif)
	guest.awaitCarrier(fmt.Sprintf("eth%d", i))
	t.Dom0().awaitCarrier(vif)
	return dom0Addr, guestAddr
}

// Ping sends echo requests with size bytes of payload and the don't-fragment bit. Each of the
// first count requests must be answered exactly once. As many more follow, since ping does not
// wait for a last reply that takes twice as long as the others. ping compares the payload of a
// reply with that of the request.
func (t *T) Ping(from *Domain, addr string, size, count int) {
	r := from.Run("ping", "-c", fmt.Sprint(2*count), "-i", "0.05", "-W", "5", "-M", "do", "-s", fmt.Sprint(size), addr)
	if err := checkPing(r.Text(), count); err != nil {
		t.Fatalf("%s: ping %s with %d bytes: %w", from.Name, addr, size, err)
	}
}

// pingSpoilt returns an error if ping says of a reply that it is not the one to its request.
func pingSpoilt(out string) error {
	for _, bad := range [...]string{"wrong data byte", "DUP!", "truncated"} {
		if strings.Contains(out, bad) {
			return fmt.Errorf("it says %q", bad)
		}
	}
	return nil
}

func checkPing(out string, count int) error {
	if err := pingSpoilt(out); err != nil {
		return err
	}
	var lost []int
	for seq := 1; seq <= count; seq++ {
		if !strings.Contains(out, fmt.Sprintf(" icmp_seq=%d ttl=", seq)) {
			lost = append(lost, seq)
		}
	}
	if lost != nil {
		return fmt.Errorf("no answer to %v of %d", lost, count)
	}
	return nil
}

// Iperf measures TCP from one domain to another, seconds long, and notes it.
func (t *T) Iperf(from, to *Domain, addr string, seconds int) {
	t.Note("iperf3 %s→%s %.0f Mbit/s", from.Name, to.Name, t.iperf(from, to, addr, seconds))
}

// iperf is Iperf without the note. It returns Mbit/s.
func (t *T) iperf(from, to *Domain, addr string, seconds int) float64 {
	server := to.Start("iperf3", "-s", "-1", "--forceflush")
	server.Await("Server listening")
	r := from.Run("iperf3", "-J", "-t", fmt.Sprint(seconds), "-c", addr)
	var report struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal(r.Stdout, &report); err != nil {
		t.Fatalf("iperf3 -J: %w", err)
	}
	server.Succeed()
	rate := report.End.Received.BitsPerSecond / 1e6
	if rate == 0 {
		t.Fatalf("iperf3 from %s to %s moved nothing", from.Name, to.Name)
	}
	return rate
}

// Fetch serves a file of random bytes by busybox httpd in one domain and fetches
// it by curl in the other; both sides' digests must agree.
func (t *T) Fetch(client, server *Domain, addr string, size int) {
	want := server.Sh("mkdir -p /tmp/www; head -c %d /dev/urandom >/tmp/www/file; sha256sum </tmp/www/file", size)
	httpd := server.Start("busybox", "httpd", "-f", "-p", "80", "-h", "/tmp/www")
	server.Await("httpd", "curl -sI http://127.0.0.1/file >/dev/null")
	got := client.Sh("curl -sSf --max-time 50 http://%s/file | sha256sum", addr)
	if got != want {
		t.Fatalf("%s fetched %s, %s serves %s", client.Name, got, server.Name, want)
	}
	httpd.Kill()
	t.Note("curl %s←%s %d bytes", client.Name, server.Name, size)
}

// Send uploads random bytes by curl to an appliance, and compares the digest in its reply.
func (t *T) Send(from *Domain, addr string, size int) {
	want := from.Sh("head -c %d /dev/urandom >/tmp/sent; sha256sum </tmp/sent | cut -c1-64", size)
	got := from.Sh("curl -sSf --max-time 50 -T /tmp/sent http://%s/sum | cut -c1-64; rm /tmp/sent", addr)
	if got != want {
		t.Fatalf("%s sent %s, %s received %s", from.Name, want, addr, got)
	}
	t.Note("curl -T %s→ %d bytes", from.Name, size)
}

// Datagrams runs test/check against addr, with one datagram of each size; sizes has the
// syntax of --sizes. Each datagram is compared at both ends. At most 1 % may be lost.
func (t *T) Datagrams(from *Domain, addr, sizes string) {
	r := from.Run(checkProgram, "--lost", "1", "--patience", "5s", "--sizes", sizes, addr)
	t.Note("UDP %s↔: %s", from.Name, r.Text())
}

// jumboSizes are the sizes of datagrams for an MTU of 9000: all sizes around one and two
// pages, a sample of the others, and some that are fragmented.
const jumboSizes = "1-8972:13,4030-4100,8130-8200,8972,8973,65507"

// answered runs f while "check --answer" answers datagrams through d's kernel.
func (t *T) answered(d *Domain, f func()) {
	p := d.Start(checkProgram, "--answer")
	p.Await("answering at")
	f()
	p.Terminate()
}

// requireChecksums fails if the kernels of these domains find a checksum wrong while f
// runs.
func (t *T) requireChecksums(f func(), doms ...*Domain) {
	wrong := func() (n []string) {
		for _, d := range doms {
			n = append(n, d.Name+": "+badChecksums(string(d.Get("/proc/net/snmp"))))
		}
		return n
	}
	before := wrong()
	f()
	if after := wrong(); !slices.Equal(before, after) {
		t.Fatalf("wrong checksums: %q, before it was %q", after, before)
	}
}

// badChecksums returns the counters of wrong checksums in /proc/net/snmp, which has a line of
// names and a line of numbers for each protocol.
func badChecksums(snmp string) (found string) {
	var names []string
	for line := range strings.Lines(snmp) {
		words := strings.Fields(line)
		if names == nil {
			names = words
			continue
		}
		for i := range min(len(words), len(names)) {
			if names[i] == "InCsumErrors" {
				found += " " + words[0] + words[i]
			}
		}
		names = nil
	}
	return strings.TrimPrefix(found, " ")
}

// kernelTraffic runs the traffic between the kernels of two domains. Every byte is compared,
// except those of iperf3.
func (t *T) kernelTraffic(guest, backend *Domain, guestAddr, backAddr string) {
	t.requireChecksums(func() {
		for _, size := range [...]int{56, 1472} {
			t.Ping(guest, backAddr, size, 20)
			t.Ping(backend, guestAddr, size, 20)
		}
		t.answered(backend, func() { t.Datagrams(guest, backAddr, "1-1472") })
		t.Iperf(guest, backend, backAddr, 2)
		t.Iperf(backend, guest, guestAddr, 2)
		t.Fetch(backend, guest, guestAddr, 3<<20)
		t.Fetch(guest, backend, backAddr, 3<<20)
	}, guest, backend)
}
