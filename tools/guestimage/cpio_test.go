//go:build linux

package guestimage

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// readCPIO parses an archive: name, mode and data of each entry.
func readCPIO(t *testing.T, b []byte) (list []string) {
	t.Helper()
	size := len(b)
	field := func(h []byte, i int) int {
		n, err := strconv.ParseUint(string(h[6+8*i:14+8*i]), 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		return int(n)
	}
	for {
		if len(b) < 110 || string(b[:6]) != "070701" {
			t.Fatalf("no header at %d", size-len(b))
		}
		mode, length, nameLen := field(b, 1), field(b, 6), field(b, 11)
		name := string(b[110 : 110+nameLen-1])
		b = b[(110+nameLen+3)&^3:]
		if name == "TRAILER!!!" {
			return list
		}
		list = append(list, fmt.Sprintf("%s %o %q", name, mode, b[:length]))
		b = b[(length+3)&^3:]
	}
}

func TestArchiveHoldsTheTree(t *testing.T) {
	source := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(source, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree := NewTree()
	tree.File("/usr/bin/tool", 0o755, source)
	tree.Data("etc/four", 0o644, []byte("four"))
	tree.Link("/init", "/usr/bin/tool")
	tree.Dir("/tmp", 0o777)
	var b bytes.Buffer
	if err := tree.Write(&b); err != nil {
		t.Fatal(err)
	}
	want := []string{
		`etc 40755 ""`, `etc/four 100644 "four"`, `init 120777 "/usr/bin/tool"`, `tmp 40777 ""`,
		`usr 40755 ""`, `usr/bin 40755 ""`, `usr/bin/tool 100755 "12345"`,
	}
	if got := readCPIO(t, b.Bytes()); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if b.Len()%4 != 0 {
		t.Errorf("%d bytes: a second archive behind it would be misaligned", b.Len())
	}
}

func TestArchiveNamesTheFileItCannotRead(t *testing.T) {
	tree := NewTree()
	tree.File("/usr/bin/tool", 0o755, "/no/such/file")
	if err := tree.Write(&bytes.Buffer{}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "usr/bin/tool") {
		t.Errorf("%v", err)
	}
}
