//go:build linux

package xenlab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/test/counters"
	"barevif/test/xenlab/image"
	"barevif/test/xenlab/machine"
)

func TestPackageCommentShowsEveryScenario(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, b := range Plan() {
		if !strings.Contains(string(doc), b.Name) {
			t.Errorf("no boot %q", b.Name)
		}
		for _, s := range b.Scenarios {
			found := false
			for line := range strings.Lines(string(doc)) {
				found = found || strings.Contains(line, "  "+s.Name+"  ") && strings.HasSuffix(line, "  "+s.Roles+"\n")
			}
			if !found {
				t.Errorf("no row of %q with %q", s.Name, s.Roles)
			}
			if slices.Contains(names, s.Name) {
				t.Errorf("two scenarios %q", s.Name)
			}
			names = append(names, s.Name)
			if _, err := compile(s.Complaints); err != nil {
				t.Errorf("%s: %v", s.Name, err)
			}
		}
	}
	rows := 0
	for line := range strings.Lines(string(doc)) {
		if strings.HasPrefix(line, "//	  ") {
			rows++
		}
	}
	if rows != len(names) {
		t.Errorf("%d rows for %d scenarios", rows, len(names))
	}
}

func TestReadmeShowsWhatRunsWhere(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), "\n"+Roles(Plan())+"\n") {
		t.Error("its table is not what \"go run ./test/xenlab/cmd/xenlab -list\" prints")
	}
}

func TestDeployingShowsWhatRunsWithoutRoot(t *testing.T) {
	page, err := os.ReadFile("../../tools/barevif/DEPLOYING.md")
	if err != nil {
		t.Fatal(err)
	}
	lines := regexp.MustCompile(`\\\n +`).ReplaceAllString(string(page), "")
	for _, want := range deployingSays() {
		for _, line := range strings.Split(want, "; ") {
			if !strings.Contains(lines, "\n    "+line) {
				t.Errorf("no line %q", line)
			}
		}
	}
}

func TestComplaintsAreFound(t *testing.T) {
	for line, want := range map[string]bool{
		"[  9.1] vif vif-1-0 vif1.0: fatal error; disabling device":                                 true,
		"[  9.1] xen:grant_table: WARNING: g.e. 0x1f still in use!":                                 true,
		"[  9.1] deferring g.e. 0x1f (pfn 0x1)":                                                     false, // no word of it refers to the lab
		"[  9.1] xen:grant_table: deferring g.e. 0x1f (pfn 0x1)":                                    true,
		"(XEN) grant_table.c:803:d0v1 Bad flags (0) or dom (0). (expected dom 0)":                   true,
		"(XEN) event_channel.c:319:d1v0 EVTCHNOP failure: error -22":                                true,
		"[  9.1] WARNING: CPU: 0 PID: 1 at drivers/xen/events/events_base.c:1 x":                    true,
		"[  9.1] INFO: task barevif:99 blocked; hung":                                               true,
		"[  9.1] barevif[99]: segfault at 0 ip 0":                                                   true,
		"[  9.1] vif vif-1-0 vif1.0: Guest Rx ready":                                                false,
		"[  9.1] xen:xen_privcmd: No target domain found, blocking all hypercalls":                  false,
		"[  9.1] IPv6: ADDRCONF(NETDEV_CHANGE): vif1.0: link becomes ready":                         false,
		"[  2.8] PCI: Fatal: No config space access function found":                                 false,
		"[  3.0] ACPI Error: No handler or method for GPE 00, disabling event (20220331/evgpe-839)": false,
		"(XEN) gnttab_usage_print_all [ key 'g' pressed":                                            false,
		"(XEN) d2v0: upcall vector f3":                                                              false,
		"[  9.1] BUG: kernel NULL pointer dereference, address: 0000000000000000":                   true,
		"[ 59.1] xen_netback:xenvif_start_xmit: Invalid queue 1 for packet on interface vif5.0":     false,
		"[ 59.1] xen_netback:xenvif_get_extras: Invalid extra type: 9":                              true,
		"(XEN) d29v0 Triple fault - invoking HVM shutdown action 1":                                 true,
		"[  9.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:":                             true,
	} {
		if got := complaints("before\n"+line+"\r\nafter\n", nil); (len(got) == 1) != want {
			t.Errorf("%q: %q", line, got)
		}
	}
	expected := []*regexp.Regexp{regexp.MustCompile(`fatal error; disabling`)}
	if got := complaints("vif1.0: fatal error; disabling device", expected); got != nil {
		t.Errorf("an expected complaint: %q", got)
	}
}

func TestDifferenceOfStates(t *testing.T) {
	for _, c := range []struct{ before, now, want string }{
		{"a b", "a b", ""},
		{"a b", "b", "- a"},
		{"a", "a a c", "+ a; + c"},
		{"b", "a c", "+ a; - b; + c"},
	} {
		if got := difference(strings.Fields(c.before), strings.Fields(c.now)); got != c.want {
			t.Errorf("%q to %q: %q, want %q", c.before, c.now, got, c.want)
		}
	}
}

func TestGrantEntriesAreReadFromXen(t *testing.T) {
	log := strings.Join([]string{
		"(XEN) gnttab_usage_print_all [ key 'g' pressed",
		"(XEN)       -------- active --------       -------- shared --------",
		"(XEN) [ref] localdom mfn      pin          localdom gmfn     flags",
		"(XEN) grant-table for remote d0 (v1)",
		"(XEN)   1 frames (64 max), 0 maptrack frames (1024 max)",
		"(XEN) [0x008]      0 0x07ab12 0x00000001          0 0x07ab12 0x19",
		"(XEN) gnttab_usage_print_all ] done",
	}, "\r\n")
	if got := grantEntries(log); len(got) != 1 || !strings.HasPrefix(got[0], "[0x008] ") {
		t.Errorf("%q", got)
	}
}

func TestPingThatLostOrSpoiltIsNoticed(t *testing.T) {
	good := "PING\n64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=1 ms\n64 bytes from 10.0.0.2: icmp_seq=2 ttl=64 time=1 ms\n"
	if err := checkPing(good, 2); err != nil {
		t.Error(err)
	}
	for _, bad := range [...]string{
		"PING\n64 bytes from 10.0.0.2: icmp_seq=12 ttl=64 time=1 ms\n64 bytes from 10.0.0.2: icmp_seq=2 ttl=64 time=1 ms\n",
		good + "wrong data byte #16 should be 0x10 but was 0x0\n",
		good + "64 bytes from 10.0.0.2: icmp_seq=2 ttl=64 time=1 ms (DUP!)\n",
	} {
		if err := checkPing(bad, 2); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestWrongChecksumsAreFound(t *testing.T) {
	const snmp = `Ip: Forwarding DefaultTTL
Ip: 2 64
Icmp: InMsgs InErrors InCsumErrors InDestUnreachs
Icmp: 8 7 6 5
IcmpMsg: InType8
IcmpMsg: 3
Udp: InDatagrams InCsumErrors
Udp: 1 2
Odd: InCsumErrors More
Odd: 9
`
	if got, want := badChecksums(snmp), "Icmp:6 Udp:2 Odd:9"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := badChecksums(""); got != "" {
		t.Errorf("%q of nothing", got)
	}
}

// shown returns a queue's counters in the formats of bpftool and of the file metrics.
func shown() (dump counters.Dump, text string) {
	queue := map[string]json.RawMessage{}
	var b strings.Builder
	for _, dir := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for i, f := range telemetry.Fields() {
			fmt.Fprintf(&b, "# TYPE %s %s\n", f.Metric(dir), f.Kind)
			switch n := fmt.Sprint(i); f.Kind {
			case telemetry.KindCounter:
				fmt.Fprintf(&b, "%s_total{vif=\"v\",queue=\"0\"} %s\n", f.Metric(dir), n)
				queue[f.FullName(dir)] = json.RawMessage(n)
			case telemetry.KindGauge:
				fmt.Fprintf(&b, "%s{vif=\"v\",queue=\"0\"} %s\n", f.Metric(dir), n)
				queue[f.FullName(dir)] = json.RawMessage(n)
			default:
				queue[f.FullName(dir)] = json.RawMessage("{}")
			}
		}
	}
	return counters.Dump{queue}, b.String() + "# EOF\n"
}

func TestAFieldThatIsNotShownIsNoticed(t *testing.T) {
	dump, text := shown()
	if got := missing(dump, dump, text, "v"); got != "" {
		t.Fatal(got)
	}
	if missing(dump, dump, strings.TrimSuffix(text, "# EOF\n"), "v") == "" {
		t.Error("without an end: not noticed")
	}
	if missing(dump, dump, text, "w") == "" {
		t.Error("of another vif: not noticed")
	}
	for line := range strings.Lines(text) {
		if missing(dump, dump, strings.Replace(text, line, "", 1), "v") == "" {
			t.Errorf("without %q: not noticed", line)
		}
	}
	for name, n := range dump[0] {
		delete(dump[0], name)
		if missing(dump, dump, text, "v") == "" {
			t.Errorf("without %s: not noticed", name)
		}
		if dump[0][name] = json.RawMessage("1234567"); string(n) != "{}" && missing(dump, dump, text, "v") == "" {
			t.Errorf("another %s: not noticed", name)
		}
		dump[0][name] = n
	}
}

func TestLossOfPingsIsRead(t *testing.T) {
	const end = "100 packets transmitted, 77 received, +12 errors, 23% packet loss, time 8884ms\nrtt min/avg/max/mdev = 0.325/199.436/4990.440/618.737 ms, pipe 35\n"
	sent, lost, longest, err := pingLoss(end)
	if sent != 100 || lost != 23 || longest != 4990.44 || err != nil {
		t.Errorf("%d %d %v %v", sent, lost, longest, err)
	}
	const rtt = "rtt min/avg/max/mdev = 1/1/1.0/1 ms\n"
	answer := func(seq int) string {
		return fmt.Sprintf("64 bytes from 10.0.0.2: icmp_seq=%d ttl=64 time=1 ms\n", seq)
	}
	for said, want := range map[string]int{
		answer(1) + answer(2) + "4 packets transmitted, 2 received, 50% packet loss\n" + rtt: 0, // two are on their way
		answer(1) + answer(4) + "4 packets transmitted, 2 received, 50% packet loss\n" + rtt: 2,
		// The third is on its way: the fourth has overtaken it, and the second.
		answer(1) + answer(4) + answer(2) + "4 packets transmitted, 3 received, 25% packet loss\n" + rtt:             0,
		answer(1) + answer(4) + answer(2) + answer(5) + "5 packets transmitted, 4 received, 20% packet loss\n" + rtt: 1,
	} {
		if _, lost, _, err := pingLoss(said); lost != want || err != nil {
			t.Errorf("%d lost, want %d, %v: %s", lost, want, err, said)
		}
	}
	for _, bad := range [...]string{"", "64 bytes from 10.0.0.2: icmp_seq=2 ttl=64 time=1 ms (DUP!)\n" + end, "5 packets transmitted, 0 received, 100% packet loss\n"} {
		if _, _, _, err := pingLoss(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestTestsAreCounted(t *testing.T) {
	passed, failed, skipped := countTests("=== RUN TestA\n--- PASS: TestA (0.1s)\n    --- FAIL: TestA/sub\n--- SKIP: TestB\n--- FAIL: TestC\n--- PASS: TestD\n")
	if passed != 2 || failed != 1 || skipped != 1 {
		t.Errorf("%d %d %d", passed, failed, skipped)
	}
}

func TestGuestIsDescribedForXL(t *testing.T) {
	got := Guest{
		Name: "one", Type: PVH, VIFs: []VIF{{}, {Backend: "driver", MTU: 9000, More: "rate=1Mb/s"}},
		Linux: []string{"a=b"}, Config: []string{"driver_domain=1"},
	}.config()
	for _, want := range [...]string{
		`name="one"`, `type="pvh"`, `memory=448`, ` xenlab=guest a=b"`, "driver_domain=1", `tsc_mode="native"`, "\ncpus=\"1\"\n",
		`vif=["mac=00:16:3e:77:00:01,script=` + image.VifScript + `","mac=00:16:3e:77:00:02,script=` + image.VifScript + `,backend=driver,mtu=9000,rate=1Mb/s"]`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	if got := (Guest{Type: PV}).config(); strings.Contains(got, "tsc_mode") || strings.Contains(got, "\ncpus=") {
		t.Error("tsc_mode and cpus are for PVH")
	}
}

func TestAGuestOfSystemdIsDescribedForXL(t *testing.T) {
	got := Guest{Name: "units", Type: PV, Systemd: "/run/again.cpio"}.config()
	for _, want := range [...]string{`ramdisk="/run/again.cpio"`, " rdinit=/lib/systemd/systemd ", ` xenlab=systemd"`} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
}

// The scenario runs the lines of the page, in the order and the place that it names.
func TestDeployingShowsHowUnitsAreInstalled(t *testing.T) {
	page, err := os.ReadFile("../../tools/barevif/DEPLOYING.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := "In `deploy`, after the program is in `" + image.InstalledBarevif[:strings.LastIndex(image.InstalledBarevif, "/")] + "` and the kernel's netfront is kept away, as above:\n\n    " + strings.Join(installUnits[:], "\n    ") + "\n"; !strings.Contains(string(page), want) {
		t.Errorf("the page does not say %q", want)
	}
	if !strings.Contains(string(page), "\n    "+keepNetfrontAway+"\n") {
		t.Errorf("the page does not say %q", keepNetfrontAway)
	}
	if !strings.Contains(string(page), "`"+readJournal+" | jq`") {
		t.Errorf("the page does not say %q", readJournal)
	}
}

// idle returns a scenario without a machine.
func idle(t *testing.T) *T {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "steps.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	return &T{machine: &machine.Machine{}, log: log, dir: t.TempDir(), start: time.Now()}
}

func TestAttemptGivesWhatFatalfSaid(t *testing.T) {
	s := idle(t)
	cause := errors.New("cause")
	after := false
	err := s.attempt(t.Context(), time.Minute, func() {
		s.Fatalf("step: %w", cause)
		after = true
	})
	if !errors.Is(err, cause) || after {
		t.Errorf("%v, went on: %v", err, after)
	}
	if err := s.attempt(t.Context(), time.Minute, func() {}); err != nil {
		t.Errorf("the next attempt: %v", err)
	}
	err = s.attempt(t.Context(), time.Millisecond, func() {
		<-s.ctx.Done()
		s.Fatalf("step")
	})
	if err == nil || !strings.Contains(err.Error(), "the limit of 1ms") {
		t.Errorf("over its limit: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.attempt(ctx, time.Minute, func() { s.Fatalf("step") }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestTableShowsFailures(t *testing.T) {
	r := Report{Dir: "logs", Rows: []Row{
		{Boot: "b", Scenario: "good", Roles: "r", Elapsed: 1500 * time.Millisecond, Note: "7 Mbit/s"},
		{Boot: "b", Scenario: "bad|odd", Err: errors.New("two\nlines"), Note: "so far"},
	}}
	table := r.Table()
	for _, want := range [...]string{"| b    | good     | r     | pass    | 1.5 | 7 Mbit/s |\n", "| FAIL    | 0.0 | two lines; so far |\n", "2 rows, 1 failed"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	if r.Failed() != 1 {
		t.Errorf("%d failed", r.Failed())
	}
}

func TestScenariosAreSelectedByName(t *testing.T) {
	all := []Scenario{{Name: "one, PV"}, {Name: "one, PVH"}, {Name: "two"}, {Name: "slow", Asked: true}}
	if got := selectScenarios(all, regexp.MustCompile("PVH?$")); len(got) != 2 {
		t.Errorf("%d selected", len(got))
	}
	if got := selectScenarios(all, regexp.MustCompile("slow")); len(got) != 1 {
		t.Errorf("%d selected", len(got))
	}
	if got := selectScenarios(all, nil); len(got) != 3 {
		t.Errorf("%d selected", len(got))
	}
}

func TestLabsTakeTurns(t *testing.T) {
	t.Setenv("BAREVIF_CACHE", t.TempDir())
	log := slog.New(slog.DiscardHandler)
	done, err := lockLab(context.Background(), log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("the second lab gave up")
	cancel(why)
	if _, err := lockLab(ctx, log); err != why {
		t.Fatalf("a second lab beside the first: %v", err)
	}
	done()
	if done, err = lockLab(ctx, log); err != nil {
		t.Fatalf("after the first: %v", err)
	}
	done()
}

func TestOldLogsAreRemoved(t *testing.T) {
	t.Setenv("BAREVIF_CACHE", t.TempDir())
	cache, err := image.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	for i := range keptRuns + 3 {
		if err := os.MkdirAll(filepath.Join(cache, "runs", "2000010"+string(rune('a'+i))), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := logDir("")
	if err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Join(cache, "runs"))
	if err != nil || len(left) != keptRuns || !slices.ContainsFunc(left, func(e os.DirEntry) bool { return e.Name() == filepath.Base(dir) }) {
		t.Errorf("%d runs left, %v", len(left), err)
	}
}

func TestASecondRunAcquitsNothing(t *testing.T) {
	r := &Report{Rows: []Row{
		{Boot: "b", Scenario: "good"},
		{Boot: "b", Scenario: "now and then", Err: errors.New("late"), Note: "7 Mbit/s"},
		{Boot: "b", Scenario: "always", Err: errors.New("wrong")},
		{Boot: "b", Scenario: "(boot)", Err: errors.New("no machine")},
		{Boot: "c", Scenario: "good"},
	}}
	failed := r.failures()
	if len(failed) != 3 || !failed[[2]string{"b", "now and then"}] || failed[[2]string{"b", "good"}] {
		t.Errorf("%v", failed)
	}
	r.addSecondRun(&Report{Starved: 0.5, Rows: []Row{
		{Boot: "b", Scenario: "(boot)"},
		{Boot: "b", Scenario: "now and then"},
		{Boot: "b", Scenario: "always", Err: errors.New("still\nwrong")},
	}})
	if r.Failed() != 3 || r.Starved != 0.5 {
		t.Errorf("%d failed, %v", r.Failed(), r.Starved)
	}
	table := r.Table()
	for _, want := range []string{
		"late; passed when run again; 7 Mbit/s", "wrong; failed when run again: still wrong",
		"no machine; passed when run again", "5 rows, 3 failed",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	if strings.Count(table, "FAIL") != 3 {
		t.Errorf("other verdicts than three times FAIL:\n%s", table)
	}
}
