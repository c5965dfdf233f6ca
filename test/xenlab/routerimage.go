//go:build linux

package xenlab

import (
	"fmt"
	"strings"
	"time"

	"barevif/test/xenlab/image"
)

// routerPackage is the program of the image.
const routerPackage = "barevif/tools/vifrouter"

// Addresses of the scenario with the router's image. dom0 is the world behind the uplink.
const (
	applianceWorld  = "10.94.0.1"
	applianceUplink = "10.94.0.2"
	applianceInside = "10.95.0.1"
	applianceClient = "10.95.0.7"
)

// routerImageConf is the file in the image.
const routerImageConf = `# The client's address comes by DHCP, and dom0 reaches its port 80.
uplink vif 0
uplink ipv4 ` + applianceUplink + `/24 via ` + applianceWorld + `
network inside ipv4 10.95.0.0/24 router ` + applianceInside + `
guest client in inside mac 00:16:3e:77:00:01 ipv4 ` + applianceClient + `
dns off
allow from inside to uplink
allow from client to router proto tcp port 9100
forward tcp 8080 to ` + applianceClient + `:80
metrics router ` + applianceInside + `:9100
`

// refusedConf is what the router says of a file that is wrong in its 11th line.
const refusedConf = `the new configuration is not used, and the old one stays.*xenstore:data/vifrouter/config:11:`

const routerLog = "/var/log/xen/console/guest-" + image.RouterName + ".log"

// udhcpcScript gives an interface what a DHCP server has offered: the address alone, and the router beside it.
const udhcpcScript = `#!/bin/sh
case "$1" in
deconfig) ip link set "$interface" up ;;
bound|renew)
	ip addr replace "$ip/32" dev "$interface"
	ip route replace "$serverid/32" dev "$interface"
	ip route replace default via "$serverid" dev "$interface"
	echo "leased $ip from $serverid" ;;
esac
`

// routerImage boots the router as what "barevif image" makes of it, as a guest of either type. A client gets its address and
// the world through it, and dom0 a port of the client. Dom0 hands the router another file. The
// client's vif is taken and given anew.
func routerImage(kind GuestType) func(*T) {
	create := []string{"xl", "create", image.RouterAppliance + "/xl-pv.cfg"}
	if kind == PVH {
		create = append([]string{"xl", "create", image.RouterAppliance + "/xl.cfg"}, pvhConfig...)
	}
	return func(t *T) { t.routerImage(create) }
}

func (t *T) routerImage(create []string) {
	t.loadNetback(true)
	dom0 := t.Dom0()
	begin := time.Now()
	dom0.Within(2 * time.Minute).Run(create...)
	router := &Domain{t: t, ID: t.domid(image.RouterName), Name: image.RouterName, limit: stepLimit}
	t.guests = append(t.guests, router)
	t.awaitConsole("domain %d routes between 1 networks and vif 0", router.ID)
	t.Note("from xl create to a running router %.1f s", time.Since(begin).Seconds())
	vif := router.VIF(0)
	dom0.Sh("ip addr replace %s/24 dev %s", applianceWorld, vif)
	t.awaitConsole("uplink vif 0: connected")
	t.requireWhole(routerLog)

	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{Backend: image.RouterName}}})
	guest.Put("/tmp/leased", []byte(udhcpcScript), 0o755)
	guest.Run("modprobe", "xen-netfront")
	t.leaseOfRouter(guest)
	t.Ping(guest, applianceWorld, 1472, 10)
	t.Fetch(guest, dom0, applianceWorld, 1<<20)
	t.requireChecksums(func() { t.Fetch(dom0, guest, applianceUplink+":8080", 1<<18) }, guest, dom0)
	if page := guest.Sh("curl -sSf --max-time 20 http://%s:9100/metrics", applianceInside); !strings.Contains(page, `vifrouter_guests{admitted="yes"} 1`+"\n") {
		t.Fatalf("no guest among the counters:\n%s", page)
	}

	// Another file, which is longer than xenstore takes at once, from dom0.
	t.handOver("no", routerImageConf+"allow from nobody\n", 1, "refused: xenstore:data/vifrouter/config:11: ")
	t.handOver("more", routerImageConf+strings.Repeat("# a remark, of which there are many\n", 150)+"drop from client to uplink proto udp port 9\n", 0, "taken: 1 networks, 1 guests, 3 rules, 1 forwards")
	t.awaitConsole("the configuration was read again")

	dom0.Run("xl", "network-detach", guest.Name, "0")
	guest.Await("the interface to go", "[ ! -e /sys/class/net/eth0 ]")
	t.awaitConsole("vif %d.0: gone", guest.ID)
	t.Attach(guest, VIF{Backend: image.RouterName})
	t.leaseOfRouter(guest)
	t.Fetch(guest, dom0, applianceWorld, 1<<18)
	t.Destroy(guest)
	t.shutDown(router, "barevif: /app/vifrouter exited with status 0")
}

// handOver gives the router in its domain another file, and requires its answer.
func (t *T) handOver(name, conf string, exit int, answer string) {
	file := "/run/router-" + name + ".conf"
	t.Dom0().Put(file, []byte(conf), 0o600)
	r := t.Dom0().Try(image.RouterReload, image.RouterName, file)
	if said := string(r.Stdout) + string(r.Stderr); r.Err != nil || r.Exit != exit || !strings.HasPrefix(said, answer) {
		t.Fatalf("%s: exit %d, %q, %v; want %d, %q", image.RouterReload, r.Exit, said, r.Err, exit, answer)
	}
}

// awaitConsole waits until the router has said something on its console.
func (t *T) awaitConsole(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	t.Dom0().Await("the router to say "+line, "grep -qF '%s' %s", line, routerLog)
}

// leaseOfRouter gives the guest what the router has for it by DHCP.
func (t *T) leaseOfRouter(guest *Domain) {
	guest.Await("a network interface", "ip link set eth0 up")
	guest.awaitCarrier("eth0")
	said := guest.Sh("busybox udhcpc -f -n -q -i eth0 -s /tmp/leased 2>&1")
	if want := "leased " + applianceClient + " from " + applianceInside; !strings.Contains(said, want) {
		t.Fatalf("the DHCP client has not said %q: %s", want, said)
	}
}
