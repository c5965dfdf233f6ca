package statweb

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/tools/internal/stat"
)

const (
	limit = time.Minute
	token = "a-token-of-the-test"
)

// A site is a running server and two ends of a vif that it shows.
type site struct {
	url         string
	front, back *telemetry.Set
}

var (
	frontInfo = telemetry.Info{Role: telemetry.Frontend, Own: 61001, Peer: 61002, Handle: 7}
	backInfo  = telemetry.Info{Role: telemetry.Backend, Own: 61002, Peer: 61001, Handle: 7}
)

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{front: telemetry.NewSet(2), back: telemetry.NewSet(2)}
	for _, end := range []struct {
		set  *telemetry.Set
		info telemetry.Info
	}{{s.front, frontInfo}, {s.back, backInfo}} {
		end.set.Open(&bpf.Store{Root: "/sys/fs/bpf/barevif-statweb-test"}, end.info)
		t.Cleanup(func() { end.set.Close() })
		if kind, reason := end.set.Backend(); kind == "heap" {
			t.Fatalf("counters cannot be seen from outside: %s", reason)
		}
		end.set.SetStatus(telemetry.Status{State: 4, Up: true, MTU: 1500, Queues: 2, Epoch: 1})
	}
	s.live(t)
	s.count(100)
	s.back.RX(0).Drop(telemetry.DropTooLong, 1)
	s.back.RX(0).Flush()
	w, err := stat.NewWatcher("/sys/fs/bpf/barevif-statweb-test", "front-61001-*", "back-61002-*")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.url = "http://" + l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, w, 100*time.Millisecond, token) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return s
}

// live keeps the heartbeat of both ends going, however long a browser takes to start.
func (s *site) live(t *testing.T) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				s.front.Tick()
				s.back.Tick()
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-stopped
	})
}

// count makes the frontend send n frames on queue 0. The backend receives all of them but
// the first one ever.
func (s *site) count(n uint64) {
	tx, rx := s.front.TX(0), s.back.RX(0)
	tx.Add(telemetry.Packets, n)
	tx.Add(telemetry.Bytes, 100*n)
	tx.Set(telemetry.RingSize, 256)
	tx.Observe(telemetry.RingOccupancy, 100)
	tx.Flush()
	posted := s.front.RX(0)
	posted.Set(telemetry.RingSize, 256)
	posted.Set(telemetry.RingUsed, 256) // the state at rest
	posted.Observe(telemetry.RingOccupancy, 256)
	posted.Flush()
	if totals := s.back.Totals(); totals.RX.Get(telemetry.Packets) == 0 {
		n--
	}
	rx.Add(telemetry.Packets, n)
	rx.Add(telemetry.Bytes, 100*n)
	rx.Set(telemetry.RingSize, 256)
	rx.Flush()
}

func get(t *testing.T, method, url, host string) (int, string, http.Header) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	req.Header.Set("Authorization", "Bearer "+token)
	return answer(t, req)
}

func answer(t *testing.T, req *http.Request) (int, string, http.Header) {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body), resp.Header
}

func TestJSONSaysWhatWasCounted(t *testing.T) {
	s := newSite(t)
	code, body, _ := get(t, "GET", s.url+"/stat.json", "")
	var j stat.JSON
	if err := json.Unmarshal([]byte(body), &j); err != nil || code != 200 {
		t.Fatal(code, err)
	}
	if len(j.Devices) != 2 || len(j.Pairs) != 1 {
		t.Fatalf("%d devices, %d pairs", len(j.Devices), len(j.Pairs))
	}
	f := j.Pairs[0].Flows[0]
	if f.Sent != 100 || f.Received != 99 || f.Dropped != 1 || f.Verdict != "balanced" {
		t.Errorf("flow %+v", f)
	}
}

func TestMetricsNameEveryDevice(t *testing.T) {
	s := newSite(t)
	_, body, h := get(t, "GET", s.url+"/metrics", "")
	for _, want := range []string{
		`barevif_tx_packets_total{vif="front-61001-61002-7",queue="0"} 100`,
		`barevif_up{vif="front-61001-61002-7"} 1`,
		"# UNIT barevif_heartbeat_age_seconds seconds",
		`barevif_rx_drop_too_long_total{vif="back-61002-61001-7",queue="0"} 1`,
		"# EOF",
	} {
		if !strings.Contains(body, want+"\n") {
			t.Errorf("no line %s", want)
		}
	}
	if !strings.HasPrefix(h.Get("Content-Type"), "application/openmetrics-text") {
		t.Errorf("it is %s", h.Get("Content-Type"))
	}
}

func TestForeignSitesAndMethodsAreRefused(t *testing.T) {
	s := newSite(t)
	for _, c := range []struct {
		method, path, host string
		want               int
	}{
		{"GET", "/", "", 200},
		{"HEAD", "/stat.json", "", 200},
		{"GET", "/stat.json", "localhost:80", 200},
		{"GET", "/stat.json", "rebound.example", http.StatusMisdirectedRequest},
		{"GET", "/metrics", "localhost.example:9464", http.StatusMisdirectedRequest},
		{"POST", "/stat.json", "", http.StatusMethodNotAllowed},
		{"GET", "/../statweb.go", "", 404},
		{"GET", "/nothing", "", 404},
	} {
		if code, _, _ := get(t, c.method, s.url+c.path, c.host); code != c.want {
			t.Errorf("%s %s for %q: %d, want %d", c.method, c.path, c.host, code, c.want)
		}
	}
	_, _, h := get(t, "GET", s.url+"/", "")
	if csp := h.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'self'") || strings.Contains(csp, "unsafe") {
		t.Errorf("policy %q", csp)
	}
}

func TestOnlyOurOwnNamesAreAnswered(t *testing.T) {
	for host, want := range map[string]bool{
		"127.0.0.1": true, "127.0.0.1:9464": true, "127.0.0.1:": true, "192.0.2.7:80": true,
		"[::1]": true, "[::1]:9464": true, "[2001:db8::7]:80": true, "[::ffff:127.0.0.1]:80": true, "[fe80::1%25eth0]:80": true,
		"localhost": true, "localhost:9464": true, "LocalHost": true, "localhost.": true, "localhost.:80": true,
		"": false, ":80": false, "[]": false, "[::1": false, "::1]": false, "[127.0.0.1]": false, "[localhost]": false,
		"localhost:http": false, "127.0.0.1:9464:80": false, "[::1]x": false, "[::1]:x": false, "[::1]:80:80": false,
		"localhost.example": false, "localhost.example:80": false, "x.localhost": false, "rebound.example": false,
		"127.0.0.1.example": false, "127.1": false, "2130706433": false, "0x7f000001": false, "localhost..": false,
		"user@127.0.0.1": false,
	} {
		if got := ownName(host); got != want {
			t.Errorf("Host: %s is answered: %v", host, got)
		}
	}
}

func TestCountersAreForThoseWhoKnowTheToken(t *testing.T) {
	s := newSite(t)
	for _, path := range []string{"/stat.json", "/history.json", "/metrics"} {
		for header, want := range map[string]int{
			"Bearer " + token: 200, "bearer " + token: 200, "Bearer  " + token: 200,
			"": 401, "Bearer": 401, "Bearer ": 401, "Basic " + token: 401, token: 401,
			"Bearer " + token + "x": 401, "Bearer " + token[1:]: 401,
		} {
			req, err := http.NewRequest("GET", s.url+path+"?token="+token, nil)
			if err != nil {
				t.Fatal(err)
			}
			if header != "" {
				req.Header.Set("Authorization", header)
			}
			code, body, h := answer(t, req)
			if code != want || (code == 200) == strings.Contains(body, "send the token") || (h.Get("WWW-Authenticate") == "") != (code == 200) {
				t.Errorf("%s with %q: %d, %.80s", path, header, code, body)
			}
			if strings.Contains(body, token) {
				t.Errorf("%s says the token", path)
			}
		}
	}
	req, err := http.NewRequest("GET", s.url+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if code, _, _ := answer(t, req); code != 200 {
		t.Errorf("the page, which is no secret: %d", code)
	}
}

func TestWithoutATokenEveryoneMayRead(t *testing.T) {
	p := &page{look: &stat.Look{}, history: stat.NewHistory(1)}
	for _, header := range []string{"", "Bearer x"} {
		req := httptest.NewRequest("GET", "http://[::1]/stat.json", nil)
		req.Header.Set("Authorization", header)
		w := httptest.NewRecorder()
		p.handler().ServeHTTP(w, req)
		if w.Code != 200 {
			t.Errorf("%q: %d", header, w.Code)
		}
	}
}

func TestHistoryGrowsAndGoesOnFromSince(t *testing.T) {
	s := newSite(t)
	type answer struct{ Series []stat.Series }
	var a answer
	read := func(query string) {
		code, body, _ := get(t, "GET", s.url+"/history.json"+query, "")
		if code != 200 {
			t.Fatalf("%s: %d %s", query, code, body)
		}
		a = answer{}
		if err := json.Unmarshal([]byte(body), &a); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "there are three samples", func() bool {
		read("")
		return len(a.Series) > 0 && len(a.Series[0].Samples) >= 3
	})
	second := a.Series[0].Samples[1].Time
	// In whatever zone: the machine's may be one east of Greenwich.
	for _, zone := range []*time.Location{time.Local, time.UTC, time.FixedZone("", 5*3600+45*60), time.FixedZone("", -9*3600)} {
		read("?since=" + url.QueryEscape(second.In(zone).Format(time.RFC3339Nano)))
		if len(a.Series[0].Samples) == 0 {
			t.Errorf("no sample since %v", second.In(zone))
		}
		for _, x := range a.Series[0].Samples {
			if !x.Time.After(second) {
				t.Errorf("a sample of %v, since %v", x.Time, second.In(zone))
			}
		}
	}
	for _, bad := range []string{"yesterday", "2026-01-02", second.In(time.FixedZone("", 3600)).Format(time.RFC3339Nano)} { // + is a space
		if code, body, _ := get(t, "GET", s.url+"/history.json?since="+strings.ReplaceAll(bad, " ", "+"), ""); code != 400 || !strings.Contains(body, "not a time") || !strings.Contains(body, "%2B") {
			t.Errorf("since %s: %d %s", bad, code, body)
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(limit)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("%s: not within %v", what, limit)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
