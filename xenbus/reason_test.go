package xenbus

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestAReasonEndsBetweenCharacters(t *testing.T) {
	if s := strings.Repeat("x", mostReason); Reason(s) != s || Reason(s+"x") != s || Reason("") != "" {
		t.Error("text of one byte a character")
	}
	for _, char := range []string{"é", "…", "🂡"} {
		for before := range 5 { // so that the limit is at each place in a character
			text := strings.Repeat("x", before) + strings.Repeat(char, mostReason)
			got := Reason(text)
			if !strings.HasPrefix(text, got) || !utf8.ValidString(got) || len(got) > mostReason || len(got) <= mostReason-len(char) {
				t.Errorf("%d bytes before %s: %d bytes that end in %x", before, char, len(got), got[len(got)-4:])
			}
		}
	}
	// What is no UTF-8 is bounded all the same.
	if got := Reason(strings.Repeat("\x80", 2*mostReason)); len(got) != mostReason {
		t.Errorf("%d bytes", len(got))
	}
}
