package hostile

import (
	"bytes"
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

// A host is a raw backend of our frontend.
type host struct {
	*raw.Back
	l     *lab
	v     toolstack.Vif
	dev   *pvnet.Device
	sink  *sink
	base  emu.Ledger
	lines int
	refs  []hypercall.GrantRef // pages posted and not used, oldest first
}

var frontKeys = []string{
	"tx-ring-ref", "rx-ring-ref", "event-channel", "event-channel-tx", "event-channel-rx",
}

// lure adds a vif with a raw backend, and connects our frontend to it.
func (l *lab) lure(cfg pvnet.Config) *host {
	l.t.Helper()
	h := l.bait(cfg)
	h.sink = listen(h.dev)
	return h
}

func (l *lab) bait(cfg pvnet.Config) *host {
	l.t.Helper()
	h := &host{l: l, base: l.Ledger(), lines: l.log.count(slog.LevelError)}
	h.v = l.vif()
	cfg.Logger = slog.New(l.log)
	connected := make(chan error, 1)
	go func() {
		var err error
		h.dev, err = pvnet.Connect(ctx(l.t), l.guest, fmt.Sprint(h.v.ID), cfg)
		connected <- err
	}()
	h.offer()
	if err := wait(l.t, connected); err != nil {
		l.t.Fatal(err)
	}
	up(l.t, h.dev)
	return h
}

// offer performs the handshake of a correct backend.
func (h *host) offer() { h.offerWith(raw.BackKeys()) }

func (h *host) offerWith(offer xenstore.Values) {
	h.l.t.Helper()
	l, v := h.l, h.v
	l.write(l.dc, v.BackDir(), offer, "2")
	l.await(v.FrontDir()+"/state", "4")
	keys := make(xenstore.Values)
	for _, k := range frontKeys {
		if s, err := l.store.Read(v.FrontDir() + "/" + k); err == nil {
			keys[k] = s
		}
	}
	var err error
	if h.Back, err = raw.NewBack(l.drv, frontID, keys); err != nil {
		l.t.Fatal(err)
	}
	h.state("4")
}

func (h *host) state(s string) { h.l.write(h.l.dc, h.v.BackDir(), nil, s) }

// leave disconnects our frontend and requires everything back.
func (h *host) leave() {
	h.l.t.Helper()
	go h.dev.Disconnect()
	h.l.await(h.v.FrontDir()+"/state", "5")
	h.gone()
}

// gone answers a frontend that closes, and requires everything back.
func (h *host) gone() {
	h.l.t.Helper()
	h.state("5")
	h.l.await(h.v.FrontDir()+"/state", "6")
	if err := h.Close(); err != nil {
		h.l.t.Error(err)
	}
	h.state("6")
	wait(h.l.t, h.dev.Done())
	if h.sink != nil {
		wait(h.l.t, h.sink.ended)
	}
	h.l.remove(h.v)
	eventually(h.l.t, "everything back", func() bool { return h.l.Ledger() == h.base })
}

// fatal requires that the attack ends the frontend's device.
func (h *host) fatal(ring, want string) {
	h.l.t.Helper()
	h.l.await(h.v.FrontDir()+"/state", "5")
	h.gone()
	_, err := h.dev.Write(pattern(60, 0))
	var pe *pvnet.PeerError
	if !errors.As(err, &pe) || pe.Ring != ring || !strings.Contains(pe.Reason, want) || !errors.Is(err, pvnet.ErrDisconnected) {
		h.l.t.Errorf("ended with %v, want a PeerError of the %s ring: %q", err, ring, want)
	}
	if n := h.l.log.count(slog.LevelError) - h.lines; n != 1 {
		h.l.t.Errorf("%d lines of errors, want 1\n%s", n, h.l.log)
	}
}

// take waits until refs has n posted pages.
func (h *host) take(n int) {
	h.l.t.Helper()
	if n -= len(h.refs); n > 0 {
		refs, err := h.Posted(n, soon())
		if err != nil {
			h.l.t.Fatal(err)
		}
		h.refs = append(h.refs, refs...)
	}
}

// slot returns a response for the next posted page, after copying p there at off.
func (h *host) slot(off uint16, flags uint16, p []byte) [2]uint32 {
	h.l.t.Helper()
	r := h.raw(raw.RxRsp{Offset: off, Flags: flags, Status: int16(len(p))})
	if err := h.Fill(h.refs[0], off, p); err != nil {
		h.l.t.Fatal(err)
	}
	h.refs = h.refs[1:]
	h.RxProd++ // counts the slot that the response will take
	return r
}

// raw returns a response with the id of its slot.
func (h *host) raw(r raw.RxRsp) [2]uint32 {
	h.take(1)
	r.ID = uint16(h.RxProd % raw.Size)
	return r.Words()
}

// deliver puts slots that RxProd has counted already into the ring.
func (h *host) deliver(slots ...[2]uint32) {
	h.RxProd -= uint32(len(slots))
	h.Deliver(slots...)
}

// bad returns a response whose page is not filled.
func (h *host) bad(r raw.RxRsp) [2]uint32 {
	w := h.raw(r)
	h.refs = h.refs[1:]
	h.RxProd++
	return w
}

// extra returns an extra, which takes a slot and the page posted for it.
func (h *host) extra(x raw.Extra) [2]uint32 {
	h.take(1)
	h.refs = h.refs[1:]
	h.RxProd++
	w := x.Words()
	return [2]uint32{w[0], w[1]}
}

// works requires that a frame arrives at our frontend, and one from it at the host.
func (h *host) works() {
	h.l.t.Helper()
	for len(h.sink.frames) > 0 {
		<-h.sink.frames
	}
	want := pattern(200, int(h.RxProd))
	h.deliver(h.slot(2, raw.RxValidated, want))
	if got := wait(h.l.t, h.sink.frames); !bytes.Equal(got, want) {
		h.l.t.Fatalf("%d bytes arrived as %d others", len(want), len(got))
	}
	if _, err := h.dev.Write(want); err != nil {
		h.l.t.Fatal(err)
	}
	reqs, err := h.Requests(1, soon())
	if err != nil {
		h.l.t.Fatal(err)
	}
	got := make([]byte, 200)
	if err := h.Read(hypercall.GrantRef(reqs[0].Ref), reqs[0].Offset, got); err != nil || !bytes.Equal(got, want) || reqs[0].Size != 200 {
		h.l.t.Fatalf("a frame of ours came as %+v: %v", reqs[0], err)
	}
	h.Answer(raw.TxRsp{ID: reqs[0].ID})
}

func TestT01ProducerJumpsOnTheFrontend(t *testing.T) {
	l := newLab(t, emu.Config{})
	honest := l.lure(pvnet.Config{})
	for _, ahead := range []uint32{1, 257, 1 << 16, 1<<31 - 1, 1 << 31, 1<<31 + 1, ^uint32(0)} {
		for _, ring := range []string{"tx", "rx"} {
			t.Run(fmt.Sprint(ring, "+", ahead), func(t *testing.T) {
				l.t = t
				h := l.lure(pvnet.Config{})
				h.works()
				if ring == "rx" {
					if ahead == 1 { // 256 are posted, so this is one of them
						ahead = 257
					}
					h.Rx.Store(raw.RspProd, h.RxProd+ahead)
					h.RxPort.Notify()
				} else {
					// The frontend reads the responses when it needs room.
					if ahead == ^uint32(0) {
						// Backwards: of that it can know once it has taken responses,
						// and for the 257th frame it has.
						for range 257 {
							if _, err := h.dev.Write(pattern(60, 0)); err != nil {
								t.Fatal(err)
							}
							reqs, err := h.Requests(1, soon())
							if err != nil {
								t.Fatal(err)
							}
							h.Answer(raw.TxRsp{ID: reqs[0].ID})
						}
						ahead = -h.TxProd
					}
					h.Tx.Store(raw.RspProd, h.TxProd+ahead)
					h.TxPort.Notify()
					h.dev.SetWriteDeadline(soon())
					for range 600 {
						if _, err := h.dev.Write(pattern(60, 0)); err != nil {
							break
						}
					}
				}
				want := "impossible"
				if ring == "tx" && ahead == 1 {
					want = "" // or the id of a response that was never written
				}
				h.fatal(ring, want)
			})
		}
	}
	l.t = t
	honest.works()
	honest.leave()
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
			h := l.lure(pvnet.Config{})
			defer func() {
				if !t.Failed() && c.want == "" {
					h.leave()
				}
			}()
			for range 2 {
				if _, err := h.dev.Write(pattern(60, 0)); err != nil {
					t.Fatal(err)
				}
			}
			reqs, err := h.Requests(2, soon())
			if err != nil {
				t.Fatal(err)
			}
			rsp := c.ids([]uint16{reqs[0].ID, reqs[1].ID})
			h.Answer(rsp...)
			// The frontend reads the responses when it needs room.
			err = nil
			for n := 0; err == nil && n < 600; n++ {
				h.dev.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
				_, err = h.dev.Write(pattern(60, 0))
			}
			if c.want != "" {
				h.fatal("tx", c.want)
				// Each frame is lost for one reason: one for the response with the wrong
				// id, the others for the end of the connection.
				st := h.dev.Stats()
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
			reqs, err = h.Requests(256, time.Now().Add(2*time.Second))
			if err != nil {
				st := h.dev.Stats()
				t.Fatal(err, h.Tx.Load(raw.ReqProd), st.TX.Get(telemetry.Packets))
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
		h := l.lure(pvnet.Config{LendRx: lend})
		h.works()
		chain := func(sizes ...int) (slots [][2]uint32, want []byte) {
			for i, n := range sizes {
				flags := uint16(raw.RxMore)
				if i == len(sizes)-1 {
					flags = 0
				}
				p := pattern(n, i)
				slots = append(slots, h.slot(uint16((4096-n)/2), flags, p))
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
			if got := wait(t, h.sink.frames); !bytes.Equal(got, want) {
				t.Fatalf("%d bytes arrived as %d others", len(want), len(got))
			}
		}
		lost := func(what string, reason telemetry.Reason, slots ...[2]uint32) {
			t.Helper()
			before := h.dev.Stats()
			h.deliver(slots...)
			eventually(t, what, func() bool {
				st := h.dev.Stats()
				return st.RX.Lost(reason) == before.RX.Lost(reason)+1
			})
			h.works() // and no other frame came
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
					h.deliver(slots...)
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
			lost(fmt.Sprintf("%+v", r), telemetry.DropBadOffset, h.bad(r))
		}
		for _, status := range []int16{-1, -2, -3, -13, -32768} {
			lost(fmt.Sprint("status ", status), telemetry.DropBackendError, h.bad(raw.RxRsp{Status: status}))
		}
		// Extras. The frontend did not ask for GSO; a hash is a hint.
		gso := func(x raw.Extra) (slots [][2]uint32, want []byte) {
			want = pattern(100, 9)
			slots = append(slots, h.slot(0, raw.RxExtra|raw.RxValidated, want), h.extra(x))
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
		h.deliver(slots...)
		arrives(want)
		slots, _ = gso(raw.Extra{Type: 4, Flags: 1})
		lost("one of two extras", telemetry.DropBadExtra, slots...)
		slots, _ = gso(raw.Extra{Type: 4, Flags: 1})
		for range 150 {
			slots = append(slots, h.extra(raw.Extra{Type: 4, Flags: 1}))
		}
		lost("endless MORE", telemetry.DropBadExtra, slots...)
		// The frontend completes checksums too.
		for _, v6 := range []bool{false, true} {
			blank, whole := packet(1, v6, true, 333, 7)
			h.deliver(h.slot(0, raw.RxBlank|raw.RxValidated|raw.RxMore, blank[:40]), h.slot(9, 0, blank[40:]))
			arrives(whole)
		}
		lost("blank garbage", telemetry.DropBadCsum, h.slot(0, raw.RxBlank, pattern(60, 0)))
		// The frontend ignores the id: the slot identifies the request.
		r := h.slot(0, 0, want)
		r[0] |= 0xffff
		h.deliver(r)
		arrives(want)
		// Afterwards every slot is posted again.
		eventually(t, "256 pages posted", func() bool { return h.Rx.Load(raw.ReqProd)-h.RxProd == 256 })
		h.leave()
	}
}
