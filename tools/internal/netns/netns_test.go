//go:build linux

package netns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/pvnet/link"

	"golang.org/x/sys/unix"
)

const wait = 2 * time.Minute

// role makes the test binary do something else than run tests; see TestMain.
const role = "BAREVIF_NETNS_TEST_ROLE"

func TestMain(m *testing.M) {
	if Main() {
		return
	}
	var err error
	switch os.Getenv(role) {
	case "":
		// Under the race detector each child would end a second late.
		os.Setenv("GORACE", "atexit_sleep_ms=0")
		os.Exit(m.Run())
	case "orphan":
		err = orphan()
	case "refused":
		err = refused()
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

var (
	card  = netip.MustParsePrefix("192.0.2.1/24")
	there = netip.MustParseAddr("192.0.2.2")
)

// start starts a sandbox. It skips the test if the system refuses namespaces, with the
// reason.
func start(t testing.TB, cfg Config) *Sandbox {
	t.Helper()
	s, err := Start(context.Background(), cfg)
	var no *RefusedError
	if errors.As(err, &no) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func both(t *testing.T, f func(t *testing.T, cfg Config)) {
	t.Run("tap", func(t *testing.T) { f(t, Config{Addr: card}) })
	t.Run("veth", func(t *testing.T) { f(t, Config{Addr: card, NoTAP: true}) })
}

// echo answers ARP requests and UDP datagrams for there, until the link is closed.
func echo(t testing.TB, l link.Link) (done chan struct{}) {
	done = make(chan struct{})
	mac := [6]byte{2, 0, 0, 0, 0, 2}
	go func() {
		defer close(done)
		buf := make([]byte, link.MaxFrame)
		for {
			n, off, err := l.ReadFrame([][]byte{buf})
			if err != nil {
				return
			}
			f := buf[:n]
			if off.Checksum == link.ChecksumPartial || off.GSO != link.GSONone {
				t.Errorf("the card sent an unfinished frame: %+v", off)
			}
			switch binary.BigEndian.Uint16(f[12:]) {
			case 0x0806:
				if f[21] != 1 || netip.AddrFrom4([4]byte(f[38:42])) != there {
					continue
				}
				f[21] = 2
				copy(f[32:42], f[22:32])
				copy(f[22:], mac[:])
				copy(f[28:], there.AsSlice())
			case 0x0800:
				if f[23] != 17 {
					continue
				}
				ip := [8]byte(f[26:34])
				copy(f[26:], ip[4:])
				copy(f[30:], ip[:4])
				ports := [4]byte(f[34:38])
				copy(f[34:], ports[2:])
				copy(f[36:], ports[:2])
			default:
				continue
			}
			copy(f, f[6:12])
			copy(f[6:], mac[:])
			if _, err := l.WriteFrame(link.Offload{}, [][]byte{f}); err != nil {
				t.Error(err)
			}
		}
	}()
	return done
}

func TestKernelOfTheSandboxTalksThroughTheLink(t *testing.T) {
	both(t, func(t *testing.T, cfg Config) {
		cfg.MTU = 9000
		s := start(t, cfg)
		if mtu := s.Link().MTU(); mtu != 9000 {
			t.Errorf("MTU %d", mtu)
		}
		done := echo(t, s.Link())
		c, err := s.DialContext(context.Background(), "udp", netip.AddrPortFrom(there, 7).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got := c.RemoteAddr().String(); got != "192.0.2.2:7" {
			t.Errorf("remote address %s", got)
		}
		c.SetDeadline(time.Now().Add(wait))
		for _, size := range []int{1, 1000, 8900} {
			want := strings.Repeat("x", size)
			if _, err := io.WriteString(c, want); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 9000)
			n, err := c.Read(got)
			if err != nil || string(got[:n]) != want {
				t.Fatalf("%d of %d bytes, %v", n, size, err)
			}
		}
		s.Close()
		<-done
	})
}

func TestHTTPClientRunsInsideTheNamespace(t *testing.T) {
	s := start(t, Config{Addr: card})
	l, err := s.Listen("tcp", "192.0.2.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "from "+r.RemoteAddr)
	})}
	go srv.Serve(l)
	defer srv.Close()
	tr := &http.Transport{DialContext: s.DialContext}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: wait}).Get("http://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || !strings.HasPrefix(string(body), "from 192.0.2.1:") {
		t.Fatalf("%q, %v", body, err)
	}
	// Outside, the address belongs to another machine or to none.
	if c, err := net.DialTimeout("tcp", l.Addr().String(), 50*time.Millisecond); err == nil {
		c.Close()
		t.Fatal("the listener is reachable from outside")
	}
}

func TestDialErrors(t *testing.T) {
	s := start(t, Config{Addr: card})
	bg := context.Background()
	for _, c := range []struct {
		network, address string
		want             string
	}{
		{"tcp", "192.0.2.1:9", "connection refused"},
		{"tcp", "198.51.100.1:9", "network is unreachable"},
		{"tcp", "localhost:9", "not an IP address"},
		{"tcp6", "192.0.2.1:9", "other family"},
		{"unix", "/tmp/x", "unknown network"},
	} {
		_, err := s.DialContext(bg, c.network, c.address)
		var op *net.OpError
		if !errors.As(err, &op) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: %v", c.network, c.address, err)
		}
	}
	if _, err := s.DialContext(bg, "tcp", "192.0.2.1:9"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("refused: %v", err)
	}
	// No host answers ARP for this address.
	ctx, cancel := context.WithCancel(bg)
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := s.DialContext(ctx, "tcp", "192.0.2.9:9"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	ctx, cancel = context.WithTimeout(bg, 20*time.Millisecond)
	defer cancel()
	if _, err := s.DialContext(ctx, "tcp", "192.0.2.9:9"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("timed out: %v", err)
	}
	if _, err := s.DialContext(ctx, "tcp", "192.0.2.1:9"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dialled with a context that is over: %v", err)
	}
	if _, err := s.Listen("tcp", "192.0.2.77:80"); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("listen elsewhere: %v", err)
	}
	if _, err := s.Listen("udp", "192.0.2.1:0"); err == nil {
		t.Error("listens for UDP")
	}
	s.Close()
	if _, err := s.DialContext(bg, "tcp", "192.0.2.1:9"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestSocketHasTheRightsOfTheNamespace(t *testing.T) {
	s := start(t, Config{Addr: card})
	f, err := s.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := s.Socket(unix.AF_INET, unix.SOCK_STREAM, 250); !errors.Is(err, unix.EPROTONOSUPPORT) {
		t.Fatal(err)
	}
}

func TestIPv6Card(t *testing.T) {
	s := start(t, Config{Addr: netip.MustParsePrefix("2001:db8::1/64")})
	l, err := s.Listen("tcp", "[2001:db8::1]:0")
	if err != nil {
		if errors.Is(err, unix.EAFNOSUPPORT) {
			t.Skip("this kernel has no IPv6")
		}
		t.Fatal(err)
	}
	defer l.Close()
	c, err := s.DialContext(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestDescribeSaysWhatWasSetUp(t *testing.T) {
	both(t, func(t *testing.T, cfg Config) {
		s := start(t, cfg)
		for _, want := range []string{"network namespace", "eth0", "192.0.2.1/24", "MTU 1500", strconv.Itoa(s.child.Process.Pid)} {
			if !strings.Contains(s.Describe(), want) {
				t.Errorf("%q does not mention %q", s.Describe(), want)
			}
		}
		_, isTAP := s.Link().(*link.TAP)
		if isTAP == (cfg.NoTAP || strings.Contains(s.Describe(), "no TAP")) {
			t.Errorf("a %T: %s", s.Link(), s.Describe())
		}
		if !isTAP && !strings.Contains(s.Describe(), "veth pair") || isTAP && !strings.Contains(s.Describe(), "TAP") {
			t.Error(s.Describe())
		}
		t.Log(s.Describe())
	})
}

func TestConfigIsChecked(t *testing.T) {
	if _, err := Start(context.Background(), Config{}); err == nil || !strings.Contains(err.Error(), "Addr") {
		t.Error(err)
	}
	start(t, Config{Addr: card}) // skips where there are no namespaces
	for _, cfg := range []Config{
		{Addr: card, MTU: 1 << 20},
		{Addr: card, MTU: 1 << 20, NoTAP: true},
		{Addr: card, Name: "a name that is too long"},
		{Addr: card, Name: "a name that is too long", NoTAP: true},
	} {
		s, err := Start(context.Background(), cfg)
		if err == nil {
			s.Close()
			t.Errorf("%+v was taken", cfg)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if s, err := Start(ctx, Config{Addr: card}); err == nil {
		s.Close() // Start was faster than the check of ctx
	} else if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestChildThatDiesIsNoticed(t *testing.T) {
	s, err := Start(context.Background(), Config{Addr: card})
	if err != nil {
		t.Skip(err)
	}
	s.child.Process.Kill()
	if _, err := s.DialContext(context.Background(), "tcp", "192.0.2.1:9"); err == nil {
		t.Error("dialled without the child")
	}
	if err := s.Close(); err == nil {
		t.Error("Close says that the child ended well")
	}
}

func TestNothingIsLeft(t *testing.T) {
	both(t, func(t *testing.T, cfg Config) {
		round := func() {
			s, err := Start(context.Background(), cfg)
			if err != nil {
				t.Skip(err)
			}
			c, err := s.DialContext(context.Background(), "udp", "192.0.2.2:7")
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			if _, err := s.DialContext(context.Background(), "tcp", "192.0.2.1:9"); err == nil {
				t.Fatal("someone listens")
			}
			for range 2 {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", s.child.Process.Pid)); err == nil {
				t.Fatal("the child is still there")
			}
		}
		count := func() (fds, goroutines int) {
			d, err := os.ReadDir("/proc/self/fd")
			if err != nil {
				t.Fatal(err)
			}
			return len(d), runtime.NumGoroutine()
		}
		round()
		fds, goroutines := count()
		for range 5 {
			round()
		}
		end := time.Now().Add(wait)
		for {
			f, g := count()
			if f <= fds && g <= goroutines {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("descriptors %d then %d, goroutines %d then %d", fds, f, goroutines, g)
			}
			runtime.Gosched()
		}
	})
}

// orphan starts a sandbox, prints the pid of its child, and ends without closing it when
// it gets a line.
func orphan() error {
	s, err := Start(context.Background(), Config{Addr: card})
	if err != nil {
		return err
	}
	fmt.Println(s.child.Process.Pid)
	_, err = bufio.NewReader(os.Stdin).ReadString('\n')
	return err
}

func again(t *testing.T, as string, attr *syscall.SysProcAttr) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), role+"="+as)
	cmd.SysProcAttr = attr
	cmd.Dir = "/"
	return cmd
}

func TestChildEndsWithTheProgram(t *testing.T) {
	start(t, Config{Addr: card})
	cmd := again(t, "orphan", nil)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	io.WriteString(in, "\n")
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(wait/time.Millisecond))
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			t.Fatalf("the child outlives the program: %v", err)
		}
		return
	}
}

// refused runs as root of a user namespace, and forbids further namespaces in it.
func refused() error {
	if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil {
		return fmt.Errorf("no such knob here: %w", err)
	}
	// Root needs no user namespace.
	s, err := Start(context.Background(), Config{Addr: card})
	if err != nil {
		return fmt.Errorf("with the rights of root: %w", err)
	}
	if !strings.HasPrefix(s.Describe(), "network namespace") {
		return errors.New(s.Describe())
	}
	s.Close()
	// Without root's capabilities Start needs one. Dropping them affects this thread and
	// the processes it starts.
	runtime.LockOSThread()
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		return err
	}
	s, err = Start(context.Background(), Config{Addr: card})
	if err == nil {
		s.Close()
		return errors.New("was not refused")
	}
	var no *RefusedError
	if !errors.As(err, &no) || no.Knob != "user.max_user_namespaces = 0" || !strings.Contains(err.Error(), no.Knob) {
		return fmt.Errorf("wrong error: %w", err)
	}
	return nil
}

func TestRefusalNamesTheKnob(t *testing.T) {
	start(t, Config{Addr: card})
	out, err := again(t, "refused", &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}).CombinedOutput()
	if strings.Contains(string(out), "no such knob here") {
		t.Skipf("%s", out)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestOrdinaryUser runs the other tests again as user nobody.
func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this is the test as an ordinary user")
	}
	start(t, Config{Addr: card})
	const nobody = 65534
	cmd := again(t, "", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}})
	cmd.Args = append(cmd.Args, "-test.v", "-test.timeout=5m")
	out, err := cmd.CombinedOutput()
	for _, must := range []string{"TestKernelOfTheSandboxTalksThroughTheLink/veth", "TestHTTPClientRunsInsideTheNamespace", "TestKernelBrowsesAGuest/veth", "TestNothingIsLeft/veth"} {
		if !strings.Contains(string(out), "--- PASS: "+must) {
			t.Errorf("%s did not pass as nobody", must)
		}
	}
	if err != nil || t.Failed() {
		t.Fatalf("%v\n%s", err, out)
	}
}
