//go:build linux

package command_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"

	"golang.org/x/sys/unix"
)

// rootNamespace is namespace without a user namespace, in which no program of eBPF is loaded.
func rootNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inside) != "" {
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs CAP_BPF outside of a user namespace: run as root")
	}
	barevif(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), inside+"="+programs)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil && strings.Contains(string(out), "--- SKIP: "+t.Name()):
		t.Skipf("inside the namespace:\n%s", out)
	case err == nil && strings.Contains(string(out), "--- PASS: "+t.Name()):
		t.Logf("%s", out)
	case err != nil && !isExit(err):
		t.Skip("this machine refuses a network namespace: ", err)
	default:
		t.Fatalf("inside the namespace: %v\n%s", err, out)
	}
	return false
}

func isExit(err error) bool {
	_, ok := errors.AsType[*exec.ExitError](err)
	return ok
}

// A steered is a guest of a "barevif host" that has its frames sent to the queues of a table.
type steered struct {
	t     *testing.T
	front *pvnet.Device
	key   []byte
	mu    sync.Mutex
	on    map[string]int // guarded by mu; by frame: the queue that it came on last
}

func newSteered(t *testing.T, s *site, queues int) *steered {
	t.Helper()
	c, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	dom, err := emu.Join(c, s.socket, 1)
	if err != nil {
		t.Fatal(err)
	}
	g := &steered{t: t, key: []byte("a key"), on: make(map[string]int)}
	if g.front, err = pvnet.Connect(c, dom, "0", pvnet.Config{Queues: queues, Hash: &pvnet.HashConfig{Key: g.key, Table: []int{0}}}); err != nil {
		t.Fatal(err)
	}
	var receiving sync.WaitGroup
	for i := range queues {
		rx, err := g.front.OwnRX(i)
		if err != nil {
			t.Fatal(err)
		}
		receiving.Go(func() {
			var frames [32]pvnet.Frame
			for {
				n, err := rx.Receive(frames[:])
				if err != nil {
					return
				}
				for k := range frames[:n] {
					b := make([]byte, frames[k].Len())
					frames[k].CopyTo(b)
					g.mu.Lock()
					g.on[string(b)] = i
					g.mu.Unlock()
				}
				rx.Release(frames[:n])
			}
		})
	}
	t.Cleanup(func() {
		g.front.Disconnect()
		receiving.Wait()
		dom.Destroy()
	})
	return g
}

// follows sets a table and sends frames of many flows into the backend's TAP until all come on
// the queue of the table.
func (g *steered) follows(tap, what string, table []int) {
	g.t.Helper()
	c, cancel := context.WithTimeout(g.t.Context(), limit)
	defer cancel()
	if err := g.front.SetHash(c, &pvnet.HashConfig{Key: g.key, Table: table}); err != nil {
		g.t.Fatal(err)
	}
	g.sees(tap, what, table)
}

// sees is follows for a table that was set before.
func (g *steered) sees(tap, what string, table []int) {
	g.t.Helper()
	in, err := link.OpenPacket(tap)
	if err != nil {
		g.t.Fatal(err)
	}
	defer in.Close()
	keyed := toeplitz.NewTable(g.key)
	wrong := 0
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		wrong = 0
		for flow := range 50 {
			f := append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 9, 1, byte(flow), 10, 8, 0, 1,
				byte(flow), 3, 1, 187}, make([]byte, 30)...)
			h, _, _ := keyed.Frame(f, len(f), netif.HashFlagsAll)
			g.mu.Lock()
			delete(g.on, string(f))
			g.mu.Unlock()
			if _, err := in.WriteFrame(link.Offload{}, [][]byte{f}); err != nil {
				g.t.Fatal(err)
			}
			queue, came := 0, false
			for late := time.Now().Add(time.Second); !came && time.Now().Before(late); time.Sleep(100 * time.Microsecond) {
				g.mu.Lock()
				queue, came = g.on[string(f)]
				g.mu.Unlock()
			}
			if !came || queue != table[h%uint32(len(table))] {
				wrong++
			}
		}
		if wrong == 0 {
			return
		}
	}
	g.t.Fatalf("%s: %d of 50 frames do not come on the queue of the table", what, wrong)
}

// A frontend's table decides on which queue "back" sends what the kernel behind its TAP sends,
// while back runs, after another has taken over, and with the next connection.
func TestABackSendsOnTheQueueOfTheTable(t *testing.T) {
	if !rootNamespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t)
	b := s.back("--queues", "3")
	g := newSteered(t, s, 3)
	b.await("connected to domain 1", 1)
	g.follows("vif1.0", "at first", []int{2, 0, 1, 1})
	g.follows("vif1.0", "another table", []int{1, 2})
	for range 2 {
		next := s.back("--queues", "3", "--take-over")
		next.await("1 vif taken over from", 1)
		wants(t, b.exit(0), "vif 1.0: handed over; ")
		b = next
		g.sees("vif1.0", "taken over", []int{1, 2})
	}
	g.follows("vif1.0", "after that", []int{0, 2, 2, 1, 0})
	b.signal(syscall.SIGTERM)
	if out := b.exit(0); strings.Contains(out, "by hash") {
		t.Errorf("back says that the kernel does not steer:\n%s", out)
	}
	b = s.back("--queues", "2")
	b.await("connected to domain 1", 1)
	g.sees("vif1.0", "fewer queues", []int{0, 0, 0, 1, 0})
	b.signal(syscall.SIGTERM)
	b.exit(0)
}
