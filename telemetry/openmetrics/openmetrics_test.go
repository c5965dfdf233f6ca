package openmetrics_test

import (
	"bytes"
	"flag"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"testing"

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
	want := "104 families\nbarevif_rx_packets 2001\n"
	if string(out) != want {
		t.Errorf("the parser read %q, want %q", out, want)
	}
}

func TestWriteReportsTheWritersError(t *testing.T) {
	r, w := io.Pipe()
	r.Close()
	if err := openmetrics.Write(w, sample()...); err != io.ErrClosedPipe {
		t.Errorf("got %v", err)
	}
}
