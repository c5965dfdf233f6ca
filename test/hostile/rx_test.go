package hostile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
)

// A driver is a raw backend, in the driver domain, of our frontend.
type driver struct {
	*raw.Back
	l          *lab
	v          toolstack.Vif
	dev        *pvnet.Device
	sink       *sink
	before     emu.Ledger
	errorLines int
	posted     []hypercall.GrantRef // pages posted and not used, oldest first
	more       []func() error       // closes what else it has of the frontend's
}

var frontKeys = []string{
	"tx-ring-ref", "rx-ring-ref", "event-channel", "event-channel-tx", "event-channel-rx",
}

// attackFrontend adds a vif with a raw backend, and connects our frontend to it.
func (l *lab) attackFrontend(cfg pvnet.Config) *driver {
	l.t.Helper()
	drv := l.connectFrontend(cfg)
	drv.sink = listen(drv.dev)
	return drv
}

// connectFrontend is attackFrontend without a sink.
func (l *lab) connectFrontend(cfg pvnet.Config) *driver {
	l.t.Helper()
	return l.connectFrontendBy(cfg, (*driver).offer)
}

// connectFrontendBy connects our frontend to a raw backend that answers it with offer.
func (l *lab) connectFrontendBy(cfg pvnet.Config, offer func(*driver)) *driver {
	l.t.Helper()
	drv := &driver{l: l, before: l.Ledger(), errorLines: l.log.count(slog.LevelError)}
	drv.v = l.addVif()
	cfg.Logger = slog.New(l.log)
	c := l.startConnect(ctx(l.t), drv.v, cfg)
	offer(drv)
	if err := wait(l.t, c.done); err != nil {
		l.t.Fatal(err)
	}
	drv.dev = c.dev
	waitLinkUp(l.t, drv.dev)
	return drv
}

// A connecting frontend is a Connect of our own that runs until done.
type connecting struct {
	done chan error    // the error that Connect returned
	dev  *pvnet.Device // read only after done
}

// startConnect starts to connect our frontend to the backend of v.
func (l *lab) startConnect(ctx context.Context, v toolstack.Vif, cfg pvnet.Config) *connecting {
	c := &connecting{done: make(chan error, 1)}
	go func() {
		var err error
		c.dev, err = pvnet.Connect(ctx, l.guest, fmt.Sprint(v.ID), cfg)
		c.done <- err
	}()
	return c
}

// offer performs the handshake of a correct backend.
func (drv *driver) offer() { drv.offerWith(raw.BackKeys()) }

func (drv *driver) offerWith(offer xenstore.Values) {
	drv.l.t.Helper()
	l, v := drv.l, drv.v
	l.write(l.drvStore, v.BackDir(), offer, "2")
	drv.awaitFrontend("4")
	keys := make(xenstore.Values)
	for _, k := range frontKeys {
		if s, err := l.store.Read(v.FrontDir() + "/" + k); err == nil {
			keys[k] = s
		}
	}
	var err error
	if drv.Back, err = raw.NewBack(l.drv, frontID, keys); err != nil {
		l.t.Fatal(err)
	}
	drv.posted = nil
	drv.setState("4")
}

// reconnect offers the vif again and waits until our frontend is connected to it.
func (drv *driver) reconnect() {
	drv.l.t.Helper()
	drv.offer()
	drv.awaitPages()
}

// awaitPages waits until our frontend has the pages of a connection.
func (drv *driver) awaitPages() {
	drv.l.t.Helper()
	eventually(drv.l.t, "the link", func() bool { return drv.dev.Budget() != (pvnet.Budget{}) })
}

func (drv *driver) setState(s string) { drv.l.write(drv.l.drvStore, drv.v.BackDir(), nil, s) }

// awaitFrontend waits until the state of our frontend is one of states.
func (drv *driver) awaitFrontend(states ...string) string {
	drv.l.t.Helper()
	return drv.l.await(drv.v.FrontDir()+"/state", states...)
}

// closeHandshake closes the connection as a correct backend does: it unmaps the rings
// before it is in Closed.
func (drv *driver) closeHandshake() {
	drv.l.t.Helper()
	drv.setState("5")
	drv.awaitFrontend("6")
	if err := drv.Close(); err != nil {
		drv.l.t.Fatal(err)
	}
	drv.setState("6")
	drv.awaitFrontend("1")
}

// disconnect disconnects our frontend and requires everything back.
func (drv *driver) disconnect() {
	drv.l.t.Helper()
	go drv.dev.Disconnect()
	drv.awaitFrontend("5")
	drv.finishClose()
}

// finishClose answers a frontend that closes, and requires everything back.
func (drv *driver) finishClose() {
	drv.l.t.Helper()
	drv.setState("5")
	drv.awaitFrontend("6")
	for _, end := range append(drv.more, drv.Close) {
		if err := end(); err != nil {
			drv.l.t.Error(err)
		}
	}
	drv.setState("6")
	wait(drv.l.t, drv.dev.Done())
	if drv.sink != nil {
		wait(drv.l.t, drv.sink.ended)
	}
	drv.l.removeVif(drv.v)
	eventually(drv.l.t, "everything back", func() bool { return drv.l.Ledger() == drv.before })
}

// requirePeerError requires that the attack ends the frontend's device.
func (drv *driver) requirePeerError(ring, want string) {
	drv.l.t.Helper()
	drv.awaitFrontend("5")
	drv.finishClose()
	_, err := drv.dev.Write(pattern(60, 0))
	var pe *pvnet.PeerError
	if !errors.As(err, &pe) || pe.Ring != ring || !strings.Contains(pe.Reason, want) || !errors.Is(err, pvnet.ErrDisconnected) {
		drv.l.t.Errorf("ended with %v, want a PeerError of the %s ring: %q", err, ring, want)
	}
	if n := drv.l.log.count(slog.LevelError) - drv.errorLines; n != 1 {
		drv.l.t.Errorf("%d lines of errors, want 1\n%s", n, drv.l.log)
	}
}

// awaitPosted waits until refs has n posted pages.
func (drv *driver) awaitPosted(n int) {
	drv.l.t.Helper()
	if n -= len(drv.posted); n > 0 {
		refs, err := drv.Posted(n, deadline())
		if err != nil {
			drv.l.t.Fatal(err)
		}
		drv.posted = append(drv.posted, refs...)
	}
}

// fillSlot returns a response for the next posted page, after copying p there at off.
func (drv *driver) fillSlot(off uint16, flags uint16, p []byte) [2]uint32 {
	drv.l.t.Helper()
	r := drv.response(raw.RxRsp{Offset: off, Flags: flags, Status: int16(len(p))})
	if err := drv.Fill(drv.posted[0], off, p); err != nil {
		drv.l.t.Fatal(err)
	}
	drv.posted = drv.posted[1:]
	drv.RxProd++ // counts the slot that the response will take
	return r
}

// response returns a response with the id of its slot.
func (drv *driver) response(r raw.RxRsp) [2]uint32 {
	drv.awaitPosted(1)
	r.ID = uint16(drv.RxProd % raw.Size)
	return r.Words()
}

// deliverSlots puts slots that RxProd has counted already into the ring.
func (drv *driver) deliverSlots(slots ...[2]uint32) {
	drv.RxProd -= uint32(len(slots))
	drv.Deliver(slots...)
}

// unfilledSlot returns a response whose page is not filled.
func (drv *driver) unfilledSlot(r raw.RxRsp) [2]uint32 {
	w := drv.response(r)
	drv.posted = drv.posted[1:]
	drv.RxProd++
	return w
}

// extraSlot returns an extra, which takes a slot and the page posted for it.
func (drv *driver) extraSlot(x raw.Extra) [2]uint32 {
	drv.awaitPosted(1)
	drv.posted = drv.posted[1:]
	drv.RxProd++
	w := x.Words()
	return [2]uint32{w[0], w[1]}
}

// awaitRequests takes n requests of our frontend from the tx ring.
func (drv *driver) awaitRequests(n int) []raw.TxReq {
	drv.l.t.Helper()
	reqs, err := drv.Requests(n, deadline())
	if err != nil {
		drv.l.t.Fatal(err)
	}
	return reqs
}

// requireTraffic requires that a frame arrives at our frontend, and one from it at the host.
func (drv *driver) requireTraffic() {
	drv.l.t.Helper()
	for len(drv.sink.frames) > 0 {
		<-drv.sink.frames
	}
	want := pattern(200, int(drv.RxProd))
	drv.deliverSlots(drv.fillSlot(2, raw.RxValidated, want))
	drv.sink.requireFrame(drv.l.t, want)
	if _, err := drv.dev.Write(want); err != nil {
		drv.l.t.Fatal(err)
	}
	reqs, err := drv.Requests(1, deadline())
	if err != nil {
		drv.l.t.Fatal(err)
	}
	got := make([]byte, 200)
	if err := drv.Read(hypercall.GrantRef(reqs[0].Ref), reqs[0].Offset, got); err != nil || !bytes.Equal(got, want) || reqs[0].Size != 200 {
		drv.l.t.Fatalf("a frame of ours came as %+v: %v", reqs[0], err)
	}
	drv.Answer(raw.TxRsp{ID: reqs[0].ID})
}

func TestT01ProducerJumpsOnTheFrontend(t *testing.T) {
	l := newLab(t, emu.Config{})
	honest := l.attackFrontend(pvnet.Config{})
	for _, ahead := range []uint32{1, 257, 1 << 16, 1<<31 - 1, 1 << 31, 1<<31 + 1, ^uint32(0)} {
		for _, ring := range []string{"tx", "rx"} {
			t.Run(fmt.Sprint(ring, "+", ahead), func(t *testing.T) {
				l.t = t
				drv := l.attackFrontend(pvnet.Config{})
				drv.requireTraffic()
				if ring == "rx" {
					if ahead == 1 { // 256 are posted, so this is one of them
						ahead = 257
					}
					drv.Rx.Store(raw.RspProd, drv.RxProd+ahead)
					drv.RxPort.Notify()
				} else {
					// The frontend reads the responses when it needs room.
					if ahead == ^uint32(0) {
						// Backwards: of that it can know once it has taken responses,
						// and for the 257th frame it has.
						for range 257 {
							if _, err := drv.dev.Write(pattern(60, 0)); err != nil {
								t.Fatal(err)
							}
							reqs := drv.awaitRequests(1)
							drv.Answer(raw.TxRsp{ID: reqs[0].ID})
						}
						ahead = -drv.TxProd
					}
					drv.Tx.Store(raw.RspProd, drv.TxProd+ahead)
					drv.TxPort.Notify()
					drv.dev.SetWriteDeadline(deadline())
					for range 600 {
						if _, err := drv.dev.Write(pattern(60, 0)); err != nil {
							break
						}
					}
				}
				want := "impossible"
				if ring == "tx" && ahead == 1 {
					want = "" // or the id of a response that was never written
				}
				drv.requirePeerError(ring, want)
			})
		}
	}
	l.t = t
	honest.requireTraffic()
	honest.disconnect()
}

// xennet_tx_buf_gc: "Illegal number of responses", "id is out of range", "not
// outstanding".
func TestT05ResponseIDs(t *testing.T) {
	l := newLab(t, emu.Config{})
	for _, c := range []struct {
		name string
		ids  func(own []uint16) []raw.TxRsp
		want string // "": a legal response
	}{
		{"out of range", func([]uint16) []raw.TxRsp { return []raw.TxRsp{{ID: 256}} }, "not outstanding"},
		{"0x8000", func([]uint16) []raw.TxRsp { return []raw.TxRsp{{ID: 0x8000}} }, "not outstanding"},
		{"0xFFFF", func([]uint16) []raw.TxRsp { return []raw.TxRsp{{ID: 0xFFFF}} }, "not outstanding"},
		{"twice", func(own []uint16) []raw.TxRsp { return []raw.TxRsp{{ID: own[0]}, {ID: own[0]}} }, "not outstanding"},
		{"twice, with errors", func(own []uint16) []raw.TxRsp {
			return []raw.TxRsp{{ID: own[1], Status: raw.Error}, {ID: own[1], Status: raw.Dropped}}
		}, "not outstanding"},
		{"NULL without an extra", func(own []uint16) []raw.TxRsp { return []raw.TxRsp{{ID: own[0], Status: raw.Null}} }, "extra that was not sent"},
		{"swapped", func(own []uint16) []raw.TxRsp { return []raw.TxRsp{{ID: own[1]}, {ID: own[0]}} }, ""},
		{"errors", func(own []uint16) []raw.TxRsp {
			return []raw.TxRsp{{ID: own[0], Status: raw.Error}, {ID: own[1], Status: -13}}
		}, ""},
		{"unknown good status", func(own []uint16) []raw.TxRsp {
			return []raw.TxRsp{{ID: own[0], Status: 2}, {ID: own[1], Status: 0x7fff}}
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.t = t
			drv := l.attackFrontend(pvnet.Config{})
			defer func() {
				if !t.Failed() && c.want == "" {
					drv.disconnect()
				}
			}()
			for range 2 {
				if _, err := drv.dev.Write(pattern(60, 0)); err != nil {
					t.Fatal(err)
				}
			}
			reqs := drv.awaitRequests(2)
			rsp := c.ids([]uint16{reqs[0].ID, reqs[1].ID})
			drv.Answer(rsp...)
			// The frontend reads the responses when it needs room.
			var err error
			for n := 0; err == nil && n < 600; n++ {
				drv.dev.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
				_, err = drv.dev.Write(pattern(60, 0))
			}
			if c.want != "" {
				drv.requirePeerError("tx", c.want)
				// Each frame is lost for one reason: one for the response with the wrong
				// id, the others for the end of the connection.
				st := drv.dev.Stats()
				sent, lost := st.TX.Get(telemetry.Packets), st.TX.Dropped()+st.TX.Errors()
				arrived, wrong := uint64(0), uint64(1)
				for _, r := range rsp[:len(rsp)-1] {
					if r.Status == raw.Okay {
						arrived++
					}
				}
				if c.want != "not outstanding" {
					wrong = 0
				}
				if n := st.TX.Lost(telemetry.DropBadID); n != wrong || sent != lost+arrived {
					t.Errorf("%d lost for a bad id; sent %d, lost %d, arrived %d", n, sent, lost, arrived)
				}
				return
			}
			var pe *pvnet.PeerError
			if errors.As(err, &pe) {
				t.Fatal(err)
			}
			// Room for as many as were answered: 256 in all.
			reqs, err = drv.Requests(256, time.Now().Add(2*time.Second))
			if err != nil {
				st := drv.dev.Stats()
				t.Fatal(err, drv.Tx.Load(raw.ReqProd), st.TX.Get(telemetry.Packets))
			}
			seen := map[uint16]bool{}
			for _, r := range reqs {
				if seen[r.ID] {
					t.Errorf("id %d is out twice", r.ID)
				}
				seen[r.ID] = true
			}
		})
	}
}

// Responses on the rx ring (xennet_get_responses, xennet_get_extras): an error in one
// frame costs only that frame.
func TestT06ReceivedChains(t *testing.T) {
	l := newLab(t, emu.Config{})
	for _, lend := range []bool{false, true} {
		drv := l.attackFrontend(pvnet.Config{LendRx: lend})
		drv.requireTraffic()
		chain := func(sizes ...int) (slots [][2]uint32, want []byte) {
			for i, n := range sizes {
				flags := uint16(raw.RxMore)
				if i == len(sizes)-1 {
					flags = 0
				}
				p := pattern(n, i)
				slots = append(slots, drv.fillSlot(uint16((4096-n)/2), flags, p))
				want = append(want, p...)
			}
			return slots, want
		}
		same := func(n, size int) []int {
			s := make([]int, n)
			for i := range s {
				s[i] = size
			}
			return s
		}
		arrives := func(want []byte) {
			t.Helper()
			drv.sink.requireFrame(t, want)
		}
		lost := func(what string, reason telemetry.Reason, slots ...[2]uint32) {
			t.Helper()
			before := drv.dev.Stats()
			drv.deliverSlots(slots...)
			eventually(t, what, func() bool {
				st := drv.dev.Stats()
				return st.RX.Lost(reason) == before.RX.Lost(reason)+1
			})
			drv.requireTraffic() // and no other frame came
		}
		for n := 1; n <= 24; n++ {
			for _, size := range []int{0, 1, 14, 900, 4096} {
				slots, want := chain(same(n, size)...)
				what := fmt.Sprintf("a chain of %d times %d", n, size)
				switch {
				case n > 19:
					lost(what, telemetry.DropBadChain, slots...)
				case len(want) < 14:
					lost(what, telemetry.DropTooShort, slots...)
				case len(want) > 65535:
					lost(what, telemetry.DropTooLong, slots...)
				default:
					drv.deliverSlots(slots...)
					arrives(want)
				}
			}
		}
		// A chain without an end takes all the responses there are, and no more.
		slots, _ := chain(same(200, 60)...)
		for i := range slots {
			slots[i][1] |= raw.RxMore
		}
		lost("an endless chain", telemetry.DropBadChain, slots...)
		// A chain must be complete: the frontend does not wait for missing slots.
		slots, _ = chain(100, 100)
		lost("more_data at the end", telemetry.DropBadChain, slots[0], func() [2]uint32 { slots[1][1] |= raw.RxMore; return slots[1] }())
		// Slots with wrong values.
		for _, r := range []raw.RxRsp{
			{Status: 4097}, {Status: 0x7fff}, {Offset: 1, Status: 4096}, {Offset: 4096, Status: 1},
			{Offset: 0xffff, Status: 1}, {Offset: 0xfff0, Status: 0x7fff}, {Offset: 4097, Status: 0},
		} {
			lost(fmt.Sprintf("%+v", r), telemetry.DropBadOffset, drv.unfilledSlot(r))
		}
		for _, status := range []int16{-1, -2, -3, -13, -32768} {
			lost(fmt.Sprint("status ", status), telemetry.DropBackendError, drv.unfilledSlot(raw.RxRsp{Status: status}))
		}
		// Extras. The frontend did not ask for GSO; a hash is a hint.
		gso := func(x raw.Extra) (slots [][2]uint32, want []byte) {
			want = pattern(100, 9)
			slots = append(slots, drv.fillSlot(0, raw.RxExtra|raw.RxValidated, want), drv.extraSlot(x))
			return slots, want
		}
		for name, x := range map[string]raw.Extra{
			"type 0": {}, "type 6": {Type: 6}, "type 255": {Type: 255},
			"GSO size 0": raw.GSO(0, 1), "GSO type 0": raw.GSO(1448, 0), "GSO type 9": raw.GSO(1448, 9),
		} {
			slots, _ := gso(x)
			lost(name, telemetry.DropBadExtra, slots...)
		}
		slots, _ = gso(raw.GSO(1448, 1))
		lost("GSO", telemetry.DropBadGSO, slots...)
		slots, want := gso(raw.Extra{Type: 4, Body: [6]byte{1, 1, 2, 3, 4, 5}})
		drv.deliverSlots(slots...)
		arrives(want)
		slots, _ = gso(raw.Extra{Type: 4, Flags: 1})
		lost("one of two extras", telemetry.DropBadExtra, slots...)
		slots, _ = gso(raw.Extra{Type: 4, Flags: 1})
		for range 150 {
			slots = append(slots, drv.extraSlot(raw.Extra{Type: 4, Flags: 1}))
		}
		lost("endless MORE", telemetry.DropBadExtra, slots...)
		// The frontend completes checksums too.
		for _, v6 := range []bool{false, true} {
			blank, whole := packet(1, v6, true, 333, 7)
			drv.deliverSlots(drv.fillSlot(0, raw.RxBlank|raw.RxValidated|raw.RxMore, blank[:40]), drv.fillSlot(9, 0, blank[40:]))
			arrives(whole)
		}
		lost("blank garbage", telemetry.DropBadCsum, drv.fillSlot(0, raw.RxBlank, pattern(60, 0)))
		// The frontend ignores the id: the slot identifies the request.
		r := drv.fillSlot(0, 0, want)
		r[0] |= 0xffff
		drv.deliverSlots(r)
		arrives(want)
		// Afterwards every slot is posted again.
		eventually(t, "256 pages posted", func() bool { return drv.Rx.Load(raw.ReqProd)-drv.RxProd == 256 })
		drv.disconnect()
	}
}
