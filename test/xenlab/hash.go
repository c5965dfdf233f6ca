//go:build linux

package xenlab

import (
	"fmt"
	"regexp"
)

// frontHashed lets Linux netback hash what it sends to a frontend of ours, which compares each
// hash with its own and the queue with its table, and changes the table while frames come.
func frontHashed(t *T) {
	const most = "/sys/module/xen_netback/parameters/max_queues"
	t.loadNetback(true)
	dom0 := t.Dom0()
	was := dom0.Sh("cat %s; echo %d >%[1]s", most, queuesOfRow)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	idle := t.domainResources(guest)
	vif := guest.VIF(0)
	p := guest.Start(prober, "hash", fmt.Sprint(queuesOfRow))
	mac := macSaid.FindString(string(p.Await("connected, MAC .*\n").Stdout))
	dom0.Sh("ip addr add 10.90.0.1/24 dev %s; ip link set %[1]s up; ip neigh replace 10.90.0.2 lladdr %s dev %[1]s; ip route replace 10.91.0.0/16 via 10.90.0.2", vif, mac)
	// Nobody answers: requests for connections, and pings, of many flows.
	flood := dom0.Start("sh", "-c", "while sleep 0.1; do for i in 1 2 3 4 5 6 7 8; do n=$((n+1)); "+
		"timeout 1 busybox nc 10.91.$((n%7)).$((n%250)) 80 </dev/null & ping -c 1 -W 1 10.91.9.$((n%250)) & done; done >/dev/null 2>&1")
	r := p.Succeed()
	flood.Kill()
	for _, line := range tableSaid.FindAllString(string(r.Stdout), -1) {
		t.Note("%s", line)
	}
	t.requireResources(guest, idle)
	dom0.Sh("echo %s >%s", was, most)
}

var (
	macSaid   = regexp.MustCompile(`([0-9a-f]{2}:){5}[0-9a-f]{2}`)
	tableSaid = regexp.MustCompile(`.*: frames by hash .*`)
)
