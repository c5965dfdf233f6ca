package pvnet

import (
	"testing"

	"barevif/hypercall/emu"
	"barevif/telemetry"
)

// Frames are searched for hashes only once one of the device's own has got one: by SetHash, or
// by the copy of a frame that has one.
func TestHashesAreLookedForOnlyOnceThereAreSome(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	btx, rx := own(t, p.back)
	eng := p.front.tx[0].eng.(*frontTX)
	eng.takesHash = true
	sendFrames(t, tx, 8, 100, 0)
	if eng.shared.Marked() {
		t.Fatal("frames are searched although none has a hash")
	}
	other, f := [1]Frame{}, [1]Frame{}
	if btx.AllocSize(other[:], 100) != 1 || tx.AllocSize(f[:], 100) != 1 {
		t.Fatal("no frames")
	}
	defer other[0].Release()
	if err := other[0].SetHash(FlowHash{HashIPv4, 77}); err != nil {
		t.Fatal(err)
	}
	f[0].copyFrame(&other[0])
	if !eng.shared.Marked() {
		t.Error("a frame that is a copy of one with a hash is not searched for")
	}
	if n, err := tx.Send(f[:]); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	var got [16]Frame
	n, err := rx.Receive(got[:])
	if err != nil {
		t.Fatal(err)
	}
	rx.Release(got[:n])
	if x := p.back.Stats().RX.Get(telemetry.ExtraInfos); n == 8 && x == 0 { // the ninth frame may not have been taken yet
		n, err = rx.Receive(got[:])
		rx.Release(got[:n])
	}
	if x := p.back.Stats().RX.Get(telemetry.ExtraInfos); err != nil || x != 1 {
		t.Errorf("%d extra infos, %v", x, err)
	}
}
