package emu

import (
	"bufio"
	"strings"
	"testing"
)

func TestOnlyAMapOfAllUsersKnowsEveryUser(t *testing.T) {
	for text, want := range map[string]bool{
		"         0          0 4294967295\n": true,
		"0 0 1000\n1000 100000 4294966295\n": true,
		"         0          0      65536\n": false,
		"0 0 4294967294\n":                   false,
		"":                                   false,
		"nonsense\n":                         false,
		"65534 65534 1\n":                    false,
		"0 0 4294967295\nnonsense\n":         false,
	} {
		if got := mapsEveryUser(bufio.NewScanner(strings.NewReader(text))); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
