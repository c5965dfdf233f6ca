package netif

import (
	"slices"
	"testing"
)

// slotsOf returns what l writes to a ring.
func slotsOf(l *Extras) (slots []Extra) {
	for i := range l.Len() {
		slots = append(slots, l.At(i))
	}
	return slots
}

func TestExtrasKeepTheLastOfEachType(t *testing.T) {
	first := GSOExtra(GSO{Size: 1448, Type: GSOTCPv4})
	gso := GSOExtra(GSO{Size: 9, Type: GSOTCPv6})
	hash := HashExtra(Hash{Type: HashIPv6, Algorithm: HashToeplitz, Value: 7})
	group := McastAddExtra(Mcast{MAC: [6]byte{1, 0, 0x5e, 0, 0, 1}})
	var l Extras
	for i, x := range []Extra{hash, first.WithMore(true), group.WithMore(true), gso} {
		if err := l.Add(x); err != nil {
			t.Fatalf("extra info %d: %v", i, err)
		}
	}
	if got := l.Of(ExtraGSO).GSO(); got != gso.GSO() {
		t.Errorf("GSO %+v, want %+v", got, gso.GSO())
	}
	if got := l.Of(ExtraHash).Hash(); got != hash.Hash() {
		t.Errorf("hash %+v, want %+v", got, hash.Hash())
	}
	want := []Extra{gso.WithMore(true), group.WithMore(true), hash}
	if got := slotsOf(&l); !slices.Equal(got, want) {
		t.Errorf("slots %+v, want %+v", got, want)
	}
	for typ := range ExtraType(255) {
		want := typ == ExtraGSO || typ == ExtraHash || typ == ExtraMcastAdd
		if l.Has(typ) != want {
			t.Errorf("holds %v: %v, want %v", typ, l.Has(typ), want)
		}
		if x := l.Of(typ); !want && x != (Extra{}) {
			t.Errorf("%v: %+v, want the zero Extra", typ, x)
		}
	}
}

func TestExtrasAreEmptyFirst(t *testing.T) {
	var l Extras
	if l.Len() != 0 || slotsOf(&l) != nil {
		t.Errorf("the zero list has %d extra infos", l.Len())
	}
	if l.Of(ExtraGSO).GSO() != (GSO{}) {
		t.Errorf("GSO %+v of an empty list", l.Of(ExtraGSO).GSO())
	}
}

func TestExtrasRefuseWhatCheckRefuses(t *testing.T) {
	good := GSOExtra(GSO{Size: 1448, Type: GSOTCPv4})
	var l Extras
	if err := l.Add(good); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		bad  Extra
		want error
	}{
		{Extra{}, BadExtraType},
		{Extra{Type: 6}, BadExtraType},
		{Extra{Type: 255, Flags: 255}, BadExtraType},
		{GSOExtra(GSO{Type: GSOTCPv4}), BadGSOSize},
		{GSOExtra(GSO{Size: 1448, Type: 3}), BadGSOType},
	} {
		if err := l.Add(c.bad); err != c.want {
			t.Errorf("%+v: %v, want %v", c.bad, err, c.want)
		}
	}
	if got := slotsOf(&l); !slices.Equal(got, []Extra{good}) {
		t.Errorf("the list became %+v", got)
	}
}

// What one end writes is what the other end reads, whichever types there are: a type that
// is added to the table needs no other place.
func TestExtrasCrossEitherRing(t *testing.T) {
	bodies := [len(extraTypes)]Extra{ExtraGSO: GSOExtra(GSO{Size: 1448, Type: GSOTCPv4})}
	for typ := range bodies {
		if typ != int(ExtraNone) && typ != int(ExtraGSO) {
			bodies[typ] = Extra{Type: ExtraType(typ), Body: [6]byte{1, 2, 3, 4, 5, byte(typ)}}
		}
	}
	for set := range 1 << len(extraTypes) {
		var sent, tx, rx Extras
		for typ, x := range bodies {
			if typ != int(ExtraNone) && set&(1<<typ) != 0 {
				if err := sent.Add(x); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i := range sent.Len() {
			x := sent.At(i)
			if x.More() != (i < sent.Len()-1) {
				t.Fatalf("set %#x: slot %d of %d: more is %v", set, i, sent.Len(), x.More())
			}
			if err := tx.Add(ExtraOfTx(x.TxRequest())); err != nil {
				t.Fatal(err)
			}
			if err := rx.Add(ExtraOfRx(x.RxResponse())); err != nil {
				t.Fatal(err)
			}
		}
		for typ, x := range bodies {
			if set&(1<<typ) == 0 {
				x = Extra{}
			}
			if tx.Of(ExtraType(typ)).Body != x.Body || rx.Of(ExtraType(typ)).Body != x.Body {
				t.Fatalf("set %#x: %v: %+v in tx, %+v in rx, want %+v", set, ExtraType(typ),
					tx.Of(ExtraType(typ)), rx.Of(ExtraType(typ)), x)
			}
		}
		if tx != rx || tx.Len() != sent.Len() {
			t.Fatalf("set %#x: %+v in tx, %+v in rx, want %+v", set, tx, rx, sent)
		}
	}
}

func TestExtrasListDoesNotAllocate(t *testing.T) {
	var total int
	if n := testing.AllocsPerRun(100, func() {
		var l Extras
		l.Add(GSOExtra(GSO{Size: 1448, Type: GSOTCPv4}))
		l.Add(Extra{Type: 200})
		l.Add(HashExtra(Hash{Value: 1}))
		for i := range l.Len() {
			total += int(l.At(i).TxRequest().Ref)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if total == 0 {
		t.Error("nothing was listed")
	}
}
