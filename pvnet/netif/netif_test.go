package netif

import (
	"errors"
	"fmt"
	"math/rand"
	"reflect"
	"testing"
	"testing/quick"

	"barevif/arena/shm"
)

// through writes v to a slot of a page and reads it back as a record of another type, as
// the two ends of a ring see one slot.
func through[Out, In any](v In, stride int) Out {
	page := shm.Heap(1)
	in := shm.NewSlots[In](page, RingHeader, 4, stride)
	in.Store(3, v)
	out := shm.NewSlots[Out](page, RingHeader, 4, stride)
	return out.Load(3)
}

func check(t *testing.T, f any) {
	t.Helper()
	of := reflect.TypeOf(f)
	err := quick.Check(f, &quick.Config{MaxCount: 2000, Values: func(args []reflect.Value, r *rand.Rand) {
		for i := range args {
			args[i] = random(of.In(i), r)
		}
	}})
	if err != nil {
		t.Error(err)
	}
}

// random fills a struct with blank fields, which quick cannot.
func random(of reflect.Type, r *rand.Rand) reflect.Value {
	if of.Kind() != reflect.Struct {
		v, _ := quick.Value(of, r)
		return v
	}
	v := reflect.New(of).Elem()
	for i := range of.NumField() {
		if f := of.Field(i); f.Name != "_" {
			v.Field(i).Set(random(f.Type, r))
		}
	}
	return v
}

func TestRecordsSurviveTheirSlot(t *testing.T) {
	check(t, func(v TxRequest) bool { return through[TxRequest](v, TxStride) == v })
	check(t, func(v TxResponse) bool { return through[TxResponse](v, TxStride) == v })
	check(t, func(v RxRequest) bool { return through[RxRequest](v, RxStride) == v })
	check(t, func(v RxResponse) bool { return through[RxResponse](v, RxStride) == v })
	check(t, func(v CtrlRequest) bool { return through[CtrlRequest](v, CtrlStride) == v })
	check(t, func(v CtrlResponse) bool { return through[CtrlResponse](v, CtrlStride) == v })
	check(t, func(v GrefEntry) bool { return through[GrefEntry](v, GrefEntrySize) == v })
}

func TestExtraIsTheSameInEitherRing(t *testing.T) {
	check(t, func(e Extra) bool {
		q := e.TxRequest()
		return ExtraOfTx(q) == e && q.ID == 0 && q.Size == 0 &&
			through[TxRequest](e, TxStride) == q && through[Extra](q, TxStride) == e
	})
	check(t, func(e Extra) bool {
		r := e.RxResponse()
		return ExtraOfRx(r) == e &&
			through[RxResponse](e, RxStride) == r && through[Extra](r, RxStride) == e
	})
	// The bytes after the eight of an extra in a tx slot are not part of it.
	check(t, func(q TxRequest) bool {
		padded := q
		padded.ID, padded.Size = 0, 0
		return ExtraOfTx(q) == ExtraOfTx(padded) && ExtraOfTx(q).TxRequest() == padded
	})
	check(t, func(r RxResponse) bool { return ExtraOfRx(r).RxResponse() == r })
}

func TestExtraBodiesSurvive(t *testing.T) {
	check(t, func(g GSO) bool { e := GSOExtra(g); return e.GSO() == g && e.Type == ExtraGSO && !e.More() })
	check(t, func(m Mcast) bool { e := McastAddExtra(m); return e.Mcast() == m && e.Type == ExtraMcastAdd })
	check(t, func(m Mcast) bool { e := McastDelExtra(m); return e.Mcast() == m && e.Type == ExtraMcastDel })
	check(t, func(h Hash) bool { e := HashExtra(h); return e.Hash() == h && e.Type == ExtraHash })
	check(t, func(x XDP) bool { e := XDPExtra(x); return e.XDP() == x && e.Type == ExtraXDP })
}

func TestWithMoreChangesOneBit(t *testing.T) {
	check(t, func(e Extra, more bool) bool {
		got := e.WithMore(more)
		rest := got
		rest.Flags = rest.Flags&^ExtraMore | e.Flags&ExtraMore
		return got.More() == more && rest == e
	})
}

func TestCheckRefusesWhatLinuxRefuses(t *testing.T) {
	gso := GSOExtra(GSO{Size: 1448, Type: GSOTCPv4})
	for _, c := range []struct {
		name string
		e    Extra
		want error
	}{
		{"gso tcpv4", gso, nil},
		{"gso tcpv6", GSOExtra(GSO{Size: 1, Type: GSOTCPv6}), nil},
		{"gso of the largest size", GSOExtra(GSO{Size: 65535, Type: GSOTCPv4, Features: 65535}), nil},
		{"gso with more", gso.WithMore(true), nil},
		{"unknown flags", Extra{Type: ExtraHash, Flags: 0xfe}, nil},
		{"mcast add", McastAddExtra(Mcast{}), nil},
		{"mcast del", McastDelExtra(Mcast{}), nil},
		{"hash of an unknown algorithm", HashExtra(Hash{Type: 200, Algorithm: 200}), nil},
		{"xdp", XDPExtra(XDP{Headroom: 256}), nil},
		{"zero", Extra{}, BadExtraType},
		{"type none", Extra{Type: ExtraNone, Body: gso.Body}, BadExtraType},
		{"type 6", Extra{Type: 6}, BadExtraType},
		{"type 255", Extra{Type: 255, Flags: 255}, BadExtraType},
		{"gso size 0", GSOExtra(GSO{Type: GSOTCPv4}), BadGSOSize},
		{"gso type none", GSOExtra(GSO{Size: 1448}), BadGSOType},
		{"gso type 3", GSOExtra(GSO{Size: 1448, Type: 3}), BadGSOType},
		{"gso type 255", GSOExtra(GSO{Size: 1448, Type: 255}), BadGSOType},
	} {
		err := c.e.Check()
		if err != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		var typed ExtraError
		if c.want != nil && (!errors.As(err, &typed) || typed.Error() == "") {
			t.Errorf("%s: %v is no ExtraError", c.name, err)
		}
	}
}

func TestFlagsOfOneDirectionAreSwappedInTheOther(t *testing.T) {
	for _, c := range []struct {
		tx TxFlags
		rx RxFlags
	}{
		{0, 0},
		{TxCsumBlank, RxCsumBlank},
		{TxDataValidated, RxDataValidated},
		{TxMoreData, RxMoreData},
		{TxExtraInfo, RxExtraInfo},
		{TxCsumBlank | TxDataValidated, RxCsumBlank | RxDataValidated},
		{TxCsumBlank | TxExtraInfo, RxCsumBlank | RxExtraInfo},
		{TxDataValidated | TxMoreData, RxDataValidated | RxMoreData},
	} {
		if got := c.tx.Rx(); got != c.rx {
			t.Errorf("%v becomes %v, want %v", c.tx, got, c.rx)
		}
		if got := c.rx.Tx(); got != c.tx {
			t.Errorf("%v becomes %v, want %v", c.rx, got, c.tx)
		}
	}
	if uint16(TxCsumBlank) != uint16(RxDataValidated) || uint16(RxCsumBlank) != uint16(TxDataValidated) {
		t.Error("the two lowest bits are not swapped")
	}
	// A bit that means nothing in the other direction is dropped.
	for f := range 1 << 16 {
		if got := TxFlags(f).Rx(); got != (TxFlags(f)&15).Rx() || got > 15 {
			t.Fatalf("tx %#x becomes %#x", f, uint16(got))
		}
		if got := RxFlags(f).Tx(); got != (RxFlags(f)&15).Tx() || got > 15 {
			t.Fatalf("rx %#x becomes %#x", f, uint16(got))
		}
	}
}

func TestHasWantsEveryFlag(t *testing.T) {
	f := TxCsumBlank | TxMoreData
	if !f.Has(TxCsumBlank) || !f.Has(f) || !f.Has(0) || f.Has(TxCsumBlank|TxExtraInfo) {
		t.Errorf("Has of %v is wrong", f)
	}
	g := RxCsumBlank | RxGSOPrefix
	if !g.Has(RxGSOPrefix) || !g.Has(g) || !g.Has(0) || g.Has(RxGSOPrefix|RxMoreData) {
		t.Errorf("Has of %v is wrong", g)
	}
}

func TestNamesForLogs(t *testing.T) {
	for _, c := range []struct {
		v    fmt.Stringer
		want string
	}{
		{TxFlags(0), "0"},
		{TxCsumBlank | TxDataValidated | TxMoreData | TxExtraInfo, "csum-blank|data-validated|more-data|extra-info"},
		{TxFlags(16), "0x10"},
		{TxMoreData | 0x8000, "more-data|0x8000"},
		{RxFlags(0), "0"},
		{RxDataValidated | RxCsumBlank | RxMoreData | RxExtraInfo | RxGSOPrefix, "data-validated|csum-blank|more-data|extra-info|gso-prefix"},
		{RxFlags(0xffe0), "0xffe0"},
		{Dropped, "dropped"}, {Error, "error"}, {Okay, "okay"}, {Null, "null"},
		{Status(-13), "status -13"}, {Status(2), "status 2"},
		{ExtraNone, "none"}, {ExtraGSO, "gso"}, {ExtraMcastAdd, "mcast-add"},
		{ExtraMcastDel, "mcast-del"}, {ExtraHash, "hash"}, {ExtraXDP, "xdp"},
		{ExtraType(6), "extra type 6"},
		{GSONone, "none"}, {GSOTCPv4, "tcpv4"}, {GSOTCPv6, "tcpv6"}, {GSOType(3), "gso type 3"},
		{CtrlInvalid, "invalid"}, {CtrlSetHashKey, "set-hash-key"},
		{CtrlDelGrefMapping, "del-gref-mapping"}, {CtrlType(11), "control type 11"},
		{CtrlType(65535), "control type 65535"},
		{CtrlSuccess, "success"}, {CtrlNotSupported, "not supported"},
		{CtrlInvalidParameter, "invalid parameter"}, {CtrlBufferOverflow, "buffer overflow"},
		{CtrlStatus(1<<32 - 1), "control status 4294967295"},
		{HashIPv4, "ipv4"}, {HashIPv4TCP, "ipv4+tcp"}, {HashIPv6, "ipv6"},
		{HashIPv6TCP, "ipv6+tcp"}, {HashType(4), "hash type 4"},
		{HashNone, "none"}, {HashToeplitz, "toeplitz"}, {HashAlgorithm(2), "hash algorithm 2"},
	} {
		if got := c.v.String(); got != c.want {
			t.Errorf("%T: %q, want %q", c.v, got, c.want)
		}
	}
	for e, want := range map[ExtraError]string{
		BadExtraType: "netif: unknown extra type",
		BadGSOSize:   "netif: gso size is zero",
		BadGSOType:   "netif: unknown gso type",
		0:            "netif: bad extra",
	} {
		if e.Error() != want {
			t.Errorf("%q, want %q", e.Error(), want)
		}
	}
}

func TestHashTypeBeyondTheWordHasNoFlag(t *testing.T) {
	for n := range 256 {
		if f := HashType(n).Flag(); n < 32 && f != 1<<n || n >= 32 && f != 0 {
			t.Errorf("hash type %d has flag %#x", n, f)
		}
	}
}

var sink struct {
	e   Extra
	q   TxRequest
	r   RxResponse
	err error
}

func TestExtrasDoNotAllocate(t *testing.T) {
	bad := []Extra{{}, {Type: 200}, GSOExtra(GSO{}), GSOExtra(GSO{Size: 1, Type: 9}), McastAddExtra(Mcast{})}
	if n := testing.AllocsPerRun(100, func() {
		for _, e := range bad {
			sink.err = e.Check()
			sink.q, sink.r = e.TxRequest(), e.RxResponse()
			sink.e = ExtraOfTx(sink.q)
			sink.e = ExtraOfRx(sink.r)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzSlot reads any 16 bytes that a peer may leave in a slot as each record type.
// Writing the record back must give the same bytes: a record loses nothing and adds
// nothing.
func FuzzSlot(f *testing.F) {
	f.Add(make([]byte, 16))
	f.Add([]byte("\x01\x01\xb4\x85\x01\x00\x7b\x9a\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Add([]byte("\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var in [16]byte
		copy(in[:], b)

		q := same[TxRequest](t, in)
		s := same[TxResponse](t, in)
		same[RxRequest](t, in)
		r := same[RxResponse](t, in)
		c := same[CtrlRequest](t, in)
		d := same[CtrlResponse](t, in)
		same[GrefEntry](t, in)
		e := same[Extra](t, in)

		if ExtraOfTx(q) != e || ExtraOfRx(r) != e {
			t.Errorf("extra %+v is %+v in tx, %+v in rx", e, ExtraOfTx(q), ExtraOfRx(r))
		}
		if e.RxResponse() != r || ExtraOfTx(e.TxRequest()) != e {
			t.Errorf("extra %+v does not go back", e)
		}
		g, h := e.GSO(), e.Hash()
		bad := e.Type < 1 || e.Type > 5 ||
			e.Type == 1 && (g.Size == 0 || g.Type < 1 || g.Type > 2)
		if err := e.Check(); (err != nil) != bad {
			t.Errorf("%+v: %v", e, err)
		}
		if McastAddExtra(e.Mcast()).Body != e.Body || HashExtra(h).Body != e.Body {
			t.Errorf("body %x is changed", e.Body)
		}
		for _, v := range []fmt.Stringer{q.Flags, s.Status, r.Flags, c.Type, d.Status, e.Type, g.Type, h.Type, h.Algorithm} {
			if v.String() == "" {
				t.Errorf("%T has no name", v)
			}
		}
	})
}

// same reads in as a T, writes it to a page full of ones, and wants in again.
func same[T any](t *testing.T, in [16]byte) T {
	t.Helper()
	from, to := shm.Heap(1), shm.Heap(1)
	copy(from.Page(0), in[:])
	src := shm.NewSlots[T](from, 0, 1, CtrlStride)
	dst := shm.NewSlots[T](to, 0, 1, CtrlStride)
	for i := range in {
		to.Page(0)[i] = ^in[i]
	}
	v := src.Load(0)
	dst.Store(0, v)
	n := size[T]()
	if got := to.Page(0)[:n]; string(got) != string(in[:n]) {
		t.Errorf("%T: %x becomes %x", v, in[:n], got)
	}
	return v
}

func size[T any]() int {
	var v T
	switch any(v).(type) {
	case TxRequest, CtrlResponse:
		return 12
	case TxResponse:
		return 4
	case CtrlRequest:
		return 16
	}
	return 8
}

func TestPlainIsAWholePacketInsideItsPage(t *testing.T) {
	for _, tt := range []struct {
		offset, size int
		plain        bool
	}{
		{0, MinFrame, true},
		{0, MinFrame - 1, false},
		{0, shm.PageSize, true},
		{1, shm.PageSize, false},
		{shm.PageSize - MinFrame, MinFrame, true},
		{shm.PageSize - MinFrame + 1, MinFrame, false},
		{0, shm.PageSize + 1, false},
	} {
		q := TxRequest{Offset: uint16(tt.offset), Size: uint16(tt.size), Flags: TxDataValidated}
		p := RxResponse{Offset: uint16(tt.offset), Status: int16(tt.size), Flags: RxDataValidated}
		if q.Plain() != tt.plain || p.Plain() != tt.plain {
			t.Errorf("%d bytes at %d: %v and %v", tt.size, tt.offset, q.Plain(), p.Plain())
		}
	}
	for _, flag := range []TxFlags{TxMoreData, TxExtraInfo, TxCsumBlank} {
		if q := (TxRequest{Size: 100, Flags: flag}); q.Plain() {
			t.Errorf("a request of flags %#x", flag)
		}
	}
	for _, flag := range []RxFlags{RxMoreData, RxExtraInfo, RxCsumBlank} {
		if p := (RxResponse{Status: 100, Flags: flag}); p.Plain() {
			t.Errorf("a response of flags %#x", flag)
		}
	}
	if p := (RxResponse{Status: int16(Error)}); p.Plain() {
		t.Error("a response that says ERROR")
	}
}
