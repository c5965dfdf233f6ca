package hostile

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/test/hostile/raw"
)

// XENVIF_TX: "Impossible number of requests" (xenvif_tx_build_gops).
func TestT01ProducerJumps(t *testing.T) {
	l := newServingLab(t)
	honest := l.attackBackend()
	for _, ahead := range []uint32{257, 258, 1 << 16, 1<<31 - 1, 1 << 31, 1<<31 + 1, rand.Uint32() | 1<<20, ^uint32(0)} {
		for _, ring := range []string{"tx", "rx"} {
			t.Run(fmt.Sprint(ring, "+", ahead), func(t *testing.T) {
				g := l.attackBackend()
				g.requireTraffic()
				copies := l.drv.Calls().CopyOps
				if ring == "tx" {
					g.Tx.Store(raw.ReqProd, g.TxProd+ahead)
					g.TxPort.Notify()
				} else {
					// The backend reads the rx ring when it has something to send.
					g.Rx.Store(raw.ReqProd, g.RxProd+ahead)
					if _, err := g.dev.Write(pattern(60, 0)); err == nil {
						t.Error("a frame was sent")
					}
				}
				g.requirePeerError(ring, "impossible")
				if n := l.drv.Calls().CopyOps - copies; n > 256 {
					t.Errorf("%d copies", n)
				}
			})
		}
	}
	honest.requireTraffic()
	honest.disconnect()
}

func TestT02ProducerBackwardsOrStandingStill(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	for range 3 {
		g.requireTraffic()
	}
	for range 1000 { // no further change: nothing happens
		g.Tx.Store(raw.ReqProd, g.TxProd)
		g.TxPort.Notify()
		g.RxPort.Notify()
	}
	g.requireTraffic()
	g.Tx.Store(raw.ReqProd, g.TxProd-1)
	g.TxPort.Notify()
	g.requirePeerError("tx", "impossible")

	g = l.attackBackend()
	g.Post(3)
	g.requireTraffic()
	g.Rx.Store(raw.ReqProd, g.RxCons-1)
	if _, err := g.dev.Write(pattern(60, 0)); err == nil {
		// The backend still handles the requests that it had counted, and no others.
		for range 2 {
			if _, err = g.dev.Write(pattern(60, 0)); err != nil {
				break
			}
		}
	}
	if _, err := g.dev.Write(pattern(60, 0)); err == nil {
		t.Error("a fourth frame was sent")
	}
	g.requirePeerError("rx", "impossible")
}

// A verdict is what xenvif_tx_build_gops and its callees decide about one packet.
type verdict int

// noReason is the reason of a refusal by which no frame is lost.
const noReason telemetry.Reason = 0

const (
	pass verdict = iota
	refuse
	fatal
)

// netbackVerdict is netback's arithmetic (xenvif_count_requests, then the size tests of
// xenvif_tx_build_gops), computed from the requests themselves. fatal_skb_slots is 20 and
// XEN_NETBK_LEGACY_SLOTS_MAX 18; both are counted after the first request.
func netbackVerdict(reqs []raw.TxReq) verdict {
	first := reqs[0].Size
	dropped := false
	for n, r := range reqs[1:] {
		if n >= 20 {
			return fatal
		}
		dropped = dropped || n >= 18 || r.Size > first
		if !dropped {
			first -= r.Size
		}
		if int(r.Offset)+int(r.Size) > 4096 {
			return fatal
		}
	}
	if dropped || first < 14 {
		return refuse
	}
	if int(reqs[0].Offset)+int(first) > 4096 {
		return fatal
	}
	return pass
}

// chain is a packet of the guest: its first request holds the total size.
func (g *guest) chain(flags uint16, sizes ...int) (reqs []raw.TxReq, want []byte) {
	total := 0
	for _, n := range sizes {
		total += n
	}
	for i, n := range sizes {
		off := 0
		if n <= 4000 {
			off = 4 * i
		}
		r := g.Req(i, uint16(off), uint16(n), raw.TxMore)
		copy(g.Pages.Page(i)[off:], pattern(n, i))
		want = append(want, pattern(n, i)...)
		if i == 0 {
			r.Size = uint16(total)
			r.Flags |= flags
		}
		reqs = append(reqs, r)
	}
	reqs[len(reqs)-1].Flags &^= raw.TxMore
	return reqs, want
}

// send puts a packet with its extras and requires the verdict. want is the frame that
// must arrive if it passes. After a final verdict the guest cannot be used again.
func (g *guest) send(reqs []raw.TxReq, extras []raw.Extra, v verdict, reason telemetry.Reason, want []byte) {
	g.l.t.Helper()
	before := g.dev.Stats()
	g.Put(reqs[0].Words())
	for _, x := range extras {
		g.Put(x.Words())
	}
	for _, r := range reqs[1:] {
		g.Put(r.Words())
	}
	g.Push()
	if v == fatal {
		g.requirePeerError("tx", "")
		return
	}
	rsp, err := g.Answers(len(reqs)+len(extras), deadline())
	if err != nil {
		g.l.t.Fatal(err)
	}
	for i, r := range rsp {
		status, id := int16(raw.Okay), reqs[0].ID
		if v == refuse {
			status = raw.Error
		}
		switch {
		case 1 <= i && i <= len(extras):
			status, id = raw.Null, r.ID
		case i > len(extras):
			id = reqs[i-len(extras)].ID
		}
		if r != (raw.TxRsp{ID: id, Status: status}) {
			g.l.t.Fatalf("slot %d of %d+%d: answered %v, want id %d status %d", i, len(reqs), len(extras), r, id, status)
		}
	}
	if want != nil {
		g.sink.requireFrame(g.l.t, want)
	}
	if v == refuse && reason != noReason { // counted before the answer, visible when the device rests
		eventually(g.l.t, fmt.Sprint("a frame counted as lost for reason ", reason), func() bool {
			st := g.dev.Stats()
			return st.RX.Lost(reason) == before.RX.Lost(reason)+1
		})
	}
	after := g.dev.Stats()
	if lost := after.RX.Dropped() + after.RX.Errors() - before.RX.Dropped() - before.RX.Errors(); v == pass && want != nil && lost != 0 {
		g.l.t.Errorf("%d frames lost", lost)
	}
}

func TestT07SlotsAndSizes(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	seen := map[verdict]map[int]bool{pass: {}, refuse: {}, fatal: {}}
	for n := 1; n <= 24; n++ {
		for _, first := range []int{0, 1, 13, 14, 4096} {
			for _, mid := range []int{0, 1, 14, 4096} {
				for _, last := range []int{0, 1, 14, 4096} {
					if n == 1 && (mid != 0 || last != 0) || n == 2 && mid != 0 {
						continue
					}
					sizes := make([]int, n)
					total := first
					sizes[0] = first
					for i := 1; i < n; i++ {
						sizes[i] = mid
						if i == n-1 {
							sizes[i] = last
						}
						total += sizes[i]
					}
					if total > 0xffff {
						continue // does not fit a request
					}
					reqs, want := g.chain(0, sizes...)
					v := netbackVerdict(reqs)
					if v == fatal && (first+mid+last)%3 != 0 && n > 22 {
						continue // each costs a device
					}
					seen[v][n] = true
					reason := telemetry.DropBadChain
					if n <= 19 {
						reason = telemetry.DropTooShort
					}
					if v != pass {
						want = nil
					}
					g.send(reqs, nil, v, reason, want)
					if t.Failed() {
						t.Fatalf("%d slots of %d, %d, %d", n, first, mid, last)
					}
					if v == fatal {
						g = l.attackBackend()
					}
				}
			}
		}
	}
	g.requireTraffic()
	g.disconnect()
	for n := 1; n <= 24; n++ {
		if seen[pass][n] != (n <= 19) || seen[fatal][n] != (n >= 22) || n >= 20 && n <= 21 && !seen[refuse][n] {
			t.Errorf("%d slots: passed %v, refused %v, fatal %v", n, seen[pass][n], seen[refuse][n], seen[fatal][n])
		}
	}
}

// An event that brought only refused frames was not spurious: it must not delay the next
// event by up to a second (late EOI).
func TestFramesThatAreRefusedDelayNobody(t *testing.T) {
	inVirtualTime(t, testFramesThatAreRefusedDelayNobody)
}

func testFramesThatAreRefusedDelayNobody(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	start := time.Now()
	for range 40 {
		reqs, _ := g.chain(0, 10)
		g.send(reqs, nil, refuse, telemetry.DropTooShort, nil)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("40 refused frames took %v", d)
	}
	g.requireTraffic()
	g.disconnect()
}
