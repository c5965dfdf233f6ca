//go:build linux

package command_test

import (
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall/emu/emutest"

	"golang.org/x/sys/unix"
)

// twoVifs are the flags of a host that gives domain 1 two vifs, and those of their backend and
// of their frontend.
var (
	twoVifs     = []string{"--vif", "front=1", "--vif", "front=1,id=1"}
	twoBacks    = []string{"--addr", "1.0=10.9.0.1/24", "--addr", "1.1=10.9.1.1/24"}
	twoServed   = []string{"--vif", "0", "--vif", "1", "--addr", "0=10.9.0.2/24", "--addr", "1=10.9.1.2/24"}
	eachOfTwo   = []string{"10.9.0.2", "10.9.1.2"}
	bothHave    = func(s string) []string { return []string{"vif 0: " + s, "vif 1: " + s} }
	takenByEach = "1 vif taken over from"
)

// One serve has several vifs, with a stack each. A vif that is not there is an error in the
// log, and of the exit status, and no matter of the others.
func TestOneServeHasSeveralVifs(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, twoVifs...)
	s.back(twoBacks...)
	g := s.serve(append([]string{"--vif", "7", "--addr", "7=10.9.7.2/24"}, twoServed...)...)
	for _, addr := range eachOfTwo {
		check(t, addr)
	}
	g.await("a vif has ended, and the others go on", 1)
	wants(t, g.text(), "vif=7", `the devices there are: \"0\" \"1\"`, "choose one of those with --vif")
	g.signal(syscall.SIGTERM)
	wants(t, g.exit(1), "barevif serve: ", "device/vif/7")

	g = s.serve(twoServed...)
	g.await("serving http://", 2)
	g.signal(syscall.SIGTERM)
	g.exit(0)

	// Both would have the default address.
	g = s.serve("--vif", "0", "--vif", "1", "--addr", "0=10.9.0.2/24")
	g.await("a vif has ended, and the others go on", 1)
	wants(t, g.text(), "vif 1: the toolstack has no address for it", "--addr 1=IP/BITS")
	check(t, "10.9.0.2")
	g.signal(syscall.SIGTERM)
	g.exit(1)
}

// A signal that comes while one vif waits for its backend is the end of a serve that has
// another, and an interruption of one that has none.
func TestASignalEndsAServeWithAVifThatWaits(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1", "--vif", "front=1,id=1,type=own,back=4", "--vif", "front=1,id=2,type=own,back=4")
	s.back("--addr", "10.9.0.1/24")
	g := s.serve(append([]string{"--wait", "0"}, twoServed...)...)
	g.await("vif 1 waits for its backend", 1)
	g.await("serving http://10.9.0.2/", 1)
	g.signal(syscall.SIGTERM)
	g.exit(0)
	g = s.serve("--wait", "0", "--vif", "1", "--vif", "2")
	g.await("waits for its backend", 2)
	g.signal(syscall.SIGTERM)
	wants(t, g.exit(130), "interrupted")
}

// A process that does not hand one vif over is an error of that vif.
func TestAVifThatIsNotHandedOverIsNoMatterOfTheOthers(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, twoVifs...)
	s.back(twoBacks...)
	l, err := net.Listen("unixpacket", filepath.Join(filepath.Dir(s.socket), "front-1-1.handover"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			c.Write([]byte("nonsense"))
			c.Close()
		}
	}()
	g := s.serve(append([]string{"--take-over"}, twoServed...)...)
	g.await("a vif has ended, and the others go on", 1)
	wants(t, g.text(), "vif=1", "to go on with a pause, end the other serve")
	check(t, "10.9.0.2")
	g.signal(syscall.SIGTERM)
	wants(t, g.exit(1), "end the other serve")
}

// Each vif of a serve is handed over for itself, to one process or to several, and no ping is
// lost on any.
func TestSeveralVifsAreTakenOverWithoutLoss(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, twoVifs...)
	b := s.back(twoBacks...)
	g := s.serve(twoServed...)
	g.await("serving http://", 2)
	var pingers []*pinger
	for _, addr := range eachOfTwo {
		check(t, addr)
		pingers = append(pingers, newPinger(t, addr, 10*time.Millisecond))
	}
	pause := func() {
		for _, p := range pingers {
			p.await(20)
		}
	}
	pause()
	for range 3 {
		next := s.serve(append([]string{"--take-over"}, twoServed...)...)
		next.await(takenByEach, 2)
		g.exit(0)
		g = next
		pause()
	}
	one := s.serve("--take-over", "--vif", "1", "--addr", "10.9.1.2/24")
	one.await(takenByEach, 1)
	pause()
	if g.signal(0); strings.Contains(one.text(), "vif 0") {
		t.Errorf("a vif was taken that was not asked for: %s", one.text())
	}
	both := s.serve(append([]string{"--take-over"}, twoServed...)...)
	both.await(takenByEach, 2)
	g.exit(0)
	one.exit(0)
	pause()
	for _, p := range pingers {
		p.endWithoutLoss(t)
	}
	both.signal(syscall.SIGTERM)
	both.exit(0)
	b.signal(syscall.SIGTERM)
	if out := b.exit(0); strings.Count(out, "connected to domain 1") != 2 {
		t.Errorf("the backend has noticed it: %s", out)
	}
}

// A vif whose backend did not come in time is tried again by the process that takes the others
// over.
func TestATakeOverTriesAVifThatFailedAgain(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1", "--vif", "front=1,id=1,type=own,back=4")
	s.back("--addr", "10.9.0.1/24")
	g := s.serve(append([]string{"--wait", "10s"}, twoServed...)...) // in which the other vif is up
	g.await("serving http://10.9.0.2/", 1)
	g.await("a vif has ended, and the others go on", 1)
	wants(t, g.text(), "vif=1", "is the backend running?")
	s.back("--dom", "4", "--type", "own", "--addr", "10.9.1.1/24")
	next := s.serve(append([]string{"--take-over"}, twoServed...)...)
	next.await(takenByEach, 1)
	for _, addr := range eachOfTwo {
		check(t, addr)
	}
	wants(t, next.text(), "no serve listens at")
	wants(t, g.exit(1), "vif 1")
	next.signal(syscall.SIGTERM)
	next.exit(0)
}

// One attach has several vifs, with a TAP each, which stay when another takes over.
func TestOneAttachHasSeveralVifs(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, twoVifs...)
	b := s.back(twoBacks...)
	args := append([]string{"attach", "-v", "--emu", s.socket, "--tap", "card%i"}, twoServed...)
	g := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, s.bin, args...)
	b.await("connected to domain 1", 2)
	for i, addr := range eachOfTwo {
		g.await(fmt.Sprintf("the kernel has it as card%d, %s/24", i, addr), 1)
		ping(t, addr)
	}
	g.signal(syscall.SIGTERM)
	wants(t, g.exit(0), bothHave("gone; ")...)
}

// An attach with two vifs is replaced by another, which has both TAPs with their addresses; no ping
// is lost on either.
func TestSeveralTAPsAreTakenOverWithoutLoss(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		t.Skip("nsenter is not installed: ", err)
	}
	s := newSite(t, twoVifs...)
	b := s.back(twoBacks...)
	args := append([]string{"attach", "-v", "--emu", s.socket, "--tap", "card%i"}, twoServed...)
	g := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, s.bin, args...)
	b.await("connected to domain 1", 2)
	var pingers []*pinger
	for i, addr := range eachOfTwo {
		g.await(fmt.Sprintf("the kernel has it as card%d, %s/24", i, addr), 1)
		ping(t, addr)
		pingers = append(pingers, newPinger(t, addr, 10*time.Millisecond))
	}
	pause := func() {
		for _, p := range pingers {
			p.await(20)
		}
	}
	pause()
	for range 3 {
		inside := append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", g.cmd.Process.Pid), s.bin}, args...)
		next := start(t, nil, nsenter, append(inside, "--take-over")...)
		next.await("the kernel has it as card", 2)
		next.await(takenByEach, 2)
		wants(t, g.exit(0), bothHave("handed over; ")...)
		g = next
		pause()
	}
	for _, p := range pingers {
		p.endWithoutLoss(t)
	}
	g.signal(syscall.SIGTERM)
	wants(t, g.exit(0), bothHave("gone; ")...)
	b.signal(syscall.SIGTERM)
	if out := b.exit(0); strings.Count(out, "connected to domain 1") != 2 {
		t.Errorf("the backend has noticed it: %s", out)
	}
}

// When the host ends, so do all vifs of a process, which says so once.
func TestSeveralVifsEndWithTheirHost(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, twoVifs...)
	s.back(twoBacks...)
	g := s.serve(twoServed...)
	g.await("serving http://", 2)
	s.host.signal(syscall.SIGTERM)
	s.host.exit(0)
	out := g.exit(1)
	wants(t, out, `start it again: "barevif host"`)
	if n := strings.Count(out, "the emulated host has ended; taking the vifs down"); n != 1 {
		t.Errorf("said %d times: %s", n, out)
	}
}

// manager listens where systemd would, and returns what it was told, in order, once the
// function that it returns is called.
func manager(t *testing.T) (told func() []string) {
	t.Helper()
	path := filepath.Join(emutest.SocketDir(t), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() (all []string) {
		t.Helper()
		const last = "that was all"
		end, err := net.Dial("unixgram", path)
		if err == nil {
			_, err = end.Write([]byte(last))
			end.Close()
		}
		for buf := make([]byte, 256); err == nil; {
			var n int
			if n, err = c.Read(buf); string(buf[:n]) == last {
				return all
			}
			all = append(all, string(buf[:n]))
		}
		t.Fatal(err)
		return nil
	}
}

// systemd learns once that a serve is ready, when each vif has connected or failed, and which
// process is the service's after a hand-over.
func TestSystemdLearnsWhenSeveralVifsAreReady(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, twoVifs...)
	s.back(twoBacks...)
	told := manager(t)
	g := s.serve(append([]string{"--vif", "7", "--addr", "7=10.9.7.2/24"}, twoServed...)...)
	for _, addr := range eachOfTwo {
		check(t, addr)
	}
	g.await("a vif has ended", 1)
	next := s.serve(append([]string{"--take-over"}, twoServed...)...)
	next.await(takenByEach, 2)
	g.exit(1)
	main := fmt.Sprintf("MAINPID=%d", next.cmd.Process.Pid)
	next.signal(syscall.SIGTERM)
	next.exit(0)
	messages := told()
	slices.Sort(messages)
	if want := []string{main, main, "READY=1", "READY=1"}; !slices.Equal(messages, want) {
		t.Errorf("%q, want one READY of each process, and %s for each vif", messages, main)
	}
}
