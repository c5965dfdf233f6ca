package wire_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"barevif/xenbus/xenstore/wire"
)

func TestAMessageOfAnyLengthComesBack(t *testing.T) {
	for _, n := range []int{0, 1, wire.MaxPayload - 1, wire.MaxPayload} {
		h := wire.Header{Op: wire.Write, ReqID: 1 << 31, TxID: 7, Len: 99}
		b, err := wire.Append([]byte("before"), h, strings.Repeat("a", n/2), strings.Repeat("b", n-n/2))
		if err != nil || !bytes.HasPrefix(b, []byte("before")) || len(b) != 6+wire.HeaderSize+n {
			t.Fatalf("payload of %d: %d bytes, %v", n, len(b), err)
		}
		buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
		got, p, err := wire.ReadMessage(bytes.NewReader(b[6:]), buf)
		h.Len = uint32(n)
		if err != nil || got != h || string(p) != strings.Repeat("a", n/2)+strings.Repeat("b", n-n/2) {
			t.Errorf("payload of %d: %+v with %d bytes, %v", n, got, len(p), err)
		}
	}
}

func TestAMessageThatIsTooLongIsNotSent(t *testing.T) {
	had := []byte("before")
	b, err := wire.Append(had, wire.Header{Op: wire.Read}, strings.Repeat("a", wire.MaxPayload), "b")
	if !errors.Is(err, wire.ErrTooLong) || !bytes.Equal(b, had) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// The peer chooses the length: it must be checked before it is used.
func TestAMessageThatIsTooLongIsNotRead(t *testing.T) {
	head, err := wire.Append(nil, wire.Header{Op: wire.Read}, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []uint32{wire.MaxPayload + 1, 1 << 31, ^uint32(0)} {
		head[12], head[13], head[14], head[15] = byte(n), byte(n>>8), byte(n>>16), byte(n>>24)
		rest := strings.NewReader(strings.Repeat("x", 2*wire.MaxPayload))
		h, p, err := wire.ReadMessage(io.MultiReader(bytes.NewReader(head), rest), make([]byte, wire.HeaderSize+2*wire.MaxPayload))
		if !errors.Is(err, wire.ErrTooLong) || p != nil || h.Len != n || rest.Len() != 2*wire.MaxPayload {
			t.Errorf("length %d: %+v, %d bytes, %v, %d left to read", n, h, len(p), err, rest.Len())
		}
	}
}

// A stream may only end between two messages.
func TestAMessageThatIsCutIsAnError(t *testing.T) {
	whole, err := wire.Append(nil, wire.Header{Op: wire.Read}, "/tool\x00")
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole {
		want := io.ErrUnexpectedEOF
		if n == 0 {
			want = io.EOF
		}
		_, p, err := wire.ReadMessage(bytes.NewReader(whole[:n]), make([]byte, wire.HeaderSize+wire.MaxPayload))
		if !errors.Is(err, want) || p != nil {
			t.Errorf("cut after %d bytes: %q, %v; want %v", n, p, err, want)
		}
	}
}
