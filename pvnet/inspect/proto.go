//go:build linux

package inspect

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"time"
	"unicode/utf8"

	"golang.org/x/net/bpf"

	"barevif/pvnet"
	"barevif/telemetry"
)

// The protocol: the client sends one request and the server one answer, each a line of
// JSON. Behind the answer to opDump follow records until the client shuts its end down for
// writing, or the vif ends. All numbers in records are little-endian.
const (
	opList  = "list"
	opRings = "rings"
	opKick  = "kick"
	opDump  = "dump"
	opState = "state"
)

// Limits of what is read from the other end, in bytes.
const (
	maxRequest = 256 << 10
	maxAnswer  = 16 << 20
	maxReason  = 1 << 10
)

// MaxProgram is how many instructions a filter may have, as in Linux (BPF_MAXINSNS).
const MaxProgram = 4096

type request struct {
	Op   string `json:"op"`
	Vif  string `json:"vif,omitempty"`
	Name string `json:"name,omitempty"` // opState: of the state
	Peer bool   `json:"peer,omitempty"` // opKick: notify the other end too
	*DumpConfig
}

type answer struct {
	Error  string           `json:"error,omitempty"`
	Vifs   []offered        `json:"vifs,omitempty"`
	Rings  *pvnet.RingState `json:"rings,omitempty"`
	Halves int              `json:"halves,omitempty"`
	States []string         `json:"states,omitempty"` // opList: their names
	State  json.RawMessage  `json:"state,omitempty"`
}

// offered is a vif in the answer to opList.
type offered struct {
	Name string `json:"name"`
	Up   bool   `json:"up"`
}

// A DumpConfig says which frames to copy. The zero DumpConfig copies all of every frame.
type DumpConfig struct {
	Queues   []int  `json:"queues,omitempty"`   // nil: all
	Sent     bool   `json:"sent,omitempty"`     // by the end of that process
	Received bool   `json:"received,omitempty"` // neither: both
	Snaplen  int    `json:"snaplen,omitempty"`  // bytes of each frame; 0: all
	Program  []Insn `json:"program,omitempty"`  // the filter; nil: every frame
}

// An Insn is one instruction of a classic BPF program: code, jt, jf, k, as "tcpdump -ddd"
// prints them.
type Insn [4]uint32

// Program converts a program for the wire.
func Program(raw []bpf.RawInstruction) (p []Insn) {
	for _, r := range raw {
		p = append(p, Insn{uint32(r.Op), uint32(r.Jt), uint32(r.Jf), r.K})
	}
	return p
}

// filterOf checks a program and returns it as a filter, nil for an empty program. A program
// has no loops by its nature. It gets the whole frame, so what it returns only says
// whether the frame is wanted.
func filterOf(program []Insn) (func([]byte) bool, error) {
	if len(program) == 0 {
		return nil, nil
	}
	if len(program) > MaxProgram {
		return nil, fmt.Errorf("a filter of %d instructions: at most %d", len(program), MaxProgram)
	}
	var all []bpf.Instruction
	for i, p := range program {
		if p[0] > math.MaxUint16 || p[1] > math.MaxUint8 || p[2] > math.MaxUint8 {
			return nil, fmt.Errorf("instruction %d of the filter is none: %v", i, p)
		}
		ins := bpf.RawInstruction{Op: uint16(p[0]), Jt: uint8(p[1]), Jf: uint8(p[2]), K: p[3]}.Disassemble()
		switch ins.(type) {
		case bpf.RawInstruction, bpf.NegateA: // the virtual machine knows neither
			return nil, fmt.Errorf("instruction %d of the filter is unknown: %v", i, p)
		}
		all = append(all, ins)
	}
	vm, err := bpf.NewVM(all)
	if err != nil {
		return nil, fmt.Errorf("the filter: %w", err)
	}
	return func(frame []byte) bool {
		n, err := vm.Run(frame)
		return n > 0 && err == nil
	}, nil
}

// Kinds of record.
const (
	recordFrame = 'F'
	recordStats = 'S'
	recordEnd   = 'E'
)

// The header of a recordFrame: kind, direction, checksum, GSO type, reason, flags, GSO size
// (2), queue (4), length (4), captured length (4), 4 unused, lost (8), Unix nanoseconds (8).
const (
	frameHeader = 40
	statsRecord = 1 + 3*8

	flagFinished = 1
)

// appendFrame appends the header of a frame's record.
func appendFrame(b []byte, f *pvnet.TapFrame) []byte {
	flags := byte(0)
	if f.Finished {
		flags |= flagFinished
	}
	b = append(b, recordFrame, byte(f.Dir), byte(f.Checksum), byte(f.GSO.Type), byte(f.Dropped), flags)
	b = binary.LittleEndian.AppendUint16(b, f.GSO.Size)
	b = binary.LittleEndian.AppendUint32(b, uint32(f.Queue))
	b = binary.LittleEndian.AppendUint32(b, uint32(f.Len))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.Data)))
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint64(b, f.Lost)
	return binary.LittleEndian.AppendUint64(b, uint64(f.Time.UnixNano()))
}

var errRecord = errors.New("inspect: the other process sent what is no record")

// parseFrame parses the header of a frame's record.
func parseFrame(b *[frameHeader]byte, f *pvnet.TapFrame) (captured int, err error) {
	*f = pvnet.TapFrame{
		Dir: telemetry.Dir(b[1]), Checksum: pvnet.Checksum(b[2]), Dropped: telemetry.Reason(b[4]), Finished: b[5]&flagFinished != 0,
		GSO:   pvnet.GSO{Type: pvnet.GSOType(b[3]), Size: binary.LittleEndian.Uint16(b[6:])},
		Queue: int(binary.LittleEndian.Uint32(b[8:])), Len: int(binary.LittleEndian.Uint32(b[12:])),
		Lost: binary.LittleEndian.Uint64(b[24:]), Time: time.Unix(0, int64(binary.LittleEndian.Uint64(b[32:]))),
	}
	captured = int(binary.LittleEndian.Uint32(b[16:]))
	if f.Dir > telemetry.TX || f.Checksum > pvnet.ChecksumPartial || f.Len > pvnet.MaxFrame || captured > f.Len {
		return 0, errRecord
	}
	return captured, nil
}

func appendStats(b []byte, s pvnet.TapStats) []byte {
	b = append(b, recordStats)
	b = binary.LittleEndian.AppendUint64(b, s.Captured)
	b = binary.LittleEndian.AppendUint64(b, s.Filtered)
	return binary.LittleEndian.AppendUint64(b, s.Lost)
}

func appendEnd(b []byte, reason string) []byte {
	reason = clipped(reason, maxReason)
	b = append(b, recordEnd)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(reason)))
	return append(b, reason...)
}

// clipped returns at most the first n bytes of s, without part of a character at their end.
func clipped(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// A byteReader is what lines and records are read from.
type byteReader interface {
	io.Reader
	io.ByteReader
	ReadSlice(delim byte) ([]byte, error)
}

// readLine reads a line of JSON of at most limit bytes.
func readLine(r byteReader, limit int, v any) error {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > limit {
			return fmt.Errorf("inspect: a line of more than %d bytes", limit)
		}
		line = append(line, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, errBufferFull) {
			if err == io.EOF && len(line) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	if err := json.Unmarshal(bytes.TrimSpace(line), v); err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	return nil
}
