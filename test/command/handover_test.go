//go:build linux

package command_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A pinger sends ICMP echo requests without waiting for the answers, and counts what comes
// back. Its socket has room for some 250 answers, so that the interval has to be some
// milliseconds on a busy machine.
type pinger struct {
	t    *testing.T
	conn net.Conn
	stop chan struct{}
	wg   sync.WaitGroup
	id   uint16

	mu      sync.Mutex
	sent    []time.Time   // guarded by mu; by sequence number
	answers []int         // guarded by mu
	longest time.Duration // guarded by mu; round trip
}

func newPinger(t *testing.T, addr string, interval time.Duration) *pinger {
	t.Helper()
	c, err := net.Dial("ip4:icmp", addr)
	if err != nil {
		t.Fatal(err)
	}
	p := &pinger{t: t, conn: c, stop: make(chan struct{}), id: uint16(os.Getpid())}
	p.wg.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-p.stop:
				return
			case <-tick.C:
				p.send()
			}
		}
	})
	go p.receive()
	return p
}

func (p *pinger) send() {
	b := make([]byte, 64)
	b[0] = 8
	p.mu.Lock()
	binary.BigEndian.PutUint16(b[4:], p.id)
	binary.BigEndian.PutUint16(b[6:], uint16(len(p.sent)))
	p.sent, p.answers = append(p.sent, time.Now()), append(p.answers, 0)
	p.mu.Unlock()
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(b[2:], ^uint16(sum+sum>>16))
	if _, err := p.conn.Write(b); err != nil {
		p.t.Errorf("ping: %v", err)
	}
}

func (p *pinger) receive() {
	b := make([]byte, 1500)
	for {
		n, err := p.conn.Read(b)
		if err != nil {
			return
		}
		if n < 28 || b[20] != 0 || binary.BigEndian.Uint16(b[24:]) != p.id { // behind the IP header
			continue
		}
		p.mu.Lock()
		if seq := int(binary.BigEndian.Uint16(b[26:])); seq < len(p.sent) {
			p.answers[seq]++
			p.longest = max(p.longest, time.Since(p.sent[seq]))
		}
		p.mu.Unlock()
	}
}

func (p *pinger) answered() (n, doubled int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.answers {
		if k > 0 {
			n++
		}
		if k > 1 {
			doubled++
		}
	}
	return n, doubled
}

// await waits until n more requests have been sent.
func (p *pinger) await(n int) {
	p.t.Helper()
	p.mu.Lock()
	goal := len(p.sent) + n
	p.mu.Unlock()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		now := len(p.sent)
		p.mu.Unlock()
		if now >= goal {
			return
		}
		if time.Now().After(end) {
			p.t.Fatal("no pings")
		}
	}
}

// end stops sending, waits for late answers, and returns the numbers.
func (p *pinger) end() (sent, lost, doubled int, longest time.Duration) {
	close(p.stop)
	p.wg.Wait()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if n, _ := p.answered(); n == len(p.sent) {
			break
		}
	}
	p.conn.Close()
	n, doubled := p.answered()
	return len(p.sent), len(p.sent) - n, doubled, p.longest
}

// A back that takes over does so without a lost or doubled ping, and keeps the TAP; a
// transfer goes on.
func TestABackTakesOverWithoutLoss(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t)
	b := s.back("--addr", "10.9.0.1/24")
	g := s.serve("--check", "7007")
	g.await("serving http://10.9.0.2/", 1)
	b.await("connected to domain 1", 1)
	ping(t, "10.9.0.2")
	before, err := net.InterfaceByName("vif1.0")
	if err != nil {
		t.Fatal(err)
	}
	transfer := make(chan error, 1)
	go func() {
		body, err := tryFetch("http://10.9.0.2/bytes/200000000")
		if err == nil && len(body) != 200000000 {
			err = fmt.Errorf("%d bytes", len(body))
		}
		transfer <- err
	}()
	p := newPinger(t, "10.9.0.2", 5*time.Millisecond)
	p.await(40)
	for i := range 5 {
		if i == 3 { // it starts the next one itself, which says what it has to say in its place
			b.signal(syscall.SIGUSR2)
			b.await("1 vif taken over from", 2)
			p.await(40)
		}
		next := s.back("--addr", "10.9.0.1/24", "--take-over")
		next.await("connected to domain 1", 1)
		next.await("1 vif taken over from", 1)
		wants(t, b.exit(0), "vif 1.0: handed over; ")
		b = next
		p.await(40)
	}
	p.endWithoutLoss(t)
	if err := <-transfer; err != nil {
		t.Error(err)
	}
	after, err := net.InterfaceByName("vif1.0")
	if err != nil || after.Index != before.Index {
		t.Errorf("the TAP is another one: %v, %v", after, err)
	}
	g.signal(syscall.SIGTERM)
	if out := g.exit(0); strings.Contains(out, "vif 0: down") {
		t.Errorf("the frontend has noticed it: %s", out)
	}
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

// A serve that takes over does so without a lost or doubled ping; the backend notices nothing,
// and later connections are served.
func TestAServeTakesOverWithoutLoss(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t)
	b := s.back("--addr", "10.9.0.1/24")
	g := s.serve("--check", "7007")
	g.await("serving http://10.9.0.2/", 1)
	b.await("connected to domain 1", 1)
	ping(t, "10.9.0.2")
	p := newPinger(t, "10.9.0.2", 5*time.Millisecond)
	p.await(40)
	for i := range 5 {
		if i == 3 { // it starts the next one itself, which says what it has to say in its place
			g.signal(syscall.SIGUSR2)
			g.await("1 vif taken over from", 2)
			p.await(40)
		}
		next := s.serve("--check", "7007", "--take-over")
		next.await("serving http://10.9.0.2/", 1)
		next.await("1 vif taken over from", 1)
		if strings.Contains(next.text(), "counters: ") {
			t.Error("it says where its counters are while they are still the other's")
		}
		g.exit(0)
		g = next
		p.await(40)
		if body, err := tryFetch("http://10.9.0.2/bytes/200000"); err != nil || len(body) != 200000 {
			t.Errorf("%d bytes, %v", len(body), err)
		}
	}
	p.endWithoutLoss(t)
	g.signal(syscall.SIGTERM)
	g.exit(0)
	b.signal(syscall.SIGTERM)
	if out := b.exit(0); strings.Count(out, "connected to domain 1") != 1 {
		t.Errorf("the backend has noticed it: %s", out)
	}
}

// An attach that takes over keeps the TAP and the kernel's connections: no ping is lost or
// doubled, and a transfer goes on.
func TestAnAttachTakesOverWithoutLoss(t *testing.T) {
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
	args := []string{"attach", "-v", "--emu", s.socket, "--tap", "card%i", "--addr", "10.9.0.2/24"}
	g := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, s.bin, args...)
	g.await("the kernel has it as card0", 1)
	b.await("connected to domain 1", 1)
	ping(t, "10.9.0.2")
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", g.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	const size = 300 << 20
	received := startTransfer(t, ns, "10.9.0.2:7", size)
	p := newPinger(t, "10.9.0.2", 5*time.Millisecond)
	p.await(40)
	for range 5 {
		inside := append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", g.cmd.Process.Pid), s.bin}, args...)
		next := start(t, nil, nsenter, append(inside, "--take-over")...)
		next.await("the kernel has it as card0", 1)
		next.await("1 vif taken over from", 1)
		wants(t, g.exit(0), "vif 0: handed over; ")
		g = next
		p.await(40)
	}
	p.endWithoutLoss(t)
	if n := <-received; n != size {
		t.Errorf("%d of %d bytes were received", n, size)
	}
	g.signal(syscall.SIGTERM)
	wants(t, g.exit(0), "vif 0: gone; ")
	b.signal(syscall.SIGTERM)
	if out := b.exit(0); strings.Count(out, "connected to domain 1") != 1 {
		t.Errorf("the backend has noticed it: %s", out)
	}
}

// startTransfer sends so many bytes over TCP from address in the network namespace ns, to this
// process, which checks and counts them.
func startTransfer(t *testing.T, ns *os.File, address string, size int) (received <-chan int) {
	t.Helper()
	listening, counted := make(chan net.Listener, 1), make(chan int, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			close(listening)
			return
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			close(listening)
			return
		}
		listening <- l
	}()
	l, ok := <-listening
	if !ok {
		t.FailNow()
	}
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i * 7 >> 3)
	}
	go func() {
		defer l.Close()
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		for range size / len(block) {
			if _, err := c.Write(block); err != nil {
				t.Error("the transfer:", err)
				return
			}
		}
	}()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer c.Close()
		n, b := 0, make([]byte, len(block))
		for {
			k, err := io.ReadFull(c, b)
			if n += k; !bytes.Equal(b[:k], block[:k]) {
				t.Errorf("other bytes than were sent, around %d", n)
			}
			if err != nil {
				counted <- n
				return
			}
		}
	}()
	return counted
}

// endWithoutLoss ends the pings, each of which has to be answered once.
func (p *pinger) endWithoutLoss(t *testing.T) {
	t.Helper()
	sent, lost, doubled, longest := p.end()
	t.Logf("%d of %d pings lost, %d doubled, longest round trip %v", lost, sent, doubled, longest)
	if lost != 0 || doubled != 0 {
		t.Error("not every ping was answered once")
	}
}
