package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"barevif/hypercall/emu/emutest"
	"barevif/pvnet"
	"barevif/pvnet/inspect"
	"barevif/pvnet/packet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry/logtest"
	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
	"barevif/xenbus/toolstack"
)

const patience = 30 * time.Second

// inspectedVif makes a vif of two domains whose ends this process shows, and returns the
// flags with which the commands find them.
func inspectedVif(t *testing.T, cfg pvnet.Config) (w *pvnettest.Wire, flags []string) {
	t.Helper()
	dir := filepath.Join(emutest.SocketDir(t), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := inspect.Listen(inspect.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	cfg.Inspector = s
	w = pvnettest.New(t, toolstack.Vif{}, cfg, cfg)
	for ev := range w.Back.Links(t.Context()) {
		if ev.Up { // the frontend was first
			break
		}
	}
	return w, []string{"--inspect", dir}
}

const frontVif, backVif = "front-2-1-0", "back-1-2-0"

func TestRingShowsBothEnds(t *testing.T) {
	w, flags := inspectedVif(t, pvnet.Config{})
	if _, err := w.Front.Write(make([]byte, 60)); err != nil {
		t.Fatal(err)
	}
	code, text, stderr := stats(t, append([]string{"ring", "--kick"}, flags...)...)
	if code != cli.ExitOK || stderr != "" {
		t.Fatalf("exit %d, %q", code, stderr)
	}
	for _, want := range []string{
		"front-2-1-0  frontend in domain 2 of vif 0, backend in domain 1; process ", "back-1-2-0  backend in domain 1",
		"Connected, up; connection 1, queues: 1; agreed: ", "kicked: 2 halves",
		"queue 0, tx ring: this end sends; its owner is away; read ", "256 slots, gref ", ", the other end is there\n",
		"req prod 1 (+1)  pvt 1 (+1)  event 1 (+1)\n  rsp prod 0 (base)  cons 0 (+0)  event 1 (+1)\n  1 outstanding, 255 free, 0 to take; ",
		"  1 frame: ids ", "256 posted: ids 0-255; grefs ", "req prod 1 (+1)  cons 0 (+0)  event 1 (+1)\n", "0 outstanding, 1 free, 1 to take",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	code, text, _ = stats(t, append([]string{"ring", "--slots", frontVif}, flags...)...)
	if n := len(regexp.MustCompile(`(?m)^    id \d+  gref \d+  posted$`).FindAllString(text, -1)); code != cli.ExitOK || n != 256 || strings.Contains(text, backVif) {
		t.Errorf("exit %d, %d slots\n%s", code, n, text)
	}
	code, text, _ = stats(t, append([]string{"ring", "--json", "2.0"}, flags...)...)
	var all []shownRings
	if err := json.Unmarshal([]byte(text), &all); err != nil || code != cli.ExitOK || len(all) != 2 || all[0].Vif != frontVif || all[0].PID != os.Getpid() || len(all[0].Halves) != 2 || all[0].Halves[0].Outstanding != 1 {
		t.Errorf("exit %d, %v\n%s", code, err, text)
	}
	w.Front.Disconnect()
	code, text, _ = stats(t, append([]string{"ring", "vif2.0"}, flags...)...)
	if code != cli.ExitOK || !strings.Contains(text, "down: ") || !strings.Contains(text, "no ring: the link is down") {
		t.Errorf("exit %d\n%s", code, text)
	}
}

func TestRunsOfNumbers(t *testing.T) {
	many := []uint32{9, 1, 2, 3, 5}
	if got := runs(many); got != "1-3, 5, 9" {
		t.Error(got)
	}
	many = nil
	for i := range uint32(40) {
		many = append(many, 3*i)
	}
	if got := runs(many); !strings.HasSuffix(got, "33, and 28 more") {
		t.Error(got)
	}
}

func TestVifsThatCannotBeLookedInto(t *testing.T) {
	_, flags := inspectedVif(t, pvnet.Config{})
	build := clitest.Build(rootCommand)
	for _, c := range []struct {
		args string
		code int
		says []string
	}{
		{"ring front-9-9-9", cli.ExitFailed, []string{`"front-9-9-9" can be looked into`, `"back-1-2-0", "front-2-1-0"`}},
		{"ring --pid 1", cli.ExitFailed, []string{"no process shows it"}},
		{"ring [x", cli.ExitUsage, []string{"syntax error in pattern"}},
		{"ring --user nosuchuser", cli.ExitUsage, []string{"a user of this machine"}},
		{"ring --pid -1", cli.ExitUsage, []string{"the number of a process"}},
		{"ring --json --slots", cli.ExitUsage, []string{"only one of them"}},
		{"dump", cli.ExitUsage, []string{"the name of a vif is missing", "barevif ring"}},
		{"dump 2.0 -w /dev/null", cli.ExitFailed, []string{`"2.0" is 2 vifs`, "back-1-2-0 of process "}},
		{"dump front-2-1-0 -Q up", cli.ExitUsage, []string{"in, out or inout"}},
		{"dump front-2-1-0 -c -1", cli.ExitUsage, []string{"a number of frames"}},
		{"dump front-2-1-0 -s -1", cli.ExitUsage, []string{"a number of bytes"}},
		{"dump front-2-1-0 --queue x", cli.ExitUsage, []string{"the number of a queue"}},
		{"dump front-2-1-0 --queue 5", cli.ExitFailed, []string{"no queue 5"}},
		{"dump front-2-1-0 tcp prt 80", cli.ExitUsage, []string{`the expression: "prt"`, "--program"}},
		{"dump front-2-1-0 mpls", cli.ExitUsage, []string{`"mpls": not compiled here`}},
		{"dump front-2-1-0 --program /nowhere", cli.ExitFailed, []string{"/nowhere", "tcpdump -ddd"}},
		{"dump front-2-1-0 --program /nowhere tcp", cli.ExitUsage, []string{"leave one of them out"}},
		{"dump front-2-1-0 -w /nowhere/x", cli.ExitFailed, []string{"/nowhere/x"}},
	} {
		args := append(strings.Fields(c.args), flags...)
		code, _, stderr := build.Run(t, args...)
		for _, want := range c.says {
			if code != c.code || !strings.Contains(stderr, want) {
				t.Errorf("%s: exit %d, %q", c.args, code, stderr)
			}
		}
	}
	build.Fails(t, cli.ExitFailed, []string{"ring", "--inspect", t.TempDir(), "x"}, "can be looked into", "pvnet/inspect")
	build.Fails(t, cli.ExitUsage, []string{"ring", "--inspect", "/nowhere"}, "/nowhere")
	build.Fails(t, cli.ExitFailed, []string{"demo", "--network", "userspace", "--inspect", "/nowhere/x"}, "--inspect", "mode 0700")
	build.Fails(t, cli.ExitUsage, []string{"demo", "--inspect", ""}, `"auto", "off" or a directory`)
}

// A capturing is a "barevif dump" that runs.
type capturing struct {
	cancel context.CancelFunc
	ended  chan int
	out    bytes.Buffer // stdout; read once it has ended
	said   logtest.Log  // on stderr
}

// await waits until it has said want n times.
func (c *capturing) await(t *testing.T, want string, n int) {
	t.Helper()
	for end := time.Now().Add(patience); strings.Count(c.said.String(), want) < n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %q in %q", want, c.said.String())
		}
	}
}

func startDump(t *testing.T, args ...string) *capturing {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c := &capturing{cancel: cancel, ended: make(chan int, 1)}
	t.Cleanup(cancel)
	go func() { c.ended <- cli.Run(ctx, rootCommand, append([]string{"dump"}, args...), &c.out, &c.said) }()
	c.await(t, "capturing ", 1)
	return c
}

func (c *capturing) wait(t *testing.T) (pcapng []byte) {
	t.Helper()
	select {
	case code := <-c.ended:
		if code != cli.ExitOK {
			t.Fatalf("exit %d, %q", code, c.said.String())
		}
	case <-time.After(patience):
		t.Fatalf("it does not end: %q", c.said.String())
	}
	return c.out.Bytes()
}

// tcpFrame is a TCP segment with n bytes of payload, whose checksum is the sum of the
// pseudo-header.
func tcpFrame(n int) []byte {
	b := make([]byte, 54+n)
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0})
	b[16], b[17] = byte((40+n)>>8), byte(40+n)
	copy(b[22:], []byte{64, 6, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2, 0x1f, 0x90, 0, 80})
	b[46], b[47] = 0x50, 0x18
	h, ok := packet.Parse(b, len(b))
	if !ok {
		panic("no packet")
	}
	sum := h.Pseudo(b, 20+n)
	b[50], b[51] = byte(sum>>8), byte(sum)
	return b
}

// offload sends a frame whose checksum is left to the receiver, to be cut if g says so.
func offload(t *testing.T, tx *pvnet.TX, b []byte, g pvnet.GSO) {
	t.Helper()
	var f [1]pvnet.Frame
	if n, err := tx.AllocWait(f[:], len(b)); n != 1 {
		t.Fatal(err)
	}
	f[0].CopyFrom(b)
	f[0].SetChecksum(pvnet.ChecksumPartial)
	if g != (pvnet.GSO{}) {
		if err := f[0].SetGSO(g); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tx.SendWait(f[:]); err != nil {
		t.Fatal(err)
	}
}

// reader runs tcpdump or tshark on a capture.
func reader(t *testing.T, pcapng []byte, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			t.Skip(name, " is not installed: ", err)
		}
	}
	file := filepath.Join(t.TempDir(), "x.pcapng")
	if err := os.WriteFile(file, pcapng, 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, append([]string{"-r", file}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "LC_ALL=C.UTF-8")
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", name, err, out.String(), errs.String())
	}
	return out.String()
}

// offloads captures what both ends of a vif see of frames with offloads, and of one without.
func offloads(t *testing.T) (front, back []byte) {
	w, flags := inspectedVif(t, pvnet.Config{Offload: true})
	tx, err := w.Front.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	a, b := startDump(t, append(flags, frontVif, "-c", "3")...), startDump(t, append(flags, backVif, "-c", "2", "-s", "100", "tcp", "and", "greater", "200")...)
	got := make(chan bool, 8)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go w.Back.Listen(ctx, func(pvnet.Frame) { got <- true })
	offload(t, tx, tcpFrame(4000), pvnet.GSO{Type: pvnet.GSOTCPv4, Size: 1448})
	offload(t, tx, tcpFrame(100), pvnet.GSO{})
	offload(t, tx, tcpFrame(200), pvnet.GSO{})
	for range 3 {
		<-got
	}
	front, back = a.wait(t), b.wait(t)
	if !strings.Contains(a.said.String(), "3 frames captured\n0 refused by the filter\n0 not copied") ||
		!strings.Contains(b.said.String(), "2 frames captured\n1 refused by the filter\n0 not copied") {
		t.Errorf("%q, %q", a.said.String(), b.said.String())
	}
	return front, back
}

func TestTsharkReadsACapture(t *testing.T) {
	front, back := offloads(t)
	fields := []string{"-T", "fields", "-E", "separator=|", "-e", "frame.interface_name", "-e", "frame.packet_flags_direction",
		"-e", "frame.len", "-e", "frame.cap_len", "-e", "tcp.dstport", "-e", "frame.comment"}
	const partial = "checksum partial: the field holds the sum of the pseudo-header, left to the receiver"
	for _, c := range []struct{ got, want string }{
		{reader(t, front, "tshark", fields...), "front-2-1-0|0x2|4054|4054|80|" + partial + "; gso tcp4 1448\n" +
			"front-2-1-0|0x2|154|154|80|" + partial + "\nfront-2-1-0|0x2|254|254|80|" + partial + "\n"},
		{reader(t, back, "tshark", fields...), "back-1-2-0|0x1|4054|100|80|" + partial + "; gso tcp4 1448\n" +
			"back-1-2-0|0x1|254|100|80|" + partial + "\n"},
	} {
		// Other versions of tshark name the flags in decimal.
		got := strings.NewReplacer("|1|", "|0x1|", "|2|", "|0x2|", "0x00000001", "0x1", "0x00000002", "0x2").Replace(c.got)
		if got != c.want {
			t.Errorf("tshark says\n%swant\n%s", got, c.want)
		}
	}
	if text := reader(t, front, "tshark", "-V"); !strings.Contains(text, "queue: 0") || strings.Contains(text, "Malformed") {
		t.Errorf("%s", text)
	}
}

func TestTcpdumpReadsACapture(t *testing.T) {
	front, back := offloads(t)
	const line = "IP 10.9.0.1.8080 > 10.9.0.2.80: Flags [P.]"
	if got := reader(t, front, "tcpdump", "-n"); strings.Count(got, line) != 3 || !strings.Contains(got, "length 4000") {
		t.Error(got)
	}
	if got := reader(t, back, "tcpdump", "-n", "less", "300"); strings.Count(got, line) != 1 {
		t.Error(got)
	}
}

// A capture outlives the connection, and the process; then it waits for the vif to be back.
func TestDumpFollowsAVifThatComesBack(t *testing.T) {
	w, flags := inspectedVif(t, pvnet.Config{})
	c := startDump(t, append(flags, frontVif, "-Q", "out")...)
	send := func() {
		t.Helper()
		if _, err := w.Front.Write(tcpFrame(10)); err != nil {
			t.Fatal(err)
		}
	}
	send()
	w.Plug([6]byte{0, 0x16, 0x3e, 9, 9, 9}, 1400)
	send()
	w.Front.Disconnect()
	c.await(t, "has ended; waiting", 1)
	w.Connect()
	c.await(t, "capturing ", 2)
	send()
	// The frame is in the buffer of the process; the end of the capture waits for it.
	c.cancel()
	c.wait(t)
	if !strings.Contains(c.said.String(), "3 frames captured") {
		t.Errorf("%q", c.said.String())
	}
}

// Under load a capture loses frames of its own at most, and says how many.
func TestDumpUnderLoad(t *testing.T) {
	w, flags := inspectedVif(t, pvnet.Config{})
	file := filepath.Join(t.TempDir(), "load.pcapng")
	c := startDump(t, append(flags, frontVif, "-w", file)...)
	const frames = 20000
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := make(chan int, 1)
	go func() {
		n := 0
		w.Back.ListenBatch(ctx, func(f []pvnet.Frame) {
			if n += len(f); n == frames {
				got <- n
			}
		})
	}()
	var batch [][]byte
	for range 32 {
		batch = append(batch, tcpFrame(1400))
	}
	for range frames / len(batch) {
		if _, err := w.Front.WriteBatch(batch); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-got:
	case <-time.After(patience):
		t.Fatal("frames of the vif are missing")
	}
	c.cancel()
	c.wait(t)
	var counts [3]int
	for i, m := range regexp.MustCompile(`(?m)^([\d ]+) (?:frames captured|refused by|not copied)`).FindAllStringSubmatch(c.said.String(), 3) {
		counts[i], _ = strconv.Atoi(strings.ReplaceAll(m[1], " ", ""))
	}
	captured, filtered, lost := counts[0], counts[1], counts[2]
	if captured+lost != frames || captured == 0 || filtered != 0 {
		t.Errorf("%d captured, %d not copied, of %d: %q", captured, lost, frames, c.said.String())
	}
	pcapng, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(reader(t, pcapng, "tcpdump", "-n", "-t"), "\n"); got != captured {
		t.Errorf("tcpdump reads %d frames, %d were captured", got, captured)
	}
}

// A program that tcpdump compiled is taken, and nothing else.
func TestDumpTakesAProgram(t *testing.T) {
	w, flags := inspectedVif(t, pvnet.Config{})
	program := filepath.Join(t.TempDir(), "p")
	write := func(text string) {
		if err := os.WriteFile(program, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("4\n128 0 0 0\n37 0 1 100\n6 0 0 262144\n6 0 0 0\n") // len > 100
	c := startDump(t, append(flags, frontVif, "-c", "1", "--program", program)...)
	for _, n := range []int{10, 200} {
		if _, err := w.Front.Write(tcpFrame(n)); err != nil {
			t.Fatal(err)
		}
	}
	c.wait(t)
	if !strings.Contains(c.said.String(), "1 frames captured\n1 refused by the filter") {
		t.Errorf("%q", c.said.String())
	}
	for text, want := range map[string]string{
		"": "", "x\n": "no number of instructions", "0\n": "no number of instructions", "5000\n": "no number of instructions",
		"1\n6 0 0\n": "line 2", "1\n6 0 0 x\n": "line 2", "1\n6 0 0 1\n6 0 0 1\n": "line 3", "2\n6 0 0 1\n": "1 instructions instead of 2",
	} {
		write(text)
		code, _, stderr := stats(t, append([]string{"dump", frontVif, "--program", program, "-w", "/dev/null"}, flags...)...)
		if code != cli.ExitUsage || !strings.Contains(stderr, want) {
			t.Errorf("%q: exit %d, %q", text, code, stderr)
		}
	}
}
