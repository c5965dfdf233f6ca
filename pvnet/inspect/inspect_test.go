//go:build linux

package inspect_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"barevif/hypercall/emu/emutest"
	"barevif/pvnet"
	"barevif/pvnet/inspect"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
)

const limit = time.Minute

// private makes a directory for sockets, whose paths must be short.
func private(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(emutest.SocketDir(t), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// shown makes a vif whose ends are both shown by one server.
func shown(t *testing.T) (w *pvnettest.Wire, s *inspect.Server, dir string) {
	t.Helper()
	dir = private(t)
	s, err := inspect.Listen(inspect.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	cfg := pvnet.Config{Inspector: s}
	w = pvnettest.New(t, toolstack.Vif{}, cfg, cfg)
	for ev := range w.Back.Links(t.Context()) {
		if ev.Up { // the frontend was first
			break
		}
	}
	return w, s, dir
}

// listed returns the vif of that name.
func listed(t *testing.T, dir, name string) *inspect.Vif {
	t.Helper()
	vifs, err := inspect.List(t.Context(), dir, os.Geteuid())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range vifs {
		if v.Name == name {
			return &v
		}
	}
	t.Fatalf("no %s among %+v", name, vifs)
	return nil
}

const front, back = "front-2-1-0", "back-1-2-0"

func TestVifsAreListedWhileTheyAreThere(t *testing.T) {
	w, s, dir := shown(t)
	vifs, err := inspect.List(t.Context(), dir, os.Geteuid())
	if err != nil || len(vifs) != 2 || vifs[0].Name != back || vifs[1].Name != front || !vifs[0].Up || vifs[0].PID != os.Getpid() {
		t.Fatalf("%+v, %v", vifs, err)
	}
	w.Front.Disconnect()
	if vifs, err = inspect.List(t.Context(), dir, os.Geteuid()); err != nil || len(vifs) != 1 || vifs[0].Name != back {
		t.Errorf("%+v, %v", vifs, err)
	}
	if _, err := listedGone(t, front, s.Path()).Rings(t.Context()); err == nil || !strings.Contains(err.Error(), "has no vif") {
		t.Errorf("a vif that is gone: %v", err)
	}
	s.Close()
	s.Close()
	if vifs, err = inspect.List(t.Context(), dir, os.Geteuid()); err != nil || len(vifs) != 0 {
		t.Errorf("%+v, %v", vifs, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("%v is left, %v", left, err)
	}
}

func listedGone(t *testing.T, name, socket string) *inspect.Vif {
	return &inspect.Vif{Name: name, Socket: socket, UID: os.Geteuid()}
}

func TestRingsAndKicksOfAnotherProcess(t *testing.T) {
	w, _, dir := shown(t)
	for name, dev := range map[string]*pvnet.Device{front: w.Front, back: w.Back} {
		v := listed(t, dir, name)
		got, err := v.Rings(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := dev.Rings()
		if got.Role != want.Role || got.Peer != want.Peer || len(got.Halves) != 2 || got.Halves[0].RingRef != want.Halves[0].RingRef ||
			got.Halves[1].Indexes != want.Halves[1].Indexes || len(got.Halves[1].Slots) != len(want.Halves[1].Slots) {
			t.Errorf("%s: %+v\nwant %+v", name, got, want)
		}
		if n, err := v.Kick(t.Context(), true); n != 2 || err != nil {
			t.Errorf("%d halves, %v", n, err)
		}
	}
}

// dump collects the frames of one Dump.
type dump struct {
	begun  chan struct{}
	frames chan pvnet.TapFrame
	ended  chan error
	stats  pvnet.TapStats
}

func start(ctx context.Context, v *inspect.Vif, cfg inspect.DumpConfig) *dump {
	d := &dump{begun: make(chan struct{}), frames: make(chan pvnet.TapFrame, 10000), ended: make(chan error, 1)}
	go func() {
		var err error
		d.stats, err = v.Dump(ctx, cfg, func() { close(d.begun) }, func(f *pvnet.TapFrame) error {
			g := *f
			g.Data = append([]byte(nil), f.Data...)
			d.frames <- g
			return nil
		})
		d.ended <- err
	}()
	return d
}

func wait[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(limit):
		t.Fatal("nothing came")
	}
	return v
}

func frame(n int, mark byte) []byte {
	b := make([]byte, n)
	b[0], b[12], b[13], b[n-1] = 2, 0x88, 0xb5, mark
	return b
}

func TestDumpGetsFramesOfBothEnds(t *testing.T) {
	w, _, dir := shown(t)
	ctx, cancel := context.WithCancel(t.Context())
	a, b := start(ctx, listed(t, dir, front), inspect.DumpConfig{Snaplen: 20}), start(ctx, listed(t, dir, back), inspect.DumpConfig{})
	wait(t, a.begun)
	wait(t, b.begun)
	if _, err := w.Front.Write(frame(9000, 7)); err != nil {
		t.Fatal(err)
	}
	sent := wait(t, a.frames)
	received := make(chan int, 1)
	go w.Back.Listen(ctx, func(f pvnet.Frame) { received <- f.Len() })
	wait(t, received)
	got := wait(t, b.frames)
	if sent.Dir != telemetry.TX || sent.Len != 9000 || len(sent.Data) != 20 || sent.Data[13] != 0xb5 || time.Since(sent.Time) > limit {
		t.Errorf("%+v", sent)
	}
	if got.Dir != telemetry.RX || got.Len != 9000 || len(got.Data) != 9000 || got.Data[8999] != 7 {
		t.Errorf("%v, %d of %d bytes", got.Dir, len(got.Data), got.Len)
	}
	cancel()
	for _, d := range []*dump{a, b} {
		if err := wait(t, d.ended); err != nil || d.stats != (pvnet.TapStats{Captured: 1}) {
			t.Errorf("%v, %+v", err, d.stats)
		}
	}
}

// The filter runs in the process, on all bytes; the caller's function ends the dump.
func TestDumpFilters(t *testing.T) {
	w, _, dir := shown(t)
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 99, Size: 1}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: 7, SkipFalse: 1},
		bpf.RetConstant{Val: 1}, bpf.RetConstant{},
	})
	if err != nil {
		t.Fatal(err)
	}
	begun, ended := make(chan struct{}), make(chan error, 1)
	var stats pvnet.TapStats
	var seen []byte
	go func() {
		var err error
		stats, err = listed(t, dir, front).Dump(t.Context(), inspect.DumpConfig{Program: inspect.Program(raw), Snaplen: 14},
			func() { close(begun) }, func(f *pvnet.TapFrame) error {
				if seen = append(seen, byte(f.Len)); len(seen) == 2 {
					return io.EOF
				}
				return nil
			})
		ended <- err
	}()
	wait(t, begun)
	for i, mark := range []byte{7, 8, 7} {
		if _, err := w.Front.Write(frame(100, mark)); err != nil {
			t.Fatal(i, err)
		}
	}
	if err := wait(t, ended); err != nil || string(seen) != "dd" || stats != (pvnet.TapStats{Captured: 2, Filtered: 1}) {
		t.Errorf("%v, %v, %+v", err, seen, stats)
	}
}

func TestDumpEndsWithTheVif(t *testing.T) {
	w, _, dir := shown(t)
	d := start(t.Context(), listed(t, dir, front), inspect.DumpConfig{})
	wait(t, d.begun)
	w.Front.Disconnect()
	if err := wait(t, d.ended); !errors.Is(err, inspect.ErrEnded) {
		t.Errorf("%v", err)
	}
}

// A dump goes on while the connection is lost and made again.
func TestDumpGoesOnAfterTheVifReconnects(t *testing.T) {
	w, _, dir := shown(t)
	d := start(t.Context(), listed(t, dir, front), inspect.DumpConfig{Sent: true})
	wait(t, d.begun)
	w.Plug([6]byte{0, 0x16, 0x3e, 1, 2, 3}, 1400)
	if _, err := w.Front.Write(frame(60, 1)); err != nil {
		t.Fatal(err)
	}
	if f := wait(t, d.frames); f.Len != 60 {
		t.Errorf("%+v", f)
	}
}

// A client that does not read costs the vif nothing. What it does not get is counted.
func TestASlowClientDoesNotHoldFramesUp(t *testing.T) {
	w, s, dir := shown(t)
	v := listed(t, dir, back)
	c, err := net.Dial("unix", s.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "{\"op\":\"dump\",\"vif\":%q}\n", v.Name)
	if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line != "{}\n" {
		t.Fatalf("%q, %v", line, err)
	}
	other := start(t.Context(), v, inspect.DumpConfig{Snaplen: 20})
	wait(t, other.begun)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := make(chan bool)
	go func() {
		n := 0
		w.Back.ListenBatch(ctx, func(f []pvnet.Frame) {
			if n += len(f); n >= 3000 {
				cancel()
			}
		})
		close(got)
	}()
	began := time.Now()
	for range 3000 {
		if _, err := w.Front.Write(frame(4000, 1)); err != nil {
			t.Fatal(err)
		}
	}
	wait(t, got)
	t.Logf("3000 frames in %v", time.Since(began))
	for range 3000 {
		if f := wait(t, other.frames); f.Lost != 0 {
			t.Fatalf("the other client lost %d", f.Lost)
		}
	}
	// The slow one is told what it has missed, if it ever reads again.
	c.(*net.UnixConn).CloseWrite()
	c.SetReadDeadline(time.Now().Add(limit))
	all, err := io.ReadAll(c)
	if err != nil || len(all) < 28 || len(all) >= 3000*4000 {
		t.Fatalf("%d bytes, %v", len(all), err)
	}
	if st := w.Back.Stats().RX; st.Get(telemetry.Packets) != 3000 || st.Dropped()+st.Errors() != 0 {
		t.Errorf("the vif: %v", st)
	}
}

// What no client would send gets an error, or nothing, and harms nobody.
func TestHostileClientsAreRefused(t *testing.T) {
	_, s, dir := shown(t)
	insn := func(n int) string {
		return "[" + strings.TrimSuffix(strings.Repeat("[6,0,0,1],", n), ",") + "]"
	}
	for name, c := range map[string]struct{ say, want string }{
		"no JSON":                 {"GET / HTTP/1.1\n", "invalid character"},
		"another type":            {`{"op":1}` + "\n", "cannot unmarshal"},
		"an unknown request":      {`{"op":"x","vif":"front-2-1-0"}` + "\n", "no request is called"},
		"no vif":                  {`{"op":"rings","vif":"` + strings.Repeat("x", 1000) + `"}` + "\n", "no vif"},
		"an endless line":         {strings.Repeat(" ", 300<<10), "a line of more than"},
		"a queue too many":        {`{"op":"dump","vif":"front-2-1-0","queues":[7]}` + "\n", "no queue 7"},
		"a negative length":       {`{"op":"dump","vif":"front-2-1-0","snaplen":-1}` + "\n", "Snaplen is -1"},
		"a long program":          {`{"op":"dump","vif":"front-2-1-0","program":` + insn(4097) + "}\n", "at most 4096"},
		"no instruction":          {`{"op":"dump","vif":"front-2-1-0","program":[[65535,0,0,0]]}` + "\n", "is unknown"},
		"a large opcode":          {`{"op":"dump","vif":"front-2-1-0","program":[[65536,0,0,0]]}` + "\n", "is none"},
		"a jump out":              {`{"op":"dump","vif":"front-2-1-0","program":[[5,0,0,100],[6,0,0,0]]}` + "\n", "jump"},
		"a far jump":              {`{"op":"dump","vif":"front-2-1-0","program":[[5,0,0,4294967295],[6,0,0,0]]}` + "\n", "jump"},
		"no return":               {`{"op":"dump","vif":"front-2-1-0","program":[[0,0,0,0]]}` + "\n", "must end"},
		"a division by zero":      {`{"op":"dump","vif":"front-2-1-0","program":[[52,0,0,0],[6,0,0,0]]}` + "\n", "divide by zero"},
		"scratch out of bounds":   {`{"op":"dump","vif":"front-2-1-0","program":[[96,0,0,99],[6,0,0,0]]}` + "\n", "is unknown"},
		"the rest of the request": {`{"op":"list"`, ""},
	} {
		conn, err := net.Dial("unix", s.Path())
		if err != nil {
			t.Fatal(err)
		}
		if c.want == "" {
			conn.Write([]byte(c.say))
			conn.(*net.UnixConn).CloseWrite()
			c.want = "unexpected EOF"
		} else {
			io.WriteString(conn, c.say)
		}
		conn.SetReadDeadline(time.Now().Add(limit))
		got, _ := io.ReadAll(conn)
		conn.Close()
		var a struct{ Error string }
		if json.Unmarshal(got, &a) != nil || !strings.Contains(a.Error, c.want) {
			t.Errorf("%s: %q", name, got)
		}
	}
	listed(t, dir, front)
}

func TestClientsAndCopiesHaveALimit(t *testing.T) {
	_, s, dir := shown(t)
	v := listed(t, dir, front)
	ctx, cancel := context.WithCancel(t.Context())
	var dumps []*dump
	for range 4 {
		d := start(ctx, v, inspect.DumpConfig{})
		wait(t, d.begun)
		dumps = append(dumps, d)
	}
	if err := wait(t, start(ctx, v, inspect.DumpConfig{}).ended); err == nil || !strings.Contains(err.Error(), "four taps") {
		t.Errorf("a fifth: %v", err)
	}
	cancel()
	for _, d := range dumps {
		if err := wait(t, d.ended); err != nil {
			t.Error(err)
		}
	}
	var idle []net.Conn
	for range 16 {
		c, err := net.Dial("unix", s.Path())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	refused := false
	for end := time.Now().Add(limit); !refused && time.Now().Before(end); { // earlier clients may still be leaving
		_, err := v.Rings(t.Context())
		refused = err != nil && strings.Contains(err.Error(), "16 clients already")
	}
	if !refused {
		t.Error("a 17th client is served")
	}
	idle[0].Close()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		if _, err := v.Rings(t.Context()); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// Close ends the copies and does not wait for clients that do not read.
func TestCloseEndsWhatClientsDo(t *testing.T) {
	_, s, dir := shown(t)
	d := start(t.Context(), listed(t, dir, front), inspect.DumpConfig{})
	wait(t, d.begun)
	idle, err := net.Dial("unix", s.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	before := time.Now()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(before); took > 4*time.Second {
		t.Errorf("it took %v", took)
	}
	if err := wait(t, d.ended); !errors.Is(err, inspect.ErrEnded) {
		t.Errorf("%v", err)
	}
}

// The place of sockets is for its user alone; one that is not is neither used nor believed.
func TestPlacesOfOthersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give files to another user")
	}
	dir := private(t)
	s, err := inspect.Listen(inspect.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := os.Stat(s.Path())
	if err != nil || st.Mode().Perm()&0o077 != 0 {
		t.Fatalf("%v, %v", st.Mode(), err)
	}
	if vifs, err := inspect.List(t.Context(), dir, 65534); err == nil || len(vifs) != 0 {
		t.Errorf("another user's directory: %v, %v", vifs, err)
	}
	for _, mode := range []os.FileMode{0o710, 0o777, 0o701} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := inspect.List(t.Context(), dir, 0); err == nil || !strings.Contains(err.Error(), "open to others") {
			t.Errorf("mode %v: %v", mode, err)
		}
		if s, err := inspect.Listen(inspect.Config{Dir: dir}); err == nil {
			s.Close()
			t.Errorf("mode %v is used", mode)
		}
	}
	// Another user who got a hold of the path is not answered.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.Path(), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // that of the test: see private
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocks: the thread ends with the goroutine
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); errno != 0 {
			got <- errno
			return
		}
		got <- func() error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.Path()}); err != nil {
				return err
			}
			unix.Write(fd, []byte("{\"op\":\"list\"}\n"))
			var b [64]byte
			if n, _ := unix.Read(fd, b[:]); n > 0 {
				return fmt.Errorf("it is answered: %q", b[:n])
			}
			return io.EOF
		}()
	}()
	if err := wait(t, got); err != io.EOF {
		t.Error(err)
	}
}

// A socket that a killed process left is no error, and the next process removes it.
func TestSocketsOfTheDeadAreRemoved(t *testing.T) {
	dir := private(t)
	dead := filepath.Join(dir, "inspect-1-dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if vifs, err := inspect.List(t.Context(), dir, os.Geteuid()); err != nil || len(vifs) != 0 {
		t.Errorf("%v, %v", vifs, err)
	}
	s, err := inspect.Listen(inspect.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := os.Stat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// A process that does not keep to the protocol is an error, not a loop or a panic.
func TestAProcessThatLiesIsAnError(t *testing.T) {
	dir := private(t)
	path := filepath.Join(dir, "inspect-1-liar.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	say := make(chan string, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			bufio.NewReader(c).ReadString('\n')
			io.WriteString(c, <-say)
			c.Close()
		}
	}()
	v := &inspect.Vif{Name: front, Socket: path, UID: os.Geteuid()}
	head := "{}\n"
	for _, lie := range []string{"", "{", "nothing\n", `{"rings":null}` + "\n", `{"rings":[]}` + "\n", head} {
		say <- lie
		if got, err := v.Rings(t.Context()); err == nil {
			t.Errorf("%q: %+v", lie, got)
		}
	}
	long := strings.Repeat("\xff", 39)
	for _, lie := range []string{head + "X", head + "F", head + "F" + long, head + "S\x01", head + "E\xff\xff", head + "E\x00\x00", head} {
		say <- lie
		_, err := v.Dump(t.Context(), inspect.DumpConfig{}, nil, func(f *pvnet.TapFrame) error {
			t.Errorf("%q: %+v", lie, f)
			return nil
		})
		if !errors.Is(err, inspect.ErrEnded) {
			t.Errorf("%q: %v", lie, err)
		}
	}
}

// A program's state of itself is shown by its name, while it is shown, and made for one client at
// a time.
func TestAStateIsShownByItsName(t *testing.T) {
	_, s, dir := shown(t)
	get := func(name string) ([]inspect.State, error) {
		return inspect.States(t.Context(), dir, name, os.Geteuid())
	}
	if all, err := get("router"); err != nil || len(all) != 0 {
		t.Fatalf("%v, %v", all, err)
	}
	var inside, most atomic.Int32
	first := s.Show("router", func() any { return 1 })
	second := s.Show("router", func() any {
		if n := inside.Add(1); n > most.Load() {
			most.Store(n)
		}
		runtime.Gosched()
		inside.Add(-1)
		return map[string]int{"flows": 2}
	})
	first() // it has no say any more
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			all, err := get("router")
			if err != nil || len(all) != 1 || string(all[0].JSON) != `{"flows":2}` || all[0].PID != os.Getpid() || all[0].UID != os.Geteuid() || all[0].Socket != s.Path() {
				t.Errorf("%+v, %v", all, err)
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d at once", most.Load())
	}
	if all, err := get("other"); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	second()
	if all, err := get("router"); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	// One that cannot be shown is an error that names it.
	for want, of := range map[string]any{"unsupported type": make(chan int), "bytes, and may be": strings.Repeat("x", 17<<20)} {
		hide := s.Show("router", func() any { return of })
		if all, err := get("router"); err == nil || !strings.Contains(err.Error(), want) || len(all) != 0 {
			t.Errorf("%d states, %v; want %q", len(all), err, want)
		}
		hide()
	}
}
