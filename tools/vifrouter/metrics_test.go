package main

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"

	"barevif/pvnet/router"
	"barevif/telemetry/openmetrics"
)

// strictly has the strict parser of prometheus_client read a page. It returns a line for each
// sample: its name, its labels in order, its value.
func strictly(t *testing.T, page []byte) (samples []string, err error) {
	t.Helper()
	const python = "/usr/bin/python3" // Debian's own has Debian's modules
	if exec.Command(python, "-c", "import prometheus_client.openmetrics.parser").Run() != nil {
		t.Skip("python3-prometheus-client is not installed")
	}
	const script = `
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
for family in parse(sys.stdin.read()):
    assert family.documentation, family.name
    for s in family.samples:
        print(s.name, " ".join(k + "=" + v for k, v in sorted(s.labels.items())), int(s.value))
`
	cmd := exec.Command(python, "-c", script)
	cmd.Stdin = bytes.NewReader(page)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, &errs)
	}
	return strings.Split(strings.TrimSpace(out.String()), "\n"), nil
}

// The page of a router with traffic, leases, drops and a refused vif passes the strict parser,
// with each family once, and its numbers are the router's.
func TestStrictParserAcceptsThePage(t *testing.T) {
	s := newSite(t, strings.Replace(standard, "guest * in office", "guest web in office domain 3", 1)+"drop from office to uplink proto udp name none\n")
	g, _ := s.guest(firstDom)
	s.settled(g)
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Fatal(err)
	}
	s.refusedGuest(firstDom + 1)
	s.d.triedReload("router.conf", nil)
	s.d.triedReload("router.conf", fmt.Errorf("a line is wrong"))
	s.d.plane.fragment(new(worker), &router.Packet{Out: router.PortID(len(s.d.plane.ports) - 1)}, nil) // its port is gone
	rec := httptest.NewRecorder()
	s.d.metrics(rec, httptest.NewRequest("GET", "/metrics", nil))
	page := rec.Body.Bytes()
	if ct := rec.Header().Get("Content-Type"); ct != openmetrics.ContentType || rec.Code != 200 {
		t.Errorf("%d, content type %q", rec.Code, ct)
	}
	samples, err := strictly(t, page)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, one := range samples {
		if have[one] {
			t.Errorf("twice: %s", one)
		}
		have[one] = true
	}
	for _, want := range []string{
		"vifrouter_guests admitted=yes 1", "vifrouter_guests admitted=no 1", "vifrouter_reloads_total taken=yes 1", "vifrouter_reloads_total taken=no 1",
		"vifrouter_dhcp_leases  1", "vifrouter_flows_limit  65536",
		"vifrouter_rule_packets_total rule=none 0", "vifrouter_failed_frames_total  1",
	} {
		if !have[want] {
			t.Errorf("no sample %q", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", page)
	}
	// The parser is one that refuses: a page without its end, a family twice, a counter without
	// its suffix, a label that does not end.
	end := "# EOF\n"
	body := strings.TrimSuffix(string(page), end)
	for what, bad := range map[string]string{
		"no end":           body,
		"a family twice":   body + "# TYPE vifrouter_flows gauge\nvifrouter_flows 1\n" + end,
		"no suffix":        body + "# TYPE vifrouter_new counter\nvifrouter_new 1\n" + end,
		"a label unquoted": body + "# TYPE vifrouter_new gauge\nvifrouter_new{port=\"a} 1\n" + end,
	} {
		if _, err := strictly(t, []byte(bad)); err == nil {
			t.Errorf("the parser takes a page with %s", what)
		}
	}
}
