// Package browser_test shows the page of "barevif stat --http" in a real browser. It is a
// module of its own, whose dependencies are not those of the product.
package browser_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/bpf"

	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

const (
	limit = 30 * time.Second
	pins  = "/sys/fs/bpf/barevif-browser-test"
)

// A site is the running command and two ends of a vif that it shows.
type site struct {
	url, token  string
	front, back *telemetry.Set
}

var (
	front = telemetry.Info{Role: telemetry.Frontend, Own: 61003, Peer: 61004, Handle: 7}
	back  = telemetry.Info{Role: telemetry.Backend, Own: 61004, Peer: 61003, Handle: 7}
)

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{front: telemetry.NewSet(2), back: telemetry.NewSet(2)}
	for _, end := range []struct {
		set  *telemetry.Set
		info telemetry.Info
	}{{s.front, front}, {s.back, back}} {
		end.set.Open(&bpf.Store{Root: pins}, end.info)
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
	s.serve(t)
	return s
}

// serve starts the command, which prints the address of its page with the token.
func (s *site) serve(t *testing.T) {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "barevif")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", bin, "./tools/barevif")
	build.Dir = "../.." // a module of its own
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	cmd := exec.Command(bin, "stat", "--http", "127.0.0.1:0", "--interval", "100ms", "--root", pins, front.Name(), back.Name())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("barevif stat --http: %v", err)
		}
	})
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if words := strings.Fields(lines.Text()); len(words) == 2 && words[0] == "page" {
			s.url, s.token, _ = strings.Cut(words[1], "/#token=")
			return
		}
	}
	t.Fatal("it prints no page")
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

// openTab starts the browser bin. complaints is what it says about a page, which may ask for
// nothing but what is below url. The browser's profile and temporary files are in directories
// of the test, because a killed browser does not remove the directory of its socket.
func openTab(t *testing.T, bin, url string) (ctx context.Context, complaints <-chan string) {
	t.Helper()
	profile, temp := t.TempDir(), t.TempDir()
	// The address of a unix socket takes 107 bytes, and the browser makes a directory with six random letters.
	if len(temp)+len("/org.chromium.Chromium.random/SingletonSocket") > 107 {
		var err error
		if temp, err = os.MkdirTemp("/tmp", "browser"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(temp) })
	}
	opts := []chromedp.ExecAllocatorOption{
		chromedp.ExecPath(bin), chromedp.UserDataDir(profile), chromedp.Env("TMPDIR=" + temp), chromedp.NoSandbox, chromedp.Headless, chromedp.DisableGPU,
		chromedp.NoFirstRun, chromedp.WindowSize(1320, 1100),
	}
	for _, f := range []string{"disable-quic", "disable-background-networking", "disable-component-update", "disable-sync"} {
		opts = append(opts, chromedp.Flag(f, true))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*limit)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, opts...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	said := make(chan string, 100)
	if err := chromedp.Listen(ctx, func(ev any) {
		say := func(s string) {
			select {
			case said <- s:
			default: // there are enough of them
			}
		}
		switch ev := ev.(type) {
		case *runtime.EventExceptionThrown:
			say(ev.ExceptionDetails.Text)
		case *log.EventEntryAdded:
			say(ev.Entry.Text)
		case *network.EventRequestWillBeSent:
			if !strings.HasPrefix(ev.Request.URL, url+"/") {
				say("the page asks " + ev.Request.URL)
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	// A browser that runs names its socket in its profile.
	if err := chromedp.Do(ctx); err != nil {
		t.Fatal(err)
	}
	if socket, err := os.Readlink(filepath.Join(profile, "SingletonSocket")); err != nil || !strings.HasPrefix(socket, temp+"/") {
		t.Errorf("the browser has its socket at %q, not in %s: %v", socket, temp, err)
	}
	return ctx, said
}

// TestPageDrawsInABrowser shows the page in a real browser and checks the result.
func TestPageDrawsInABrowser(t *testing.T) {
	bin, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is not installed")
	}
	s := newSite(t)
	ctx, complaints := openTab(t, bin, s.url)
	if err := chromedp.Do(ctx, chromedp.Navigate(s.url+"/#token="+s.token)); err != nil {
		t.Fatal(err)
	}
	await := func(what, js string) {
		t.Helper()
		if _, err := chromedp.Run(ctx, chromedp.Poll[bool](js, chromedp.WithPollingTimeout(limit))); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	text := func(js string) string {
		t.Helper()
		got, err := chromedp.Run(ctx, chromedp.Evaluate[string](js))
		if err != nil {
			t.Fatalf("%s: %v", js, err)
		}
		return got
	}
	await("every plot has a line but one", `document.querySelectorAll("svg .line.tx[d^=M]").length === 7`)
	for _, c := range []struct{ js, want string }{
		{`document.querySelector("#summary").textContent.split(" · ")[0]`, "2 devices, 2 up"},
		{`document.querySelector("#devices section h2").textContent`, front.Name()},
		{`document.querySelector("#flows tr .pill").textContent`, "✓ balanced"},
		{`[...document.querySelectorAll(".losses")].filter(e => !e.hidden).map(e => e.textContent).join()`, "Lost: rx too long 1"},
		{`[...document.querySelectorAll("svg text")].filter(e => e.textContent === "not measured yet").length + ""`, "1"},
		{`document.querySelector("#trouble").hidden + ""`, "true"},
		{`location.href`, s.url + "/"},
		{`[...document.querySelectorAll("svg text")].map(e => e.textContent).filter(s => /\.0+\D|\d{4}/.test(s)).join()`, ""},
	} {
		if got := text(c.js); got != c.want {
			t.Errorf("%s is %q, want %q", c.js, got, c.want)
		}
	}
	// Later counts appear without reloading the page.
	s.count(1000)
	await("the new count is shown", `document.querySelector("#flows td.n").textContent.replace(/\D/g, "") === "1100"`)
	await("the plot shows it came", `cards.values().next().value.series.get(-1).samples.some(s => s.tx_frames > 0)`)
	await("the frontend's full receive ring is not drawn as a saturated one", `(() => {
		const rx = [...document.querySelectorAll(".plot.posted .line.rx")], other = [...document.querySelectorAll(".plot:not(.posted) .line")];
		const fill = e => getComputedStyle(e.closest("svg").querySelector(".area.rx")).display;
		return rx.length === 1 && rx[0].closest("section").querySelector("h2").textContent.startsWith("front-")
			&& rx[0].closest(".plot").querySelector(".now .rx").textContent.startsWith("rx posted")
			&& getComputedStyle(rx[0]).strokeDasharray !== "none" && fill(rx[0]) === "none"
			&& other.length === 14 && other.every(e => getComputedStyle(e).strokeDasharray === "none" && fill(e) !== "none");
	})()`)
	for _, width := range []int64{400, 360} {
		if err := chromedp.Do(ctx, chromedp.EmulateViewport(width, 800)); err != nil {
			t.Fatal(err)
		}
		await("a telephone shows all numbers and the verdict beside each other, and nothing beyond its edge", fmt.Sprintf(`(() => {
			const width = %d, cells = [...document.querySelectorAll("#flows tr:first-child td")], boxes = cells.map(e => e.getBoundingClientRect());
			const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
			const seen = e => { const r = e.getBoundingClientRect(), at = document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2); return e.contains(at); };
			document.querySelector("#balance").scrollIntoView();
			return innerWidth === width && cells.length === 6 && document.documentElement.scrollWidth <= width
				&& boxes.every((b, i) => b.width > 0 && b.left >= 0 && b.right <= width && boxes.slice(0, i).every(o => apart(o, b)))
				&& cells.every(seen) && seen(document.querySelector("#flows .pill"))
				&& ["sent", "received", "dropped"].every((w, i) => getComputedStyle(cells[2 + i], "::before").content === JSON.stringify(w));
		})()`, width))
	}
	for len(complaints) > 0 {
		t.Errorf("the browser says: %s", <-complaints)
	}
}
