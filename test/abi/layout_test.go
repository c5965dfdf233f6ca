package abi_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"reflect"
	"testing"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/xenbus/xenstore/wire"
)

// fieldNames says which Go field a field of C is.
type fieldNames map[string]string

func TestRecordsHaveTheHeadersLayout(t *testing.T) {
	types := map[string]struct {
		of    reflect.Type
		names fieldNames
	}{
		"tx_request": {reflect.TypeFor[netif.TxRequest](), fieldNames{
			"gref": "Ref", "offset": "Offset", "flags": "Flags", "id": "ID", "size": "Size"}},
		"tx_response": {reflect.TypeFor[netif.TxResponse](), fieldNames{
			"id": "ID", "status": "Status"}},
		"rx_request": {reflect.TypeFor[netif.RxRequest](), fieldNames{
			"id": "ID", "pad": "Pad", "gref": "Ref"}},
		"rx_response": {reflect.TypeFor[netif.RxResponse](), fieldNames{
			"id": "ID", "offset": "Offset", "flags": "Flags", "status": "Status"}},
		"extra": {reflect.TypeFor[netif.Extra](), fieldNames{
			"type": "Type", "flags": "Flags", "u": "Body"}},
		"ctrl_request": {reflect.TypeFor[netif.CtrlRequest](), fieldNames{
			"id": "ID", "type": "Type", "data": "Data"}},
		"ctrl_response": {reflect.TypeFor[netif.CtrlResponse](), fieldNames{
			"id": "ID", "type": "Type", "status": "Status", "data": "Data"}},
		"gref": {reflect.TypeFor[netif.GrefEntry](), fieldNames{
			"ref": "Ref", "flags": "Flags", "status": "Status"}},
	}
	f := readFacts(t)
	delete(f.records, "xsd_sockmsg") // encoded, not laid out: see TestXenstoreHeader
	sameNames(t, "record", f.records, types)

	for name, c := range f.records {
		g := types[name]
		if g.of == nil {
			continue
		}
		if g.of.Size() != c.size {
			t.Errorf("%v: %d bytes, want %d", g.of, g.of.Size(), c.size)
		}
		if name == "extra" {
			c.fields = map[string]field{"type": c.fields["type"], "flags": c.fields["flags"], "u": c.fields["u"]}
		}
		sameNames(t, "field of "+name, c.fields, g.names)
		named := 0
		for i := range g.of.NumField() {
			if g.of.Field(i).Name != "_" {
				named++
			}
		}
		if named != len(c.fields) {
			t.Errorf("%v: %d fields, want %d", g.of, named, len(c.fields))
		}
		for cname, want := range c.fields {
			sf, ok := g.of.FieldByName(g.names[cname])
			if !ok {
				t.Errorf("%v has no field %q", g.of, g.names[cname])
				continue
			}
			if got := (field{sf.Offset, sf.Type.Size()}); got != want {
				t.Errorf("%v.%s: %+v, want %+v", g.of, sf.Name, got, want)
			}
		}
	}
}

func TestExtraBodiesHaveTheHeadersLayout(t *testing.T) {
	// Each sets every bit of one field and no other.
	bodies := map[string]netif.Extra{
		"u.gso.size":       netif.GSOExtra(netif.GSO{Size: 0xffff}),
		"u.gso.type":       netif.GSOExtra(netif.GSO{Type: 0xff}),
		"u.gso.features":   netif.GSOExtra(netif.GSO{Features: 0xffff}),
		"u.mcast.addr":     netif.McastAddExtra(netif.Mcast{MAC: [6]byte{255, 255, 255, 255, 255, 255}}),
		"u.hash.type":      netif.HashExtra(netif.Hash{Type: 0xff}),
		"u.hash.algorithm": netif.HashExtra(netif.Hash{Algorithm: 0xff}),
		"u.hash.value":     netif.HashExtra(netif.Hash{Value: 0xffffffff}),
	}
	c := readFacts(t).records["extra"]
	delete(c.fields, "type")
	delete(c.fields, "flags")
	u := c.fields["u"]
	delete(c.fields, "u")
	sameNames(t, "field of extra", c.fields, bodies)
	for name, f := range c.fields {
		var want [6]byte
		for i := range f.size {
			want[f.offset-u.offset+i] = 0xff
		}
		if got := bodies[name].Body; got != want {
			t.Errorf("%s: %x, want %x", name, got, want)
		}
	}
}

// A sample is a record of golden.c: how Go writes it to the start of a page and
// whether what Go reads from there is the same.
type sample struct {
	store func(shm.Memory)
	load  func(shm.Memory) error
}

func inSlot[T comparable](v T, stride int) sample {
	return sample{
		func(m shm.Memory) {
			s := shm.NewSlots[T](m, 0, 1, stride)
			s.Store(0, v)
		},
		func(m shm.Memory) error {
			s := shm.NewSlots[T](m, 0, 1, stride)
			if got := s.Load(0); got != v {
				return fmt.Errorf("loaded %+v, want %+v", got, v)
			}
			return nil
		},
	}
}

func extraInTx(e netif.Extra) sample {
	s := inSlot(e.TxRequest(), netif.TxStride)
	return sample{s.store, func(m shm.Memory) error {
		q := shm.NewSlots[netif.TxRequest](m, 0, 1, netif.TxStride)
		if got := netif.ExtraOfTx(q.Load(0)); got != e {
			return fmt.Errorf("request holds %+v, want %+v", got, e)
		}
		return inSlot(e, netif.TxStride).load(m)
	}}
}

func extraInRx(e netif.Extra) sample {
	s := inSlot(e.RxResponse(), netif.RxStride)
	return sample{s.store, func(m shm.Memory) error {
		q := shm.NewSlots[netif.RxResponse](m, 0, 1, netif.RxStride)
		if got := netif.ExtraOfRx(q.Load(0)); got != e {
			return fmt.Errorf("response holds %+v, want %+v", got, e)
		}
		return inSlot(e, netif.RxStride).load(m)
	}}
}

func samples() map[string]sample {
	gso := netif.GSO{Size: 0x85b4, Type: netif.GSOTCPv4, Features: 0x9a7b}
	gso6 := gso
	gso6.Type = netif.GSOTCPv6
	group := netif.Mcast{MAC: [6]byte{0x01, 0x80, 0xc2, 0xd3, 0xe4, 0xf5}}
	hash := netif.Hash{Type: netif.HashIPv6TCP, Algorithm: netif.HashToeplitz, Value: 0xa5b6c7d8}
	ones := netif.Extra{Type: 255, Flags: 255, Body: [6]byte{255, 255, 255, 255, 255, 255}}

	return map[string]sample{
		"tx_request": inSlot(netif.TxRequest{
			Ref: 0x81a2b3c4, Offset: 0x0d1e, ID: 0xf1e2, Size: 0xd3c4,
			Flags: netif.TxCsumBlank | netif.TxExtraInfo | 0x5000}, netif.TxStride),
		"tx_response": inSlot(netif.TxResponse{
			ID: 0xf1e2, Status: netif.Dropped}, netif.TxStride),
		"rx_request": inSlot(netif.RxRequest{
			ID: 0x91a2, Pad: 0xb3c4, Ref: 0xd5e6f708}, netif.RxStride),
		"rx_response": inSlot(netif.RxResponse{
			ID: 0x91a2, Offset: 0x0b3c, Status: 0x0f71,
			Flags: netif.RxCsumBlank | netif.RxMoreData | 0x6000}, netif.RxStride),
		"rx_response_error": inSlot(netif.RxResponse{
			ID: 0x91a2, Offset: 0x0b3c, Status: int16(hypercall.BadCopyArg),
			Flags: netif.RxDataValidated | netif.RxGSOPrefix}, netif.RxStride),

		"extra_gso_tcpv4_more_tx": extraInTx(netif.GSOExtra(gso).WithMore(true)),
		"extra_gso_tcpv4_more_rx": extraInRx(netif.GSOExtra(gso).WithMore(true)),
		"extra_gso_tcpv6_tx":      extraInTx(netif.GSOExtra(gso6)),
		"extra_gso_tcpv6_rx":      extraInRx(netif.GSOExtra(gso6)),
		"extra_mcast_add_tx":      extraInTx(netif.McastAddExtra(group)),
		"extra_mcast_add_rx":      extraInRx(netif.McastAddExtra(group)),
		"extra_mcast_del_tx":      extraInTx(netif.McastDelExtra(group)),
		"extra_mcast_del_rx":      extraInRx(netif.McastDelExtra(group)),
		"extra_hash_tx":           extraInTx(netif.HashExtra(hash)),
		"extra_hash_rx":           extraInRx(netif.HashExtra(hash)),
		"extra_ones_tx":           extraInTx(ones),
		"extra_ones_rx":           extraInRx(ones),

		"ctrl_request": inSlot(netif.CtrlRequest{
			ID: 0xa1b2, Type: netif.CtrlAddGrefMapping,
			Data: [3]uint32{0x81828384, 0x91929394, 0xa1a2a3a4}}, netif.CtrlStride),
		"ctrl_response": inSlot(netif.CtrlResponse{
			ID: 0xa1b2, Type: netif.CtrlGetHashMappingSize,
			Status: netif.CtrlBufferOverflow, Data: 0xb1b2b3b4}, netif.CtrlStride),
		"gref": inSlot(netif.GrefEntry{
			Ref: 0xc1c2c3c4, Flags: netif.GrefReadOnly | 0x7000,
			Status: uint16(netif.CtrlInvalidParameter)}, netif.GrefEntrySize),
	}
}

func TestRecordsAreTheSameBytesInBothLanguages(t *testing.T) {
	f := readFacts(t)
	delete(f.bytes, "xsd_sockmsg") // see TestXenstoreHeader
	all := samples()
	sameNames(t, "bytes", f.bytes, all)
	for name, s := range all {
		want := f.bytes[name]
		page := shm.Heap(1)
		b := page.Page(0)
		for i := range b {
			b[i] = 0xee
		}
		s.store(page)
		if !bytes.Equal(b[:len(want)], want) {
			t.Errorf("%s: stored %x, want %x", name, b[:len(want)], want)
		}
		for i, v := range b[len(want):] {
			if v != 0xee {
				t.Errorf("%s: byte %d past the record was written", name, i)
				break
			}
		}
		copy(b, want)
		if err := s.load(page); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Xen's header has no such extra; the bytes are those of struct
// xen_netif_extra_info in Linux's include/xen/interface/io/netif.h: headroom,
// then two words of padding.
func TestXDPExtraIsTheBytesLinuxWrites(t *testing.T) {
	x := netif.XDP{Headroom: 0x0100}
	want := []byte{5, 0, 0x00, 0x01, 0, 0, 0, 0}
	for name, s := range map[string]sample{
		"tx": extraInTx(netif.XDPExtra(x)),
		"rx": extraInRx(netif.XDPExtra(x)),
	} {
		page := shm.Heap(1)
		s.store(page)
		if got := page.Page(0)[:8]; !bytes.Equal(got, want) {
			t.Errorf("%s: stored %x, want %x", name, got, want)
		}
		if err := s.load(page); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := netif.XDPExtra(x).XDP(); got != x {
		t.Errorf("headroom came back as %+v", got)
	}
}

func TestXenstoreHeader(t *testing.T) {
	f := readFacts(t)
	c := f.records["xsd_sockmsg"]
	if c.size != wire.HeaderSize {
		t.Errorf("HeaderSize is %d, want %d", wire.HeaderSize, c.size)
	}
	want := f.bytes["xsd_sockmsg"]
	h := wire.Header{Op: wire.DirectoryPart, ReqID: 0x81828384, TxID: 0x91929394, Len: 6}
	got, err := wire.Append(nil, h, "/vm\x00", "0\x00")
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("encoded %x, %v; want %x", got, err, want)
	}
	back, payload, err := wire.ReadMessage(bytes.NewReader(want), make([]byte, wire.HeaderSize+wire.MaxPayload))
	if err != nil || back != h || string(payload) != "/vm\x000\x00" {
		t.Errorf("decoded %+v %q, %v; want %+v", back, payload, err, h)
	}
	for name, v := range map[string]uint32{
		"type": uint32(h.Op), "req_id": h.ReqID, "tx_id": h.TxID, "len": h.Len,
	} {
		fd := c.fields[name]
		if fd.size != 4 || binary.LittleEndian.Uint32(got[fd.offset:]) != v {
			t.Errorf("%s is not at %+v", name, fd)
		}
	}
	if len(c.fields) != 4 {
		t.Errorf("the header has %d fields, want 4", len(c.fields))
	}
}

// slotOffset is where Go puts the record with free-running index i.
func slotOffset[T any](t *testing.T, i uint32, entries, stride int, v T) int {
	t.Helper()
	page := shm.Heap(1)
	s := shm.NewSlots[T](page, netif.RingHeader, entries, stride)
	s.Store(i, v)
	for off, b := range page.Page(0) {
		if b != 0 {
			return off
		}
	}
	t.Fatalf("slot %d: nothing was written", i)
	return 0
}

func TestRingPages(t *testing.T) {
	type ringOf struct {
		stride, entries int
		slot            func(i uint32) int
		init            func(shm.Memory) uint32 // as the frontend; gives the entries
	}
	rings := map[string]ringOf{
		"tx": {netif.TxStride, netif.TxRingSize,
			func(i uint32) int {
				return slotOffset(t, i, netif.TxRingSize, netif.TxStride, netif.TxRequest{Ref: 1})
			},
			func(m shm.Memory) uint32 {
				return ring.NewFront[netif.TxRequest, netif.TxResponse](m, netif.TxStride).Size()
			}},
		"rx": {netif.RxStride, netif.RxRingSize,
			func(i uint32) int {
				return slotOffset(t, i, netif.RxRingSize, netif.RxStride, netif.RxRequest{ID: 1})
			},
			func(m shm.Memory) uint32 {
				return ring.NewFront[netif.RxRequest, netif.RxResponse](m, netif.RxStride).Size()
			}},
		"ctrl": {netif.CtrlStride, netif.CtrlRingSize,
			func(i uint32) int {
				return slotOffset(t, i, netif.CtrlRingSize, netif.CtrlStride, netif.CtrlRequest{ID: 1})
			},
			func(m shm.Memory) uint32 {
				return ring.NewFront[netif.CtrlRequest, netif.CtrlResponse](m, netif.CtrlStride).Size()
			}},
	}
	f := readFacts(t)
	sameNames(t, "ring", f.rings, rings)
	header := map[string]field{
		"req_prod": {0, 4}, "req_event": {4, 4}, "rsp_prod": {8, 4}, "rsp_event": {12, 4},
	}
	for name, c := range f.rings {
		g, ok := rings[name]
		if !ok {
			continue
		}
		if g.stride != c.stride || g.entries != c.entries {
			t.Errorf("%s: %d slots of %d bytes, want %d of %d", name, g.entries, g.stride, c.entries, c.stride)
		}
		if len(c.header) != netif.RingHeader {
			t.Errorf("%s: slots begin at %d, want %d", name, netif.RingHeader, len(c.header))
		}
		if !reflect.DeepEqual(c.fields, header) {
			t.Errorf("%s: indices at %v, want %v", name, c.fields, header)
		}
		for i, want := range c.slots {
			if got := g.slot(i); got != want {
				t.Errorf("%s: slot %d at %d, want %d", name, i, got, want)
			}
		}
		page := shm.Heap(1)
		if n := g.init(page); int(n) != c.entries {
			t.Errorf("%s: a frontend makes %d slots, want %d", name, n, c.entries)
		}
		if got := page.Page(0)[:len(c.header)]; !bytes.Equal(got, c.header) {
			t.Errorf("%s: a frontend's page begins\n%x, want\n%x", name, got, c.header)
		}
	}
}
