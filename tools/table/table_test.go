package table

import "testing"

func TestColumnsAreAligned(t *testing.T) {
	got := (&Table{
		Head: []string{"", "frames", "why"},
		Rows: [][]string{
			{"rx 0", "1 234", "\x1b[31mlost\x1b[0m"},
			{"of another device", "up"},
			{"tx ○", "5", ""},
			{"tx 10", "1234567890", "a reason of many words that is not wrapped, however long it may be"},
		},
		Left: func(column int) bool { return column != 1 },
	}).String()
	const want = `           frames  why
rx 0        1 234  ` + "\x1b[31mlost\x1b[0m" + `
of another device  up
tx ○            5
tx 10  1234567890  a reason of many words that is not wrapped, however long it may be
`
	if got != want {
		t.Errorf("\n%q\nwant\n%q", got, want)
	}
}

func TestATableWithoutRowsIsItsHead(t *testing.T) {
	if got := (&Table{Head: []string{"a", "b"}}).String(); got != "a  b\n" {
		t.Errorf("%q", got)
	}
}
