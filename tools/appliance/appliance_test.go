package appliance

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"barevif/telemetry"
	"barevif/telemetry/openmetrics"
)

func get(t *testing.T, h http.Handler, path string, header ...string) (int, string) {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func handler(t *testing.T, cfg Config) http.Handler {
	t.Helper()
	if cfg.About == nil {
		cfg.About = func() []Row { return []Row{{"vif", "<0>"}} }
	}
	cfg.Vifs = func() []openmetrics.Device {
		set := telemetry.NewSet(1)
		set.RX(0).Add(telemetry.Packets, 7)
		set.RX(0).Flush()
		return []openmetrics.Device{{Name: "front-1-2-0", Stats: set.Totals()}}
	}
	return New(cfg)
}

func TestABlobIsTheSameFromAnyOffset(t *testing.T) {
	const size = 100_003
	whole, err := io.ReadAll(NewBlob(size))
	if err != nil || len(whole) != size {
		t.Fatal(len(whole), err)
	}
	if err := iotest.TestReader(NewBlob(size), whole); err != nil {
		t.Error(err)
	}
	b := NewBlob(size)
	for _, at := range []int64{0, 1, 15, 16, 17, 4095, 65536, size - 1, size} {
		if _, err := b.Seek(at, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(b)
		if err != nil || !bytes.Equal(rest, whole[at:]) {
			t.Errorf("from %d: %d bytes, %v", at, len(rest), err)
		}
	}
	if longer, _ := io.ReadAll(NewBlob(2 * size)); !bytes.Equal(longer[:size], whole) {
		t.Error("a longer blob begins otherwise")
	}
	if _, err := b.Seek(-1, io.SeekStart); err == nil {
		t.Error("a negative offset was taken")
	}
}

// The key is zeros, so the first block is the encryption of a block of zeros, which is in
// the FIPS test vectors.
func TestABlobIsAESInCounterMode(t *testing.T) {
	first := make([]byte, 16)
	if _, err := io.ReadFull(NewBlob(16), first); err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(first); got != "66e94bd4ef8a2c3b884cfa59ca342b2e" {
		t.Error(got)
	}
}

func TestBytesAndTheirSum(t *testing.T) {
	h := handler(t, Config{})
	code, body := get(t, h, "/bytes/1000003")
	if code != http.StatusOK || len(body) != 1000003 {
		t.Fatal(code, len(body))
	}
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(body)))
	if got, err := Sum(t.Context(), 1000003); got != sum || err != nil {
		t.Error(got, err)
	}
	if code, line := get(t, h, "/bytes/1000003.sha256"); code != http.StatusOK || line != sum+"  -\n" {
		t.Error(code, line)
	}
	if code, part := get(t, h, "/bytes/1000003", "Range", "bytes=777-999"); code != http.StatusPartialContent || part != body[777:1000] {
		t.Error(code, len(part))
	}
	for _, name := range []string{"-1", "x", "", "1.5", "1e3", "9223372036854775808", "1099511627777", "17179869185.sha256", "../1", ".sha256"} {
		if code, body := get(t, h, "/bytes/"+name); code == http.StatusOK {
			t.Errorf("%q gave %d bytes", name, len(body))
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Sum(ctx, 1<<40); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestSumOfWhatIsSent(t *testing.T) {
	h := handler(t, Config{})
	for _, method := range []string{http.MethodPost, http.MethodPut} {
		r := httptest.NewRequestWithContext(t.Context(), method, "/sum", NewBlob(1000003))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		want, err := Sum(t.Context(), 1000003)
		if err != nil || w.Code != http.StatusOK || w.Body.String() != want+"  -\n" {
			t.Errorf("%s: %d %q, want %s, %v", method, w.Code, w.Body, want, err)
		}
	}
	broken := io.MultiReader(NewBlob(1000), iotest.ErrReader(io.ErrUnexpectedEOF))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/sum", broken))
	if w.Code != http.StatusBadRequest {
		t.Errorf("a body that broke off: %d %q", w.Code, w.Body)
	}
	if code, _ := get(t, h, "/sum"); code != http.StatusMethodNotAllowed {
		t.Errorf("a sum of nothing: %d", code)
	}
}

func TestThePageSaysWhatServedIt(t *testing.T) {
	h := handler(t, Config{})
	code, body := get(t, h, "/")
	if code != http.StatusOK || !strings.Contains(body, "<td>&lt;0&gt;</td>") {
		t.Error(code, body)
	}
	if code, _ := get(t, h, "/other"); code != http.StatusNotFound {
		t.Error(code)
	}
	if code, body := get(t, h, "/metrics"); code != http.StatusOK || !strings.Contains(body, `front-1-2-0`) {
		t.Error(code, body)
	}
}

func TestFilesStayInTheirDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("no"), 0o600); err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(dir, "www")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sub, "a.txt"), []byte("yes"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../secret", filepath.Join(sub, "out")); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(sub)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	h := handler(t, Config{Files: root.FS()})
	if code, body := get(t, h, "/a.txt"); code != http.StatusOK || body != "yes" {
		t.Error(code, body)
	}
	for _, path := range []string{"/out", "/../secret", "/%2e%2e/secret"} {
		if code, body := get(t, h, path); code == http.StatusOK || body == "no" {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	if code, body := get(t, h, "/bytes/5"); code != http.StatusOK || len(body) != 5 {
		t.Error(code, body)
	}
}
