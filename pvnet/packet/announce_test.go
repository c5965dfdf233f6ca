package packet

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

func TestAnnouncements(t *testing.T) {
	mac := [6]byte{0x00, 0x16, 0x3e, 0x77, 0x00, 0x01}
	for addr, want := range map[string]string{
		"10.88.0.2": "ffffffffffff 00163e770001 0806 0001 0800 06 04 0001 00163e770001 0a580002 000000000000 0a580002",
		// The checksum was computed apart from this package.
		"fd00::2": "333300000001 00163e770001 86dd 60000000 0020 3a ff fd000000000000000000000000000002" +
			" ff020000000000000000000000000001 88 00 1e0c 20000000 fd000000000000000000000000000002 0201 00163e770001",
		"0.0.0.0": "", "::": "", "224.0.0.1": "", "ff02::1": "",
	} {
		got := AppendAnnouncement([]byte{}, mac, netip.MustParseAddr(addr))
		if s := strings.ReplaceAll(want, " ", ""); hex.EncodeToString(got) != s {
			t.Errorf("%s: %x, want %s", addr, got, s)
		}
	}
	if got := AppendAnnouncement(nil, mac, netip.Addr{}); got != nil {
		t.Errorf("no address: %x", got)
	}
	mapped := AppendAnnouncement(nil, mac, netip.MustParseAddr("::ffff:10.88.0.2"))
	if len(mapped) != 14+28 {
		t.Errorf("a mapped address: %x", mapped)
	}
}

func TestTheAdvertisementsChecksumIsRight(t *testing.T) {
	b := AppendAnnouncement(make([]byte, 3), [6]byte{2, 3, 4, 5, 6, 7}, netip.MustParseAddr("2001:db8::77:1%eth0"))[3:]
	if len(b) != 14+40+32 {
		t.Fatalf("%d bytes", len(b))
	}
	h, ok := Parse(b, len(b))
	if !ok {
		t.Fatal("it does not parse")
	}
	if sum := Fold(Add(32+58, h.Addresses(b)) + uint64(Fold(Add(0, b[54:])))); sum != 0xffff {
		t.Errorf("the sum is %#x", sum)
	}
}
