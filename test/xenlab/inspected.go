//go:build linux

package xenlab

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"

	"barevif/pvnet"
)

// rings returns what "barevif ring" says of a vif of d.
func (t *T) rings(d *Domain, name string) pvnet.RingState {
	var all []pvnet.RingState
	out := d.Run(barevif, "ring", "--json", name).Stdout
	if err := json.Unmarshal(out, &all); err != nil || len(all) != 1 || len(all[0].Halves) != 2 || all[0].Halves[0].Ring != "tx" {
		t.Fatalf("%s: the rings of %s: %v: %s", d.Name, name, err, out)
	}
	return all[0]
}

// requireNetbackRings compares our frontend's rings with those that netback shows in debugfs,
// once nothing moves, and kicks the link.
func (t *T) requireNetbackRings(guest *Domain, name, vif string) {
	t.Dom0().Sh("[ -d /sys/kernel/debug/xen-netback ] || mount -t debugfs none /sys/kernel/debug")
	indexes := regexp.MustCompile(`(req|rsp) prod (\d+)`)
	var ours, theirs string
	for range 20 {
		s := t.rings(guest, name)
		ours = ""
		for _, h := range s.Halves {
			ours += fmt.Sprintf("req prod %d rsp prod %d ", h.ReqProd, h.RspProd)
			if h.Size != 256 || h.Port == 0 || h.RingRef == 0 || int(h.Outstanding) != len(h.Slots) {
				t.Fatalf("%s: %s: %+v", guest.Name, name, h)
			}
		}
		theirs = ""
		for _, m := range indexes.FindAllString(t.Dom0().Sh("cat /sys/kernel/debug/xen-netback/%s/io_ring_q0", vif), -1) {
			theirs += m + " "
		}
		if ours == theirs {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	if ours != theirs {
		t.Fatalf("%s: the rings of %s are %q, and netback says %q", guest.Name, name, ours, theirs)
	}
	if out := guest.Run(barevif, "ring", "--kick", name).Text(); !strings.Contains(out, "kicked: 2 halves") {
		t.Fatalf("%s: a kick: %s", guest.Name, out)
	}
	t.Note("rings as netback has them: %s", strings.TrimSpace(ours))
}

// requireCapture captures pings of one domain to the vif of another.
func (t *T) requireCapture(d *Domain, name string, from *Domain, addr string) {
	p := d.Start(barevif, "dump", name, "-c", "6", "-s", "60", "-w", "/tmp/card.pcapng", "icmp", "and", "host", addr)
	p.Await(`capturing ` + name)
	t.Ping(from, addr, 56, 3)
	out := string(p.Succeed().Stderr)
	if !strings.Contains(out, "6 frames captured") {
		t.Fatalf("%s: %s", d.Name, out)
	}
	if size := d.Sh("wc -c </tmp/card.pcapng; rm /tmp/card.pcapng"); len(size) < 3 { // 6 frames of 60 bytes
		t.Fatalf("%s: the capture has %s bytes", d.Name, size)
	}
	t.Note("a capture of 6 frames")
}
