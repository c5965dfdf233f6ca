//go:build linux

package bpf

import (
	"fmt"
	"reflect"

	"github.com/cilium/ebpf/btf"

	"barevif/telemetry"
)

var (
	btfU64  = &btf.Int{Name: "__u64", Size: 8}
	btfU32  = &btf.Int{Name: "__u32", Size: 4}
	btfS32  = &btf.Int{Name: "__s32", Size: 4, Encoding: btf.Signed}
	btfU16  = &btf.Int{Name: "__u16", Size: 2}
	btfU8   = &btf.Int{Name: "__u8", Size: 1}
	btfChar = &btf.Int{Name: "char", Size: 1, Encoding: btf.Char}
	btfBool = &btf.Int{Name: "bool", Size: 1, Encoding: btf.Bool}
)

// enums are the types that show a uint32, by the name in its tag.
var enums = map[string]*btf.Enum{
	"role":         enum("barevif_role", 0, telemetry.Frontend.Short(), telemetry.Backend.Short()),
	"xenbus_state": enum("xenbus_state", 0, stateSymbols()...),
	"event_kind":   enum("barevif_event", 0, telemetry.EventNames[:]...),
	"metric_kind": enum("barevif_metric_kind", 0, telemetry.KindCounter.String(),
		telemetry.KindGauge.String(), telemetry.KindHistogram.String()),
	"bool32": enum("barevif_bool", 0, "no", "yes"),
}

func enum(name string, from uint64, values ...string) *btf.Enum {
	e := &btf.Enum{Name: name, Size: 4}
	for i, v := range values {
		e.Values = append(e.Values, btf.EnumValue{Name: v, Value: from + uint64(i)})
	}
	return e
}

func stateSymbols() []string {
	var out []string
	for i := range telemetry.StateNames {
		out = append(out, telemetry.State(i).Symbol())
	}
	return out
}

// queueType describes an element of the counters map, with the full name of every member.
// Units and help are declaration tags.
func queueType() *btf.Struct {
	s := &btf.Struct{Name: "barevif_queue", Size: queueBytes}
	for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		block := int(d) * telemetry.BlockWords
		word := func(name string, w int, t btf.Type, tags ...string) {
			s.Members = append(s.Members, btf.Member{Name: name, Type: t, Offset: btf.Bits(64 * (block + w)), Tags: tags})
		}
		word(d.String()+"_gen_done", 0, btfU64)
		for _, f := range telemetry.Fields() {
			var t btf.Type = btfU64
			if f.Kind == telemetry.KindHistogram {
				h := &btf.Struct{Name: "barevif_" + f.Name, Size: uint32(8 * f.Words())}
				for i := range f.Words() {
					h.Members = append(h.Members, btf.Member{Name: f.Bucket(i), Type: btfU64, Offset: btf.Bits(64 * i)})
				}
				t = h
			}
			word(f.FullName(d), f.Word, t, "unit:"+f.Unit, "help:"+f.Help)
		}
		word(d.String()+"_gen_start", telemetry.BlockWords-1, btfU64)
	}
	return s
}

// recordType describes a record by the btf tags of its Go type.
func recordType(name string, record any) *btf.Struct {
	return structType(name, reflect.TypeOf(record))
}

func structType(name string, t reflect.Type) *btf.Struct {
	s := &btf.Struct{Name: name, Size: uint32(t.Size())}
	members(t, func(name, show string, f reflect.StructField) {
		s.Members = append(s.Members, btf.Member{Name: name, Type: memberType(show, f.Type), Offset: btf.Bits(8 * f.Offset)})
	})
	return s
}

func memberType(show string, t reflect.Type) btf.Type {
	if show == "features" {
		s := &btf.Struct{Name: "barevif_features", Size: uint32(t.Size())}
		for i, n := range telemetry.FeatureNames {
			s.Members = append(s.Members, btf.Member{Name: n, Type: btfBool, Offset: btf.Bits(8 * i)})
		}
		return s
	}
	if e, ok := enums[show]; ok {
		return e
	}
	switch t.Kind() {
	case reflect.Array:
		return &btf.Array{Index: btfU32, Type: memberType(show, t.Elem()), Nelems: uint32(t.Len())}
	case reflect.Struct:
		return structType("barevif_reset", t)
	case reflect.Uint64:
		return btfU64
	case reflect.Uint32:
		return btfU32
	case reflect.Int32:
		return btfS32
	case reflect.Uint16:
		return btfU16
	case reflect.Uint8:
		switch show {
		case "char":
			return btfChar
		case "bool":
			return btfBool
		}
		return btfU8
	}
	panic(fmt.Sprintf("telemetry/bpf: a record has a member of type %v", t)) // a programming error that every test would see
}
