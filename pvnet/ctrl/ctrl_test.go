package ctrl

import (
	"errors"
	"testing"

	"barevif/arena/shm"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
)

// Offsets of the indices in a ring page, and of its slots (ring.h).
const (
	reqProd = 0
	rspProd = 8
	slots   = 64
)

// echo answers with the sum of the request's data.
func echo(r netif.CtrlRequest) (netif.CtrlStatus, uint32) {
	return netif.CtrlStatus(r.Data[2]), r.Data[0] + r.Data[1]
}

func newPair(t *testing.T) (shm.Memory, *Client, *Server) {
	t.Helper()
	page := shm.Heap(1)
	c := NewClient(page)
	s, err := Attach(page)
	if err != nil {
		t.Fatal(err)
	}
	s.Handle(netif.CtrlGetHashFlags, echo)
	s.Handle(netif.CtrlSetHashKey, echo)
	return page, c, s
}

func serve(t *testing.T, s *Server) {
	t.Helper()
	if served, _, err := s.Serve(); !served || err != nil {
		t.Fatalf("served %v, %v", served, err)
	}
}

func TestAnswers(t *testing.T) {
	_, c, s := newPair(t)
	if served, _, err := s.Serve(); served || err != nil {
		t.Errorf("an empty ring: %v, %v", served, err)
	}
	for i := range uint32(3 * 128) { // three times around the ring
		typ, want := netif.CtrlGetHashFlags, netif.CtrlResponse{Data: i + 1, Status: netif.CtrlStatus(i % 4)}
		switch i % 3 {
		case 1:
			typ = netif.CtrlSetHashKey
		case 2: // a type without a handler
			typ, want = netif.CtrlType(8+i), netif.CtrlResponse{Status: netif.CtrlNotSupported}
		}
		want.ID, want.Type = uint16(i+1), typ
		c.Ask(typ, [3]uint32{i, 1, i % 4})
		if _, ok, err := c.Answer(); ok || err != nil || !c.Waiting() {
			t.Fatalf("an answer before there is one: %v, %v", ok, err)
		}
		serve(t, s)
		if got, ok, err := c.Answer(); got != want || !ok || err != nil || c.Waiting() {
			t.Fatalf("request %d: %+v, %v, %v; want %+v", i, got, ok, err, want)
		}
	}
}

func TestSleepersAreNotified(t *testing.T) {
	_, c, s := newPair(t)
	if more, err := s.Arm(); more || err != nil {
		t.Fatalf("%v, %v", more, err)
	}
	if !c.Ask(netif.CtrlGetHashFlags, [3]uint32{}) || !s.Overdue() {
		t.Error("the server sleeps, and is not notified")
	}
	if more, err := s.Arm(); !more || err != nil {
		t.Errorf("armed with a request in the ring: %v, %v", more, err)
	}
	if more, err := c.Arm(); more || err != nil {
		t.Fatalf("%v, %v", more, err)
	}
	if _, notify, _ := s.Serve(); !notify || !c.Overdue() {
		t.Error("the client sleeps, and is not notified")
	}
	if more, err := c.Arm(); !more || err != nil {
		t.Errorf("armed with a response in the ring: %v, %v", more, err)
	}
}

func TestOneRequestInFlight(t *testing.T) {
	_, c, _ := newPair(t)
	c.Ask(netif.CtrlGetHashFlags, [3]uint32{})
	defer func() {
		if recover() == nil {
			t.Error("a second request went out")
		}
	}()
	c.Ask(netif.CtrlGetHashFlags, [3]uint32{})
}

// What no correct backend does is an error of the client, which is final.
func TestWrongResponses(t *testing.T) {
	asked := netif.CtrlResponse{ID: 1, Type: netif.CtrlSetHashFlags}
	for name, a := range map[string]struct {
		prod uint32
		rsp  netif.CtrlResponse
		want error
	}{
		"right":           {1, asked, nil},
		"another id":      {1, netif.CtrlResponse{ID: 2, Type: asked.Type}, ErrUnasked},
		"an old id":       {1, netif.CtrlResponse{ID: 0, Type: asked.Type}, ErrUnasked},
		"another type":    {1, netif.CtrlResponse{ID: 1, Type: netif.CtrlSetHashKey}, ErrUnasked},
		"nothing written": {1, netif.CtrlResponse{ID: 1, Type: netif.CtrlSetHashFlags, Status: 99}, nil}, // any status is an answer
		"two":             {2, asked, ring.ErrCorrupt},
		"far ahead":       {1 << 31, asked, ring.ErrCorrupt},
		"backwards":       {1<<32 - 1, asked, ring.ErrCorrupt},
	} {
		page := shm.Heap(1)
		c := NewClient(page)
		rsp := shm.NewSlots[netif.CtrlResponse](page, slots, 128, netif.CtrlStride)
		c.Ask(asked.Type, [3]uint32{})
		rsp.Store(0, a.rsp)
		page.Out(rspProd).Store(a.prod)
		if _, _, err := c.Answer(); !errors.Is(err, a.want) {
			t.Errorf("%s: %v, want %v", name, err, a.want)
		}
	}
}

func TestAnswersThatNobodyWaitsFor(t *testing.T) {
	page, c, s := newPair(t)
	c.Ask(netif.CtrlGetHashFlags, [3]uint32{})
	serve(t, s)
	if _, ok, err := c.Answer(); !ok || err != nil {
		t.Fatalf("%v, %v", ok, err)
	}
	page.Out(rspProd).Store(2) // the same response once more
	if _, ok, err := c.Answer(); ok || !errors.Is(err, ring.ErrCorrupt) {
		t.Errorf("a response to nothing: %v, %v", ok, err)
	}
	if _, err := c.Arm(); !errors.Is(err, ring.ErrCorrupt) {
		t.Errorf("armed beside it: %v", err)
	}
}

// Producer indices that no correct frontend writes: more requests than slots, and fewer
// than before.
func TestWildProducers(t *testing.T) {
	for _, prod := range []uint32{129, 1 << 16, 1 << 31, 1<<32 - 1} {
		page, _, s := newPair(t)
		page.Out(reqProd).Store(prod)
		if served, _, err := s.Serve(); served || !errors.Is(err, ring.ErrCorrupt) {
			t.Errorf("%d requests: %v, %v", prod, served, err)
		}
		if _, err := Attach(page); !errors.Is(err, ring.ErrCorrupt) {
			t.Errorf("attached to %d requests: %v", prod, err)
		}
	}
	page, _, s := newPair(t)
	page.Out(reqProd).Store(128)
	for range 128 {
		serve(t, s)
	}
	page.Out(reqProd).Store(127)
	if served, _, err := s.Serve(); served || !errors.Is(err, ring.ErrCorrupt) {
		t.Errorf("backwards: %v, %v", served, err)
	}
}

// A server that follows another answers what that one has not answered.
func TestAttachToALiveRing(t *testing.T) {
	page, c, s := newPair(t)
	for range 5 {
		c.Ask(netif.CtrlGetHashFlags, [3]uint32{})
		serve(t, s)
		c.Answer()
	}
	c.Ask(netif.CtrlGetHashFlags, [3]uint32{40, 2})
	next, err := Attach(page)
	if err != nil {
		t.Fatal(err)
	}
	next.Handle(netif.CtrlGetHashFlags, echo)
	serve(t, next)
	if r, ok, err := c.Answer(); r.Data != 42 || !ok || err != nil {
		t.Errorf("%+v, %v, %v", r, ok, err)
	}
}

// FuzzServer lets a frontend write any word of the ring page. The server answers as many
// requests as the frontend shows, and never more than fit.
func FuzzServer(f *testing.F) {
	f.Add([]byte{0, 1, 64, 2, 0, 2})
	f.Add([]byte{0, 128, 0, 127, 0, 255, 8, 3})
	f.Fuzz(func(t *testing.T, in []byte) {
		page := shm.Heap(1)
		NewClient(page)
		s, err := Attach(page)
		if err != nil {
			t.Fatal(err)
		}
		handled := 0
		s.Handle(3, func(netif.CtrlRequest) (netif.CtrlStatus, uint32) { handled++; return 0, 0 })
		for ; len(in) >= 2; in = in[2:] {
			page.Out(int(in[0]) * 4 % 128).Store(uint32(int32(int8(in[1]))))
			n := 0
			for served := true; served; n++ {
				if served, _, err = s.Serve(); err != nil {
					return
				}
			}
			if n > 129 {
				t.Fatalf("%d requests at once", n)
			}
			if _, err := s.Arm(); err != nil {
				return
			}
		}
	})
}

// FuzzClient lets a backend write any word of the ring page. The client accepts one
// response for each request, with its id and type.
func FuzzClient(f *testing.F) {
	f.Add([]byte{16, 1, 2, 1})
	f.Add([]byte{16, 1, 2, 1, 2, 2})
	f.Fuzz(func(t *testing.T, in []byte) {
		page := shm.Heap(1)
		c := NewClient(page)
		asked, answered := 0, 0
		for ; len(in) >= 2; in = in[2:] {
			if !c.Waiting() {
				asked++
				c.Ask(netif.CtrlType(asked%11), [3]uint32{})
			}
			page.Out(int(in[0]) * 4 % 256).Store(uint32(int32(int8(in[1]))))
			r, ok, err := c.Answer()
			if err != nil {
				return
			}
			if ok {
				if answered++; answered != asked || r.ID != uint16(asked) || r.Type != netif.CtrlType(asked%11) {
					t.Fatalf("%+v was taken as the answer to request %d", r, asked)
				}
			}
		}
	})
}
