package pvnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"barevif/pvnet/netif"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// A Toolstack is what the toolstack wrote into a backend's directory about the network
// behind the vif (tools/libs/light/libxl_nic.c). Every value is checked. A key that is
// missing leaves its field zero, and so does one whose value cannot be used; the latter is
// in Bad.
type Toolstack struct {
	Bridge  string         // "bridge": name of an interface. libxl writes "xenbr0" if it was told none
	Name    string         // "vifname": name of the backend's interface
	Script  string         // "script": path of the hotplug script
	Gateway string         // "gatewaydev": name of the interface that script vif-route takes its address from
	IPs     []netip.Prefix // "ip": addresses of the guest, at most 64, each with its host bits
	MAC     MAC            // "mac": the frontend's address
	Type    string         // "type": "vif", or "vif_ioemu" if the device model emulates a card beside it
	Others  []string       // keys that are there and have no field here: "forwarddev", "vlan"

	// Done says that "hotplug-status" is "connected": the interface was set up before, by a
	// script or by an earlier backend.
	Done bool

	Bad []error // a [*xenstore.ValueError] for each unusable value; its Path is the key
}

// toolstackKeys are the keys of a vif's directory that a Toolstack is made of.
var toolstackKeys = []string{
	netif.KeyBridge, netif.KeyVifName, netif.KeyScript, netif.KeyGatewayDev, netif.KeyIP,
	netif.KeyMAC, netif.KeyType, netif.KeyForwardDev, netif.KeyVLAN, netif.KeyHotplugStatus,
}

// Limits of the toolstack's values.
const (
	mostName   = 15  // bytes of an interface's name: IFNAMSIZ-1 of linux/if.h
	mostScript = 255 // bytes of a path that is logged and shown
	mostIPs    = 64
)

// Toolstack reads what the toolstack wrote about the vif of a backend. If the toolstack writes
// meanwhile, the values are of different moments. It returns [ErrNotBackend] for a frontend's device, [ErrDisconnected], and
// what xenstore refuses.
func (d *Device) Toolstack(ctx context.Context) (Toolstack, error) {
	if err := d.backendOnly(); err != nil {
		return Toolstack{}, err
	}
	v, err := d.own(ctx, toolstackKeys...)
	if err != nil {
		return Toolstack{}, fmt.Errorf("pvnet: vif %s: %w", d.id, err)
	}
	return parseToolstack(v), nil
}

func parseToolstack(v xenstore.Values) (t Toolstack) {
	take := func(key, want string, ok func(string) bool) string {
		s := v[key]
		if s == "" || ok(s) {
			return s
		}
		t.Bad = append(t.Bad, &xenstore.ValueError{Path: key, Value: xenstore.Clip(s), Want: want})
		return ""
	}
	t.Bridge = take(netif.KeyBridge, wantName, interfaceName)
	t.Name = take(netif.KeyVifName, wantName, interfaceName)
	t.Gateway = take(netif.KeyGatewayDev, wantName, interfaceName)
	t.Script = take(netif.KeyScript, fmt.Sprintf("a path of at most %d printable bytes", mostScript), func(s string) bool {
		return len(s) <= mostScript && graphic(s)
	})
	t.Type = take(netif.KeyType, "vif or vif_ioemu", func(s string) bool { return s == "vif" || s == "vif_ioemu" })
	take(netif.KeyIP, wantIPs, func(s string) (ok bool) {
		t.IPs, ok = parseIPs(s)
		return ok
	})
	take(netif.KeyMAC, "the address of a station", func(s string) bool {
		mac, err := xenstore.ParseMAC(s)
		if err != nil || !MAC(mac).station() {
			return false
		}
		t.MAC = mac
		return true
	})
	for _, key := range []string{netif.KeyForwardDev, netif.KeyVLAN} {
		if v[key] != "" {
			t.Others = append(t.Others, key)
		}
	}
	t.Done = v[netif.KeyHotplugStatus] == netif.HotplugConnected
	return t
}

const wantName = "the name of an interface: 1 to 15 printable bytes without blank, /, : and %"

// interfaceName reports whether s can name an interface of Linux (dev_valid_name of
// net/core/dev.c). % is refused too: the kernel would put a number in its place.
func interfaceName(s string) bool {
	return len(s) <= mostName && s != "." && s != ".." && graphic(s) && !strings.ContainsAny(s, "/:%")
}

// graphic reports whether s has only visible ASCII characters, and at least one.
func graphic(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return s != ""
}

// A verdict is what is known of the network behind a backend's vif. The pointer to one is
// what is compared, so that the same verdict may be given twice.
type verdict struct {
	script bool   // the toolstack's script sets the interface up, and writes hotplug-status
	why    string // why the interface cannot be set up; "" if it is
}

// Offer says that the network behind a vif of [ServeConfig].Hold is there, and lets its
// frontend connect. With connected, the backend writes hotplug-status "connected" and takes
// back what an earlier Refuse wrote. Without, it waits until the toolstack's hotplug script
// has written that. Offer does not wait for xenstore. It does nothing on a frontend.
func (d *Device) Offer(connected bool) { d.decide(&verdict{script: !connected}) }

// Refuse says that the network behind a vif of [ServeConfig].Hold cannot be set up, and
// why: as much of the error's text as [xenbus.Reason] leaves. The backend goes to InitWait, since libxl
// waits for that state before it looks further, and stays there until Offer, whatever a
// script says: with hotplug-status "error", the reason in hotplug-error, where libxl reads
// it when a hotplug script has failed, and in "error", where the frontend may read it. A
// link that is up stays up. Refuse does not wait for xenstore. It does nothing on a
// frontend.
func (d *Device) Refuse(why error) {
	d.decide(&verdict{why: xenbus.Reason(why.Error())})
}

func (d *Device) decide(v *verdict) {
	if d.own != nil {
		d.verdict.Store(v)
		d.wakeLifecycle()
	}
}

// publish adds what the verdict says to keys and gone, the keys to write and to remove.
// before is the verdict that was published last; nil: none.
func (v *verdict) publish(before *verdict, keys xenstore.Values, gone []string) []string {
	switch {
	case v.why != "":
		keys[netif.KeyHotplugStatus] = netif.HotplugFailed
		keys[netif.KeyHotplugError] = v.why
		keys[xenbus.KeyReason] = v.why
		return gone
	case !v.script:
		keys[netif.KeyHotplugStatus] = netif.HotplugConnected
	case before != nil && before.why != "":
		keys[netif.KeyHotplugStatus] = "" // as the toolstack writes it for its script
	default: // what is there is the script's
		return gone
	}
	return append(gone, netif.KeyHotplugError, xenbus.KeyReason)
}

// publishVerdict writes a verdict that came after the features were published.
func (l *lifecycle) publishVerdict(v *verdict) bool {
	ok := l.attempt("publish the state of the network behind a vif", func(ctx context.Context, xd *xenbus.Device) error {
		keys := make(xenstore.Values)
		gone := v.publish(l.told, keys, nil)
		err := xd.Publish(ctx, keys, gone...)
		if errors.Is(err, xenbus.ErrGone) { // the next step sees it
			return nil
		}
		return err
	})
	if ok {
		l.told = v
	}
	return ok
}
