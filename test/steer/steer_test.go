//go:build linux

// Package steer tries the program of pvnet/steer in the kernel: on a TAP that is joined to a vif
// of the emulator. It needs CAP_BPF outside of a user namespace, so that it runs as root only.
package steer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/pvnet/netif"
	"barevif/pvnet/pvnettest"
	"barevif/pvnet/toeplitz"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const inside = "BAREVIF_STEER_TEST_INSIDE"

// limit bounds every wait. No test comes near it.
const limit = time.Minute

// TestMain runs the tests in a network namespace of their own, whose kernel sends nothing by
// itself.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		for _, which := range []string{"all", "default"} {
			_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
		}
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig fires when this thread ends
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "no network namespace, which root can make:", err)
		os.Exit(m.Run())
	}
}

// A rig is a vif whose backend is joined to a TAP with several queues.
type rig struct {
	t     *testing.T
	wire  *pvnettest.Wire
	front *pvnet.Device
	taps  []*link.TAP
	in    *link.Packet // what is written here comes out of the TAP
	came  chan arrival // at the frontend
	said  *logtest.Log // by the backend
}

type arrival struct {
	queue int
	frame string
}

const mostQueues = 4

func openTAPs(t *testing.T) []*link.TAP {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("needs a network namespace of its own: run as root")
	}
	taps, err := link.OpenTAPQueues(link.TAPConfig{}, mostQueues)
	if err != nil {
		t.Skip("this machine gives no TAP: ", err)
	}
	for _, tap := range taps {
		t.Cleanup(func() { tap.Close() })
	}
	return taps
}

func newRig(t *testing.T, queues int, hash *pvnet.HashConfig) *rig {
	t.Helper()
	r := &rig{t: t, said: new(logtest.Log), came: make(chan arrival, 1<<14)}
	r.taps = openTAPs(t)
	log := r.said.Logger()
	r.wire = pvnettest.New(t, toolstack.Vif{}, pvnet.Config{Queues: queues, Hash: hash}, pvnet.Config{Queues: mostQueues, Logger: log})
	r.front = r.wire.Front
	var err error
	if r.in, err = link.OpenPacket(r.taps[0].Name()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.in.Close() })
	r.receive()
	return r
}

// connect replaces the frontend by one with other queues or another hash.
func (r *rig) connect(queues int, hash *pvnet.HashConfig) {
	r.t.Helper()
	r.front.Disconnect()
	c, cancel := context.WithTimeout(r.t.Context(), limit)
	defer cancel()
	var err error
	if r.front, err = pvnet.Connect(c, r.wire.Guest, "0", pvnet.Config{Queues: queues, Hash: hash}); err != nil {
		r.t.Fatal(err)
	}
	r.receive()
}

// receive passes on what arrives at the frontend, until it is disconnected.
func (r *rig) receive() {
	var receiving sync.WaitGroup
	front := r.front
	for i := range front.Queues() {
		rx, err := front.OwnRX(i)
		if err != nil {
			r.t.Fatal(err)
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
					select {
					case r.came <- arrival{i, string(b)}:
					default: // a test that floods looks at some only
					}
				}
				rx.Release(frames[:n])
			}
		})
	}
	r.t.Cleanup(func() { front.Disconnect(); receiving.Wait() })
}

// join joins the backend to the TAP, until the end of the test or until end is called.
func (r *rig) join(taps []*link.TAP) (j *link.Joint, end func()) {
	r.t.Helper()
	c, cancel := context.WithCancel(r.t.Context())
	j = new(link.Joint)
	done := make(chan struct{})
	var links []link.Link
	for _, tap := range taps {
		links = append(links, tap)
	}
	go func() {
		defer close(done)
		if err := j.Run(c, r.wire.Back, links...); err != nil && c.Err() == nil {
			r.t.Errorf("Run: %v", err)
		}
	}()
	end = func() { cancel(); <-done }
	r.t.Cleanup(end)
	return j, end
}

// frame is a frame of a flow: IPv4 or IPv6, TCP or UDP, or none of these.
func frame(flow int) []byte {
	f := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	proto := []byte{6, 17}[flow/5%2]
	switch flow % 5 {
	case 4:
		return append(append(f, 0x88, 0xb5, byte(flow), byte(flow>>8)), make([]byte, 50)...)
	case 2, 3:
		f = append(f, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, proto, 64)
		f = append(f, 0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, byte(flow>>8), byte(flow))
		f = append(f, 0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
	default:
		f = append(f, 8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, proto, 0, 0, 10, 9, byte(flow>>8), byte(flow), 10, 8, 0, 1)
	}
	f = append(f, byte(flow>>8), byte(flow), 1, 187)
	return append(f, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0)
}

func (r *rig) send(f []byte) {
	r.t.Helper()
	if _, err := r.in.WriteFrame(link.Offload{}, [][]byte{f}); err != nil {
		r.t.Fatal(err)
	}
}

// next returns the queue on which the frame comes.
func (r *rig) next(f []byte) int {
	r.t.Helper()
	q := r.arrives(f, limit)
	if q < 0 {
		r.t.Fatalf("no frame came; the log says\n%s", r.said)
	}
	return q
}

// arrives is next for a frame that may be lost, as those in a queue that the Joint detaches
// are: then it returns -1.
func (r *rig) arrives(f []byte, patience time.Duration) int {
	for end := time.After(patience); ; {
		select {
		case a := <-r.came:
			if a.frame == string(f) {
				return a.queue
			}
		case <-end:
			return -1
		}
	}
}

// queueOf returns the queue of a frame by the frontend's hash, whose number of queues is n.
func queueOf(c *pvnet.HashConfig, f []byte, n int) int {
	types := uint32(netif.HashFlagsAll)
	if c.Types != nil {
		types = 0
		for _, typ := range c.Types {
			types |= typ.Flag()
		}
	}
	h, _, _ := toeplitz.NewTable(c.Key).Frame(f, len(f), types)
	if c.Table == nil {
		return int(h % uint32(n))
	}
	return c.Table[h%uint32(len(c.Table))] % n
}

// await sends frames until all of a burst come on the queue that want returns: the kernel is
// told of a change some time after the frontend asked for it.
func (r *rig) await(what string, want func(f []byte) int) {
	r.t.Helper()
	const burst = 60
	var wrong string
	for end := time.Now().Add(limit); time.Now().Before(end); {
		right := 0
		for flow := range burst {
			f := frame(flow)
			r.send(f)
			if got := r.arrives(f, 300*time.Millisecond); got == want(f) {
				right++
			} else {
				wrong = fmt.Sprintf("queue %d, not %d, for %x", got, want(f), f)
			}
		}
		if right == burst {
			return
		}
	}
	r.t.Fatalf("%s: %s; the log says\n%s", what, wrong, r.said)
}

var spread = &pvnet.HashConfig{Key: []byte("a key of which we know every bit"), Table: []int{3, 1, 2, 0, 3, 3, 1}}

// The kernel sends each frame on the queue of the frontend's table, and follows what the
// frontend changes. Without a hash it chooses as it likes again.
func TestTheKernelSteersAsTheFrontendAsks(t *testing.T) {
	r := newRig(t, mostQueues, spread)
	_, end := r.join(r.taps)
	by := func(c *pvnet.HashConfig) func([]byte) int {
		return func(f []byte) int { return queueOf(c, f, mostQueues) }
	}
	r.await("the hash of the connection", by(spread))
	for i, c := range []*pvnet.HashConfig{
		{Key: []byte("another"), Table: []int{2}},
		{Key: []byte("another"), Types: []pvnet.HashType{pvnet.HashIPv4}, Table: []int{0, 1, 2, 3, 3, 2, 1, 0, 1}},
		{Key: []byte("another"), Types: []pvnet.HashType{pvnet.HashIPv6TCP, pvnet.HashIPv6}, Table: []int{1, 2}},
		{Key: []byte("no table")},
		spread,
	} {
		if err := r.front.SetHash(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		r.await(fmt.Sprintf("change %d", i), by(c))
	}
	all3 := &pvnet.HashConfig{Table: []int{3}}
	if err := r.front.SetHash(t.Context(), all3); err != nil {
		t.Fatal(err)
	}
	r.await("all on queue 3", func([]byte) int { return 3 })
	if err := r.front.SetHash(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	r.chooses("after the hash")
	if err := r.front.SetHash(t.Context(), all3); err != nil {
		t.Fatal(err)
	}
	r.await("all on queue 3 again", func([]byte) int { return 3 })
	end()
	r.leftTo(r.taps, "after Run")
	if s := r.said.String(); strings.Contains(s, "by hash") {
		t.Errorf("it complains: %s", s)
	}
}

// chooses waits until the kernel spreads frames by itself: over several queues.
func (r *rig) chooses(when string) {
	r.t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); {
		seen := make(map[int]bool)
		for flow := range 40 {
			f := frame(5 * flow)
			r.send(f)
			seen[r.next(f)] = true
		}
		if len(seen) > 1 {
			return
		}
	}
	r.t.Fatalf("%s: all frames come on one queue", when)
}

// leftTo checks that no program is left on the TAP: frames come out of several of its queues.
func (r *rig) leftTo(taps []*link.TAP, when string) {
	r.t.Helper()
	if seen := r.drain(taps, 60); len(seen) < 2 {
		r.t.Errorf("%s: frames come on the queues %v", when, seen)
	}
}

// drain sends frames of n flows and returns how many come out of which queue of the TAP, which
// nobody else reads.
func (r *rig) drain(taps []*link.TAP, n int) map[int]int {
	r.t.Helper()
	for flow := range n {
		r.send(frame(5 * flow))
	}
	seen, came := make(map[int]int), 0
	b := make([]byte, 2000)
	look := func(patience time.Duration) {
		for i, tap := range taps {
			_ = tap.SetReadDeadline(time.Now().Add(patience))
			for {
				if _, _, err := tap.ReadFrame([][]byte{b}); err != nil {
					break
				}
				seen[i]++
				came++
			}
			_ = tap.SetReadDeadline(time.Time{})
		}
	}
	// Once its deadline is over a TAP reads nothing, whatever there is.
	for end := time.Now().Add(limit); came < n && time.Now().Before(end); {
		look(time.Millisecond)
	}
	look(20 * time.Millisecond) // at what should not come
	return seen
}

// A connection may have fewer queues than the TAP, or more again. The kernel numbers those
// that are left as the Joint does.
func TestTheKernelSteersOverTheQueuesThatThereAre(t *testing.T) {
	r := newRig(t, mostQueues, spread)
	r.join(r.taps)
	for i, queues := range []int{4, 2, 3, 1, 4, 3, 2, 4} {
		if i > 0 {
			r.connect(queues, spread)
		}
		r.await(fmt.Sprintf("%d queues", queues), func(f []byte) int { return queueOf(spread, f, queues) })
	}
	for range 5 { // each queue on its own, so that no two numbers can have changed places
		for q := range mostQueues {
			if err := r.front.SetHash(t.Context(), &pvnet.HashConfig{Table: []int{q}}); err != nil {
				t.Fatal(err)
			}
			r.await(fmt.Sprintf("queue %d", q), func([]byte) int { return q })
		}
	}
}

// A vif with more queues than links: a queue without a link is fed by another, the same each
// time.
func TestFewerLinksThanQueues(t *testing.T) {
	r := newRig(t, mostQueues, spread)
	for _, tap := range r.taps[2:] {
		tap.Close()
	}
	r.join(r.taps[:2])
	r.await("two links", func(f []byte) int { return queueOf(spread, f, mostQueues) % 2 })
}

// The settings change while the kernel sends: no frame is lost or comes on a queue that the
// vif does not have, and the last table is the one that stays.
func TestTheTableChangesUnderTraffic(t *testing.T) {
	r := newRig(t, mostQueues, spread)
	r.join(r.taps)
	r.await("the hash of the connection", func(f []byte) int { return queueOf(spread, f, mostQueues) })
	done := make(chan struct{})
	var changing sync.WaitGroup
	changing.Go(func() {
		defer close(done)
		for i := range 60 {
			c := &pvnet.HashConfig{Key: []byte{byte(i)}, Table: make([]int, 1+i%128)}
			for k := range c.Table {
				c.Table[k] = (i + k) % mostQueues
			}
			if i%7 == 6 {
				c = nil
			}
			if err := r.front.SetHash(t.Context(), c); err != nil {
				t.Errorf("SetHash: %v", err)
			}
		}
	})
	sent := 0
	for changed := false; !changed; sent++ {
		select {
		case <-done:
			changed = true
		default:
		}
		f := frame(sent % 4000)
		r.send(f)
		if q := r.next(f); q < 0 || q >= mostQueues {
			t.Fatalf("queue %d", q)
		}
	}
	changing.Wait()
	last := &pvnet.HashConfig{Key: []byte("last"), Table: []int{1, 3, 2}}
	if err := r.front.SetHash(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	r.await("the last table", func(f []byte) int { return queueOf(last, f, mostQueues) })
	t.Logf("%d frames under 60 changes", sent)
}

// A tag that the kernel keeps beside the frame counts as one in the frame: no hash.
func TestAFrameWithATagHasNoHash(t *testing.T) {
	c := &pvnet.HashConfig{Key: []byte("a key"), Table: []int{3, 0, 1, 2, 0, 1, 2}} // hash 0 is entry 0
	r := newRig(t, mostQueues, c)
	r.join(r.taps)
	r.await("the hash of the connection", func(f []byte) int { return queueOf(c, f, mostQueues) })
	parent, err := netlink.LinkByName(r.taps[0].Name())
	if err != nil {
		t.Fatal(err)
	}
	vlan := &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: "tagged", ParentIndex: parent.Attrs().Index}, VlanId: 7}
	if err := netlink.LinkAdd(vlan); err != nil {
		t.Skip("this kernel makes no VLANs: ", err)
	}
	if err := netlink.LinkSetUp(vlan); err != nil {
		t.Fatal(err)
	}
	tagged, err := link.OpenPacket("tagged")
	if err != nil {
		t.Fatal(err)
	}
	defer tagged.Close()
	for flow := range 20 {
		f := frame(5 * flow)
		want := append(append(append([]byte(nil), f[:12]...), 0x81, 0, 0, 7), f[12:]...)
		if _, err := tagged.WriteFrame(link.Offload{}, [][]byte{f}); err != nil {
			t.Fatal(err)
		}
		if q := r.next(want); q != 3 {
			t.Errorf("a frame with a tag beside it came on queue %d", q)
		}
		r.send(want)
		if q := r.next(want); q != 3 {
			t.Errorf("a frame with a tag in it came on queue %d", q)
		}
	}
}

// Frames of a backend's TAP that are cut short, and all the same the kernel and the table
// agree.
func TestShortFramesOfTheKernel(t *testing.T) {
	r := newRig(t, mostQueues, spread)
	r.join(r.taps)
	r.await("the hash of the connection", func(f []byte) int { return queueOf(spread, f, mostQueues) })
	for flow := range 10 {
		whole := frame(flow)
		for size := 14; size <= len(whole); size++ {
			f := whole[:size]
			want := queueOf(spread, f, mostQueues)
			r.send(f)
			if q := r.next(f); q != want {
				t.Errorf("%d bytes came on queue %d, want %d: %x", size, q, want, f)
			}
		}
	}
}

// A Joint that is held leaves the program to the next process, which takes the descriptors of
// the queues in use. Its program follows the frontend then.
func TestQueuesThatWereHandedOverAreSteered(t *testing.T) {
	first := newRig(t, 2, spread)
	j, end := first.join(first.taps)
	by2 := func(f []byte) int { return queueOf(spread, f, 2) }
	first.await("the hash of the connection", by2)
	if err := j.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	adopted := first.adopt(2)
	end()
	seen := first.drain(adopted, 60)
	for i := range adopted {
		if seen[i] == 0 {
			t.Errorf("queue %d gets no frame", i)
		}
	}
	for flow := range 40 { // the program is still there
		f := frame(5 * flow)
		first.send(f)
		if got := first.drainOne(adopted, f); got != by2(f) {
			t.Fatalf("queue %d, want %d", got, by2(f))
		}
	}
	// Another vif stands for the vif in the next process; its frontend asks for another hash.
	other := &pvnet.HashConfig{Key: []byte("other"), Table: []int{1, 0, 0}}
	second := &rig{t: t, said: first.said, came: make(chan arrival, 1<<14), taps: adopted, in: first.in}
	second.wire = pvnettest.New(t, toolstack.Vif{}, pvnet.Config{Queues: 2, Hash: other}, pvnet.Config{Queues: 2})
	second.front = second.wire.Front
	second.receive()
	_, end = second.join(adopted)
	second.await("the adopted queues", func(f []byte) int { return queueOf(other, f, 2) })
	end()
	second.leftTo(adopted, "after the second Run")
}

// adopt makes TAPs of the first n queues, as a process does that takes a vif over, and closes
// the others.
func (r *rig) adopt(n int) (adopted []*link.TAP) {
	r.t.Helper()
	for i, tap := range r.taps {
		if i < n {
			f, err := tap.File()
			if err != nil {
				r.t.Fatal(err)
			}
			next, err := link.AdoptTAP(f)
			if err != nil {
				r.t.Fatal(err)
			}
			r.t.Cleanup(func() { next.Close() })
			adopted = append(adopted, next)
		}
		tap.Close()
	}
	return adopted
}

// drainOne returns the queue of the TAP that the frame comes out of; -1: none.
func (r *rig) drainOne(taps []*link.TAP, f []byte) int {
	b := make([]byte, 2000)
	for end := time.Now().Add(limit); time.Now().Before(end); {
		for i, tap := range taps {
			_ = tap.SetReadDeadline(time.Now().Add(time.Millisecond))
			n, _, err := tap.ReadFrame([][]byte{b})
			_ = tap.SetReadDeadline(time.Time{})
			if err == nil && string(b[:n]) == string(f) {
				return i
			}
		}
	}
	return -1
}

// A TAP with a program that a process left there, which was killed, is the kernel's again as
// long as the frontend asks for no hash.
func TestAProgramThatWasLeftIsTakenOff(t *testing.T) {
	first := newRig(t, mostQueues, &pvnet.HashConfig{Table: []int{3}})
	j, end := first.join(first.taps)
	first.await("the hash of the connection", func([]byte) int { return 3 })
	if err := j.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	adopted := first.adopt(mostQueues)
	end()
	if seen := first.drain(adopted, 40); len(seen) != 1 || seen[3] != 40 {
		t.Fatalf("the program is not there: frames come on the queues %v", seen)
	}
	second := &rig{t: t, said: first.said, came: make(chan arrival, 1<<14), taps: adopted, in: first.in}
	second.wire = pvnettest.New(t, toolstack.Vif{}, pvnet.Config{Queues: mostQueues}, pvnet.Config{Queues: mostQueues})
	second.front = second.wire.Front
	second.receive()
	second.join(adopted)
	second.chooses("after a program that was left")
}

// A Hold that is taken back misses no change of the frontend's.
func TestAChangeDuringAHoldIsFollowed(t *testing.T) {
	r := newRig(t, mostQueues, &pvnet.HashConfig{Table: []int{3}})
	j, _ := r.join(r.taps)
	r.await("the hash of the connection", func([]byte) int { return 3 })
	if err := j.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.front.SetHash(t.Context(), &pvnet.HashConfig{Table: []int{1}}); err != nil {
		t.Fatal(err)
	}
	for s := range r.wire.Back.Steerings(t.Context()) {
		if s != nil && s.Queues[0] == 1 {
			break
		}
	}
	if seen := r.drain(r.taps, 20); len(seen) != 1 || seen[3] != 20 {
		t.Errorf("while held frames come on the queues %v", seen)
	}
	j.Resume()
	r.await("after Resume", func([]byte) int { return 1 })
}
