// Package abi_test holds the Go side of barevif to what Xen's public headers say.
//
// testdata/golden.txt is the output of golden.c, a program over those headers.
// The tests refuse a fact the headers state and Go does not repeat, and a Go
// value the headers do not know, so that neither list outgrows the other. The
// package has no code of its own.
package abi_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

const goldenFile = "testdata/golden.txt"

type field struct{ offset, size uintptr }

type record struct {
	size   uintptr
	fields map[string]field
}

type ringFacts struct {
	stride, entries int
	fields          map[string]field
	header          []byte         // after SHARED_RING_INIT
	slots           map[uint32]int // offset by index
}

// facts is golden.txt, by kind of line.
type facts struct {
	records map[string]*record
	rings   map[string]*ringFacts
	bytes   map[string][]byte
	consts  map[string]int64
}

func readFacts(t *testing.T) facts {
	t.Helper()
	text, err := os.ReadFile(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	f := facts{map[string]*record{}, map[string]*ringFacts{}, map[string][]byte{}, map[string]int64{}}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if err := f.add(lines.Text()); err != nil {
			t.Fatalf("%s: %q: %v", goldenFile, lines.Text(), err)
		}
	}
	if len(f.records) == 0 || len(f.rings) == 0 || len(f.bytes) == 0 || len(f.consts) == 0 {
		t.Fatalf("%s lacks a kind of line", goldenFile)
	}
	return f
}

func (f facts) add(line string) error {
	var kind, name, of string
	if _, err := fmt.Sscan(line, &kind, &name); err != nil {
		return err
	}
	rest := line[len(kind)+len(name)+2:]
	var err error
	switch kind {
	case "record":
		r := &record{fields: map[string]field{}}
		_, err = fmt.Sscan(rest, &r.size)
		f.records[name] = r
	case "ring":
		r := &ringFacts{fields: map[string]field{}, slots: map[uint32]int{}}
		_, err = fmt.Sscan(rest, &r.stride, &r.entries)
		f.rings[name] = r
	case "field":
		var v field
		if _, err = fmt.Sscan(rest, &of, &v.offset, &v.size); err != nil {
			return err
		}
		if r := f.records[name]; r != nil {
			r.fields[of] = v
			return nil
		}
		for ring, r := range f.rings {
			if name == ring+"_ring" {
				r.fields[of] = v
				return nil
			}
		}
		return errors.New("field of nothing")
	case "slot":
		var at uint32
		var off int
		if _, err = fmt.Sscan(rest, &at, &off); err == nil {
			f.rings[name].slots[at] = off
		}
	case "page":
		f.rings[name].header, err = hex.DecodeString(rest)
	case "bytes":
		f.bytes[name], err = hex.DecodeString(rest)
	case "const":
		var v int64
		_, err = fmt.Sscan(rest, &v)
		f.consts[name] = v
	default:
		err = errors.New("unknown kind of line")
	}
	return err
}

// sameNames fails the test unless the headers and Go name the same things.
func sameNames[A, B any](t *testing.T, what string, c map[string]A, g map[string]B) {
	t.Helper()
	inC, inGo := slices.Sorted(maps.Keys(c)), slices.Sorted(maps.Keys(g))
	for _, name := range inC {
		if _, ok := slices.BinarySearch(inGo, name); !ok {
			t.Errorf("%s %s: in %s, unknown to the test", what, name, goldenFile)
		}
	}
	for _, name := range inGo {
		if _, ok := slices.BinarySearch(inC, name); !ok {
			t.Errorf("%s %s: known to the test, not in %s", what, name, goldenFile)
		}
	}
}

var update = flag.Bool("update", false, "write the golden file anew, from golden.c and Xen's headers")

func TestGoldenFileIsWhatTheHeadersSay(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("gcc is not installed: ", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	probe := exec.CommandContext(ctx, gcc, "-fsyntax-only", "-x", "c", "-")
	probe.Stdin = bytes.NewReader([]byte("#if !__has_include(<xen/io/netif.h>)\n#error\n#endif\n"))
	if probe.Run() != nil {
		t.Skip("Xen's public headers are not installed (Debian: libxen-dev)")
	}

	bin := filepath.Join(t.TempDir(), "golden")
	build := exec.CommandContext(ctx, gcc, "-Wall", "-Wextra", "-Werror", "-o", bin, "golden.c")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("golden.c: %v\n%s", err, out)
	}
	got, err := exec.CommandContext(ctx, bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(goldenFile, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		g, w := bytes.Split(got, []byte("\n")), bytes.Split(want, []byte("\n"))
		for i := range max(len(g), len(w)) {
			if i >= len(g) || i >= len(w) || !bytes.Equal(g[i], w[i]) {
				t.Fatalf("line %d differs: headers %q, file %q", i+1, at(g, i), at(w, i))
			}
		}
	}
}

func at(lines [][]byte, i int) []byte {
	if i < len(lines) {
		return lines[i]
	}
	return nil
}
