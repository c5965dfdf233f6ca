// Package deploy keeps what operators install: alerts.yml for Prometheus,
// dashboard.json for Grafana, and vif-barevif for xl. Its tests make the dashboard out of the table of
// fields, and refuse a metric that does not exist.
package deploy

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"barevif/telemetry"
	"barevif/tools/internal/statweb"

	"go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "write dashboard.json anew")

// samples returns the names of all samples that exist.
func samples() map[string]bool {
	out := map[string]bool{}
	for _, name := range statweb.Metrics() {
		out[name] = true
	}
	for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			switch m := f.Metric(d); f.Kind {
			case telemetry.KindCounter:
				out[m+"_total"] = true
			case telemetry.KindGauge:
				out[m] = true
			case telemetry.KindHistogram:
				out[m+"_bucket"], out[m+"_count"], out[m+"_sum"] = true, true, true
			}
		}
	}
	return out
}

var metric = regexp.MustCompile(`\bbarevif_[a-z0-9_]+`)

// unknown returns the metrics of an expression that do not exist.
func unknown(expr string) (out []string) {
	known := samples()
	for _, m := range metric.FindAllString(expr, -1) {
		if !known[m] {
			out = append(out, m)
		}
	}
	return out
}

func TestUnknownMetricIsFound(t *testing.T) {
	got := unknown(`rate(barevif_rx_packets_total[5m]) / barevif_rx_packets + barevif_up + barevif_rx_gone_total`)
	if want := []string{"barevif_rx_packets", "barevif_rx_gone_total"}; !slices.Equal(got, want) {
		t.Errorf("found %v, want %v", got, want)
	}
}

func TestAlertsNameMetricsThatExist(t *testing.T) {
	text, err := os.ReadFile("alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if bad := unknown(r.Expr); len(bad) > 0 || !metric.MatchString(r.Expr) {
				t.Errorf("%s: %s: no metrics %v", r.Alert, r.Expr, bad)
			}
			if seen[r.Alert] || r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%s is there twice, or has no severity, summary or description", r.Alert)
			}
			seen[r.Alert] = true
		}
	}
	if len(seen) < 10 {
		t.Errorf("%d alerts", len(seen))
	}
}

func TestPromtoolAcceptsTheAlerts(t *testing.T) {
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed")
	}
	for _, args := range [][]string{{"check", "rules", "alerts.yml"}, {"test", "rules", "alerts_test.yml"}} {
		if out, err := exec.Command(tool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

func TestDashboardIsMadeFromTheFields(t *testing.T) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(dashboard()); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("dashboard.json", b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile("dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Error(errors.New("dashboard.json is not of this table of fields; run go test -update"))
	}
	if bad := unknown(b.String()); len(bad) > 0 {
		t.Errorf("no metrics %v", bad)
	}
	// The dashboard has every reason for a loss.
	for _, f := range telemetry.Fields() {
		for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
			if f.SumIn != "" && !strings.Contains(b.String(), f.Metric(d)+"_total") {
				t.Errorf("%s is not drawn", f.Metric(d))
			}
		}
	}
}

// If one of these conditions fails, Grafana shows nothing and reports no error.
func TestGrafanaCanPlaceTheDashboard(t *testing.T) {
	type source struct{ Type, UID string }
	var d struct {
		UID, Title    string
		SchemaVersion int
		Templating    struct {
			List []struct {
				Name, Type string
				Datasource source
				Query      json.RawMessage
			}
		}
		Panels []struct {
			ID          int
			Type, Title string
			GridPos     struct{ X, Y, W, H int }
			Datasource  source
			FieldConfig struct{ Defaults struct{ Unit string } }
			Options     struct {
				Legend struct {
					ShowLegend             bool
					DisplayMode, Placement string
				}
			}
			Targets []struct {
				RefID, Expr, LegendFormat string
				Datasource                source
			}
		}
	}
	text, err := os.ReadFile("dashboard.json")
	if err == nil {
		err = json.Unmarshal(text, &d)
	}
	if err != nil {
		t.Fatal(err)
	}
	if d.UID == "" || len(d.UID) > 40 || d.Title == "" || d.SchemaVersion < 36 {
		t.Errorf("uid %q, title %q, schema %d", d.UID, d.Title, d.SchemaVersion)
	}
	variables := map[string]bool{"__rate_interval": true}
	prometheus := source{Type: "prometheus", UID: "${source}"}
	for _, v := range d.Templating.List {
		if variables[v.Name] || v.Type != "datasource" && (v.Type != "query" || v.Datasource != prometheus) {
			t.Errorf("variable %s: there twice, or of no source", v.Name)
		}
		for _, m := range reference.FindAllStringSubmatch(string(v.Query), -1) {
			if !variables[m[1]] {
				t.Errorf("variable %s asks for %s, which is not before it", v.Name, m[1])
			}
		}
		variables[v.Name] = true
	}
	const columns = 24
	units := []string{"pps", "bps", "percentunit", "short", "ops", "s"}
	ids, places := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if p.ID <= 0 || ids[p.ID] || p.Type != "timeseries" || p.Title == "" || len(p.Targets) == 0 || p.Datasource != prometheus || !slices.Contains(units, p.FieldConfig.Defaults.Unit) {
			t.Errorf("panel %d, %s: its id, type, source, lines or unit", p.ID, p.Title)
		}
		ids[p.ID] = true
		if l := p.Options.Legend; !l.ShowLegend || l.DisplayMode != "table" || l.Placement != "bottom" {
			t.Errorf("%s: legend %+v", p.Title, l)
		}
		if g := p.GridPos; g.W <= 0 || g.H <= 0 || g.X < 0 || g.X+g.W > columns {
			t.Errorf("%s is at %+v", p.Title, g)
		}
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := places[[2]int{x, y}]; other != "" {
					t.Fatalf("%s lies over %s", p.Title, other)
				}
				places[[2]int{x, y}] = p.Title
			}
		}
		refs, legends := map[string]bool{}, map[string]bool{}
		for _, q := range p.Targets {
			if q.RefID == "" || refs[q.RefID] || q.LegendFormat == "" || legends[q.LegendFormat] || q.Datasource != prometheus {
				t.Errorf("%s: %s, %q: there twice, or of no source", p.Title, q.RefID, q.LegendFormat)
			}
			refs[q.RefID], legends[q.LegendFormat] = true, true
			for _, m := range reference.FindAllStringSubmatch(q.Expr, -1) {
				if !variables[m[1]] {
					t.Errorf("%s: no variable %s", p.Title, m[1])
				}
			}
		}
	}
}

// reference matches the use of a variable.
var reference = regexp.MustCompile(`\$\{?(\w+)`)

type object = map[string]any

// A query is one line of a panel.
type query struct{ expr, legend string }

const of = `{vif=~"$vif",queue=~"$queue"}`

func rate(name string) string { return "rate(" + name + of + "[$__rate_interval])" }

// both returns a query for each direction.
func both(expr, legend string) []query {
	return []query{
		{strings.ReplaceAll(expr, "DIR", "rx"), "{{vif}} rx" + legend},
		{strings.ReplaceAll(expr, "DIR", "tx"), "{{vif}} tx" + legend},
	}
}

// losses returns a query for each reason and direction.
func losses() (out []query) {
	for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			if f.SumIn != "" || f.Name == "undelivered" {
				reason := strings.ReplaceAll(strings.TrimPrefix(f.Name, "drop_"), "_", " ")
				out = append(out, query{"sum by (vif) (" + rate(f.Metric(d)+"_total") + ") > 0", fmt.Sprintf("{{vif}} %s %s", d, reason)})
			}
		}
	}
	return out
}

// dashboard returns the dashboard as Grafana's JSON object.
func dashboard() object {
	sum := func(name string) string { return "sum by (vif) (" + rate(name) + ")" }
	quantile := func(name string) string {
		return "histogram_quantile(0.99, sum by (vif, le) (" + rate(name) + ")) / 1e9"
	}
	var events []query
	for _, name := range []string{"violations", "stalls", "rescued_wakeups", "mirror_healed", "grant_errors", "pages_quarantined"} {
		events = append(events, query{
			fmt.Sprintf("sum by (vif) (increase(barevif_rx_%[1]s_total%[2]s[$__rate_interval]) + increase(barevif_tx_%[1]s_total%[2]s[$__rate_interval])) > 0", name, of),
			"{{vif}} " + strings.ReplaceAll(name, "_", " "),
		})
	}
	panels := []object{
		panel("Frames", "pps", "", both(sum("barevif_DIR_packets_total"), "")),
		panel("Traffic", "bps", "", both("8 * "+sum("barevif_DIR_bytes_total"), "")),
		panel("Frames lost, by reason", "pps", "Only reasons that occur are drawn.", losses()),
		panel("Ring in use", "percentunit", "Mean over the looks of the owner, as a part of the ring.",
			both("sum by (vif) ("+rate("barevif_DIR_ring_occupancy_slots_sum")+") / sum by (vif) ("+rate("barevif_DIR_ring_occupancy_slots_count")+
				") / on (vif) max by (vif) (barevif_DIR_ring_size"+of+" > 0)", "")),
		panel("Frames a batch", "short", "More is cheaper: a signal and a look are shared by the batch.",
			both("sum by (vif) ("+rate("barevif_DIR_batch_size_frames_sum")+") / sum by (vif) ("+rate("barevif_DIR_batch_size_frames_count")+")", "")),
		panel("Signals", "ops", "Sent to the peer, and spared because it was awake.",
			append(both(sum("barevif_DIR_notifies_sent_total"), " sent"), both(sum("barevif_DIR_notifies_spared_total"), " spared")...)),
		panel("Request to response, 99th percentile", "s", "Sampled.", both(quantile("barevif_DIR_request_latency_nanoseconds_bucket"), "")),
		panel("What should not happen", "short", "All 0 on a correct system with a correct peer.", events),
		panel("Free buffers", "short", "At 0 the program holds them all and frames are lost.", both("sum by (vif) (barevif_DIR_buffers_free"+of+")", "")),
	}
	for i, p := range panels {
		p["id"] = i + 1
		p["gridPos"] = object{"h": 8, "w": 12, "x": i % 2 * 12, "y": i / 2 * 8}
	}
	variable := func(name, label string) object {
		return object{
			"name": name, "label": name, "type": "query", "datasource": source(), "query": object{
				"query": "label_values(barevif_rx_packets_total" + label + ", " + name + ")", "refId": "variable",
			},
			"refresh": 2, "includeAll": true, "multi": true, "sort": 3, "current": object{"text": "All", "value": "$__all"},
		}
	}
	return object{
		"uid": "barevif", "title": "barevif", "tags": []string{"network", "xen"}, "schemaVersion": 39, "version": 1,
		"editable": true, "refresh": "10s", "time": object{"from": "now-1h", "to": "now"}, "graphTooltip": 1,
		"templating": object{"list": []object{
			{"name": "source", "label": "data source", "type": "datasource", "query": "prometheus"},
			variable("vif", ""), variable("queue", `{vif=~"$vif"}`),
		}},
		"panels": panels,
	}
}

func source() object { return object{"type": "prometheus", "uid": "${source}"} }

func panel(title, unit, description string, queries []query) object {
	var targets []object
	for i, q := range queries {
		targets = append(targets, object{"refId": fmt.Sprintf("Q%d", i), "datasource": source(), "expr": q.expr, "legendFormat": q.legend})
	}
	return object{
		"type": "timeseries", "title": title, "description": description, "datasource": source(), "targets": targets,
		"fieldConfig": object{"defaults": object{"unit": unit, "min": 0, "custom": object{"fillOpacity": 10, "lineWidth": 2, "showPoints": "never"}}, "overrides": []object{}},
		"options":     object{"legend": object{"showLegend": true, "displayMode": "table", "placement": "bottom", "calcs": []string{"lastNotNull", "max"}}, "tooltip": object{"mode": "multi", "sort": "desc"}},
	}
}
