package openmetrics_test

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unicode/utf8"

	"barevif/telemetry"
	"barevif/telemetry/openmetrics"
)

var update = flag.Bool("update", false, "write testdata anew")

func sample() []openmetrics.Device {
	s := telemetry.NewSet(2)
	for q := range 2 {
		rx, tx := s.RX(q), s.TX(q)
		rx.Add(telemetry.Packets, 1000+uint64(q))
		rx.Add(telemetry.Bytes, 1<<63)
		rx.Drop(telemetry.DropBadGref, 3)
		for _, size := range []uint64{0, 60, 64, 65, 1514, 65536, 65537} {
			rx.Observe(telemetry.FrameSize, size)
		}
		tx.Set(telemetry.RingUsed, 77)
		tx.Observe(telemetry.RequestLatency, 5_000_000)
		rx.Flush()
		tx.Flush()
	}
	return []openmetrics.Device{
		{Name: "front-3-0-0", Stats: s.Totals()},
		{Name: `od"d\name`, Stats: s.Totals()},
	}
}

func TestTextIsAsRecorded(t *testing.T) {
	var got bytes.Buffer
	if err := openmetrics.Write(&got, sample()...); err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/metrics.txt"
	if *update {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Errorf("text differs from %s; run go test -update if that is meant", golden)
	}
}

func TestHandlerServesTheText(t *testing.T) {
	rec := httptest.NewRecorder()
	openmetrics.Handler(sample).ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	var want bytes.Buffer
	if err := openmetrics.Write(&want, sample()...); err != nil {
		t.Fatal(err)
	}
	if ct := rec.Header().Get("Content-Type"); ct != openmetrics.ContentType {
		t.Errorf("content type %q", ct)
	}
	body, _ := io.ReadAll(rec.Body)
	if !bytes.Equal(body, want.Bytes()) {
		t.Error("the body is not what Write writes")
	}
}

func TestStrictParserAcceptsTheText(t *testing.T) {
	const python = "/usr/bin/python3"
	if exec.Command(python, "-c", "import prometheus_client.openmetrics.parser").Run() != nil {
		t.Skip("python3-prometheus-client is not installed")
	}
	var text bytes.Buffer
	if err := openmetrics.Write(&text, sample()...); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(python, "testdata/parse.py")
	cmd.Stdin = &text
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := "118 families\nbarevif_rx_packets 2001\n"
	if string(out) != want {
		t.Errorf("the parser read %q, want %q", out, want)
	}
}

// A reader returns each name as it was given, since one bad name would make it refuse the
// page.
func TestAnyNameMakesAPageThatIsRead(t *testing.T) {
	totals := sample()[0].Stats
	for name, want := range map[string]string{
		"front-1-2-0":          `front-1-2-0`,
		`back\slash`:           `back\\slash`,
		`"quoted"`:             `\"quoted\"`,
		"two\nlines":           `two\nlines`,
		"\xff":                 `\\xff`,
		"a\xc3":                `a\\xc3`,
		"\xed\xa0\x80":         `\\xed\\xa0\\x80`, // half of a surrogate pair
		"x\x80\"\n\xc0\x80y":   `x\\x80\"\n\\xc0\\x80y`,
		"\ufffd \u00e9 \u4e16": "\ufffd \u00e9 \u4e16",
		"":                     "",
	} {
		var text bytes.Buffer
		if err := openmetrics.Write(&text, openmetrics.Device{Name: "other", Stats: totals}, openmetrics.Device{Name: name, Stats: totals}); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if !utf8.Valid(text.Bytes()) {
			t.Errorf("%q: text that is not UTF-8", name)
		}
		if line := `barevif_rx_packets_total{vif="` + want + `",queue="1"} 1001` + "\n"; !strings.Contains(text.String(), line) {
			t.Errorf("%q: no line %q", name, line)
		}
	}
}

func TestTwoDevicesOfOneNameAreRefused(t *testing.T) {
	one := sample()[0]
	var text bytes.Buffer
	err := openmetrics.Write(&text, one, sample()[1], one)
	if !errors.Is(err, openmetrics.ErrName) || !strings.Contains(err.Error(), one.Name) || text.Len() != 0 {
		t.Errorf("%v, and %d bytes", err, text.Len())
	}
	rec := httptest.NewRecorder()
	openmetrics.Handler(func() []openmetrics.Device { return []openmetrics.Device{one, one} }).
		ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	if rec.Code != http.StatusInternalServerError || !strings.Contains(rec.Body.String(), one.Name) {
		t.Errorf("status %d: %s", rec.Code, rec.Body)
	}
}

func TestWriteReportsTheWritersError(t *testing.T) {
	r, w := io.Pipe()
	r.Close()
	if err := openmetrics.Write(w, sample()...); err != io.ErrClosedPipe {
		t.Errorf("got %v", err)
	}
}
