//go:build linux

package bpf

import (
	"fmt"
	"reflect"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"barevif/telemetry"
	"barevif/telemetry/bpf/refused"
)

// The iterator's formats for bpf_seq_printf. Its output is that of openmetrics.Write.
var formats = [...]string{
	"# TYPE %s counter\n",
	"# TYPE %s gauge\n",
	"# TYPE %s histogram\n",
	"# UNIT %s %s\n",
	"# HELP %s %s\n",
	"%s_total{vif=\"%s\",queue=\"%llu\"} %llu\n",
	"%s{vif=\"%s\",queue=\"%llu\"} %llu\n",
	"%s_bucket{vif=\"%s\",queue=\"%llu\",le=\"%s\"} %llu\n",
	"%s_count{vif=\"%s\",queue=\"%llu\"} %llu\n",
	"%s_sum{vif=\"%s\",queue=\"%llu\"} %llu\n",
	"# EOF\n",
}

const (
	fmtTypeCounter = iota
	fmtTypeGauge
	fmtTypeHistogram
	fmtUnit
	fmtHelp
	fmtCounter
	fmtGauge
	fmtBucket
	fmtCount
	fmtSum
	fmtEOF
)

// Offsets of the members of struct bpf_iter__bpf_map_elem
// (kernel/bpf/map_iter.c): meta, map, key, value.
const (
	ctxMeta  = 0
	ctxValue = 24
	metaSeq  = 0
)

// Stack of the program: the arguments of bpf_seq_printf, then its variables.
const (
	argMetric = -64
	argVif    = -56 // or the unit, or the help text
	argQueue  = -48
	argValue  = -40 // or the bound
	argCount  = -32
	varSum    = -16
	varField  = -8
	varQueue  = -4
)

// texts returns the formats and name as one element, and the offset of each.
func texts(name string) (data []byte, at []uint32) {
	for _, f := range append(formats[:len(formats):len(formats)], name) {
		at = append(at, uint32(len(data)))
		data = append(append(data, f...), 0)
	}
	return append(data, make([]byte, -len(data)&7)...), at
}

// attachIterator makes the program whose link prints the counters as OpenMetrics when it
// is read. The link keeps all maps alive.
//
// The program walks the lines and not the counters, because the samples of a family must
// follow each other. It is called once per family and queue, because the output of one
// call must fit the reader's buffer.
func attachIterator(suffix, name string, counters, fields *ebpf.Map, queues int) (*link.Iter, error) {
	data, at := texts(name)
	text, err := frozen("bvf_t_"+suffix, uint32(len(data)), [][]byte{data}, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("formats: %w", err)
	}
	defer text.Close()

	families := 2 * len(telemetry.Fields())
	elems := make([][]byte, 0, families*queues)
	for f := range families {
		for q := range queues {
			elems = append(elems, encode(lineRecord{Field: uint32(f), Queue: uint32(q)}))
		}
	}
	lines, err := frozen("bvf_l_"+suffix, uint32(lineBytes), elems, keyType("line"), recordType("barevif_line", lineRecord{}))
	if err != nil {
		return nil, fmt.Errorf("lines: %w", err)
	}
	defer lines.Close()

	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "bvf_metrics",
		Type:         ebpf.Tracing,
		AttachType:   ebpf.AttachTraceIter,
		AttachTo:     "bpf_map_elem",
		Instructions: iterProgram(counters.FD(), fields.FD(), text.FD(), at),
		License:      "Dual MIT/GPL", // decides which helpers the program may call
	})
	// The instructions refer to maps by descriptor only: keep the maps alive until here.
	runtime.KeepAlive(counters)
	runtime.KeepAlive(fields)
	runtime.KeepAlive(text)
	if err != nil {
		return nil, fmt.Errorf("load the iterator: %w", refused.Lacking("CAP_PERFMON", unix.CAP_PERFMON, err))
	}
	defer prog.Close()
	it, err := link.AttachIter(link.IterOptions{Program: prog, Map: lines})
	if err != nil {
		return nil, fmt.Errorf("attach the iterator: %w", refused.Terse(err))
	}
	return it, nil
}

// iterProgram assembles the iterator. R6 is the context, R7 the sequence file,
// R8 the field's record, R9 the field's first word.
func iterProgram(counters, fields, text int, at []uint32) asm.Instructions {
	var p asm.Instructions
	next := "" // label of the next instruction
	label := func(name string) { next = name }
	emit := func(ins ...asm.Instruction) {
		if next != "" {
			ins[0], next = ins[0].WithSymbol(next), ""
		}
		p = append(p, ins...)
	}

	field := map[string]int16{}
	members(reflect.TypeFor[fieldRecord](), func(name, _ string, f reflect.StructField) {
		field[name] = int16(f.Offset)
	})
	// store puts the address of a text into an argument.
	store := func(arg int16, n int) {
		emit(asm.LoadMapValue(asm.R1, text, at[n]), asm.StoreMem(asm.RFP, arg, asm.R1, asm.DWord))
	}
	// member puts the address of a string in the field's record into an argument.
	member := func(arg int16, offset int16) {
		emit(
			asm.Mov.Reg(asm.R1, asm.R8),
			asm.Add.Imm(asm.R1, int32(offset)),
			asm.StoreMem(asm.RFP, arg, asm.R1, asm.DWord),
		)
	}
	printf := func(n, args int) {
		emit(
			asm.Mov.Reg(asm.R1, asm.R7),
			asm.LoadMapValue(asm.R2, text, at[n]),
			asm.Mov.Imm(asm.R3, int32(len(formats[n])+1)),
			asm.Mov.Reg(asm.R4, asm.RFP),
			asm.Add.Imm(asm.R4, argMetric),
			asm.Mov.Imm(asm.R5, int32(8*args)),
		)
		if args == 0 {
			emit(asm.Mov.Imm(asm.R4, 0))
		}
		emit(asm.FnSeqPrintf.Call())
	}
	lookup := func(m int, key int16, into asm.Register) {
		emit(
			asm.LoadMapPtr(asm.R1, m),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, int32(key)),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "exit"),
			asm.Mov.Reg(into, asm.R0),
		)
	}

	// byKind jumps to a label by the kind of the field, and goes on for a counter.
	byKind := func(gauge, histogram string) {
		emit(
			asm.LoadMem(asm.R1, asm.R8, field["kind"], asm.Word),
			asm.JEq.Imm(asm.R1, int32(telemetry.KindGauge), gauge),
			asm.JEq.Imm(asm.R1, int32(telemetry.KindHistogram), histogram),
		)
	}

	emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, ctxMeta, asm.DWord),
		asm.LoadMem(asm.R7, asm.R7, metaSeq, asm.DWord),
		asm.LoadMem(asm.R8, asm.R6, ctxValue, asm.DWord),
		asm.JEq.Imm(asm.R8, 0, "eof"), // the call after the last element
		asm.LoadMem(asm.R1, asm.R8, 0, asm.Word),
		asm.StoreMem(asm.RFP, varField, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R8, 4, asm.Word),
		asm.StoreMem(asm.RFP, varQueue, asm.R1, asm.Word),
		asm.StoreMem(asm.RFP, argQueue, asm.R1, asm.DWord),
	)
	lookup(fields, varField, asm.R8)
	lookup(counters, varQueue, asm.R9)
	emit(
		// The bound keeps a histogram's sum, its furthest word, inside the element.
		asm.LoadMem(asm.R1, asm.R8, field["offset"], asm.Word),
		asm.JGT.Imm(asm.R1, queueBytes-8*(bucketSlots+1), "exit"),
		asm.Add.Reg(asm.R9, asm.R1),
	)
	member(argMetric, field["metric"])

	emit(asm.LoadMem(asm.R1, asm.RFP, varQueue, asm.Word), asm.JNE.Imm(asm.R1, 0, "samples"))
	byKind("type_gauge", "type_histogram")
	printf(fmtTypeCounter, 1)
	emit(asm.Ja.Label("unit"))
	label("type_gauge")
	printf(fmtTypeGauge, 1)
	emit(asm.Ja.Label("unit"))
	label("type_histogram")
	printf(fmtTypeHistogram, 1)
	label("unit")
	emit(asm.LoadMem(asm.R1, asm.R8, field["unit_line"], asm.Word), asm.JEq.Imm(asm.R1, 0, "help"))
	member(argVif, field["unit"])
	printf(fmtUnit, 2)
	label("help")
	member(argVif, field["help"])
	printf(fmtHelp, 2)

	label("samples")
	store(argVif, len(formats))
	emit(asm.LoadMem(asm.R1, asm.R9, 0, asm.DWord), asm.StoreMem(asm.RFP, argValue, asm.R1, asm.DWord))
	byKind("gauge", "histogram")
	printf(fmtCounter, 4)
	emit(asm.Ja.Label("exit"))
	label("gauge")
	printf(fmtGauge, 4)
	emit(asm.Ja.Label("exit"))

	label("histogram")
	emit(asm.Mov.Imm(asm.R1, 0), asm.StoreMem(asm.RFP, argCount, asm.R1, asm.DWord))
	for i := range int16(bucketSlots + 1) {
		emit(
			asm.LoadMem(asm.R2, asm.R9, 8*i, asm.DWord),
			asm.StoreMem(asm.RFP, varSum, asm.R2, asm.DWord),
			asm.LoadMem(asm.R1, asm.R8, field["buckets"], asm.Word),
			asm.JEq.Imm(asm.R1, int32(i), "sum"), // the word after the last bucket
		)
		if i == bucketSlots {
			emit(asm.Ja.Label("exit"))
			break
		}
		emit(
			asm.LoadMem(asm.R1, asm.RFP, argCount, asm.DWord),
			asm.Add.Reg(asm.R1, asm.R2),
			asm.StoreMem(asm.RFP, argCount, asm.R1, asm.DWord),
		)
		member(argValue, field["le"]+16*i)
		printf(fmtBucket, 5)
	}
	label("sum")
	emit(asm.LoadMem(asm.R1, asm.RFP, argCount, asm.DWord), asm.StoreMem(asm.RFP, argValue, asm.R1, asm.DWord))
	printf(fmtCount, 4)
	emit(asm.LoadMem(asm.R1, asm.RFP, varSum, asm.DWord), asm.StoreMem(asm.RFP, argValue, asm.R1, asm.DWord))
	printf(fmtSum, 4)
	emit(asm.Ja.Label("exit"))

	label("eof")
	printf(fmtEOF, 0)
	label("exit")
	emit(asm.Mov.Imm(asm.R0, 0), asm.Return())
	return p
}
