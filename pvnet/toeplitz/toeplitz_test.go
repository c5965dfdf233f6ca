package toeplitz

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"barevif/pvnet/netif"
)

// rssKey is the key of the published verification suite ("Verifying the RSS Hash
// Calculation", Windows driver documentation).
var rssKey = []byte{
	0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
	0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
	0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
}

// The verification suite.
var suite = []struct {
	src, dst         string
	sport, dport     uint16
	addresses, ports uint32
}{
	{"66.9.149.187", "161.142.100.80", 2794, 1766, 0x323e8fc2, 0x51ccc178},
	{"199.92.111.2", "65.69.140.83", 14230, 4739, 0xd718262a, 0xc626b0ea},
	{"24.19.198.95", "12.22.207.184", 12898, 38024, 0xd2d0a5de, 0x5c2b394a},
	{"38.27.205.30", "209.142.163.6", 48228, 2217, 0x82989176, 0xafc7327f},
	{"153.39.163.191", "202.188.127.2", 44251, 1303, 0x5d1809c5, 0x10e828a2},
	{"3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1", 2794, 1766, 0x2cc18cd5, 0x40207d3d},
	{"3ffe:501:8::260:97ff:fe40:efab", "ff02::1", 14230, 4739, 0x0f0c461c, 0xdde51bbf},
	{"3ffe:1900:4545:3:200:f8ff:fe21:67cf", "fe80::200:f8ff:fe21:67cf", 44251, 38024, 0x4b61e985, 0x02d1feef},
}

// tcp is a TCP segment without payload in an Ethernet frame.
func tcp(src, dst string, sport, dport uint16) []byte {
	s, d := netip.MustParseAddr(src).AsSlice(), netip.MustParseAddr(dst).AsSlice()
	f := make([]byte, 12, 100)
	if len(s) == 4 {
		f = append(f, 0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0)
	} else {
		f = append(f, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 6, 64)
	}
	f = append(append(f, s...), d...)
	f = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(f, sport), dport)
	return append(f, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0)
}

func TestVerificationSuite(t *testing.T) {
	table := NewTable(rssKey)
	for _, c := range suite {
		f := tcp(c.src, c.dst, c.sport, c.dport)
		plain, ports := netif.HashIPv4, netif.HashIPv4TCP
		if netip.MustParseAddr(c.src).Is6() {
			plain, ports = netif.HashIPv6, netif.HashIPv6TCP
		}
		for _, w := range []struct {
			flags uint32
			hash  uint32
			typ   netif.HashType
			ok    bool
		}{
			{netif.HashFlagsAll, c.ports, ports, true},
			{ports.Flag(), c.ports, ports, true},
			{plain.Flag(), c.addresses, plain, true},
			{netif.HashFlagsAll &^ ports.Flag(), c.addresses, plain, true},
			{netif.HashFlagsAll &^ ports.Flag() &^ plain.Flag(), 0, 0, false},
			{0, 0, 0, false},
		} {
			hash, typ, ok := table.Frame(f, len(f), w.flags)
			if hash != w.hash || typ != w.typ || ok != w.ok {
				t.Errorf("%s to %s, flags %b: %#x, %v, %v; want %#x, %v", c.src, c.dst, w.flags, hash, typ, ok, w.hash, w.typ)
			}
		}
		if n := len(f); table.Sum(f[n-20-2*len(netip.MustParseAddr(c.src).AsSlice()):n-16]) != c.ports {
			t.Errorf("%s to %s: the sum of the same bytes is another", c.src, c.dst)
		}
	}
}

// Frames that no type applies to, or a less specific one.
func TestTypes(t *testing.T) {
	table := NewTable(rssKey)
	c := suite[0]
	c6 := suite[5]
	edit := func(f []byte, at int, b ...byte) []byte { copy(f[at:], b); return f }
	v4 := func() []byte { return tcp(c.src, c.dst, c.sport, c.dport) }
	v6 := func() []byte { return tcp(c6.src, c6.dst, c6.sport, c6.dport) }
	atomic := v6() // a fragment header on a whole packet
	atomic = append(atomic[:54:54], append([]byte{6, 0, 0, 0, 0, 0, 0, 1}, atomic[54:]...)...)
	atomic[19], atomic[20] = 28, 44
	options := append(v6()[:54:54], append([]byte{6, 0, 1, 4, 0, 0, 0, 0}, v6()[54:]...)...)
	options[19], options[20] = 28, 0
	tagged := append(v4()[:12:12], append([]byte{0x81, 0, 0, 1}, v4()[12:]...)...)
	for name, w := range map[string]struct {
		frame []byte
		hash  uint32
		typ   netif.HashType
		ok    bool
	}{
		"UDP":                      {edit(v4(), 23, 17), c.addresses, netif.HashIPv4, true},
		"ICMP":                     {edit(v4(), 23, 1), c.addresses, netif.HashIPv4, true},
		"a first fragment":         {edit(v4(), 20, 0x20, 0), c.addresses, netif.HashIPv4, true},
		"a later fragment":         {edit(v4(), 20, 0, 1), c.addresses, netif.HashIPv4, true},
		"an IPv6 fragment header":  {atomic, c6.addresses, netif.HashIPv6, true},
		"TCP behind IPv6 options":  {options, c6.ports, netif.HashIPv6TCP, true},
		"TCP without ports":        {edit(v4()[:34], 16, 0, 20), c.addresses, netif.HashIPv4, true},
		"ARP":                      {edit(v4(), 12, 0x08, 0x06), 0, 0, false},
		"a VLAN tag":               {tagged, 0, 0, false},
		"a header that is no IPv4": {edit(v4(), 14, 0x65), 0, 0, false},
		"nothing":                  {nil, 0, 0, false},
	} {
		hash, typ, ok := table.Frame(w.frame, len(w.frame), netif.HashFlagsAll)
		if hash != w.hash || typ != w.typ || ok != w.ok {
			t.Errorf("%s: %#x, %v, %v; want %#x, %v, %v", name, hash, typ, ok, w.hash, w.typ, w.ok)
		}
	}
}

// bitwise is the definition: for each bit of the input that is set, the 32 bits of the
// key that begin at that bit are added.
func bitwise(key, in []byte) (h uint32) {
	at := func(i int) uint32 {
		if i/8 >= len(key) {
			return 0
		}
		return uint32(key[i/8]>>(7-i%8)) & 1
	}
	for i := range 8 * len(in) {
		if in[i/8]>>(7-i%8)&1 != 0 {
			for b := range 32 {
				h ^= at(i+b) << (31 - b)
			}
		}
	}
	return h
}

func TestShortKeys(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	for n := range MaxKey + 1 {
		key := random(n)
		table := NewTable(key)
		for m := range maxInput + 1 {
			in := random(m)
			if got, want := table.Sum(in), bitwise(key, in); got != want {
				t.Fatalf("key of %d bytes, input of %d: %#x, want %#x", n, m, got, want)
			}
		}
	}
	long := NewTable(rssKey).Sum(random(200)) // bytes beyond the input do not count
	if long == 0 {
		t.Error("a long input has no hash")
	}
	if NewTable(append(rssKey[:MaxKey:MaxKey], 1, 2, 3)).Sum([]byte{1}) != NewTable(rssKey).Sum([]byte{1}) {
		t.Error("bytes beyond the key count")
	}
}

func TestFrameDoesNotAllocate(t *testing.T) {
	table, f := NewTable(rssKey), tcp(suite[5].src, suite[5].dst, 1, 2)
	if n := testing.AllocsPerRun(100, func() { table.Frame(f, len(f), netif.HashFlagsAll) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkFrame(b *testing.B) {
	table := NewTable(rssKey)
	for name, c := range map[string]int{"IPv4": 0, "IPv6": 5} {
		f := tcp(suite[c].src, suite[c].dst, 1, 2)
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				table.Frame(f, len(f), netif.HashFlagsAll)
			}
		})
	}
}
