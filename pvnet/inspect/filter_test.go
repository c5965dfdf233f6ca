//go:build linux

package inspect

import (
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/net/bpf"
)

// A filter runs in the data path, so it allocates nothing, whichever way it goes.
func TestFiltersAllocateNothing(t *testing.T) {
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 2}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0x800, SkipFalse: 6},
		bpf.LoadMemShift{Off: 14}, bpf.LoadIndirect{Off: 16, Size: 2}, bpf.StoreScratch{Src: bpf.RegA, N: 3},
		bpf.LoadScratch{Dst: bpf.RegX, N: 3}, bpf.ALUOpX{Op: bpf.ALUOpAdd}, bpf.RetConstant{Val: 1}, bpf.RetConstant{},
	})
	if err != nil {
		t.Fatal(err)
	}
	filter, err := filterOf(Program(raw))
	if err != nil {
		t.Fatal(err)
	}
	ip := make([]byte, 60)
	ip[12], ip[14] = 8, 0x45
	frames := [][]byte{ip, make([]byte, 60), ip[:20], nil}
	got := ""
	for _, f := range frames {
		got += map[bool]string{true: "y", false: "n"}[filter(f)]
	}
	if got != "ynnn" {
		t.Errorf("it says %s", got)
	}
	if n := testing.AllocsPerRun(100, func() {
		for _, f := range frames {
			filter(f)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// No program that passes the checks can end the process.
func FuzzFilter(f *testing.F) {
	f.Add([]byte{6, 0, 0, 0, 0, 0, 0, 1}, []byte{1, 2})
	f.Add([]byte{0x28, 0, 0, 0, 0, 0, 0, 12, 6, 0, 0, 0, 0, 0, 0, 1}, make([]byte, 60))
	f.Fuzz(func(t *testing.T, program, frame []byte) {
		var p []Insn
		for ; len(program) >= 8; program = program[8:] {
			k := uint32(program[4])<<24 | uint32(program[5])<<16 | uint32(program[6])<<8 | uint32(program[7])
			p = append(p, Insn{uint32(program[0]) | uint32(program[1])<<8, uint32(program[2]), uint32(program[3]), k})
		}
		filter, err := filterOf(p)
		if err != nil || filter == nil {
			return
		}
		filter(frame)
	})
}

// A reason that is cut to its room ends with a whole character.
func TestAReasonIsCutBetweenCharacters(t *testing.T) {
	for _, c := range []struct {
		s    string
		n    int
		want string
	}{{"abc", 3, "abc"}, {"abc", 2, "ab"}, {"aé", 2, "a"}, {"aé", 3, "aé"}, {"a€b", 3, "a"}, {"€", 2, ""}} {
		if got := clipped(c.s, c.n); got != c.want {
			t.Errorf("the first %d bytes of %q: %q", c.n, c.s, got)
		}
	}
	b := appendEnd(nil, strings.Repeat("é", maxReason))
	if reason := string(b[3:]); len(reason) != maxReason || !utf8.ValidString(reason) {
		t.Errorf("%d bytes", len(reason))
	}
	if b = appendEnd(nil, "x"+strings.Repeat("é", maxReason)); !utf8.Valid(b[3:]) {
		t.Errorf("it ends with part of a character: %q", b[len(b)-4:])
	}
}
