//go:build linux

package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"

	"barevif/telemetry"
)

// queueWords is the size of one element of the counters: an rx block, then a tx block.
const queueWords = 2 * telemetry.BlockWords

const (
	queueBytes  = queueWords * 8
	eventSlots  = 256
	maxQueues   = 1024 // larger numbers are refused by writer and reader
	infoMagic   = "barevif\x00"
	bucketSlots = 16 // buckets that a fieldRecord and the iterator's loop have room for
)

// The records below are the elements of maps, in the machine's byte order and without
// implicit padding. Like a block of counters, a record begins and ends with a marker:
// equal markers mean that its words are of one instant. The btf tag is the name of the
// member in the map's type and, after a comma, how to show it.

// infoRecord is the single element of the info map.
type infoRecord struct {
	Done     uint64    `btf:"gen_done"`
	Magic    [8]byte   `btf:"magic,char"`
	Version  uint32    `btf:"layout_version"`
	Slots    uint32    `btf:"queue_slots"`
	Layout   uint64    `btf:"layout_hash"`
	Vif      [32]byte  `btf:"vif,char"`
	MAC      [24]byte  `btf:"mac,char"`
	Kind     [24]byte  `btf:"backend,char"`
	Reason   [256]byte `btf:"backend_reason,char"`
	Role     uint32    `btf:"role,role"`
	State    uint32    `btf:"state,xenbus_state"`
	Own      uint16    `btf:"own_domid"`
	Peer     uint16    `btf:"peer_domid"`
	Handle   uint32    `btf:"handle"`
	MTU      uint32    `btf:"mtu"`
	Queues   uint32    `btf:"queues"`
	Epoch    uint64    `btf:"epoch"`
	Up       uint8     `btf:"up,bool"`
	Features [13]uint8 `btf:"features,features"`
	_        [2]byte
	PID      uint32      `btf:"owner_pid"`
	UID      uint32      `btf:"owner_uid"`
	Counters uint32      `btf:"counters_map_id"`
	Events   uint32      `btf:"events_map_id"`
	Start    uint64      `btf:"start_unix_ns"`
	Beat     uint64      `btf:"heartbeat_boot_ns"`
	BeatUnix uint64      `btf:"heartbeat_unix_ns"`
	Resumed  uint64      `btf:"resumed_start_unix_ns"`
	Reset    resetRecord `btf:"reset"`
	Begun    uint64      `btf:"gen_start"`
}

type resetRecord struct {
	Count     uint64 `btf:"count"`
	Unix      uint64 `btf:"unix_ns"`
	RxPackets uint64 `btf:"rx_packets"`
	RxBytes   uint64 `btf:"rx_bytes"`
	TxPackets uint64 `btf:"tx_packets"`
	TxBytes   uint64 `btf:"tx_bytes"`
}

// eventRecord is an element of the events map: event n is in element n modulo the number
// of elements. Both markers are n.
type eventRecord struct {
	Seq   uint64 `btf:"seq"`
	Unix  uint64 `btf:"unix_ns"`
	Kind  uint32 `btf:"kind,event_kind"`
	Queue int32  `btf:"queue"`
	A     uint64 `btf:"a"`
	B     uint64 `btf:"b"`
	_     [16]byte
	Begun uint64 `btf:"seq_start"`
}

// fieldRecord is an element of the fields map: one metric family, so that a program can
// make text without the table.
type fieldRecord struct {
	Offset  uint32                `btf:"offset"` // bytes into an element of the counters
	Kind    uint32                `btf:"kind,metric_kind"`
	Buckets uint32                `btf:"buckets"`
	Unit    uint32                `btf:"unit_line,bool32"` // the family's name ends in its unit
	Name    [32]byte              `btf:"name,char"`
	Metric  [64]byte              `btf:"metric,char"`
	UnitOf  [16]byte              `btf:"unit,char"`
	Help    [112]byte             `btf:"help,char"`
	LE      [bucketSlots][16]byte `btf:"le,char"`
}

// lineRecord is an element of the map that the iterator walks: print this field of this
// queue.
type lineRecord struct {
	Field uint32 `btf:"field"`
	Queue uint32 `btf:"queue"`
}

var (
	infoBytes  = binary.Size(infoRecord{})
	eventBytes = binary.Size(eventRecord{})
	fieldBytes = binary.Size(fieldRecord{})
	lineBytes  = binary.Size(lineRecord{})
)

// encode returns the bytes of a record.
func encode(record any) []byte {
	b, err := binary.Append(nil, binary.NativeEndian, record)
	if err != nil {
		panic(err) // impossible: the type of a record has a fixed size
	}
	return b
}

// decode fills a record from the first bytes of b.
func decode(b []byte, record any) error {
	_, err := binary.Decode(b, binary.NativeEndian, record)
	return err
}

// put shows a record to other processes. The first and the last word of words are
// markers.
func put(words []uint64, record []byte) {
	last := len(words) - 1
	at := func(w int) uint64 { return binary.NativeEndian.Uint64(record[8*w:]) }
	atomic.StoreUint64(&words[last], at(last))
	for w := 1; w < last; w++ {
		if v := at(w); atomic.LoadUint64(&words[w]) != v {
			atomic.StoreUint64(&words[w], v)
		}
	}
	atomic.StoreUint64(&words[0], at(0))
}

// set copies s into an array of chars, cut so that a NUL remains.
func set(dst []byte, s string) {
	clear(dst)
	copy(dst[:len(dst)-1], s)
}

// str returns an array of chars that another process wrote, with '?' for unprintable
// characters.
func str(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, string(b))
}

// fieldRecords returns the table in the form of the fields map.
func fieldRecords() []fieldRecord {
	var out []fieldRecord
	for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			r := fieldRecord{Offset: uint32(8 * (int(d)*telemetry.BlockWords + f.Word)), Kind: uint32(f.Kind)}
			set(r.Name[:], f.FullName(d))
			set(r.Metric[:], f.Metric(d))
			set(r.UnitOf[:], f.Unit)
			set(r.Help[:], f.Help)
			if strings.HasSuffix(f.Metric(d), "_"+f.Unit) {
				r.Unit = 1
			}
			if f.Kind == telemetry.KindHistogram {
				r.Buckets = uint32(len(f.Bounds) + 1)
				for i := range r.Buckets {
					set(r.LE[i][:], f.LE(int(i)))
				}
			}
			out = append(out, r)
		}
	}
	return out
}

// ErrLayout is returned by readers for counters of another version of this package, or
// for data that are no counters.
var ErrLayout = errors.New("telemetry/bpf: counters of another layout")

// check returns nil if this package can read the counters that belong to this info.
func (r *infoRecord) check() error {
	switch {
	case string(r.Magic[:]) != infoMagic:
		return fmt.Errorf("%w: no magic", ErrLayout)
	case r.Version != telemetry.LayoutVersion || r.Layout != telemetry.Layout():
		return fmt.Errorf("%w: version %d hash %#x, ours is version %d hash %#x",
			ErrLayout, r.Version, r.Layout, telemetry.LayoutVersion, telemetry.Layout())
	case r.Slots == 0 || r.Slots > maxQueues:
		return fmt.Errorf("%w: %d queues", ErrLayout, r.Slots)
	}
	return nil
}

// members visits the tagged members of a record with their offsets.
func members(t reflect.Type, visit func(name, show string, f reflect.StructField)) {
	for f := range slices.Values(reflect.VisibleFields(t)) {
		tag, ok := f.Tag.Lookup("btf")
		if !ok {
			continue
		}
		name, show, _ := strings.Cut(tag, ",")
		visit(name, show, f)
	}
}
