package pvnet

import (
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/telemetry"
)

// storm notifies p until stop is called.
func storm(p hypercall.Port) (stop func()) {
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
				p.Notify()
			}
		}
	})
	return func() { close(end); wg.Wait() }
}

// parkedAfter waits until h waits for the nth time.
func parkedAfter(t testing.TB, h *half, n uint32) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); h.parked.Load() < 2*n-1 || h.parked.Load()%2 == 0; time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("%d waits, not %d", (h.parked.Load()+1)/2, n)
		}
	}
}

// A frame that comes while a storm is being paid for is late, and was not missed:
// the watchdog leaves it to the waiter.
func TestAnEventHeldBackIsNotRescued(t *testing.T) {
	for name, f := range map[string]features{
		"two channels": plain,
		"one channel":  {queues: 1, frontSG: true, backSG: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := join(t, emu.Config{}, f, Config{})
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			got := make(chan error)
			receive := func() {
				var f [1]Frame
				_, err := rx.Receive(f[:])
				rx.Release(f[:])
				got <- err
			}
			stop := storm(p.front.tx[0].eng.(*frontTX).port)
			l := &life{d: p.back, conn: p.conns[1], running: true}
			frames := uint64(0)
			for len(l.suspects) == 0 {
				if frames++; frames > 5 {
					t.Fatal("no frame was held back")
				}
				waits := (rx.parked.Load() + 1) / 2
				go receive()
				parkedAfter(t, &rx.half, waits+13) // one or two are free, then 1, 2 ... 1000 ms
				var f [1]Frame
				tx.AllocSize(f[:], 60)
				if n, err := tx.Send(f[:]); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				if l.beat(); len(l.suspects) == 0 { // this machine is slow
					if err := <-got; err != nil {
						t.Fatal(err)
					}
				}
			}
			for l.recheck != nil {
				<-l.recheck
				l.rescue()
			}
			if err := <-got; err != nil {
				t.Fatal(err)
			}
			stop()
			st := p.back.Stats()
			if n := st.RX.Get(telemetry.RescuedWakeups); n != 0 {
				t.Errorf("%d rescues counted", n)
			}
			if n := st.RX.Get(telemetry.Packets); n != frames {
				t.Errorf("%d frames", n)
			}
		})
	}
}
