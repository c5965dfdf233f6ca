package pvnet

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/telemetry"
	"barevif/xenbus/xenstore/server/labtest"
)

var sizes = []int{14, 15, 60, 64, 1500, 1514, 3967, 3968, 3969, 4095, 4096, 4097, 8191, 8192, 9014, 40000, 65534, 65535}

// each runs f from front to back and from back to front.
func each(t *testing.T, f func(t *testing.T, p *pair, from, to *Device)) {
	t.Run("front to back", func(t *testing.T) {
		p := join(t, emu.Config{}, plain, Config{})
		f(t, p, p.front, p.back)
	})
	t.Run("back to front", func(t *testing.T) {
		p := join(t, emu.Config{}, plain, Config{})
		f(t, p, p.back, p.front)
	})
	t.Run("back to front, lent", func(t *testing.T) {
		p := join(t, emu.Config{}, plain, Config{LendRx: true})
		f(t, p, p.back, p.front)
	})
	for _, lend := range []bool{false, true} {
		name := map[bool]string{false: "mapped", true: "lent from the mapping"}[lend]
		t.Run("front to back, "+name, func(t *testing.T) {
			p := join(t, emu.Config{}, plain, Config{LendRx: lend})
			static(t, p)
			f(t, p, p.front, p.back)
		})
	}
	t.Run("back to front, mapped", func(t *testing.T) {
		p := join(t, emu.Config{}, plain, Config{})
		static(t, p)
		f(t, p, p.back, p.front)
	})
	t.Run("one event channel", func(t *testing.T) {
		one := plain
		one.split = false
		p := join(t, emu.Config{}, one, Config{})
		f(t, p, p.front, p.back)
	})
}

func TestFramesOfEverySizePass(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		bytes := uint64(0)
		for round, size := range append(append([]int{}, sizes...), sizes...) {
			var f [1]Frame
			if n, err := tx.AllocWait(f[:], size); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			if f[0].Len() != size {
				t.Fatalf("asked for %d bytes, got %d", size, f[0].Len())
			}
			want := make([]byte, size)
			pattern(want, round)
			if n := f[0].CopyFrom(want[:size/3], want[size/3:]); n != size {
				t.Fatalf("CopyFrom took %d of %d", n, size)
			}
			if n, err := tx.Send(f[:]); n != 1 || err != nil {
				t.Fatalf("size %d: Send = %d, %v", size, n, err)
			}
			if f[0].Valid() {
				t.Fatal("a sent frame is still held")
			}
			if n, err := rx.Receive(f[:]); n != 1 || err != nil {
				t.Fatalf("size %d: Receive = %d, %v", size, n, err)
			}
			if f[0].Len() != size {
				t.Fatalf("sent %d bytes, received %d", size, f[0].Len())
			}
			if err := same(&f[0], round); err != nil {
				t.Fatalf("size %d: %v", size, err)
			}
			if err := rx.Release(f[:]); err != nil {
				t.Fatal(err)
			}
			bytes += uint64(size)
		}
		checkBalance(t, from, to, uint64(2*len(sizes)), bytes)
	})
}

// checkBalance asserts that what one end sent is what the other received.
func checkBalance(t *testing.T, from, to *Device, frames, bytes uint64) {
	t.Helper()
	s, r := from.Stats().TX, to.Stats().RX
	if s.Get(telemetry.Packets) != frames || r.Get(telemetry.Packets) != frames || s.Get(telemetry.Bytes) != bytes || r.Get(telemetry.Bytes) != bytes {
		t.Errorf("sent %d frames, %d bytes; received %d, %d; want %d, %d",
			s.Get(telemetry.Packets), s.Get(telemetry.Bytes), r.Get(telemetry.Packets), r.Get(telemetry.Bytes), frames, bytes)
	}
	if s.Dropped()+s.Errors()+r.Dropped()+r.Errors() != 0 {
		t.Errorf("dropped %d + %d, errors %d + %d", s.Dropped(), r.Dropped(), s.Errors(), r.Errors())
	}
}

func TestBatchesKeepOrderUnderPressure(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		const total = 5000
		tx, _ := own(t, from)
		_, rx := own(t, to)
		var wg sync.WaitGroup
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(3, 4))
			var frames [32]Frame
			for sent := 0; sent < total; {
				n, err := tx.AllocWait(frames[:1+rng.IntN(min(32, total-sent))], 0)
				if err != nil {
					t.Error(err)
					return
				}
				for i := range frames[:n] {
					b := frames[i].Extend(14 + (sent+i)%1500)
					pattern(b, sent+i)
				}
				k, err := tx.SendWait(frames[:n])
				sent += k
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
		rng := rand.New(rand.NewPCG(5, 6))
		var frames [40]Frame
		for got := 0; got < total; {
			n, err := rx.Receive(frames[:1+rng.IntN(40)])
			if err != nil {
				t.Fatal(got, err)
			}
			for i := range frames[:n] {
				if want := 14 + got%1500; frames[i].Len() != want {
					t.Fatalf("frame %d has %d bytes, want %d", got, frames[i].Len(), want)
				}
				if err := same(&frames[i], got); err != nil {
					t.Fatalf("frame %d: %v", got, err)
				}
				got++
			}
			rx.Release(frames[:n])
		}
		wg.Wait()
	})
}

// Two owners forward received frames to each other, starting with full rings: neither may
// wait for the other for ever.
func TestForwardersNeverDeadlock(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	const hops = 20000
	var wg sync.WaitGroup
	done := make(chan struct{})
	var once sync.Once
	forward := func(d *Device, tx *TX, rx *RX, fill int) {
		var frames [64]Frame
		n := tx.AllocSize(frames[:fill], 200)
		tx.Send(frames[:n])
		for seen := 0; ; {
			select {
			case <-done:
				return
			default:
			}
			rx.SetDeadline(time.Now().Add(labtest.Limit))
			n, err := rx.Receive(frames[:])
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, ErrLinkDown) {
				t.Errorf("after %d frames: %v", seen, err)
				once.Do(func() { close(done) })
				return
			}
			if err != nil {
				return
			}
			k, err := tx.Send(frames[:n])
			if err != nil && err != ErrFull {
				t.Error(err)
			}
			rx.Release(frames[k:n])
			if seen += k; seen > hops {
				once.Do(func() { close(done) })
				p.front.rx[0].interrupt()
				p.back.rx[0].interrupt()
			}
		}
	}
	ftx, frx := own(t, p.front)
	btx, brx := own(t, p.back)
	wg.Go(func() { forward(p.front, ftx, frx, 64) })
	wg.Go(func() { forward(p.back, btx, brx, 64) })
	wg.Wait()
}

func TestReceiveIntoFramesOfAnotherDevice(t *testing.T) {
	a := join(t, emu.Config{}, plain, Config{})
	b := join(t, emu.Config{}, plain, Config{})
	atx, _ := own(t, a.front)
	_, arx := own(t, a.back)
	btx, _ := own(t, b.front)
	_, brx := own(t, b.back)
	for seed, size := range sizes {
		var f [1]Frame
		atx.AllocWait(f[:], size)
		want := make([]byte, size)
		pattern(want, seed)
		f[0].CopyFrom(want)
		atx.Send(f[:])

		if n, err := btx.AllocWait(f[:], 65535); n != 1 || err != nil {
			t.Fatal(err)
		}
		if n, err := arx.ReceiveInto(f[:]); n != 1 || err != nil || f[0].Len() != size {
			t.Fatalf("size %d: %d, %v, %d bytes", size, n, err, f[0].Len())
		}
		if n, err := btx.SendWait(f[:]); n != 1 || err != nil {
			t.Fatal(err)
		}
		if n, err := brx.Receive(f[:]); n != 1 || err != nil {
			t.Fatal(err)
		}
		if err := same(&f[0], seed); err != nil || f[0].Len() != size {
			t.Fatalf("size %d: got %d bytes, %v", size, f[0].Len(), err)
		}
		brx.Release(f[:])
	}
	if rx := a.back.Stats().RX; rx.Get(telemetry.CopiedBytes) == 0 {
		t.Error("no copy was counted")
	}
}

func TestReceiveIntoKeepsWhatDoesNotFit(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		totx, rx := own(t, to)
		var f, small [1]Frame
		tx.AllocWait(f[:], 5000)
		want := make([]byte, 5000)
		pattern(want, 9)
		f[0].CopyFrom(want)
		tx.Send(f[:])
		totx.AllocWait(small[:], 100)
		if n, err := rx.ReceiveInto(small[:]); n != 0 || err != ErrShortFrame {
			t.Fatal(n, err)
		}
		if n, err := rx.Receive(f[:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if err := same(&f[0], 9); err != nil || f[0].Len() != 5000 {
			t.Fatal(f[0].Len(), err)
		}
		rx.Release(f[:])
		small[0].Release()
	})
}

func TestAFrameOfAnotherHalfIsCopied(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, rx := own(t, from)
		totx, torx := own(t, to)
		var f [1]Frame
		for seed, size := range sizes { // there and back
			tx.AllocWait(f[:], size)
			want := make([]byte, size)
			pattern(want, seed)
			f[0].CopyFrom(want)
			tx.Send(f[:])
			if _, err := torx.Receive(f[:]); err != nil {
				t.Fatal(err)
			}
			if _, err := totx.SendWait(f[:]); err != nil {
				t.Fatalf("size %d: %v", size, err)
			}
			if f[0].Valid() {
				t.Fatal("still held after Send")
			}
			if _, err := rx.Receive(f[:]); err != nil {
				t.Fatal(err)
			}
			if err := same(&f[0], seed); err != nil {
				t.Fatalf("size %d: %v", size, err)
			}
			rx.Release(f[:])
		}
	})
}

func TestARetainedFrameIsCopiedAndStaysReadable(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	var f, got [1]Frame
	tx.AllocWait(f[:], 100)
	b := f[0].Bytes()
	pattern(b, 1)
	f[0].Retain()
	if _, err := tx.Send(f[:]); err != nil {
		t.Fatal(err)
	}
	if !f[0].Valid() {
		t.Fatal("the second holder lost the frame")
	}
	pattern(b, 2)
	rx.Receive(got[:])
	if err := same(&got[0], 1); err != nil {
		t.Fatal(err)
	}
	rx.Release(got[:])
	if err := f[0].Release(); err != nil {
		t.Fatal(err)
	}
}

func TestHeadroomTrimAndAppend(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		var f [1]Frame
		if tx.Alloc(f[:]) != 1 {
			t.Fatal("no frame")
		}
		if f[0].Len() != 0 || f[0].Headroom() != headroom {
			t.Fatal(f[0].Len(), f[0].Headroom())
		}
		if n := f[0].Append([]byte("payload, and a tail")); n != 19 {
			t.Fatal(n)
		}
		if !f[0].Truncate(7) || f[0].Truncate(8) {
			t.Fatal("Truncate")
		}
		copy(f[0].Prepend(16), "headers, 16 long")
		if f[0].Prepend(headroom) != nil || f[0].Extend(5000) != nil {
			t.Fatal("room that is not there")
		}
		if !f[0].TrimFront(9) || f[0].TrimFront(100) {
			t.Fatal("TrimFront")
		}
		if _, err := tx.Send(f[:]); err != nil {
			t.Fatal(err)
		}
		rx.Receive(f[:])
		if got := string(f[0].Bytes()); got != "16 longpayload" {
			t.Fatalf("%q", got)
		}
		rx.Release(f[:])

		// A chain cut back to one piece.
		tx.AllocWait(f[:], 20000)
		want := make([]byte, 20000)
		pattern(want, 3)
		f[0].CopyFrom(want)
		for _, n := range []int{15000, 8000, 100} {
			if !f[0].Truncate(n) || f[0].Len() != n {
				t.Fatal(n, f[0].Len())
			}
			if err := same(&f[0], 3); err != nil {
				t.Fatal(err)
			}
		}
		if n, err := tx.Send(f[:]); n != 1 || err != nil {
			t.Fatal(err)
		}
		rx.Receive(f[:])
		if err := same(&f[0], 3); err != nil || f[0].Len() != 100 {
			t.Fatal(f[0].Len(), err)
		}
		rx.Release(f[:])
	})
}

func TestWhatMustNotGoIntoARing(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		var f [2]Frame
		tx.AllocWait(f[:], 60)
		f[1].Truncate(13)
		if n, err := tx.Send(f[:]); n != 1 || err != ErrFrameSize {
			t.Fatal(n, err)
		}
		if n, err := tx.Send(f[:1]); n != 0 || !errors.Is(err, ErrStale) {
			t.Fatal(n, err)
		}
		if n, err := tx.Send(make([]Frame, 1)); n != 0 || err == nil {
			t.Fatal("the zero frame", n, err)
		}
		f[1].Release()
	})
}

func TestAPeerWithoutScatterGatherGetsNoChains(t *testing.T) {
	none := plain
	none.frontSG, none.backSG = false, false
	p := join(t, emu.Config{}, none, Config{})
	for _, d := range []*Device{p.front, p.back} {
		tx, _ := own(t, d)
		var f [1]Frame
		tx.AllocWait(f[:], 5000)
		if n, err := tx.Send(f[:]); n != 0 || err != ErrFrameSize {
			t.Fatal(n, err)
		}
		f[0].Truncate(3000)
		if n, err := tx.Send(f[:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
}

func TestAHolderOfEveryBufferIsTold(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		if to == p.back && to.cfg.LendRx {
			return // the frontend runs out of slots first: TestAHeldFrameHoldsUpItsRing
		}
		tx, _ := own(t, from)
		_, rx := own(t, to)
		held := make([]Frame, 0, 2000)
		var f [32]Frame
		for {
			n, err := tx.AllocWait(f[:], 64)
			if err != nil {
				t.Fatal(err)
			}
			k, err := tx.Send(f[:n])
			for i := k; i < n; i++ {
				f[i].Release()
			}
			if err != nil && err != ErrFull {
				t.Fatal(err)
			}
			n, err = rx.Receive(f[:])
			held = append(held, f[:n]...)
			if err == ErrNoBuffers {
				break
			}
			if err != nil || len(held) > 1000 {
				t.Fatal(len(held), err)
			}
		}
		st := to.Stats()
		lent := int(st.RX.Get(telemetry.LentPackets))
		if len(held) != privatePages+lent || (lent > 0) != to.cfg.LendRx {
			t.Fatalf("held %d frames, %d of them lent, of %d buffers", len(held), lent, privatePages)
		}
		rx.Release(held)
		if n, err := rx.Receive(f[:]); n == 0 || err != nil {
			t.Fatal(n, err)
		}
		rx.Release(f[:])
	})
}

func TestDeadlineEndsEveryWait(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		soon := time.Now().Add(30 * time.Millisecond)
		rx.SetDeadline(soon)
		tx.SetDeadline(soon)
		var f [1]Frame
		if _, err := rx.Receive(f[:]); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		for {
			if n := tx.AllocSize(f[:], 60); n == 0 {
				break
			}
			if n, err := tx.SendWait(f[:]); n == 0 {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
				f[0].Release()
				break
			}
		}
		// A new deadline reaches a wait under way.
		rx2 := make(chan error)
		other, otherRX := from, from.rx[0]
		_ = other
		otherRX.SetDeadline(time.Time{})
		go func() {
			var f [1]Frame
			_, err := otherRX.Receive(f[:])
			rx2 <- err
		}()
		otherRX.SetDeadline(time.Now().Add(time.Millisecond))
		if err := <-rx2; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	})
}

func TestTheOwningPathAllocatesNothing(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		var f [32]Frame
		for _, size := range []int{64, 1500, 20000} {
			batch := 32
			if size > shm.PageSize {
				batch = 8
			}
			cycle := func() {
				n := tx.AllocSize(f[:batch], size)
				if k, err := tx.Send(f[:n]); k != n || err != nil {
					t.Fatal(k, n, err)
				}
				for got := 0; got < n; {
					k, err := rx.Receive(f[:])
					if err != nil {
						t.Fatal(err)
					}
					rx.Release(f[:k])
					got += k
				}
			}
			cycle()
			if n := testing.AllocsPerRun(50, cycle); n != 0 {
				t.Errorf("size %d: %v allocations for %d frames", size, n, batch)
			}
		}
	})
}

// The calls that copy allocate nothing either.
func TestWriteAllocatesNothing(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		_, rx := own(t, to)
		var f [1]Frame
		head, body := make([]byte, 14), make([]byte, 200)
		one := [][]byte{body}
		for name, write := range map[string]func() (int, error){
			"Write":      func() (int, error) { return from.Write(body) },
			"Writev":     func() (int, error) { return from.Writev(head, body) },
			"WriteBatch": func() (int, error) { return from.WriteBatch(one) },
		} {
			cycle := func() {
				if _, err := write(); err != nil {
					t.Fatal(err)
				}
				if _, err := rx.Receive(f[:]); err != nil {
					t.Fatal(err)
				}
				rx.Release(f[:])
			}
			cycle()
			if n := testing.AllocsPerRun(50, cycle); n != 0 {
				t.Errorf("%s: %v allocations a frame", name, n)
			}
		}
	})
}

// Frames of every size that are written together arrive whole and in order, however many
// frames and however few buffers there are, and with fewer notifications than frames. A
// frame of a size that no vif takes ends the batch before it.
func TestWriteBatch(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		sizes := []int{14, 60, 1514, 4096, 4097, 60, 20000, 64, MaxFrame, 61}
		var frames [][]byte
		for i := range 3 * 64 {
			b := make([]byte, sizes[i%len(sizes)])
			if i >= 64 {
				b = b[:min(len(b), 64+i)] // long runs of one page each
			}
			pattern(b, i)
			frames = append(frames, b)
		}
		got := make(chan []byte, len(frames))
		most := 0
		ended := make(chan error, 1)
		go func() {
			ended <- to.ListenBatch(context.Background(), func(fs []Frame) {
				most = max(most, len(fs))
				for i := range fs {
					b := make([]byte, fs[i].Len())
					fs[i].CopyTo(b)
					got <- b
				}
			})
		}()
		before := from.Stats()
		if n, err := from.WriteBatch(frames); n != len(frames) || err != nil {
			t.Fatal(n, err)
		}
		for i, want := range frames {
			if b := <-got; !bytes.Equal(b, want) {
				t.Fatalf("frame %d: %d bytes, want %d", i, len(b), len(want))
			}
		}
		st := from.Stats()
		if sent, notifies := st.TX.Get(telemetry.Packets)-before.TX.Get(telemetry.Packets),
			st.TX.Get(telemetry.NotifiesSent)-before.TX.Get(telemetry.NotifiesSent); sent != uint64(len(frames)) || notifies >= sent/2 {
			t.Errorf("%d frames counted, %d notifies", sent, notifies)
		}

		bad := [][]byte{frames[0], frames[1], make([]byte, 13), frames[3]}
		if n, err := from.WriteBatch(bad); n != 2 || err != ErrFrameSize {
			t.Errorf("%d, %v", n, err)
		}
		bad[2] = make([]byte, MaxFrame+1)
		if n, err := from.WriteBatch(bad); n != 2 || err != ErrFrameSize {
			t.Errorf("%d, %v", n, err)
		}
		for i := range 4 {
			if b := <-got; !bytes.Equal(b, frames[i%2]) {
				t.Errorf("%d bytes", len(b))
			}
		}
		if n, err := from.WriteBatch(nil); n != 0 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		if _, err := from.OwnTX(0); err != nil {
			t.Fatal(err)
		}
		if n, err := from.WriteBatch(frames); n != 0 || err != ErrOwned {
			t.Errorf("%d, %v", n, err)
		}
		p.disconnect()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if most < 2 || most > 32 {
			t.Errorf("at most %d frames in one call", most)
		}
	})
}

// A flow keeps its queue even if a batch holds frames of other flows.
func TestWriteBatchSpreadsFlows(t *testing.T) {
	p := join(t, emu.Config{}, features{queues: 4, frontSG: true, backSG: true, split: true}, Config{Queues: 4})
	type seen struct {
		queue int
		frame []byte
	}
	got := make(chan seen, 1024)
	for i := range 4 {
		rx, err := p.back.OwnRX(i)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			var f [8]Frame
			for {
				n, err := rx.Receive(f[:])
				if err != nil {
					return
				}
				for k := range f[:n] {
					b := make([]byte, f[k].Len())
					f[k].CopyTo(b)
					got <- seen{i, b}
				}
				rx.Release(f[:n])
			}
		}()
	}
	var frames [][]byte
	for i := range 256 {
		b := make([]byte, 64)
		b[0], b[6] = 2, byte(i%16) // the flow: 16 senders
		b[20] = byte(i / 16)
		frames = append(frames, b)
	}
	if n, err := p.front.WriteBatch(frames); n != len(frames) || err != nil {
		t.Fatal(n, err)
	}
	queue, last := make(map[byte]int), make(map[byte]byte)
	used := make(map[int]bool)
	for range frames {
		s := <-got
		flow, at := s.frame[6], s.frame[20]
		if q, there := queue[flow]; there && q != s.queue {
			t.Fatalf("flow %d came on queues %d and %d", flow, q, s.queue)
		}
		if prev, there := last[flow]; there && at != prev+1 || !there && at != 0 {
			t.Fatalf("flow %d: frame %d after %d", flow, at, prev)
		}
		queue[flow], last[flow], used[s.queue] = s.queue, at, true
	}
	if len(used) < 2 {
		t.Errorf("%d queues used", len(used))
	}
}

// PollInto does not wait: it fills the caller's frames with the frames in the ring, or
// returns 0.
func TestPollInto(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, rx := own(t, to) // the frames to receive into come from tx
		mine := make([]Frame, 4)
		if n := tx.AllocSize(mine, 2000); n != len(mine) {
			t.Fatal(n)
		}
		if n, err := rx.PollInto(mine); n != 0 || err != nil {
			t.Fatalf("with nothing there: %d, %v", n, err)
		}
		sizes := []int{60, 1500, 5000}
		for i, size := range sizes {
			b := make([]byte, size)
			pattern(b, i)
			if _, err := from.Write(b); err != nil {
				t.Fatal(err)
			}
		}
		n, err := rx.PollInto(mine)
		if n != 2 || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		for i := range mine[:n] {
			want, b := make([]byte, sizes[i]), make([]byte, mine[i].Len())
			pattern(want, i)
			if mine[i].CopyTo(b); !bytes.Equal(b, want) {
				t.Errorf("frame %d: %d bytes", i, len(b))
			}
		}
		if n, err := rx.PollInto(mine); n != 0 || err != ErrShortFrame {
			t.Errorf("a frame that does not fit: %d, %v", n, err)
		}
		for i := range mine {
			mine[i].Release()
		}
	})
}

// Frames of one slot arrive in frames of every kind that a caller may hold, in their
// order: the fast path hands those it cannot fill to the general path, which returns the
// error.
func TestPollIntoFramesOfEveryKind(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, rx := own(t, to)
		const size = 200
		sent := 0
		write := func() {
			t.Helper()
			b := make([]byte, size)
			pattern(b, sent)
			if _, err := from.Write(b); err != nil {
				t.Fatal(err)
			}
			sent++
		}
		arrived := 0
		poll := func(frames []Frame, want error) (n int) {
			t.Helper()
			n, err := rx.PollInto(frames)
			if err != want {
				t.Fatalf("frame %d: %v, want %v", arrived, err, want)
			}
			for i := range frames[:n] {
				f := &frames[i]
				if err := same(f, arrived); err != nil || f.Len() != size || f.Checksum() != ChecksumUnknown || f.gso != (GSO{}) {
					t.Errorf("frame %d: %d bytes, %v, %v, %v", arrived, f.Len(), err, f.Checksum(), f.gso)
				}
				arrived++
			}
			return n
		}
		for range 6 {
			write()
		}
		mine := make([]Frame, 5)
		if n := tx.AllocSize(mine[:1], size) + tx.AllocSize(mine[1:2], 5000) + tx.AllocSize(mine[2:], 60); n != len(mine) {
			t.Fatal(n)
		}
		leave := func(f *Frame, room int) { // leaves the frame room bytes of its page
			f.Extend(f.Tailroom())
			f.TrimFront(f.Len() - room)
		}
		leave(&mine[3], size)
		mine[0].csum, mine[2].csum = ChecksumVerified, ChecksumPartial // left by earlier contents
		mine[0].gso, mine[2].gso = GSO{Size: 100}, GSO{Size: 100}
		for n := 0; n < 4; {
			k := poll(mine[n:4], nil)
			if k == 0 {
				t.Fatalf("%d frames, then none", n)
			}
			n += k
		}
		// Each failing call here meets a frame that is not parsed yet, and leaves it at
		// the head.
		leave(&mine[2], size-1)
		poll(mine[2:3], ErrShortFrame)
		poll(mine[3:4], nil)
		mine[4].Retain()
		poll(mine[4:], ErrShared)
		mine[4].Release()
		poll(mine[4:], nil)
		stale := []Frame{mine[0]}
		mine[0].Release()
		write()
		poll(stale, ErrStale)
		poll(mine[3:4], nil)
		if arrived != sent {
			t.Errorf("%d of %d frames arrived", arrived, sent)
		}
		for i := range mine[1:] {
			mine[1+i].Release()
		}
	})
}

// A failed copy loses the peer's frame, but none of the caller's frames.
func TestPollIntoKeepsTheFramesOfCopiesThatFail(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, rx := own(t, p.back)
	mine := make([]Frame, 4)
	if n := tx.AllocSize(mine, 2000); n != len(mine) {
		t.Fatal(n)
	}
	for i := range 3 {
		b := make([]byte, 100)
		pattern(b, i)
		if _, err := p.front.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	lift := p.bdom.Fail(emu.Fault{Op: emu.OpCopyGrant, K: 2, Status: hypercall.BadGntref})
	n, err := rx.PollInto(mine)
	lift()
	if n != 2 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	for i, seed := range []int{0, 2} {
		if err := same(&mine[i], seed); err != nil {
			t.Errorf("frame %d: %v", i, err)
		}
	}
	for i := range mine {
		if err := mine[i].Release(); err != nil {
			t.Errorf("frame %d is not the caller's any more: %v", i, err)
		}
	}
}

// A batch in which frames of one slot, chains and frames with offloads follow each other
// in every order arrives in that order, with the right offloads and counters: the fast
// path of each engine hands over to the general path and back.
func TestFramesOfEveryKindKeepTheirOrder(t *testing.T) {
	kinds := []int{60, 5000, -1500, 200, 4096, 4097, -300, 64}
	run := func(t *testing.T, lend bool, pick func(p *pair) (from, to *Device)) {
		p := join(t, emu.Config{}, plain, Config{Offload: true, LendRx: lend})
		from, to := pick(p)
		tx, _ := own(t, from)
		_, rx := own(t, to)
		rng := rand.New(rand.NewPCG(5, 6))
		var frames [24]Frame
		for range 200 {
			var want []int
			n := 1 + rng.IntN(len(frames))
			for i := range n {
				kind := kinds[rng.IntN(len(kinds))]
				want = append(want, kind)
				size := max(kind, -kind)
				if k := tx.AllocSize(frames[i:i+1], size); k != 1 {
					t.Fatal("no buffer")
				}
				b := make([]byte, size)
				pattern(b, i)
				frames[i].CopyFrom(b)
				if kind < 0 {
					frames[i].SetChecksum(ChecksumVerified)
				}
			}
			if k, err := tx.Send(frames[:n]); k != n || err != nil {
				t.Fatal(k, err)
			}
			for got := 0; got < n; {
				k, err := rx.Receive(frames[:1+rng.IntN(len(frames))])
				if err != nil {
					t.Fatal(err)
				}
				for i := range frames[:k] {
					f, kind := &frames[i], want[got+i]
					if f.Len() != max(kind, -kind) {
						t.Fatalf("frame %d of %v has %d bytes", got+i, want, f.Len())
					}
					if err := same(f, got+i); err != nil {
						t.Fatalf("frame %d of %v: %v", got+i, want, err)
					}
					if (f.Checksum() == ChecksumVerified) != (kind < 0) {
						t.Errorf("frame %d of %v: checksum %v", got+i, want, f.Checksum())
					}
				}
				rx.Release(frames[:k])
				got += k
			}
		}
		s, r := from.Stats().TX, to.Stats().RX
		for _, c := range []telemetry.Counter{telemetry.Packets, telemetry.Bytes, telemetry.Slots, telemetry.ChainedPackets} {
			if s.Get(c) != r.Get(c) {
				t.Errorf("counter %v: sent %d, received %d", c, s.Get(c), r.Get(c))
			}
		}
	}
	t.Run("front to back", func(t *testing.T) {
		run(t, false, func(p *pair) (*Device, *Device) { return p.front, p.back })
	})
	t.Run("back to front", func(t *testing.T) {
		run(t, false, func(p *pair) (*Device, *Device) { return p.back, p.front })
	})
	t.Run("back to front, lent", func(t *testing.T) {
		run(t, true, func(p *pair) (*Device, *Device) { return p.back, p.front })
	})
}

// Each batch, in each direction, takes one copy batch at the backend, at most one
// notification per side, and no other call of the domain.
func TestTheOwningPathCallsTheDomainOncePerBatch(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	ftx, frx := own(t, p.front)
	btx, brx := own(t, p.back)
	var f [32]Frame
	const rounds = 50
	run := func(tx *TX, rx *RX) {
		for range rounds {
			n := tx.AllocSize(f[:], 200)
			if k, err := tx.Send(f[:n]); k != 32 || err != nil {
				t.Fatal(k, err)
			}
			if k, err := rx.Receive(f[:]); k != 32 || err != nil {
				t.Fatal(k, err)
			}
			rx.Release(f[:])
		}
	}
	run(ftx, brx)
	run(btx, frx)
	f0, b0 := p.fdom.Calls(), p.bdom.Calls()
	run(ftx, brx)
	run(btx, frx)
	f1, b1 := p.fdom.Calls(), p.bdom.Calls()
	if n := f1.Copy - f0.Copy; n != 0 {
		t.Errorf("the frontend made %d copy batches", n)
	}
	if n := b1.Copy - b0.Copy; n != 2*rounds {
		t.Errorf("the backend made %d copy batches for %d batches of frames", n, 2*rounds)
	}
	if n := b1.CopyOps - b0.CopyOps; n != 2*rounds*32 {
		t.Errorf("%d copy operations for %d frames", n, 2*rounds*32)
	}
	if n := f1.Notify - f0.Notify + b1.Notify - b0.Notify; n > 0 {
		t.Errorf("%d notifies that nobody asked for", n)
	}
	f1.Copy, f1.CopyOps, b1.Copy, b1.CopyOps = f0.Copy, f0.CopyOps, b0.Copy, b0.CopyOps
	f1.Notify, b1.Notify = f0.Notify, b0.Notify
	if f1 != f0 || b1 != b0 {
		t.Errorf("other calls: %+v then %+v, %+v then %+v", f0, f1, b0, b1)
	}
}

func TestChecksumsLeftBlankAreCompleted(t *testing.T) {
	frame := udp4(t, 700)
	want := append([]byte(nil), frame...)
	blank(frame)
	for _, split := range []int{0, 1, 35, 60} {
		p := join(t, emu.Config{}, plain, Config{})
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		var f [1]Frame
		tx.AllocWait(f[:], len(frame))
		f[0].CopyFrom(frame[:split], frame[split:])
		f[0].csum = ChecksumPartial
		if !f[0].completeChecksum() {
			t.Fatal("not completed")
		}
		if string(f[0].Bytes()) != string(want) {
			t.Fatalf("split %d: wrong checksum", split)
		}
		tx.Send(f[:])
		rx.Receive(f[:])
		rx.Release(f[:])
	}
}

func TestEveryWayToWaitMovesFrames(t *testing.T) {
	ways := []Config{{Wait: Park}, {Wait: Adaptive}, {Wait: Busy}}
	if runtime.GOOS == "linux" {
		ways = append(ways, Config{LockedThreads: true}, Config{Wait: Adaptive, LockedThreads: true})
	}
	for _, cfg := range ways {
		p := join(t, emu.Config{}, plain, cfg)
		const total = 2000
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		var wg sync.WaitGroup
		wg.Go(func() {
			if cfg.LockedThreads {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
			}
			var f [8]Frame
			for sent := 0; sent < total; {
				n, err := tx.AllocWait(f[:], 100)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := tx.SendWait(f[:n]); err != nil {
					t.Error(err)
					return
				}
				sent += n
			}
		})
		var f [8]Frame
		for got := 0; got < total; {
			n, err := rx.Receive(f[:])
			if err != nil {
				t.Fatal(cfg, got, err)
			}
			rx.Release(f[:n])
			got += n
		}
		wg.Wait()
		rx.SetDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := rx.Receive(f[:]); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}

// A lost event, which a correct machine never has, delays a frame by at most a second and
// is counted.
func TestALostEventIsRescued(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	lift := p.fdom.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
	got := make(chan error, 1)
	go func() {
		var f [1]Frame
		_, err := rx.Receive(f[:])
		rx.Release(f[:])
		got <- err
	}()
	waiting := func() bool { return waits(&rx.half) }
	comes(t, "the first wait", waiting)
	comes(t, "the second wait", func() bool { // the event of the bind ends the first
		if rx.waitSeq.Load() >= 3 {
			return true
		}
		rx.park.Load().wake()
		return false
	})
	comes(t, "a wait", waiting)
	var f [1]Frame
	tx.AllocSize(f[:], 60)
	tx.Send(f[:])
	lift()
	l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
	l.tick()
	if len(l.suspects) != 1 {
		t.Fatalf("%d halves are suspected", len(l.suspects))
	}
	for l.recheckAt != nil { // until the waiter could no longer hold the event back
		<-l.recheckAt
		l.rescue()
	}
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	st := p.back.Stats()
	if n := st.RX.Get(telemetry.RescuedWakeups); n != 1 {
		t.Errorf("%d rescues counted", n)
	}
}

func TestStatsNeverDisturbAnOwner(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, d := range []*Device{p.front, p.back} {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					d.Stats()
				}
			}
		})
	}
	var f [4]Frame
	for i := range 3000 {
		if n := tx.AllocSize(f[:], 60); n != 4 {
			t.Fatalf("round %d: %d frames", i, n)
		}
		if n, err := tx.Send(f[:]); n != 4 || err != nil {
			t.Fatal(i, n, err)
		}
		for got := 0; got < 4; {
			n, err := rx.Receive(f[:])
			if err != nil {
				t.Fatal(i, err)
			}
			rx.Release(f[:n])
			got += n
		}
	}
	close(stop)
	wg.Wait()
	checkBalance(t, p.front, p.back, 12000, 12000*60)
}

// The memory of a released frame belongs to somebody else: no method may touch it.
func TestAStaleFrameIsRefusedByEveryMethod(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	for name, size := range map[string]int{"zero": -1, "single": 100, "chain": 9000} {
		var f [1]Frame
		if size >= 0 {
			tx.AllocWait(f[:], size)
			f[0].Release()
		}
		for method, call := range map[string]func(f Frame){
			"Bytes":    func(f Frame) { f.Bytes() },
			"Pieces":   func(f Frame) { f.Pieces()(func([]byte) bool { return true }) },
			"CopyTo":   func(f Frame) { f.CopyTo(make([]byte, 10)) },
			"CopyFrom": func(f Frame) { f.CopyFrom(make([]byte, 10)) },
			"Extend":   func(f Frame) { _ = f.Extend(1)[0] },
		} {
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%s: %s did not panic", name, method)
					}
				}()
				call(f[0])
			}()
		}
		if err := f[0].Retain(); err != ErrStale {
			t.Errorf("%s: Retain: %v", name, err)
		}
		if err := f[0].Release(); err != ErrStale {
			t.Errorf("%s: Release: %v", name, err)
		}
		if _, err := tx.Send(f[:]); err != ErrStale {
			t.Errorf("%s: Send: %v", name, err)
		}
		if f[0].Valid() {
			t.Errorf("%s: valid", name)
		}
	}
}

// A sender that stops with a full ring would see the responses only in its next call. The
// slow tick takes them, so that an idle ring is not shown as full.
func TestAnIdleRingIsNotShownAsFull(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	frames := make([]Frame, 250)
	if n := tx.AllocSize(frames, 60); n != len(frames) {
		t.Fatal(n)
	}
	if n, err := tx.Send(frames); n != len(frames) || err != nil {
		t.Fatal(n, err)
	}
	used := func() uint64 {
		st := p.front.Stats().TX
		return st.Gauge(telemetry.RingUsed)
	}
	if n := used(); n != 250 {
		t.Fatalf("%d slots in use, want 250", n)
	}
	for got := 0; got < len(frames); {
		n, err := rx.Receive(frames)
		if err != nil {
			t.Fatal(err)
		}
		rx.Release(frames[:n])
		got += n
	}
	if err := tx.settle(tx.eng); err != nil {
		t.Fatal(err)
	}
	if n := used(); n != 0 {
		t.Errorf("%d slots in use once all are answered", n)
	}
}

// Nobody waits for the slots of a ring whose connection has ended, so a ring that was full is
// not shown as full while the vif is down.
func TestNoSlotIsInUseWhileTheLinkIsDown(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	sendSizes(t, tx, minimal(200)...)
	wantUsed := func(when string, want uint64) {
		t.Helper()
		st := p.front.Stats().TX
		if n := st.Gauge(telemetry.RingUsed); n != want {
			t.Errorf("%s: %d slots in use, want %d", when, n, want)
		}
	}
	wantUsed("sent", 200)
	if !p.front.quiesce(p.conns[0], "test") {
		t.Fatal("not quiesced")
	}
	wantUsed("quiesced, with its rings", 0)
	p.disconnect()
	wantUsed("disconnected", 0)
}

// The pages that a frontend grants to be read hold frames and zeros: nothing else is ever in
// them, whichever call sends, and also behind and before the frames.
func TestGrantedPagesHoldFramesOnly(t *testing.T) {
	untrusted := plain
	untrusted.untrusted = true
	p := join(t, emu.Config{}, untrusted, Config{LendRx: true})
	allowed := 0 // bytes of frames, each 0xee
	frameOf := func(n int) []byte {
		allowed += n
		return bytes.Repeat([]byte{0xee}, n)
	}
	for _, n := range []int{14, 60, 1500, 4096, 9000} {
		if _, err := p.front.Write(frameOf(n)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.front.Writev(frameOf(14), frameOf(3000)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.front.WriteBatch([][]byte{frameOf(60), frameOf(700)}); err != nil {
		t.Fatal(err)
	}
	tx, _ := own(t, p.front)
	var f [1]Frame
	btx, _ := own(t, p.back)
	if _, err := btx.AllocWait(f[:], shm.PageSize); err != nil {
		t.Fatal(err)
	}
	f[0].CopyFrom(bytes.Repeat([]byte{0x55}, shm.PageSize)) // the page has more in it than the frame will have
	f[0].Truncate(100)
	f[0].CopyFrom(frameOf(100))
	if _, err := tx.SendWait(f[:]); err != nil { // copied from another device's page
		t.Fatal(err)
	}
	shared := p.conns[0].queues[0].tx.(*frontTX).shared
	found := 0
	for i := range shared.Len() {
		for _, b := range shared.Bytes(uint32(i)) {
			switch b {
			case 0xee:
				found++
			case 0:
			default:
				t.Fatalf("page %d has a byte %#x", i, b)
			}
		}
	}
	if found != allowed {
		t.Errorf("%d bytes of frames of %d bytes", found, allowed)
	}
}
