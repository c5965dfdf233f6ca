// Package appliance is the web server of the command's appliances. It serves a page that
// says what serves it, files of any size for measurements, a checksum of an uploaded
// body, counters, and a directory of the user's. It also sends and answers UDP datagrams,
// which both ends compare byte by byte.
//
// It reads nothing outside that directory, does not know how it is connected, and keeps
// no state between requests.
package appliance

import (
	"crypto/sha256"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"time"

	"barevif/telemetry/openmetrics"
)

// MaxBlob is the size of the largest file under /bytes/, in bytes.
const MaxBlob = 1 << 40

// maxSum bounds the bytes of which one request may ask a checksum, or that it may upload.
const maxSum = 16 << 30

// A Row is a line of the page's table.
type Row struct{ Name, Value string }

// Config describes the server. Files may be nil.
type Config struct {
	Files fs.FS // served under /; nil: the page is served there
	About func() []Row
	Vifs  func() []openmetrics.Device
}

// New returns a handler of
//
//	/                 the page, or the files
//	/bytes/N          N pseudo-random bytes, the same every time
//	/bytes/N.sha256   their SHA-256
//	/sum              the SHA-256 of what is sent there by POST or PUT
//	/metrics          counters as OpenMetrics text
func New(cfg Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /bytes/{name}", blob)
	mux.HandleFunc("POST /sum", sum)
	mux.HandleFunc("PUT /sum", sum) // the method of curl -T
	mux.Handle("GET /metrics", openmetrics.Handler(cfg.Vifs))
	if cfg.Files != nil {
		mux.Handle("/", http.FileServerFS(cfg.Files))
		return mux
	}
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		// An error means that the client went away.
		_ = page.Execute(w, cfg.About())
	})
	return mux
}

var page = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>barevif</title></head><body>
<h1>A Go program with a network card of its own</h1>
<p>This page came through a Xen paravirtual network card that a Go process owns:
no kernel driver, no socket of the machine it runs on.</p>
<table>{{range .}}
<tr><th align="left">{{.Name}}</th><td>{{.Value}}</td></tr>{{end}}
</table>
<p><a href="/bytes/268435456">256 MiB</a> (<a href="/bytes/268435456.sha256">SHA-256</a>),
<a href="/metrics">counters</a></p>
</body></html>
`))

func blob(w http.ResponseWriter, r *http.Request) {
	name, sum := strings.CutSuffix(r.PathValue("name"), ".sha256")
	size, err := strconv.ParseInt(name, 10, 64)
	switch {
	case err != nil || size < 0 || size > MaxBlob:
		http.Error(w, fmt.Sprintf("not a number of bytes from 0 to %d: %q", int64(MaxBlob), name), http.StatusNotFound)
	case sum && size > maxSum:
		http.Error(w, fmt.Sprintf("no checksums of more than %d bytes", int64(maxSum)), http.StatusNotFound)
	case sum:
		s, err := Sum(r.Context(), size)
		if err != nil {
			return // the client is gone
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "%s  -\n", s)
	default:
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("ETag", fmt.Sprintf(`"%d"`, size)) // a client may ask for parts
		http.ServeContent(w, r, "", time.Time{}, NewBlob(size))
	}
}

func sum(w http.ResponseWriter, r *http.Request) {
	h := sha256.New()
	if _, err := io.Copy(h, http.MaxBytesReader(w, r.Body, maxSum)); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest) // too long, or the connection broke
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "%x  -\n", h.Sum(nil))
}
