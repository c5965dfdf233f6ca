package pvnet

import (
	"errors"
	"testing"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
)

// A chain or a list of extra infos that continues beyond the published slots is a
// violation, whatever the unpublished slots hold.
func TestARequestThatGoesOnBehindTheRingsEndIsAViolation(t *testing.T) {
	for name, flags := range map[string]netif.TxFlags{
		"more data":  netif.TxMoreData,
		"extra info": netif.TxExtraInfo,
	} {
		t.Run(name, func(t *testing.T) {
			p := join(t, emu.Config{}, plain, Config{})
			_, rx := own(t, p.back)
			e := p.front.tx[0].eng.(*frontTX)
			e.ring.Put(netif.TxRequest{Ref: e.refs[0], Size: 100, Flags: flags})
			e.ring.Publish()
			var f [1]Frame
			var broken *PeerError
			if n, err := rx.Poll(f[:]); n != 0 || !errors.As(err, &broken) || broken.Ring != "tx" {
				t.Errorf("%d frames, %v", n, err)
			}
		})
	}
}

// A request index that becomes impossible while requests are left is noticed when a frame
// needs more requests than that.
func TestAnImpossibleIndexIsSeenByASenderThatNeedsMore(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.back)
	e := p.back.tx[0].eng.(*backTX)
	page := shm.Heap(1)
	lying := ring.NewFront[netif.RxRequest, netif.RxResponse](page, netif.RxStride)
	for range 256 {
		lying.Put(netif.RxRequest{})
	}
	lying.Publish()
	b, err := ring.AttachBack[netif.RxRequest, netif.RxResponse](page, netif.RxStride)
	if err != nil {
		t.Fatal(err)
	}
	b.Poll()
	for range 254 {
		b.Take() // two are left
	}
	page.Out(0).Store(1 << 20) // the index of requests: impossible
	kept := e.ring
	e.ring = b
	var f [1]Frame
	tx.AllocSize(f[:], 3*shm.PageSize)
	var broken *PeerError
	if n, err := tx.Send(f[:]); n != 0 || !errors.As(err, &broken) || broken.Ring != "rx" {
		t.Errorf("%d frames, %v", n, err)
	}
	e.ring = kept
	f[0].Release()
}

// lazy is a domain whose Copy does nothing and leaves every status as it was.
type lazy struct{ hypercall.Domain }

func (lazy) Copy([]hypercall.CopyOp) error { return nil }

// A copy whose status Copy did not set counts as failed.
func TestACopyThatSetsNoStatusHasFailed(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	ftx, frx := own(t, p.front)
	btx, brx := own(t, p.back)
	round := func() {
		sendSizes(t, ftx, 60)
		receiveN(t, brx, 1)
		sendSizes(t, btx, 60)
		receiveN(t, frx, 1)
	}
	round() // leaves the status OK in the operations of both batches
	p.back.tx[0].eng.(*backTX).dom, p.back.rx[0].eng.(*backRX).dom = lazy{p.bdom}, lazy{p.bdom}
	sendSizes(t, ftx, 60)
	sendSizes(t, btx, 60)
	var f [1]Frame
	if n, err := brx.Poll(f[:]); n != 0 || err != nil {
		t.Errorf("the backend received %d frames, %v", n, err)
	}
	if n, err := frx.Poll(f[:]); n != 0 || err != nil {
		t.Errorf("the frontend received %d frames, %v", n, err)
	}
	st := p.back.Stats()
	if st.RX.Lost(telemetry.DropBadGref) != 1 || st.TX.Lost(telemetry.DropBadGref) != 1 {
		t.Errorf("lost %d and %d", st.RX.Lost(telemetry.DropBadGref), st.TX.Lost(telemetry.DropBadGref))
	}
	p.back.tx[0].eng.(*backTX).dom, p.back.rx[0].eng.(*backRX).dom = p.bdom, p.bdom
	round()
}
