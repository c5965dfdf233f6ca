package main

import (
	"errors"
	"fmt"
	"net/netip"
	"path"

	"barevif/pvnet"
	"barevif/pvnet/netif"
	"barevif/xenbus/xenstore"
)

// Values of --hotplug: who sets the interfaces of vifs up.
const (
	hotplugAuto   = "auto"   // the toolstack's script in domain 0, where libxl runs it; else back
	hotplugKeys   = "keys"   // back, by the toolstack's keys
	hotplugScript = "script" // the toolstack's script
	hotplugFlags  = "flags"  // back, by its flags alone
)

// defaultBridge is what libxl writes for a vif that was given no bridge
// (libxl__device_nic_setdefault of tools/libs/light/libxl_nic.c).
const defaultBridge = "xenbr0"

// A keyError says why a key of the toolstack is not honoured, and what helps.
type keyError struct {
	key, value string // value: "" if it is not worth showing
	what, next string // next may be ""
}

func (e *keyError) Error() string {
	s := e.key
	if e.value != "" {
		s += "=" + e.value
	}
	s += ": " + e.what
	if e.next != "" {
		s += "; " + e.next
	}
	return s
}

// attrs returns the error as attributes of a log line.
func (e *keyError) attrs() []any {
	args := []any{"key", e.key}
	if e.value != "" {
		args = append(args, "value", e.value)
	}
	args = append(args, "why", e.what)
	if e.next != "" {
		args = append(args, "next", e.next)
	}
	return args
}

// A plan says what a vif is joined to.
type plan struct {
	tap    string         // name of the TAP
	named  bool           // by vifname
	bridge string         // to put the TAP on; "": none
	keyed  bool           // the bridge is the toolstack's, not that of --bridge
	mac    pvnet.MAC      // the only address that the bridge takes frames from; zero: any
	routed bool           // as vif-route does it:
	routes []netip.Prefix // through the TAP
	via    string         // the interface whose address the TAP has too
	script bool           // the toolstack's script does the rest, and writes hotplug-status
	notes  []*keyError    // keys that are left aside
}

// String says what the plan joins the vif to beside its TAP, as the end of a line.
func (p plan) String() string {
	switch {
	case p.script:
		return ", set up by the toolstack's script"
	case p.bridge != "":
		return ", on bridge " + p.bridge
	case p.routed:
		return ", routed to " + join(p.routes)
	}
	return ""
}

func (p *plan) note(key, value, what, next string) {
	p.notes = append(p.notes, &keyError{key, value, what, next})
}

// kinds of hotplug scripts, by what back does in their place.
type scriptKind int

const (
	otherScript scriptKind = iota
	bridgeScript
	routeScript
)

// kindOf returns the kind of a script, and whether it is one of ours (deploy/), which does
// nothing but wait for back.
func kindOf(script string) (kind scriptKind, ours bool) {
	switch path.Base(script) {
	case ".", "vif-bridge": // no script at all: a toolstack that leaves the vif to back
		return bridgeScript, false
	case "vif-barevif":
		return bridgeScript, true
	case "vif-route":
		return routeScript, false
	case "vif-barevif-route":
		return routeScript, true
	}
	return otherScript, false
}

// plan decides what a vif is joined to, by the toolstack's keys and by the flags. tap is the
// name that --tap gives it. The error is a [*keyError] for a key that must not be left aside:
// the vif would be joined to another network than the one it was meant for.
func (b *back) plan(vif, tap string, ts pvnet.Toolstack) (plan, error) {
	p := plan{tap: tap, bridge: b.bridge}
	if b.hotplug == hotplugFlags {
		err := b.planLock(&p, ts)
		return p, err
	}
	if b.packet != "" {
		b.planPacket(&p, ts)
		return p, nil
	}
	kind, ours := kindOf(ts.Script)
	runs := b.hotplug == hotplugScript || b.hotplug == hotplugAuto && b.dom0 && ts.Script != ""
	if runs && !ours && !ts.Done { // once done the toolstack runs it no more, and a new TAP needs the same again
		p.script = true
		if b.lockMAC {
			p.note("--lock-mac", "", "the script decides what the vif's guest is held to", "use script=vif-barevif, or --hotplug keys")
		}
		return p, nil
	}
	if err := p.refuse(ts, "back", "put the vif on a bridge of that VLAN, or have a script do it (--hotplug script)", "put its TAP on the same bridge"); err != nil {
		return p, err
	}
	flagged := b.bridge != "" || len(b.addrs) > 0
	switch kind {
	case bridgeScript:
		b.planBridge(&p, vif, ts, flagged)
	case routeScript:
		p.bridge, p.routed, p.routes, p.via = "", true, ts.IPs, ts.Gateway
	default:
		next := "have it run by the toolstack (--hotplug script), or name vif-bridge, vif-route, vif-barevif or vif-barevif-route"
		if !flagged && !ts.Done {
			return p, &keyError{netif.KeyScript, ts.Script, "back runs no scripts", next}
		}
		p.note(netif.KeyScript, ts.Script, "back runs no scripts, and joins the vif as its flags say", next)
	}
	if ts.Name != "" {
		p.tap, p.named = ts.Name, true
	}
	err := b.planLock(&p, ts)
	return p, err
}

// planLock plans what --lock-mac asks for. A vif that cannot be held to its address is
// refused: the other guests on the bridge count on it.
func (b *back) planLock(p *plan, ts pvnet.Toolstack) error {
	switch {
	case !b.lockMAC:
	case p.bridge == "":
		p.note("--lock-mac", "", "the vif is on no bridge, so its guest is not held to its address", "")
	case ts.MAC == pvnet.MAC{}:
		return &keyError{netif.KeyMAC, "", "there is no usable one, as --lock-mac needs", "give the vif one: mac=..."}
	default:
		p.mac = ts.MAC
	}
	return nil
}

// refuse notes or refuses what a command cannot honour in any plan. vlan and emulated say what
// helps against a VLAN, and with an emulated card.
func (p *plan) refuse(ts pvnet.Toolstack, command, vlan, emulated string) error {
	for _, err := range ts.Bad {
		bad, ok := errors.AsType[*xenstore.ValueError](err)
		if !ok {
			return err
		}
		e := &keyError{bad.Path, fmt.Sprintf("%q", bad.Value), "not " + bad.Want, "correct it: xl network-detach, and xl network-attach again"}
		if bad.Path != netif.KeyMAC && bad.Path != netif.KeyType { // these two say nothing of the network behind the vif
			return e
		}
		p.notes = append(p.notes, e)
	}
	for _, key := range ts.Others {
		if key == netif.KeyVLAN {
			return &keyError{key, "", command + " sets up no VLANs", vlan}
		}
		p.note(key, "", "not honoured", "")
	}
	if ts.Type == "vif_ioemu" {
		p.note(netif.KeyType, ts.Type, command+" serves the paravirtual card alone", "the emulated one is the device model's: "+emulated)
	}
	return nil
}

// planBridge plans what vif-bridge does. libxl writes a bridge for every vif. So where the
// flags say what to join vifs to, its default does not count.
func (b *back) planBridge(p *plan, vif string, ts pvnet.Toolstack, flagged bool) {
	switch _, own := b.prefix[vif]; {
	case ts.Bridge == "", ts.Bridge == defaultBridge && flagged:
	case own && b.bridge == "":
		p.note(netif.KeyBridge, ts.Bridge, "the vif has an address of this machine instead", "leave --addr "+vif+"=... away to put it on the bridge")
	default:
		p.bridge, p.keyed = ts.Bridge, true
	}
	if len(ts.IPs) > 0 {
		p.note(netif.KeyIP, join(ts.IPs), "the guest is not held to these addresses",
			"filter on the bridge (nftables), or route to them: script=vif-barevif-route")
	}
	if ts.Gateway != "" {
		p.note(netif.KeyGatewayDev, ts.Gateway, "nothing is routed", "script=vif-barevif-route does")
	}
}

// planPacket notes the keys that have no effect on a vif that shares an interface.
func (b *back) planPacket(p *plan, ts pvnet.Toolstack) {
	bridge := ts.Bridge
	if bridge == defaultBridge {
		bridge = ""
	}
	script := ts.Script
	if kind, _ := kindOf(script); kind == bridgeScript {
		script = ""
	}
	for _, k := range [...][2]string{
		{netif.KeyBridge, bridge}, {netif.KeyVifName, ts.Name}, {netif.KeyScript, script},
		{netif.KeyIP, join(ts.IPs)}, {netif.KeyGatewayDev, ts.Gateway},
	} {
		if k[1] != "" {
			p.note(k[0], k[1], "the vif is joined to "+b.packet+" instead", "leave --packet away to have it honoured")
		}
	}
}

// join returns addresses as the toolstack writes them.
func join(ips []netip.Prefix) (s string) {
	for i, p := range ips {
		if i > 0 {
			s += " "
		}
		if p.IsSingleIP() {
			s += p.Addr().String()
		} else {
			s += p.String()
		}
	}
	return s
}
