//go:build linux

package command_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall/emu/emutest"
	"barevif/test/xenstored"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A site is a "barevif host" with the processes that join it.
type site struct {
	t      *testing.T
	bin    string
	socket string
	host   *process
}

func newSite(t *testing.T, vifs ...string) *site {
	t.Helper()
	s := &site{t: t, bin: barevif(t), socket: filepath.Join(emutest.SocketDir(t), "host.sock")}
	s.host = start(t, nil, s.bin, append([]string{"host", "--socket", s.socket}, vifs...)...)
	s.host.await("look inside:", 1)
	return s
}

func (s *site) back(args ...string) *process {
	s.t.Helper()
	p := start(s.t, nil, s.bin, append([]string{"back", "-v", "--emu", s.socket}, args...)...)
	p.await("serves vifs", 1)
	return p
}

func (s *site) serve(args ...string) *process {
	s.t.Helper()
	return start(s.t, nil, s.bin, append([]string{"serve", "-v", "--emu", s.socket}, args...)...)
}

func needTAP(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Skip("this machine gives no TAP: ", err)
	}
	f.Close()
}

// client returns a client that opens a new connection for each request.
func client() *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: limit}
}

// fetch repeats a request until the appliance answers: ARP and routes need some time after a
// restart.
func fetch(t *testing.T, url string) []byte {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		body, err := tryFetch(url)
		if err == nil {
			return body
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func tryFetch(url string) ([]byte, error) {
	resp, err := client().Get(url)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", url, resp.Status, body)
	}
	return body, err
}

// check fetches a page and a file with its checksum.
func check(t *testing.T, server string) {
	t.Helper()
	wants(t, string(fetch(t, "http://"+server+"/")), "network card of its own")
	const file = "/bytes/5000011"
	body := fetch(t, "http://"+server+file)
	sum := sha256.Sum256(body)
	want, _, _ := strings.Cut(string(fetch(t, "http://"+server+file+".sha256")), " ")
	if hex.EncodeToString(sum[:]) != want || len(body) != 5000011 {
		t.Errorf("%d bytes with SHA-256 %x, want %s", len(body), sum, want)
	}
}

// pings counts the calls of ping.
var pings atomic.Uint32

// ping sends an ICMP echo request, each second again, and fails unless a reply arrives: a TAP or a
// port of a bridge that is not up yet may lose some. The requests of a call have a number of its
// own, so that a late reply to another's is none.
func ping(t *testing.T, address string) {
	t.Helper()
	c, err := net.Dial("ip4:icmp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n := uint16(pings.Add(1))
	ask := []byte{8, 0, 0, 0, 0x12, 0x34, byte(n >> 8), byte(n)}
	binary.BigEndian.PutUint16(ask[2:], ^(0x0800 + 0x1234 + n))
	reply := append([]byte{0}, ask[1:]...)
	buf := make([]byte, 1500)
	for end := time.Now().Add(limit); ; {
		if _, err := c.Write(ask); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		for {
			n, err := c.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) && time.Now().Before(end) {
				break
			}
			if err != nil {
				t.Fatal("ping: ", err)
			}
			// The read includes the IP header.
			if got := buf[:n]; n == 28 && got[20] == 0 && bytes.Equal(got[24:], reply[4:]) {
				return
			}
		}
	}
}

func TestHostBackServe(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t)
	back := func() *process { t.Helper(); return s.back("--addr", "10.9.0.1/24") }
	serve := func() *process { t.Helper(); return s.serve("--addr", "10.9.0.2/24", "--gateway", "10.9.0.1") }
	const server = "10.9.0.2"

	b := back()
	g := serve()
	g.await("serving http://10.9.0.2/", 1)
	b.await("connected to domain 1", 1) // its TAP has the address by then
	ping(t, server)
	check(t, server)

	t.Log("the backend ends in good order and comes back")
	b.signal(syscall.SIGTERM)
	wants(t, b.exit(0), "vif 1.0: gone; ", "connected to domain 1")
	g.await("vif 0: down: the other end is ", 1)
	b = back()
	g.await("vif 0: connected again, backend in domain 2", 1)
	check(t, server)

	t.Log("the backend is killed under load and comes back")
	resp, err := client().Get("http://" + server + "/bytes/1099511627776")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	b.signal(syscall.SIGKILL)
	<-b.done
	b = back()
	b.await("connected to domain 1", 1)
	check(t, server)
	// A TCP connection between the machine and the appliance outlives the backend.
	if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil {
		t.Errorf("a download did not go on: %v", err)
	}
	resp.Body.Close()

	t.Log("the guest ends in good order and comes back")
	g.signal(syscall.SIGTERM)
	g.exit(0)
	b.await("vif 1.0: down", 1)
	g = serve()
	b.await("connected to domain 1", 2)
	check(t, server)

	t.Log("the guest is killed and comes back")
	g.signal(syscall.SIGKILL)
	<-g.done
	g = serve()
	b.await("connected to domain 1", 3)
	check(t, server)

	t.Log("all end")
	g.signal(syscall.SIGINT)
	wants(t, g.exit(0), "link down")
	b.signal(syscall.SIGINT)
	b.exit(0)
	s.host.signal(syscall.SIGTERM)
	wants(t, s.host.exit(0), "domain 1: a program runs in it", "domain 2: its program has ended")
	for _, path := range []string{s.socket, filepath.Join(filepath.Dir(s.socket), "xenstored.sock")} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind", path)
		}
	}
	if _, err := net.InterfaceByName("vif1.0"); err == nil {
		t.Error("the TAP is left behind")
	}
}

// When the backend is replaced, the bridge keeps its MAC address, so that a guest that knows
// it still reaches its gateway.
func TestTheBridgeKeepsItsAddressWhenTheBackendIsReplaced(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "bridge0"
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Skip("this machine gives no bridge: ", err)
	}
	bridge, err := netlink.LinkByName("bridge0")
	if err == nil {
		err = netlink.LinkSetUp(bridge)
	}
	if err == nil {
		err = netlink.AddrAdd(bridge, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 9, 0, 1), Mask: net.CIDRMask(24, 32)}})
	}
	if err != nil {
		t.Fatal(err)
	}
	const most = "fe:ff:ff:ff:ff:ff" // no card has a higher address: a bridge takes its lowest port's
	s := newSite(t)
	b := s.back("--bridge", "bridge0")
	g := s.serve()
	g.await("serving http://10.9.0.2/", 1)
	for range 2 {
		b.await("connected to domain 1", 1)
		ping(t, "10.9.0.2")
		for _, name := range []string{"bridge0", "vif1.0"} {
			if i, err := net.InterfaceByName(name); err != nil || i.HardwareAddr.String() != most {
				t.Errorf("%s has address %v, want %s: %v", name, i.HardwareAddr, most, err)
			}
		}
		b.signal(syscall.SIGUSR1)
		b.exit(0)
		b = s.back("--bridge", "bridge0")
	}
	b.await("connected to domain 1", 1)
	ping(t, "10.9.0.2")
	g.signal(syscall.SIGTERM)
	g.exit(0)
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

// test/check compares datagrams to the appliance and back, and between two kernels. One
// kernel gets the vif from attach, in a network namespace of its own.
func TestAttachAndCheck(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		t.Skip("nsenter is not installed: ", err)
	}
	s := newSite(t)
	b := s.back("--addr", "10.9.0.1/24")
	bin := checkProgram(t)
	check := func(args ...string) *process { return start(t, nil, bin, args...) }
	g := s.serve("--check", "7007")
	b.await("connected to domain 1", 1)
	g.await("serving http://10.9.0.2/", 1)
	wants(t, check("--sizes", "1-1472:7,4000,65507", "10.9.0.2").exit(0), "213 datagrams", " 0 lost, 0 wrong")
	g.signal(syscall.SIGTERM)
	g.exit(0)
	wants(t, check("--sizes", "1-3", "--patience", "100ms", "10.9.0.2").exit(1), "3 of 3 datagrams are lost")
	const unused = "no station on vif1.0 says that it is 10.9.0.77 (ARP, or neighbour discovery)"
	wants(t, check("--silence", "1500ms", "10.9.0.77").exit(1), "no answer yet: "+unused, "nothing was answered within 1.5s: "+unused, "next: is that its address")
	wants(t, check("10.9.0.77").exit(1), "no answer yet: "+unused, unused+"\n  next: is that its address")

	g = start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, s.bin, "attach", "--emu", s.socket, "--tap", "card%i", "--addr", "10.9.0.2/24")
	g.await("the kernel has it as card0", 1)
	b.await("connected to domain 1", 2)
	net := fmt.Sprintf("--net=/proc/%d/ns/net", g.cmd.Process.Pid)
	other := start(t, nil, nsenter, net, bin, "--answer")
	other.await("answering at", 1)
	ping(t, "10.9.0.2")
	neighbours, err := os.ReadFile("/proc/self/net/arp")
	if err != nil {
		t.Fatal(err)
	}
	wants(t, string(neighbours), "00:16:3e:00:01:00")
	wants(t, check("--sizes", "1-1472:7,4000,65507", "10.9.0.2").exit(0), "213 datagrams", " 0 lost, 0 wrong")
	other.signal(syscall.SIGTERM)
	other.exit(0)
	wants(t, check("10.9.0.2").exit(1), "next: ")

	// The addresses of the TAP are announced: the kernel behind the next backend, which has not
	// asked for them, knows them.
	const accept = "/proc/sys/net/ipv4/conf/all/arp_accept"
	if err := os.WriteFile(accept, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	b.signal(syscall.SIGKILL)
	<-b.done
	b = s.back("--addr", "10.9.0.1/24")
	b.await("connected to domain 1", 1)
	for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		neighbours, err := os.ReadFile("/proc/self/net/arp")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(neighbours), "00:16:3e:00:01:00") {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the next backend's kernel has heard no announcement")
		}
	}
	ping(t, "10.9.0.2")
	g.signal(syscall.SIGTERM)
	wants(t, g.exit(0), "vif 0: connected again", "vif 0: gone; ")
}

func TestADomainEndsWithItsHost(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t)
	b := s.back("--addr", "10.9.0.1/24")
	g := s.serve()
	g.await("serving http://", 1)
	s.host.signal(syscall.SIGKILL)
	<-s.host.done
	for _, p := range []*process{b, g} {
		wants(t, p.exit(1), "the emulated host has ended", "next: ")
		if strings.Contains(p.text(), "xenstore refused") {
			t.Error("a connection that has ended is said to have refused something")
		}
	}
	wants(t, b.text(), "vif 1.0: gone; ")
	// Files that a killed host leaves behind do not prevent the next host from starting.
	s.host = start(t, nil, s.bin, "host", "--socket", s.socket)
	s.host.await("look inside:", 1)
	s.host.signal(syscall.SIGTERM)
	s.host.exit(0)
}

// A program that ends in order, or because its host ends, leaves no pins of its counters.
// "barevif stat --prune" removes the pins of a program that was killed, but not those of a
// live one.
func TestPinsEndWithTheirProgram(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root mounts a BPF file system")
	}
	needTAP(t)
	s := newSite(t)
	// A BPF file system and a network for these two programs only.
	const missing, dir = 77, "/sys/fs/bpf/barevif"
	script := fmt.Sprintf(`mount -t bpf bpf /sys/fs/bpf || exit %d
		left() { echo "$1: $(ls -A %[2]s | tr '\n' ' ')left"; }
		both() { while [ "$(ls -A %[2]s 2>/dev/null | wc -l)" != 2 ]; do sleep 0.05; done; }
		begin() { "$0" back --emu "$1" --addr 10.9.0.1/24 & b=$!; "$0" serve --emu "$1" & g=$!; both; }
		end() { kill -$1 $b $g; wait $b; wait $g; }
		begin "$1"; end TERM; left terminated
		begin "$1"; end KILL; left killed
		"$0" stat --prune; left pruned
		begin "$1"; kill -KILL $g; wait $g; "$0" stat --prune; left beside
		"$0" serve --emu "$1" >"$2" & g=$!; until grep -q serving "$2"; do sleep 0.05; done; both; echo again; wait $b; wait $g; left "without a host"`, missing, dir)
	p := start(t, &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET}, "/bin/sh", "-c", script, s.bin, s.socket, filepath.Join(emutest.SocketDir(t), "serve"))
	select {
	case <-p.done:
		if p.cmd.ProcessState.ExitCode() == missing {
			t.Skip("this root mounts no BPF file system: ", p.text())
		}
	case <-time.After(2 * limit):
		t.Fatal("the script does not come to its end")
	case <-said(p, "again\n"):
	}
	s.host.signal(syscall.SIGKILL)
	<-s.host.done
	out := p.exit(0)
	wants(t, out, "terminated: left\n", "killed: back-2-1-0 front-1-2-0 left\n", "pruned: left\n",
		"removed "+dir+"/back-2-1-0\n", "removed "+dir+"/front-1-2-0\n", "beside: back-2-1-0 left\n", "without a host: left\n")
}

// said returns a channel that is closed once the process has printed s.
func said(p *process, s string) <-chan struct{} {
	c := make(chan struct{})
	go func() {
		defer close(c)
		p.mu.Lock()
		defer p.mu.Unlock()
		for !p.over && !strings.Contains(p.out.String(), s) {
			p.cond.Wait()
		}
	}()
	return c
}

func TestSeveralVifsWithQueuesAndIPv6(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1,mtu=9000", "--vif", "front=3,type=own,back=4,mac=00:16:3e:11:22:33", "--vif", "front=1,id=1")
	b := s.back("--queues", "4", "--addr", "1.0=10.9.0.1/24", "--addr", "1.1=10.9.1.1/24", "--tap", "t%dx%i")
	s.back("--dom", "4", "--type", "own", "--addr", "fd00:9::1/64").await("joined to vif3.0", 1)
	b.await("joined to t1x0, MTU 9000", 1)
	b.await("joined to t1x1, MTU 1500", 1)

	g := s.serve("--queues", "2")
	check(t, "10.9.0.2")
	wants(t, g.text(), "MTU 9000", "pages shared")
	g.signal(syscall.SIGTERM)
	g.exit(0)
	s.serve("--vif", "1", "--addr", "10.9.1.2/24", "--port", "8080")
	check(t, "10.9.1.2:8080")
	s.serve("--dom", "3", "--addr", "fd00:9::2/64")
	check(t, "[fd00:9::2]")
	wants(t, b.text(), "vif 1.0: down", "vif 1.1: connected")
}

func TestGuestOnAnInterface(t *testing.T) {
	if !namespace(t) {
		return
	}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "here", TxQLen: -1}, PeerName: "there"}); err != nil {
		t.Skip("this machine gives no veth pair: ", err)
	}
	for _, name := range []string{"here", "there"} {
		l, err := netlink.LinkByName(name)
		if err == nil && name == "here" {
			var a *netlink.Addr
			if a, err = netlink.ParseAddr("10.9.0.1/24"); err == nil {
				err = netlink.AddrAdd(l, a)
			}
		}
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s := newSite(t)
	b := s.back("--packet", "there")
	s.serve().await("serving http://10.9.0.2/", 1)
	b.await("connected to domain 1", 1)
	ping(t, "10.9.0.2")
	check(t, "10.9.0.2")
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

// The program in README.md works as the guest.
func TestReadmeProgramServes(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t)
	b := s.back("--addr", "10.9.0.1/24")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "hello.txt"), []byte("from a directory"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := startIn(t, dir, nil, filepath.Join(programs, "readme"), s.socket)
	p.await("http://10.9.0.2/\n", 1)
	if body := fetch(t, "http://10.9.0.2/hello.txt"); string(body) != "from a directory" {
		t.Errorf("%q", body)
	}
	p.signal(syscall.SIGINT)
	p.exit(0)
	b.await("vif 1.0: down: the other end is Clos", 1)
}

func TestReadmeProgramSaysHowItIsUsed(t *testing.T) {
	readmeProgram(t)
	out := start(t, nil, filepath.Join(programs, "readme")).exit(1)
	wants(t, out, "usage: hello SOCKET\n")
	if strings.Contains(out, "panic") {
		t.Error("it panicked")
	}
}

// Debian's xenstore tools can read the host's xenstore.
func TestXenstoreToolsSeeTheHost(t *testing.T) {
	s := newSite(t, "--vif", "front=7,back=9,id=4,mac=00:16:3e:aa:bb:cc,mtu=9000")
	socket := filepath.Join(filepath.Dir(s.socket), "xenstored.sock")
	out, err := xenstored.Tool(t, socket, "xenstore-ls", "-f").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	wants(t, string(out),
		`/local/domain/7/device/vif/4/state = "1"`, `/local/domain/7/device/vif/4/mac = "00:16:3e:aa:bb:cc"`,
		`/local/domain/9/backend/vif/7/4/frontend = "/local/domain/7/device/vif/4"`, `mtu = "9000"`)
	if out, err := xenstored.Tool(t, socket, "xenstore-write", "/tool/test", "yes").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := xenstored.Tool(t, socket, "xenstore-read", "/tool/test").CombinedOutput(); err != nil || string(out) != "yes\n" {
		t.Errorf("%v: %q", err, out)
	}
}
