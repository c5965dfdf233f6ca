package dhcpd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// A Pool gives the addresses of one network to vifs. A vif that comes back gets the address
// that it had, unless that was needed for another meanwhile. Its methods may be called from any
// goroutine.
type Pool struct {
	mu          sync.Mutex
	first, last uint32
	used        map[uint32]string // who has an address now
	before      map[string]uint32 // which address a vif had; at most one for each address
	owner       map[uint32]string // the inverse of before
	spoiled     map[uint32]spoil  // declined addresses
	reserved    map[uint32]bool   // addresses that are fixed for one vif each
	next        uint32            // where the search begins
}

// A spoil says who has declined an address, and until when it is not given.
type spoil struct {
	vif   string
	until time.Time
}

// ErrExhausted means that all addresses of a pool are in use.
var ErrExhausted = errors.New("all addresses of the pool are in use")

// NewPool makes a pool of the addresses from first to last, without those that are reserved for
// one vif each. With invalid addresses it has none.
func NewPool(first, last netip.Addr, reserved ...netip.Addr) *Pool {
	p := &Pool{used: map[uint32]string{}, before: map[string]uint32{}, owner: map[uint32]string{}, spoiled: map[uint32]spoil{}}
	p.Resize(first, last, reserved...)
	return p
}

// Resize changes the addresses of the pool. Addresses in use stay in use.
func (p *Pool) Resize(first, last netip.Addr, reserved ...netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reserved = map[uint32]bool{}
	for _, a := range reserved {
		p.reserved[toNumber(a)] = true
	}
	p.first, p.last = 1, 0
	if first.Is4() && last.Is4() {
		p.first, p.last = toNumber(first), toNumber(last)
	}
	p.next = p.first
}

func toNumber(a netip.Addr) uint32 { b := a.As4(); return binary.BigEndian.Uint32(b[:]) }

func toAddr(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// spoiledFor is how long the pool does not give an address that a guest has declined, and
// spoiledEach how many it takes from the pool in that time.
const (
	spoiledFor  = 10 * time.Minute
	spoiledEach = 2
)

// Take gives vif an address that no other has: want, if it is valid, or else one of the pool.
// The error says who has want, or is ErrExhausted.
func (p *Pool) Take(now time.Time, vif string, want netip.Addr) (netip.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if want.IsValid() {
		n := toNumber(want)
		if other, ok := p.used[n]; ok && other != vif {
			return netip.Addr{}, fmt.Errorf("the address %v is that of %s now", want, other)
		}
		p.useLocked(n, vif)
		return want, nil
	}
	p.forgiveLocked(now)
	if n, ok := p.before[vif]; ok && p.freeLocked(n) {
		p.useLocked(n, vif)
		return toAddr(n), nil
	}
	if p.first > p.last {
		return netip.Addr{}, ErrExhausted
	}
	size := uint64(p.last-p.first) + 1
	for _, fresh := range [...]bool{true, false} { // first those that no absent vif had
		for i := range size {
			n := p.first + uint32((uint64(p.next-p.first)+i)%size)
			if _, had := p.owner[n]; p.freeLocked(n) && (!fresh || !had) {
				p.next = p.first + uint32((uint64(n-p.first)+1)%size)
				p.useLocked(n, vif)
				return toAddr(n), nil
			}
		}
	}
	return netip.Addr{}, ErrExhausted
}

func (p *Pool) freeLocked(n uint32) bool {
	_, used := p.used[n]
	_, spoiled := p.spoiled[n]
	return n >= p.first && n <= p.last && !used && !spoiled && !p.reserved[n]
}

func (p *Pool) useLocked(n uint32, vif string) {
	p.used[n] = vif
	if n < p.first || n > p.last { // a fixed address is always found again
		return
	}
	if old, ok := p.owner[n]; ok {
		delete(p.before, old)
	}
	if old, ok := p.before[vif]; ok {
		delete(p.owner, old)
	}
	p.before[vif], p.owner[n] = n, vif
}

// Give gives an address back.
func (p *Pool) Give(vif string, a netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := toNumber(a); p.used[n] == vif {
		delete(p.used, n)
	}
}

// Spoil gives an address back that another station has: nobody gets it for ten minutes. At once two
// at most are spoiled by one vif, whose link is its own and seldom has such a station, and a quarter of the
// pool by all; beyond that it reports false, and the vif keeps the address.
func (p *Pool) Spoil(now time.Time, vif string, a netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgiveLocked(now)
	n := toNumber(a)
	if p.used[n] != vif || n < p.first || n > p.last || uint64(len(p.spoiled)+1)*4 > uint64(p.last-p.first)+1 {
		return false
	}
	own := 0
	for _, s := range p.spoiled {
		if s.vif == vif {
			own++
		}
	}
	if own >= spoiledEach {
		return false
	}
	delete(p.used, n)
	p.spoiled[n] = spoil{vif, now.Add(spoiledFor)}
	return true
}

func (p *Pool) forgiveLocked(now time.Time) {
	for n, s := range p.spoiled {
		if !now.Before(s.until) {
			delete(p.spoiled, n)
		}
	}
}
