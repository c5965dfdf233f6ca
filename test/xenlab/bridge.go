//go:build linux

package xenlab

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Addresses on the bridge: of dom0's kernel behind its TAP, and of the guests.
const switchedDom0, switchedOne, switchedTwo = "10.87.0.1", "10.87.0.2", "10.87.0.3"

// A switchPort is what the row reads of a port that "barevif bridge status --json" shows.
type switchPort struct {
	Port           string
	Up             bool
	Guard          []string
	Received, Sent uint64
	Dropped        struct{ Spoofed uint64 }
}

// switchPorts returns the ports of the bridge in dom0, in order of their names.
func (t *T) switchPorts() []switchPort {
	text := t.Dom0().Run(barevif, "bridge", "status", "--json").Stdout
	var all []struct{ Ports []switchPort }
	if err := json.Unmarshal(text, &all); err != nil || len(all) != 1 {
		t.Fatalf("bridge status: %v: %s", err, text)
	}
	slices.SortFunc(all[0].Ports, func(a, b switchPort) int { return strings.Compare(a.Port, b.Port) })
	return all[0].Ports
}

// switched runs our bridge between the netfronts of two guests and the kernel of dom0. It is killed
// and comes back, a vif is taken away and given anew, and a guest sends from another's address.
func switched(t *T) {
	t.loadNetback(false)
	dom0 := t.Dom0()
	dom0.Run("modprobe", "tun")
	start := func() *Process {
		p := dom0.Start(barevif, "bridge", "-v", "--xen", "--uplink", "tap:lan0", "--addr", switchedDom0+"/24")
		p.Await("serves vifs of type")
		return p
	}
	mac := [2]string{"00:16:3e:77:01:01", "00:16:3e:77:01:02"}
	vif := func(i int) VIF { return VIF{More: "mac=" + mac[i] + ",script=vif-barevif"} } // xl takes the last of a key
	p := start()
	one := t.Create(Guest{Name: "one", Type: PV, VIFs: []VIF{vif(0)}})
	two := t.Create(Guest{Name: "two", Type: PV, VIFs: []VIF{vif(1)}})
	t.startNetfront(one, switchedOne)
	t.startNetfront(two, switchedTwo)
	t.kernelTraffic(one, two, switchedOne, switchedTwo)
	t.Ping(one, switchedDom0, 1472, 20)
	t.Fetch(two, dom0, switchedDom0, 3<<20)

	ports := t.switchPorts()
	want := []string{fmt.Sprintf("%d.0", one.ID), fmt.Sprintf("%d.0", two.ID), "tap:lan0"}
	slices.Sort(want)
	var names []string
	for _, port := range ports {
		names = append(names, port.Port)
		if !port.Up || port.Received == 0 || port.Sent == 0 || port.Dropped.Spoofed != 0 || (len(port.Guard) == 0) != (port.Port == "tap:lan0") {
			t.Fatalf("the bridge shows %+v", port)
		}
	}
	if !slices.Equal(names, want) {
		t.Fatalf("the bridge has the ports %q, not %q", names, want)
	}

	// A guest sends from the other's address: nobody hears it, and the other goes on.
	pretend := func(mac string) {
		one.Sh("ip link set eth0 down; ip link set eth0 address %s; ip link set eth0 up", mac)
	}
	pretend(mac[1])
	one.Sh("! ping -c 3 -i 0.2 -W 1 %s", switchedDom0)
	t.Ping(two, switchedDom0, 1472, 20)
	pretend(mac[0])
	t.Ping(one, switchedTwo, 1472, 20)
	for _, port := range t.switchPorts() {
		if (port.Dropped.Spoofed > 0) != (port.Port == fmt.Sprintf("%d.0", one.ID)) {
			t.Fatalf("after a forgery the bridge shows %+v", port)
		}
	}

	p.Kill()
	p = start()
	one.Await("the other guest behind the new bridge", "ping -c 1 -W 1 %s", switchedTwo)
	t.Fetch(one, two, switchedTwo, 1<<20)

	dom0.Run("xl", "network-detach", two.Name, "0")
	two.Await("the interface to go", "[ ! -e /sys/class/net/eth0 ]")
	t.Ping(one, switchedDom0, 1472, 20)
	t.Attach(two, vif(1))
	t.startNetfront(two, switchedTwo)
	t.Ping(one, switchedTwo, 1472, 20)

	t.Destroy(two)
	t.Ping(one, switchedDom0, 1472, 20)
	if said := p.Terminate().Stderr; strings.Contains(string(said), "left something behind") {
		t.Fatalf("the bridge ended and has said: %s", said)
	}
	dom0.Sh("[ ! -e /sys/class/net/lan0 ]")
}
