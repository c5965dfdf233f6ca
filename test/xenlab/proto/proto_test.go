package proto

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"testing"
)

func TestBlobsArriveAsTheyLeft(t *testing.T) {
	random := make([]byte, 100_000)
	rand.NewChaCha8([32]byte{1}).Read(random)
	for _, b := range []Blob{
		nil, Blob("short"), {0, 0xff, '\n'}, bytes.Repeat([]byte("x"), worthwhile-1),
		bytes.Repeat([]byte("x"), worthwhile), bytes.Repeat([]byte("long\n"), 100_000), random,
	} {
		line, err := json.Marshal(Reply{ID: 7, Stdout: b})
		if err != nil {
			t.Fatal(err)
		}
		if bytes.IndexByte(line, '\n') >= 0 {
			t.Error("a message of more than one line")
		}
		var r Reply
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatal(err)
		}
		if r.ID != 7 || !bytes.Equal(r.Stdout, b) {
			t.Errorf("%d bytes came as %d", len(b), len(r.Stdout))
		}
	}
}

func TestLongTextIsCompressed(t *testing.T) {
	line, err := json.Marshal(Blob(bytes.Repeat([]byte("the same line\n"), 10_000)))
	if err != nil {
		t.Fatal(err)
	}
	if len(line) > 10_000 {
		t.Errorf("140 kB take %d bytes", len(line))
	}
}

func TestDamagedBlobIsAnError(t *testing.T) {
	for _, line := range []string{`{"z":"AAAA"}`, `{"r":"!"}`, `7`} {
		var b Blob
		if err := json.Unmarshal([]byte(line), &b); err == nil {
			t.Errorf("%s: no error", line)
		}
	}
}
