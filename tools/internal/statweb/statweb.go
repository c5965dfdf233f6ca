// Package statweb shows the counters of this machine's vifs as a web page with live
// plots, as JSON and as OpenMetrics text.
//
// The package contains the whole page, which requests nothing from another server. It
// answers GET and HEAD only. It answers only requests that name this server by an address
// or by the host name "localhost", so that no other site's page can read it through a
// browser.
//
// This process may read counters that other users of the machine may not. Unless there is
// no token, a client gets JSON and metrics only with the token, sent as "Authorization:
// Bearer TOKEN". The page takes the token from the fragment of its address,
// "#token=TOKEN", which a browser sends to no server, and keeps it for its tab. A cookie
// would be weaker: a browser sends it to every port of the host.
package statweb

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"barevif/telemetry/bpf"
	"barevif/telemetry/openmetrics"
	"barevif/tools/internal/stat"
)

//go:embed page
var pageFiles embed.FS

// kept is how many looks the plots show.
const kept = 300

// Serve takes l over and serves until ctx ends, with a look every interval. A client
// without token gets no counters; with the token "" every client gets them. The error is
// ctx's, or that of the listener.
func Serve(ctx context.Context, l net.Listener, w *stat.Watcher, interval time.Duration, token string) error {
	p := &page{history: stat.NewHistory(kept), interval: interval, token: token}
	p.add(w.Look())
	srv := &http.Server{
		Handler:           p.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.add(w.Look())
		case err := <-ended:
			return err
		case <-ctx.Done():
			grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			err := srv.Shutdown(grace)
			if err != nil {
				err = srv.Close() // a client does not read
			}
			<-ended
			return errors.Join(ctx.Err(), err)
		}
	}
}

// A page holds the data for the answers.
type page struct {
	interval time.Duration
	token    string // "": no token is needed

	mu      sync.Mutex
	look    *stat.Look    // guarded by mu
	history *stat.History // guarded by mu
}

func (p *page) add(l *stat.Look) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.look = l
	p.history.Add(l)
}

func (p *page) latest() *stat.Look {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.look
}

func (p *page) handler() http.Handler {
	files, err := fs.Sub(pageFiles, "page")
	if err != nil {
		panic(err) // impossible: the name above is right
	}
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServerFS(files))
	mux.HandleFunc("GET /stat.json", p.known(func(w http.ResponseWriter, _ *http.Request) {
		reply(w, p.latest().JSON())
	}))
	mux.HandleFunc("GET /history.json", p.known(p.serveHistory))
	mux.HandleFunc("GET /metrics", p.known(p.serveMetrics))
	return guard(mux)
}

// known answers only requests with the token. It compares in constant time.
func (p *page) known(next http.HandlerFunc) http.HandlerFunc {
	want := sha256.Sum256([]byte(p.token))
	return func(w http.ResponseWriter, r *http.Request) {
		scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		got := sha256.Sum256([]byte(strings.TrimSpace(token)))
		if p.token != "" && (!strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(got[:], want[:]) == 0) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="barevif stat"`)
			http.Error(w, `send the token that "barevif stat --http" printed or read from its --token-file: Authorization: Bearer TOKEN`, http.StatusUnauthorized)
			return
		}
		next(w, r)
	}
}

// A gauge is a value of a device that only an outside reader can tell.
type gauge struct {
	name, unit, help string
	value            func(*stat.Device) float64
}

var gauges = [...]gauge{
	{"barevif_up", "", "1 while the device is connected and its owner lives", func(d *stat.Device) float64 {
		if d.Report.Status.Up && !d.Stale {
			return 1
		}
		return 0
	}},
	{"barevif_heartbeat_age_seconds", "seconds", "time since the owner's last sign of life, at the latest look", func(d *stat.Device) float64 {
		return max(d.Report.Age.Seconds(), 0)
	}},
}

// Metrics returns the names of the page's metrics that are not in the table of fields.
func Metrics() []string {
	var out []string
	for _, g := range gauges {
		out = append(out, g.name)
	}
	return out
}

func (p *page) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	devices := p.latest().Labelled()
	var counters []openmetrics.Device
	for _, d := range devices {
		counters = append(counters, openmetrics.Device{Name: d.Label(), Stats: d.Report.Stats})
	}
	var b bytes.Buffer
	for _, g := range gauges {
		fmt.Fprintf(&b, "# TYPE %s gauge\n", g.name)
		if g.unit != "" {
			fmt.Fprintf(&b, "# UNIT %s %s\n", g.name, g.unit)
		}
		fmt.Fprintf(&b, "# HELP %s %s\n", g.name, g.help)
		for _, d := range devices {
			if d.Source.Kind != bpf.KindMetrics { // which has only counters
				fmt.Fprintf(&b, "%s{vif=\"%s\"} %v\n", g.name, escape.Replace(d.Label()), g.value(d))
			}
		}
	}
	if err := openmetrics.Write(&b, counters...); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", openmetrics.ContentType)
	// An error means that the client went away.
	_, _ = w.Write(b.Bytes())
}

var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// serveHistory returns the samples after the time ?since=, or all.
func (p *page) serveHistory(w http.ResponseWriter, r *http.Request) {
	var since time.Time
	if text := r.URL.Query().Get("since"); text != "" {
		var err error
		if since, err = time.Parse(time.RFC3339Nano, text); err != nil {
			http.Error(w, fmt.Sprintf("since %.40q: not a time as samples have, 2006-01-02T15:04:05.999999999+07:00 (in a query + is %%2B)", text), http.StatusBadRequest)
			return
		}
	}
	type answer struct {
		Interval float64       `json:"interval_seconds"`
		Kept     int           `json:"kept"`
		Series   []stat.Series `json:"series"`
	}
	a := answer{Interval: p.interval.Seconds(), Kept: kept, Series: []stat.Series{}}
	p.mu.Lock()
	for _, s := range p.history.Series() {
		i := 0
		for i < len(s.Samples) && !s.Samples[i].Time.After(since) {
			i++
		}
		s.Samples = append([]stat.Sample{}, s.Samples[i:]...)
		a.Series = append(a.Series, s)
	}
	p.mu.Unlock()
	reply(w, a)
}

func reply(w http.ResponseWriter, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	// An error means that the client went away.
	_, _ = w.Write(append(b, '\n'))
}

// guard refuses requests that another site's page can have made a browser send, and tells
// browsers what the page may do.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ownName(r.Host) {
			http.Error(w, `ask for this page by its address, or as "localhost"`, http.StatusMisdirectedRequest)
			return
		}
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'self'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

// ownName reports whether the host of a request, with or without a port, is an address or
// "localhost": no other site can have such a name in a browser.
func ownName(host string) bool {
	name, port := host, ""
	if at := strings.LastIndexByte(host, ':'); at > strings.LastIndexByte(host, ']') {
		name, port = host[:at], host[at+1:]
	}
	if strings.Trim(port, "0123456789") != "" {
		return false
	}
	if inner, ok := strings.CutPrefix(name, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		a, err := netip.ParseAddr(inner)
		return ok && err == nil && a.Is6()
	}
	a, err := netip.ParseAddr(name)
	return err == nil && a.Is4() || strings.EqualFold(strings.TrimSuffix(name, "."), "localhost")
}
