package counters

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"go.yaml.in/yaml/v3"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/telemetry/bpf/bpftest"
	"barevif/telemetry/openmetrics"
)

const deploy = "../../tools/barevif/deploy/"

// serve starts a program that listens on a port of its own choice and ends with the
// test. It waits until listening finds the address, the first group, in a line of
// the output.
func serve(t *testing.T, listening, name string, args ...string) (address string) {
	t.Helper()
	var out bytes.Buffer // written until ended is closed, read after that
	at := regexp.MustCompile(listening)
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = limit
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	found, ended := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(ended)
		defer r.Close()
		for lines := bufio.NewScanner(r); lines.Scan(); {
			out.WriteString(lines.Text() + "\n")
			if m := at.FindStringSubmatch(lines.Text()); m != nil {
				select {
				case found <- m[1]:
				default: // it says so twice
				}
			}
		}
	}()
	t.Cleanup(func() {
		cmd.Wait()
		<-ended
		if t.Failed() {
			t.Logf("%s said:\n%s", name, &out)
		}
	})
	select {
	case address = <-found:
	case <-ended:
		t.Fatalf("%s has ended", name)
	case <-time.After(limit):
		t.Fatalf("%s does not listen within %v", name, limit)
	}
	return address
}

// A prometheus is a real one that looks at targets of this test.
type prometheus struct {
	t   *testing.T
	api string
}

// scraped is how often it looks and judges, window how far its rates go back.
const (
	scraped = 200 * time.Millisecond
	window  = 2 * time.Second
)

// startPrometheus has a Prometheus load rules and scrape targets, which are
// addresses by job. Only those of job "stat" keep the label that tells devices
// apart: the others show the same ones again. It asks with the token of tokenFile.
func startPrometheus(t *testing.T, rules []byte, targets map[string]string, tokenFile string) *prometheus {
	t.Helper()
	dir := t.TempDir()
	type object = map[string]any
	var jobs []object
	for job, address := range targets {
		j := object{"job_name": job, "static_configs": []object{{"targets": []string{address}}}}
		if job == "stat" {
			j["authorization"] = object{"credentials_file": tokenFile}
		} else {
			j["metric_relabel_configs"] = []object{{"action": "labeldrop", "regex": "vif"}}
		}
		jobs = append(jobs, j)
	}
	config, err := yaml.Marshal(object{
		"global":         object{"scrape_interval": scraped.String(), "scrape_timeout": scraped.String(), "evaluation_interval": scraped.String()},
		"rule_files":     []string{"rules.yml"},
		"scrape_configs": jobs,
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"prometheus.yml": config, "rules.yml": rules} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	address := serve(t, `msg="Listening on" address=(\S+)`, bpftest.Tool(t, "prometheus"),
		"--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:0")
	return &prometheus{t, "http://" + address + "/api/v1/"}
}

// ask decodes an answer into data. An answer before it is ready is none.
func (p *prometheus) ask(data any, path string, query ...string) bool {
	p.t.Helper()
	form := url.Values{}
	for i := 0; i < len(query); i += 2 {
		form.Add(query[i], query[i+1])
	}
	resp, err := http.Get(p.api + path + "?" + form.Encode())
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusServiceUnavailable {
		return false
	}
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" {
		p.t.Fatalf("%s %v: %s, %v", path, query, answer.Error, err)
	}
	if err := json.Unmarshal(answer.Data, data); err != nil {
		p.t.Fatal(err)
	}
	return true
}

// A sample is one value of an answer.
type sample struct {
	labels map[string]string
	value  float64
}

func (p *prometheus) query(expr string) (out []sample) {
	p.t.Helper()
	var data struct {
		Result []struct {
			Metric map[string]string
			Value  [2]any
		}
	}
	if !p.ask(&data, "query", "query", expr) {
		return nil
	}
	for _, r := range data.Result {
		text, _ := r.Value[1].(string)
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			p.t.Fatal(err)
		}
		out = append(out, sample{r.Metric, v})
	}
	return out
}

// firing gives the alerts that fire, by vif.
func (p *prometheus) firing() map[string][]string {
	out := map[string][]string{}
	for _, s := range p.query(`ALERTS{alertstate="firing"}`) {
		vif := s.labels["vif"]
		if !slices.Contains(out[vif], s.labels["alertname"]) { // once for each queue
			out[vif] = append(out[vif], s.labels["alertname"])
			slices.Sort(out[vif])
		}
	}
	return out
}

// settled waits until look has no complaint.
func settled(t *testing.T, what string, look func() (complaints []string)) {
	t.Helper()
	var last []string
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(scraped / 2) {
		if last = look(); len(last) == 0 {
			return
		}
	}
	t.Fatalf("%s: not within %v:\n%s", what, limit, strings.Join(last, "\n"))
}

// A rule is an alert of the file.
type rule struct {
	Alert, Expr string
	For         string            `yaml:",omitempty"`
	Labels      map[string]string `yaml:",omitempty"`
	Annotations map[string]string `yaml:",omitempty"`
}

// impatient reads the alerts, and gives them with short waiting times.
func impatient(t *testing.T) (alerts []rule, text []byte) {
	t.Helper()
	type group struct {
		Name  string
		Rules []rule
	}
	var file struct{ Groups []group }
	text, err := os.ReadFile(deploy + "alerts.yml")
	if err == nil {
		err = yaml.Unmarshal(text, &file)
	}
	if err != nil {
		t.Fatal(err)
	}
	for g := range file.Groups {
		for i := range file.Groups[g].Rules {
			if r := &file.Groups[g].Rules[i]; r.For != "" {
				r.For = "1s" // what a moment shows is no reason
			}
			alerts = append(alerts, file.Groups[g].Rules[i])
		}
	}
	if text, err = yaml.Marshal(file); err != nil {
		t.Fatal(err)
	}
	return alerts, text
}

// A panel is what the dashboard draws in one place.
type panel struct {
	Title   string
	Targets []struct{ Expr, LegendFormat string }
}

func readDashboard(t *testing.T) (panels []panel, variables map[string]string) {
	t.Helper()
	text, err := os.ReadFile(deploy + "dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Panels     []panel
		Templating struct {
			List []struct {
				Name  string
				Query json.RawMessage
			}
		}
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	variables = map[string]string{}
	for _, v := range file.Templating.List {
		var q struct{ Query string }
		if json.Unmarshal(v.Query, &q) == nil && q.Query != "" {
			variables[v.Name] = q.Query
		}
	}
	return file.Panels, variables
}

// filled puts values where the dashboard has variables, as Grafana does for "All".
func filled(expr string, values map[string][]string) string {
	expr = strings.ReplaceAll(expr, "$__rate_interval", window.String())
	for name, all := range values {
		expr = strings.ReplaceAll(expr, "$"+name, "("+strings.Join(all, "|")+")")
	}
	return expr
}

// choices are the values of a variable: label_values(metric, label).
func (p *prometheus) choices(query string, values map[string][]string) (out []string) {
	p.t.Helper()
	m := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(filled(query, values))
	if m == nil {
		p.t.Fatalf("variable %s", query)
	}
	p.ask(&out, "label/"+m[2]+"/values", "match[]", m[1])
	return out
}

// talk has a send to b and b echo, in small bursts with pauses, so that both ends
// also sleep.
func talk(t *testing.T, a, b *pvnet.Device) (stop func()) {
	a.SetWriteDeadline(time.Time{})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	listen := func(d *pvnet.Device, fn func(pvnet.Frame)) {
		wg.Go(func() {
			if err := d.Listen(ctx, fn); !errors.Is(err, context.Canceled) {
				t.Errorf("Listen: %v", err)
			}
		})
	}
	listen(a, func(pvnet.Frame) {})
	listen(b, func(f pvnet.Frame) {
		if _, err := b.Write(f.Bytes()); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		frame := make([]byte, 600)
		for tick := time.NewTicker(5 * time.Millisecond); ; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case <-tick.C:
			}
			for i := range 8 {
				if _, err := a.Write(frame[:60+60*i]); err != nil {
					t.Error(err)
				}
			}
		}
	})
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// ailing shows the counters of a device of which nothing but its counters is real.
func ailing(t *testing.T, own uint16) (name string, set *telemetry.Set) {
	t.Helper()
	info := telemetry.Info{Role: telemetry.Frontend, Own: own, Peer: backDom}
	set = telemetry.NewSet(1)
	set.Open(&bpf.Store{}, info)
	t.Cleanup(func() {
		if err := set.Close(); err != nil {
			t.Error(err)
		}
	})
	set.SetStatus(telemetry.Status{State: 4, Up: true, MTU: 1500, Queues: 1, Epoch: 1})
	set.RX(0).Add(telemetry.Packets, 1000)
	set.RX(0).Flush()
	return info.Name(), set
}

// ills are what can be wrong with a device, and the alerts that are to tell of it.
var ills = []struct {
	what   string
	befall func(rx, tx *telemetry.Block)
	alerts []string
}{
	{"nothing", func(_, _ *telemetry.Block) {}, nil},
	{"a violation", func(rx, _ *telemetry.Block) { rx.Add(telemetry.Violations, 1) }, []string{"BarevifPeerViolation"}},
	{"a violation of what was sent", func(_, tx *telemetry.Block) { tx.Add(telemetry.Violations, 1) }, []string{"BarevifPeerViolation"}},
	{"stalls", func(_, tx *telemetry.Block) { tx.Add(telemetry.Stalls, 1) }, []string{"BarevifStalled"}},
	{"lost signals", func(rx, _ *telemetry.Block) { rx.Add(telemetry.RescuedWakeups, 1) }, []string{"BarevifRescuedWakeups"}},
	{"frames received that are wrong", func(rx, _ *telemetry.Block) { rx.Drop(telemetry.DropBadOffset, 1) }, []string{"BarevifReceiveErrors"}},
	{"frames sent that are refused", func(_, tx *telemetry.Block) { tx.Drop(telemetry.DropBackendError, 1) }, []string{"BarevifTransmitErrors"}},
	{"frames dropped", func(rx, tx *telemetry.Block) {
		tx.Drop(telemetry.DropDisconnected, 50)
		rx.Add(telemetry.Packets, 1000)
	}, []string{"BarevifDropping"}},
	{"few frames dropped", func(rx, tx *telemetry.Block) { tx.Drop(telemetry.DropDisconnected, 5); rx.Add(telemetry.Packets, 1000) }, nil},
	{"no buffers", func(rx, _ *telemetry.Block) { rx.Add(telemetry.AllocFailed, 5); rx.Add(telemetry.Packets, 1000) }, []string{"BarevifNoBuffers"}},
	{"a full ring", func(_, tx *telemetry.Block) { tx.Set(telemetry.RingSize, 256); tx.Set(telemetry.RingUsed, 256) }, []string{"BarevifRingFull"}},
	{"a busy ring", func(_, tx *telemetry.Block) { tx.Set(telemetry.RingSize, 256); tx.Set(telemetry.RingUsed, 200) }, nil},
	{"an interface that takes no frames", func(rx, _ *telemetry.Block) { rx.Add(telemetry.Undelivered, 10) }, []string{"BarevifUndelivered"}},
	{"an interface that gives no frames", func(_, tx *telemetry.Block) { tx.Add(telemetry.Undelivered, 10) }, []string{"BarevifUndelivered"}},
	{"copies that fail", func(rx, _ *telemetry.Block) { rx.Add(telemetry.GrantErrors, 1) }, []string{"BarevifGrantErrors"}},
	{"a guest that takes nothing", func(_, tx *telemetry.Block) { tx.Add(telemetry.CarrierOff, 1) }, []string{"BarevifCarrierOff"}},
	{"a guest that sends more than it may", func(rx, _ *telemetry.Block) {
		rx.Add(telemetry.CreditWaited, uint64(time.Hour)) // of the 15 minutes that the rate looks at
	}, []string{"BarevifHeldToItsRate"}},
	{"a guest that waited for credit for a moment", func(rx, _ *telemetry.Block) { rx.Add(telemetry.CreditWaited, uint64(time.Second)) }, nil},
	{"pages that are kept", func(_, tx *telemetry.Block) { tx.Add(telemetry.PagesQuarantined, 1) }, []string{"BarevifPagesQuarantined"}},
	{"every reason there is", func(rx, tx *telemetry.Block) {
		for _, b := range []*telemetry.Block{rx, tx} {
			for r := telemetry.DropDisconnected; r <= telemetry.DropBackendError; r++ {
				b.Drop(r, 10)
			}
			for _, c := range []telemetry.Counter{telemetry.Violations, telemetry.Stalls, telemetry.RescuedWakeups,
				telemetry.MirrorHealed, telemetry.GrantErrors, telemetry.PagesQuarantined, telemetry.AllocFailed, telemetry.Undelivered} {
				b.Add(c, 10)
			}
		}
	}, []string{"BarevifDropping", "BarevifGrantErrors", "BarevifMirrorTampered", "BarevifNoBuffers", "BarevifPagesQuarantined", "BarevifPeerViolation",
		"BarevifReceiveErrors", "BarevifRescuedWakeups", "BarevifStalled", "BarevifTransmitErrors", "BarevifUndelivered"}},
}

// No alert is left out of the test below. This one needs no Prometheus.
func TestEveryAlertHasACause(t *testing.T) {
	driven := []string{"BarevifOwnerGone", "BarevifDown", "BarevifMirrorTampered"} // by devices
	for _, ill := range ills {
		driven = append(driven, ill.alerts...)
	}
	alerts, _ := impatient(t)
	for _, a := range alerts {
		if !slices.Contains(driven, a.Alert) {
			t.Errorf("no test raises %s", a.Alert)
		}
	}
}

// A Prometheus takes the counters in from wherever they are offered, draws every
// line of the dashboard from them, and raises every alert when it should, and not
// before.
func TestPrometheusDrawsAndAlerts(t *testing.T) {
	bpftest.Need(t)
	bpftest.Tool(t, "prometheus")
	alerts, rules := impatient(t)
	panels, variables := readDashboard(t)

	w := newWire(t, pvnet.Config{Counters: &bpf.Store{}}, pvnet.Config{Counters: &bpf.Store{}})
	dead := killed(t, telemetry.Info{Role: telemetry.Backend, Own: 31099, Peer: frontDom})
	names := make([]string, len(ills))
	sets := make([]*telemetry.Set, len(ills))
	for i := range ills {
		names[i], sets[i] = ailing(t, uint16(31100+i))
	}
	beating, still := context.WithCancel(t.Context())
	var hearts sync.WaitGroup
	hearts.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for beating.Err() == nil {
			for _, s := range sets {
				s.Tick()
			}
			select {
			case <-tick.C:
			case <-beating.Done():
			}
		}
	})
	defer hearts.Wait()
	defer still()

	tokenFile := filepath.Join(t.TempDir(), "token")
	page := serve(t, `^metrics +http://(\S+)/metrics$`, command(t), "stat", "--http", "127.0.0.1:0", "--interval", "100ms",
		"--token-file", tokenFile, "front-31*", "back-31*")
	targets := map[string]string{"stat": page}
	handlers := map[string]http.Handler{
		"handler": openmetrics.Handler(func() []openmetrics.Device {
			return []openmetrics.Device{{Name: frontName, Stats: w.Front.Counters().Totals()}}
		}),
	}
	hasFile := bpftest.Iterators()
	if hasFile == nil {
		handlers["file"] = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			text, err := os.ReadFile(frontPins + "/metrics")
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
			w.Header().Set("Content-Type", openmetrics.ContentType)
			w.Write(text)
		})
	} else {
		t.Log("not from the file metrics: this kernel loads no BPF iterator over maps: ", hasFile)
	}
	for job, handler := range handlers {
		srv := httptest.NewServer(handler)
		defer srv.Close()
		targets[job] = strings.TrimPrefix(srv.URL, "http://")
	}
	if node, err := exec.LookPath("prometheus-node-exporter"); err == nil && hasFile == nil {
		dir := t.TempDir()
		if err := os.Symlink(frontPins+"/metrics", filepath.Join(dir, "barevif.prom")); err != nil {
			t.Fatal(err)
		}
		targets["node"] = serve(t, `msg="Listening on" address=(\S+)`, node,
			"--collector.disable-defaults", "--collector.textfile", "--collector.textfile.directory="+dir, "--web.listen-address=127.0.0.1:0")
	} else if err != nil {
		t.Log("not through node_exporter, which is not installed")
	}
	p := startPrometheus(t, rules, targets, tokenFile)
	stop := talk(t, w.Front, w.Back)

	values := map[string][]string{}
	settled(t, "every device is there", func() (complaints []string) {
		values["vif"] = p.choices(variables["vif"], nil)
		for _, name := range append([]string{frontName, backName, dead}, names...) {
			if !slices.Contains(values["vif"], name) {
				complaints = append(complaints, name)
			}
		}
		for job := range targets {
			if up := p.query(`up{job="` + job + `"} == 1`); len(up) == 0 {
				complaints = append(complaints, job+" is not up")
			}
		}
		return complaints
	})
	pair := map[string][]string{"vif": {backName, frontName}}
	pair["queue"] = p.choices(variables["queue"], pair)
	if !slices.Equal(pair["queue"], []string{"0"}) || len(variables) != 2 {
		t.Errorf("queues %v, variables %v", pair["queue"], variables)
	}

	legend := regexp.MustCompile(`\{\{(\w+)\}\}`)
	draws := func(values map[string][]string, vifs []string, lines func(expr string) bool) func() []string {
		return func() (complaints []string) {
			for _, panel := range panels {
				for _, target := range panel.Targets {
					if !lines(target.Expr) {
						continue
					}
					got := map[string]bool{}
					for _, s := range p.query(filled(target.Expr, values)) {
						got[s.labels["vif"]] = !math.IsNaN(s.value) && !math.IsInf(s.value, 0) && s.value >= 0
						for _, m := range legend.FindAllStringSubmatch(target.LegendFormat, -1) {
							if s.labels[m[1]] == "" {
								t.Fatalf("%s: %s has no %s", panel.Title, target.Expr, m[1])
							}
						}
					}
					for _, vif := range vifs {
						if !got[vif] {
							complaints = append(complaints, fmt.Sprintf("%s of %s: %s", panel.Title, vif, target.Expr))
						}
					}
				}
			}
			return complaints
		}
	}
	exceptional := func(expr string) bool { return strings.HasSuffix(expr, " > 0") }
	sampled := func(expr string) bool { return strings.HasPrefix(expr, "histogram_quantile") }
	settled(t, "the dashboard draws what a healthy pair does",
		draws(pair, pair["vif"], func(expr string) bool { return !exceptional(expr) && !sampled(expr) }))
	settled(t, "the dashboard draws latencies", func() (complaints []string) {
		for _, panel := range panels {
			drawn, lines := false, false
			for _, target := range panel.Targets {
				if lines = sampled(target.Expr); lines {
					for _, s := range p.query(filled(target.Expr, pair)) {
						drawn = drawn || s.value > 0 && s.value < 10
					}
				}
			}
			if lines && !drawn {
				complaints = append(complaints, panel.Title)
			}
		}
		return complaints
	})
	for _, panel := range panels {
		for _, target := range panel.Targets {
			if exceptional(target.Expr) {
				if got := p.query(filled(target.Expr, pair)); len(got) != 0 {
					t.Errorf("%s: %s shows %v of a healthy pair", panel.Title, target.Expr, got)
				}
			}
		}
	}

	// Each alert has been judged, on numbers, and none is raised.
	settled(t, "every alert is judged", func() (complaints []string) { return p.judged(alerts) })
	metric := regexp.MustCompile(`\bbarevif_[a-z0-9_]+`)
	for _, a := range alerts {
		for _, m := range metric.FindAllString(a.Expr, -1) {
			for _, vif := range pair["vif"] {
				if got := p.query(m + `{vif="` + vif + `"}`); len(got) == 0 {
					t.Errorf("%s: there is no %s of %s", a.Alert, m, vif)
				}
			}
		}
	}
	for vif, raised := range p.firing() {
		if vif != dead && len(raised) > 0 {
			t.Errorf("%s: %v", vif, raised)
		}
	}

	// What all offer is the same.
	stop()
	settled(t, "every way in has the same numbers", func() (complaints []string) {
		want := w.Front.Counters().Totals()
		for job := range targets {
			for name, n := range map[string]uint64{
				"barevif_tx_packets_total": want.TX.Get(telemetry.Packets), "barevif_rx_bytes_total": want.RX.Get(telemetry.Bytes),
				"barevif_tx_frame_size_bytes_count": want.TX.Get(telemetry.Packets),
			} {
				expr := name + `{job="` + job + `"}`
				if job == "stat" {
					expr = name + `{job="stat",vif="` + frontName + `"}`
				}
				if got := p.query(expr); len(got) != 1 || got[0].value != float64(n) || n == 0 {
					complaints = append(complaints, fmt.Sprintf("%s is %v, want %d", expr, got, n))
				}
			}
		}
		return complaints
	})

	want := map[string][]string{dead: {"BarevifOwnerGone"}, frontName: {"BarevifMirrorTampered"}}
	for i, ill := range ills {
		rx, tx := sets[i].RX(0), sets[i].TX(0)
		ill.befall(rx, tx)
		rx.Flush()
		tx.Flush()
		want[names[i]] = ill.alerts
	}
	tamper(t, frontPins+"/counters", int(telemetry.BuffersFree))
	raised := func() (complaints []string) {
		have := p.firing()
		for vif, alerts := range want {
			if got := have[vif]; !slices.Equal(got, alerts) {
				complaints = append(complaints, fmt.Sprintf("%s: %v, want %v", vif, got, alerts))
			}
		}
		return complaints
	}
	all := names[len(names)-1]
	settled(t, "the dashboard draws every loss and event", draws(map[string][]string{"vif": {all}, "queue": {"0"}}, []string{all}, exceptional))
	settled(t, "what is wrong raises its alerts, and no others", raised)

	// The other end takes nothing any more, and then what it was sent.
	w.Front.SetWriteDeadline(time.Now().Add(limit))
	sent := make(chan error, 1)
	go func() {
		for frame := make([]byte, 60); ; {
			if _, err := w.Front.Write(frame); err != nil {
				sent <- err
				return
			}
		}
	}()
	want[frontName] = []string{"BarevifMirrorTampered", "BarevifRingFull", "BarevifStalled"}
	settled(t, "a peer that takes nothing raises its alerts", raised)
	w.Front.SetWriteDeadline(time.Now())
	if err := <-sent; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Write: %v", err)
	}
	stop = talk(t, w.Front, w.Back)
	want[frontName] = []string{"BarevifMirrorTampered", "BarevifStalled"}
	settled(t, "the ring is not full any more", raised)
	stop()

	// It goes, in good order.
	w.Back.Disconnect()
	want[frontName] = []string{"BarevifDown", "BarevifMirrorTampered", "BarevifStalled"}
	settled(t, "a peer that is away raises the alert", raised)

	var active struct {
		Alerts []struct{ Annotations map[string]string }
	}
	p.ask(&active, "alerts")
	for _, a := range active.Alerts {
		for _, text := range a.Annotations {
			if strings.Contains(text, "<error") || strings.Contains(text, "<no value>") || strings.Contains(text, "{{") {
				t.Errorf("an alert says %q", text)
			}
		}
	}
}

// judged complains of rules Prometheus has not evaluated, or not without an error.
func (p *prometheus) judged(alerts []rule) (complaints []string) {
	var data struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError string }
		}
	}
	p.ask(&data, "rules")
	have := map[string]string{}
	for _, g := range data.Groups {
		for _, r := range g.Rules {
			have[r.Name] = r.Health + r.LastError
		}
	}
	for _, a := range alerts {
		if have[a.Alert] != "ok" {
			complaints = append(complaints, a.Alert+": "+have[a.Alert])
		}
	}
	return complaints
}

// killed is a device whose owner was killed with kill -9.
func killed(t *testing.T, info telemetry.Info) (name string) {
	t.Helper()
	p, kind := startOwner(t, info)
	if kind != pinned() {
		t.Fatalf("the owner counts in %s", kind)
	}
	p.Kill()
	t.Cleanup(func() { os.RemoveAll(filepath.Join(bpf.DefaultRoot, info.Name())) })
	return info.Name()
}

// tamper changes one word of the receive block of queue 0, from outside.
func tamper(t *testing.T, pin string, word int) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		t.Fatal(err)
	}
	value[8*word]++
	if err := m.Put(uint32(0), value); err != nil {
		t.Fatal(err)
	}
}
