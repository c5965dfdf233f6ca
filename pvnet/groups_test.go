package pvnet

import (
	"testing"

	"barevif/hypercall/emu"
	"barevif/telemetry"
)

// A list of groups is as long as netback's, and knows which addresses are in it.
func TestTheListOfGroups(t *testing.T) {
	var g groups
	mac := func(i int) [6]byte { return [6]byte{1, 0, 0x5e, 0, byte(i >> 8), byte(i)} }
	for i := range maxGroups {
		if !g.add(mac(i)) {
			t.Fatalf("no place for address %d", i)
		}
	}
	if g.add(mac(1000)) || g.takes(mac(1000)) {
		t.Error("an address too many")
	}
	g.remove(mac(1000))
	g.remove(mac(7))
	for i := range maxGroups {
		if g.takes(mac(i)) != (i != 7) {
			t.Errorf("address %d", i)
		}
	}
	if !g.add([6]byte{}) || g.add(mac(7)) {
		t.Error("the address of zeros takes no place")
	}
	g.remove([6]byte{})
	if !g.add(mac(8)) {
		t.Error("a place is lost")
	}
	g.remove(mac(8))
	if !g.takes(mac(8)) {
		t.Error("an address that was listed twice is gone after it left once")
	}
	if !g.takes([6]byte{2}) || !g.takes([6]byte{255, 255, 255, 255, 255, 255}) || g.takes([6]byte{255, 255, 255, 255, 255, 254}) {
		t.Error("unicast, broadcast or another address that is listed nowhere")
	}
	g.clear(true)
	if g.takes(mac(0)) {
		t.Error("an address survives the connection")
	}
}

// What is not wanted is left out of a batch, wherever it is in it, however long it is and
// whoever holds it. Nothing is allocated, and no buffer lost.
func TestAFilterTakesFramesOutOfABatch(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.back)
	_, rx := own(t, p.front)
	wanted, not := [6]byte{1, 0, 0x5e, 0, 0, 1}, [6]byte{1, 0, 0x5e, 0, 0, 2}
	p.back.groups.clear(true)
	p.back.groups.add(wanted)
	seed, filtered, free := uint32(1), uint64(0), p.back.tx[0].eng.(*backTX).private.Free()
	var out, in [32]Frame
	cycle := func() {
		want := 0
		for i := range out {
			size := 100
			if seed = seed*1664525 + 1013904223; seed>>28 == 0 {
				size = 9000
			}
			if tx.AllocSize(out[i:i+1], size) != 1 {
				t.Fatal("no buffer")
			}
			mac := not
			if seed>>20&1 == 0 {
				mac = wanted
				want++
			} else {
				filtered++
			}
			copy(out[i].Bytes(), mac[:])
			if seed>>21&3 == 0 {
				out[i].Retain()
				defer out[i].Release()
			}
		}
		if n, err := tx.SendWait(out[:]); n != len(out) || err != nil {
			t.Fatal(n, err)
		}
		for want > 0 {
			n, err := rx.Receive(in[:])
			if err != nil {
				t.Fatal(err)
			}
			for i := range in[:n] {
				if [6]byte(in[i].Bytes()) != wanted {
					t.Fatalf("a frame to %x", in[i].Bytes()[:6])
				}
			}
			want -= n
			rx.Release(in[:n])
		}
	}
	for range 100 {
		cycle()
	}
	if n := p.back.Stats().TX.Get(telemetry.Filtered); n != filtered {
		t.Errorf("%d filtered, want %d", n, filtered)
	}
	if n := p.back.tx[0].eng.(*backTX).private.Free(); n != free {
		t.Errorf("%d buffers are free, %d before", n, free)
	}
	s, r := p.back.Stats().TX, p.front.Stats().RX
	if n := telemetry.Unaccounted(&s, &r); n != 0 {
		t.Errorf("%d frames are in no account", n)
	}
	for i := range out { // the batch of the measurement is made once
		out[i] = Frame{}
	}
	if n := testing.AllocsPerRun(50, func() {
		for i := range out {
			tx.AllocSize(out[i:i+1], 100)
			copy(out[i].Bytes(), not[:])
		}
		tx.Send(out[:])
	}); n != 0 {
		t.Errorf("%v allocations a batch", n)
	}
}
