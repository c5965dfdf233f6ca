package processes

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/bridge"
	"barevif/pvnet/forward"
	"barevif/xenbus/toolstack"
)

// The guests of BenchmarkFlooder: those that do not flood, one to which all send, and the flooder.
const (
	paced    = 14
	receiver = paced
	flooder  = paced + 1
	guests   = paced + 2
)

func guestDomain(i int) hypercall.DomID { return hypercall.DomID(10 + i) }

func guestMAC(i int) pvnet.MAC { return pvnet.MAC{2, 0, 0, 0, 0, byte(i)} }

// BenchmarkFlooder measures what one guest that floods leaves to others of the same bridge, which send
// frames of 64 bytes to the same guest: 14 of them a batch of 8 every 2 ms, and then as much as they can
// with 32 under way. The bridge has a process and a processor, and so have the guests, all of which one
// goroutine plays that never sleeps. So the guests take nothing from the bridge.
//
//   - delivered: frames of the paced guests that arrive beside the flooder, in those that do without
//   - p99-us: the 99th percentile of their time on the way without the flooder, in microseconds
//   - p99-x: that percentile beside the flooder, in the one without: the mean of the rounds; p99-x-median is
//     their median
//   - share: what the guest that gets least has, in an equal part of all that arrives, when all send what
//     they can
func BenchmarkFlooder(b *testing.B) {
	if runtime.NumCPU() < 2 {
		b.Skip("the bridge and the guests need a processor each")
	}
	for _, pool := range []int{0, 1} {
		b.Run(fmt.Sprintf("pool=%t", pool > 0), func(b *testing.B) { benchFlooder(b, pool) })
	}
}

func benchFlooder(b *testing.B, pool int) {
	m := newMachine(b)
	for i := range guests {
		v := toolstack.Vif{Front: guestDomain(i), Back: 2, MAC: guestMAC(i)}
		m.store.Introduce(v.Front)
		if err := cmp.Or(toolstack.Home(b.Context(), m.tools, v.Front), toolstack.Add(b.Context(), m.tools, v)); err != nil {
			b.Fatal(err)
		}
	}
	lines := func(c *child) (line string) {
		var open bool
		if line, open = <-c.lines; !open {
			b.Fatalf("%s has ended", c.name)
		}
		return line
	}
	switched := m.startChildOn(0, "bridge", "BAREVIF_TEST_POOL="+strconv.Itoa(pool))
	defer switched.stop()
	lines(switched)
	world := m.startChildOn(1, "guests")
	defer world.stop()
	lines(world)
	var sum, one flood
	var slower []float64
	for b.Loop() {
		fmt.Fprintln(world.in, "again")
		if _, err := fmt.Sscan(lines(world), &one.delivered, &one.p99, &one.slower, &one.share); err != nil {
			b.Fatal(err)
		}
		sum.delivered, sum.p99, sum.slower, sum.share = sum.delivered+one.delivered, sum.p99+one.p99, sum.slower+one.slower, sum.share+one.share
		slower = append(slower, one.slower)
	}
	slices.Sort(slower)
	n := len(slower)
	b.ReportMetric(slower[n/2], "p99-x-median")
	for unit, of := range map[string]float64{"delivered": sum.delivered, "p99-us": sum.p99, "p99-x": sum.slower, "share": sum.share, "ns/op": 0} {
		b.ReportMetric(of/float64(n), unit)
	}
}

// A flood is what BenchmarkFlooder reports.
type flood struct{ delivered, p99, slower, share float64 }

// startChildOn is startChild for one that has one processor.
func (m *machine) startChildOn(cpu int, mode string, env ...string) *child {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var was, one unix.CPUSet
	one.Set(cpu)
	if err := cmp.Or(unix.SchedGetaffinity(0, &was), unix.SchedSetaffinity(0, &one)); err != nil {
		m.t.Fatal(err)
	}
	defer unix.SchedSetaffinity(0, &was)
	return m.startChild(mode, env...)
}

// runBridge is a bridge of all vifs of domain 2. It ends when its standard input does.
func runBridge(ctx context.Context) error {
	dom, err := emu.Join(ctx, os.Getenv("BAREVIF_TEST_SOCKET"), 2)
	if err != nil {
		return err
	}
	defer dom.Destroy()
	var cfg bridge.Config
	if goroutines, _ := strconv.Atoi(os.Getenv("BAREVIF_TEST_POOL")); goroutines > 0 {
		if cfg.Pool, err = forward.NewPool(dom, goroutines); err != nil {
			return err
		}
		defer cfg.Pool.Close()
	}
	br, err := bridge.New(cfg)
	if err != nil {
		return err
	}
	defer br.Close()
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		for s := bufio.NewScanner(os.Stdin); s.Scan(); {
		}
		cancel()
	}()
	fmt.Println("ready")
	err = pvnet.Serve(ctx, dom, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) {
		if _, err := br.Add(d, bridge.PortConfig{}); err != nil {
			fmt.Fprintln(os.Stderr, "bridge:", err)
		}
		<-d.Done()
	})
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

// A world is all guests of BenchmarkFlooder, played by one goroutine.
type world struct {
	tx      [guests]*pvnet.TX
	rx      *pvnet.RX // of the receiver
	samples [guests][]byte
	frames  [32]pvnet.Frame
	start   time.Time
}

// runGuests connects the guests, and measures once for each line of its standard input.
func runGuests(ctx context.Context) error {
	w := &world{start: time.Now()}
	for i := range guests {
		dom, err := emu.Join(ctx, os.Getenv("BAREVIF_TEST_SOCKET"), guestDomain(i))
		if err != nil {
			return err
		}
		defer dom.Destroy()
		dev, err := pvnet.Connect(ctx, dom, "0", pvnet.Config{})
		if err != nil {
			return err
		}
		defer dev.Disconnect()
		if w.tx[i], err = dev.OwnTX(0); err != nil {
			return err
		}
		if i == receiver {
			if w.rx, err = dev.OwnRX(0); err != nil {
				return err
			}
		}
		to, from := guestMAC(receiver), guestMAC(i)
		w.samples[i] = append(append(append(make([]byte, 0, 64), to[:]...), from[:]...), make([]byte, 52)...)
		if i == receiver { // to a group that no bridge passes on, so that it learns the receiver
			copy(w.samples[i], []byte{1, 0x80, 0xc2, 0, 0, 0})
		}
	}
	for w.send(receiver, 1) == 0 {
		time.Sleep(time.Millisecond)
	}
	for { // until the bridge has learned the receiver, and all links are up
		var seen [guests]bool
		seen[receiver] = true
		for i := range guests {
			if i != receiver {
				w.send(i, 1)
			}
		}
		time.Sleep(50 * time.Millisecond)
		if err := w.receive(func(from int, _ time.Duration) { seen[from] = true }); err != nil {
			return err
		}
		if !slices.Contains(seen[:], false) {
			break
		}
		if ctx.Err() != nil {
			return fmt.Errorf("not all guests are heard: %v", seen)
		}
	}
	fmt.Println("ready")
	for s := bufio.NewScanner(os.Stdin); s.Scan(); {
		f, err := w.measure()
		if err != nil {
			return err
		}
		fmt.Println(f.delivered, f.p99, f.slower, f.share)
	}
	return nil
}

// send sends at most n frames of a guest, as many as there is room for, with the time in them.
func (w *world) send(guest, n int) int {
	n = w.tx[guest].AllocSize(w.frames[:n], 64)
	binary.BigEndian.PutUint64(w.samples[guest][18:], uint64(time.Since(w.start)))
	for i := range w.frames[:n] {
		w.frames[i].CopyFrom(w.samples[guest])
	}
	sent, _ := w.tx[guest].Send(w.frames[:n])
	for i := range w.frames[sent:n] {
		w.frames[sent+i].Release()
	}
	return sent
}

// receive shows what has arrived at the receiver: from which guest, and how long it took.
func (w *world) receive(show func(from int, took time.Duration)) error {
	for {
		n, err := w.rx.Poll(w.frames[:])
		if n == 0 || err != nil {
			return err
		}
		now := time.Since(w.start)
		for i := range w.frames[:n] {
			f := w.frames[i].Bytes()
			show(int(f[11]), now-time.Duration(binary.BigEndian.Uint64(f[18:])))
		}
		w.rx.Release(w.frames[:n])
		if n < len(w.frames) {
			return nil
		}
	}
}

func (w *world) measure() (f flood, err error) {
	_, without, err := w.phase(false, true)
	if err != nil {
		return f, err
	}
	_, beside, err := w.phase(true, true)
	if err != nil {
		return f, err
	}
	all, _, err := w.phase(true, false)
	if err != nil {
		return f, err
	}
	if len(without) == 0 || len(beside) == 0 {
		return f, errors.New("nothing arrived")
	}
	p99 := func(took []time.Duration) float64 { return float64(took[len(took)*99/100].Nanoseconds()) / 1e3 }
	total := 0
	for _, k := range all {
		total += k
	}
	return flood{
		delivered: float64(len(beside)) / float64(len(without)), p99: p99(without), slower: p99(beside) / p99(without),
		share: float64(slices.Min(all[:paced])) / (float64(total) / (paced + 1)),
	}, nil
}

// phase has the guests send for a while, the paced ones every 2 ms or whatever they can, and returns how
// many frames of each arrived, and how long those of the paced guests took, sorted.
func (w *world) phase(flood, slow bool) (arrived [guests]int, took []time.Duration, err error) {
	const length, rest, every, window = 400 * time.Millisecond, 50 * time.Millisecond, 2 * time.Millisecond, 32
	var under [paced]int
	var due [paced]time.Duration
	begin := time.Since(w.start)
	for i := range due {
		due[i] = begin + every*time.Duration(i)/paced
	}
	took = make([]time.Duration, 0, 1<<22)
	for {
		now := time.Since(w.start)
		if now > begin+length+rest {
			break
		}
		if now < begin+length {
			for i := range due {
				switch {
				case slow && now >= due[i]:
					due[i] += every
					w.send(i, 8)
				case !slow && under[i] <= window-8:
					under[i] += w.send(i, 8)
				}
			}
			if flood {
				w.send(flooder, 32)
			}
		}
		err := w.receive(func(from int, d time.Duration) {
			if from >= guests {
				return
			}
			arrived[from]++
			if from < paced {
				under[from]--
				took = append(took, d)
			}
		})
		if err != nil {
			return arrived, nil, err
		}
	}
	slices.Sort(took)
	return arrived, took, nil
}
