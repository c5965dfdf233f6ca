package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/router"
	"barevif/telemetry/openmetrics"
)

// metrics serves the counters of the vifs and of the router as OpenMetrics text.
func (d *daemon) metrics(w http.ResponseWriter, _ *http.Request) {
	var b bytes.Buffer
	if err := d.writeMetrics(&b); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", openmetrics.ContentType)
	w.Write(b.Bytes())
}

// A sample is a value of a metric with its labels.
type sample struct {
	labels string // name="value" pairs with commas between them; "": none
	value  uint64
}

// A family is one metric of the router, in the form of OpenMetrics.
type family struct {
	name, kind, unit, help string
	samples                []sample
}

// add adds a sample. labels are names and values in turn.
func (f *family) add(value uint64, labels ...string) {
	var b strings.Builder
	for i := 0; i+1 < len(labels); i += 2 {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `%s="%s"`, labels[i], labels[i+1]) // names, numbers and words of ours: nothing to escape
	}
	f.samples = append(f.samples, sample{b.String(), value})
}

func (f *family) write(w io.Writer) {
	fmt.Fprintf(w, "# TYPE %s %s\n", f.name, f.kind)
	if f.unit != "" {
		fmt.Fprintf(w, "# UNIT %s %s\n", f.name, f.unit)
	}
	fmt.Fprintf(w, "# HELP %s %s\n", f.name, f.help)
	name := f.name
	if f.kind == "counter" {
		name += "_total"
	}
	for _, s := range f.samples {
		if s.labels == "" {
			fmt.Fprintf(w, "%s %d\n", name, s.value)
		} else {
			fmt.Fprintf(w, "%s{%s} %d\n", name, s.labels, s.value)
		}
	}
}

// writeMetrics writes the whole page.
func (d *daemon) writeMetrics(b *bytes.Buffer) error {
	var devices []openmetrics.Device
	d.mu.Lock()
	guests, up := d.sortedLocked(), d.up
	ports := d.applied.Ports
	var leased []*guest
	for _, g := range guests {
		if g.server != nil {
			leased = append(leased, g)
		}
	}
	families := d.dhcpFamiliesLocked(leased)
	guestCount := &family{name: "vifrouter_guests", kind: "gauge", help: "Vifs of guests, by whether the configuration admits them."}
	admitted := 0
	for _, g := range guests {
		if g.admitted {
			admitted++
		}
	}
	guestCount.add(uint64(admitted), "admitted", "yes")
	guestCount.add(uint64(len(guests)-admitted), "admitted", "no")
	reloads := &family{name: "vifrouter_reloads", kind: "counter", help: "Reloads of the configuration, by whether it was taken."}
	reloads.add(d.reloads, "taken", "yes")
	reloads.add(d.refused, "taken", "no")
	duplicates := &family{name: "vifrouter_uplink_duplicate_addresses", kind: "counter", help: "Times that another station of the uplink's link had an address that would be the router's."}
	duplicates.add(d.duplicates)
	d.mu.Unlock()
	listens := d.listens.now()
	queries := &family{name: "vifrouter_uplink_listener_queries", kind: "counter", help: "Queries of Multicast Listener Discovery that came from the uplink's link."}
	queries.add(listens.Queries)
	reports := &family{name: "vifrouter_uplink_listener_reports", kind: "counter", help: "Messages that told the uplink's link which groups the router listens to, or does not any more."}
	reports.add(listens.Reports)

	add := func(dev *pvnet.Device, name string) {
		devices = append(devices, openmetrics.Device{Name: name, Stats: dev.Stats()})
	}
	if up != nil {
		add(up.dev, "uplink")
	}
	for _, g := range guests {
		add(g.dev, "vif"+g.vif)
	}
	if err := openmetrics.Write(b, devices...); err != nil {
		return err
	}
	b.Truncate(b.Len() - len("# EOF\n"))
	families = append(families, guestCount, reloads, duplicates, queries, reports)
	families = append(families, d.coreFamilies(ports)...)
	families = append(families, d.planeFamilies()...)
	families = append(families, d.dnsFamilies()...)
	for _, f := range families {
		f.write(b)
	}
	b.WriteString("# EOF\n")
	return nil
}

func (d *daemon) coreFamilies(ports []router.Port) []*family {
	forwarded := &family{name: "vifrouter_forwarded_packets", kind: "counter", help: "Packets that came in at a port and were forwarded."}
	bytes := &family{name: "vifrouter_forwarded_bytes", kind: "counter", unit: "bytes", help: "Bytes of their frames."}
	dropped := &family{name: "vifrouter_dropped_packets", kind: "counter", help: "Packets that came in at a port and were not forwarded, by reason."}
	local := &family{name: "vifrouter_local_packets", kind: "counter", help: "Packets for the router itself."}
	replies := &family{name: "vifrouter_reply_packets", kind: "counter", help: "ICMP errors, TCP resets, ARP replies and neighbour advertisements that answered packets of a port."}
	flows := &family{name: "vifrouter_port_flows", kind: "gauge", help: "Flows that began at a port."}
	refused := &family{name: "vifrouter_port_refused_flows", kind: "counter", help: "Flows that began at a port and found no place."}
	for _, p := range append(ports[:len(ports):len(ports)], router.Port{ID: router.LocalPort, Name: "router"}) {
		s, ok := d.core.PortStats(p.ID)
		if !ok {
			continue
		}
		forwarded.add(s.Forwarded, "port", p.Name)
		bytes.add(s.ForwardedBytes, "port", p.Name)
		local.add(s.Local, "port", p.Name)
		replies.add(s.Replies, "port", p.Name)
		flows.add(uint64(s.Flows), "port", p.Name)
		refused.add(s.Refused, "port", p.Name)
		for r := router.Reason(1); int(r) < router.Reasons; r++ {
			dropped.add(s.Dropped[r], "port", p.Name, "reason", r.String())
		}
	}
	st := d.core.Stats()
	all := &family{name: "vifrouter_flows", kind: "gauge", help: "Flows in the table."}
	all.add(uint64(st.Flows))
	room := &family{name: "vifrouter_flows_limit", kind: "gauge", help: "Flows that the table has room for."}
	room.add(uint64(st.FlowLimit))
	evicted := &family{name: "vifrouter_evicted_flows", kind: "counter", help: "Flows whose place another one got."}
	evicted.add(st.Evicted)
	rules := &family{name: "vifrouter_rule_packets", kind: "counter", help: "Packets that a rule with a name decided about."}
	sums, order := map[string]uint64{}, []string{}
	for _, r := range d.core.RuleStats() {
		if _, there := sums[r.Name]; !there && r.Name != "" {
			order = append(order, r.Name)
		}
		sums[r.Name] += r.Matched
	}
	for _, name := range order {
		rules.add(sums[name], "rule", name)
	}
	return []*family{forwarded, bytes, dropped, local, replies, flows, refused, all, room, evicted, rules}
}

func (d *daemon) planeFamilies() []*family {
	n := &d.plane.n
	lost := &family{name: "vifrouter_undelivered_frames", kind: "counter", help: "Frames for which the vif they should leave by had no room."}
	lost.add(n.undelivered.Load())
	own := &family{name: "vifrouter_unsent_own_frames", kind: "counter", help: "Frames of the router's own that found no room."}
	own.add(n.control.Load())
	failed := &family{name: "vifrouter_failed_frames", kind: "counter", help: "Frames whose checksum could not be completed, or that could not be cut into fragments, and that went nowhere."}
	failed.add(n.failed.Load())
	limited := &family{name: "vifrouter_limited_connections", kind: "counter", help: "TCP connections to the router itself that were too many for the port they came from."}
	limited.add(n.knocks.Load())
	d.plane.wait.mu.Lock()
	total, without := d.plane.wait.total, d.plane.wait.lost
	d.plane.wait.mu.Unlock()
	waited := &family{name: "vifrouter_neighbour_waits", kind: "counter", help: "Frames that waited for the address of a neighbour, by whether there was room for them."}
	waited.add(total, "room", "yes")
	waited.add(without, "room", "no")
	return []*family{lost, own, failed, limited, waited}
}

func (d *daemon) dnsFamilies() []*family {
	s := d.names.Stats()
	queries := &family{name: "vifrouter_dns_queries", kind: "counter", help: "Queries of guests, by what became of them."}
	queries.add(s.Cached, "result", "cached")
	queries.add(s.Joined, "result", "joined")
	queries.add(s.Failed, "result", "failed")
	queries.add(s.Refused, "result", "refused")
	queries.add(s.Limited, "result", "limited")
	queries.add(s.Truncated, "result", "truncated")
	queries.add(s.Answered, "result", "answered")
	upstream := &family{name: "vifrouter_dns_upstream_queries", kind: "counter", help: "Queries sent to name servers."}
	upstream.add(s.Upstream)
	strange := &family{name: "vifrouter_dns_mismatches", kind: "counter", help: "Datagrams that came for an answer and were none."}
	strange.add(s.Mismatch)
	return []*family{queries, upstream, strange}
}

func (d *daemon) dhcpFamiliesLocked(list []*guest) []*family {
	messages := &family{name: "vifrouter_dhcp_messages", kind: "counter", help: "DHCP messages of guests that are there now, and answers to them, by kind."}
	leases := &family{name: "vifrouter_dhcp_leases", kind: "gauge", help: "Guests with a DHCP lease."}
	now, n := time.Now(), uint64(0)
	for _, g := range list {
		s := g.server.Stats()
		for _, one := range []struct {
			kind  string
			count uint64
		}{
			{"discover", s.Discover}, {"offer", s.Offer}, {"request", s.Request}, {"ack", s.Ack}, {"nak", s.Nak}, {"decline", s.Decline},
			{"release", s.Release}, {"inform", s.Inform}, {"ignored", s.Ignored}, {"limited", s.Limited},
		} {
			messages.add(one.count, "port", g.vif, "kind", one.kind)
		}
		if _, ok := g.server.Lease(now); ok {
			n++
		}
	}
	leases.add(n)
	return []*family{messages, leases}
}
