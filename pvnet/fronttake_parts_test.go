package pvnet

import (
	"fmt"
	"strings"
	"testing"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
)

// A frame that another process says it has taken out of the ring is one that can be.
func TestAParsedFrameIsChecked(t *testing.T) {
	good := func() *parsedState {
		x := netif.GSOExtra(netif.GSO{Size: 1000, Type: netif.GSOTCPv4})
		return &parsedState{
			Slots: 3, Checksum: ChecksumPartial,
			Segments: []parsedSegment{{0, 0, 4096}, {7, 96, 4000}},
			Extras:   []parsedExtra{{byte(x.Type), x.Body[:]}},
		}
	}
	for name, f := range map[string]func(*parsedState){
		"":                  func(*parsedState) {},
		"no segments":       func(s *parsedState) { s.Segments = nil },
		"too many segments": func(s *parsedState) { s.Segments, s.Slots = make([]parsedSegment, maxRxSlots+1), 99 },
		"too few slots":     func(s *parsedState) { s.Slots = 1 },
		"too many slots":    func(s *parsedState) { s.Slots = 257 },
		"a checksum":        func(s *parsedState) { s.Checksum = ChecksumPartial + 1 },
		"one page twice":    func(s *parsedState) { s.Segments[1].Page = 0 },
		"no such page":      func(s *parsedState) { s.Segments[1].Page = 8 },
		"beyond the page":   func(s *parsedState) { s.Segments[1].Offset = 97 },
		"no extra":          func(s *parsedState) { s.Extras[0].Type = 99 },
		"a short extra":     func(s *parsedState) { s.Extras[0].Body = []byte{1, 2} },
		"a long extra":      func(s *parsedState) { s.Extras[0].Body = make([]byte, 9) },
		"an empty frame":    func(s *parsedState) { s.Segments = []parsedSegment{{0, 0, 1}, {7, 0, 1}} },
		"too long a frame": func(s *parsedState) {
			s.Segments, s.Slots = nil, maxRxSlots
			for i := range maxRxSlots {
				s.Segments = append(s.Segments, parsedSegment{byte(i), 0, 4096})
			}
		},
	} {
		s := good()
		f(s)
		pages := 8
		if name == "too long a frame" || name == "too many segments" {
			pages = 32
		}
		e := frontRX{
			ring:   ring.NewFront[netif.RxRequest, netif.RxResponse](shm.Heap(1), netif.RxStride),
			shared: arena.New(shm.Heap(pages), shm.PageSize),
		}
		if name == "too many segments" {
			for i := range s.Segments {
				s.Segments[i] = parsedSegment{byte(i), 0, 60}
			}
		}
		err := e.resume(&queueState{Parsed: s})
		if (err == nil) != (name == "") {
			t.Errorf("%q: %v", name, err)
		}
		if free := e.shared.Free(); name != "" && free != pages || name == "" && (free != pages-2 || e.home() != pages || e.next.total != 8096) {
			t.Errorf("%q: %d pages are free", name, free)
		}
	}
}

// What is adopted is what a frontend of that many queues shares with its backend.
func TestAdoptedPartsAreChecked(t *testing.T) {
	next := hypercall.GrantRef(8)
	share := func(peer hypercall.DomID, pages int, access hypercall.Access) *hypercall.Share {
		var refs []hypercall.GrantRef
		for range pages {
			refs, next = append(refs, next), next+1
		}
		return hypercall.NewShare(shm.Heap(pages), peer, access, refs, func() error { return nil })
	}
	const ro, rw = hypercall.ReadOnly, hypercall.ReadWrite
	good := func() (shares []*hypercall.Share, ports []int) {
		return []*hypercall.Share{share(2, 256, ro), share(2, 256, rw), share(2, 2, rw), share(2, 2, rw)}, []int{1, 1, 1}
	}
	for name, f := range map[string]func(shares []*hypercall.Share, ports []int) ([]*hypercall.Share, []int){
		"": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) { return s, p },
		"4 shares and 2 event channels": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			return s, p[1:]
		},
		"4 shares and 4 event channels": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			return s, append(p, 1)
		},
		"5 shares": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			return append(s, share(2, 2, rw)), p
		},
		"share 1 has 256 read-write pages for domain 3": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			s[1] = share(3, 256, rw)
			return s, p
		},
		"share 0 has 256 read-write": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			s[0] = share(2, 256, rw)
			return s, p
		},
		"share 1 has 256 read-only": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			s[1] = share(2, 256, ro)
			return s, p
		},
		"share 1 has 257": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			s[1] = share(2, 257, rw)
			return s, p
		},
		"share 3 has 1 ": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			s[3] = share(2, 1, rw)
			return s, p
		},
		"waiter 2 has 0": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			p[2] = 0
			return s, p
		},
		"waiter 0 has 2": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			p[0] = 2
			return s, p
		},
		"a grant is there twice": func(s []*hypercall.Share, p []int) ([]*hypercall.Share, []int) {
			s[3].Refs[1] = s[2].Refs[0]
			return s, p
		},
	} {
		shares, ports := f(good())
		var waiters []hypercall.AdoptedWaiter
		for _, n := range ports {
			waiters = append(waiters, hypercall.AdoptedWaiter{Ports: make([]hypercall.Port, n)})
		}
		h := frontSuccessor{
			state:   frontState{Back: 2, Features: frontFeatures{Split: true}, Queues: make([]queueState, 1), Ctrl: new(frontCtrlState)},
			adopted: hypercall.NewAdopted(shares, waiters, nil),
		}
		if err := h.checkParts(); (err == nil) != (name == "") || !strings.Contains(fmt.Sprint(err), name) && name != "" {
			t.Errorf("%q: %v", name, err)
		}
	}
}
