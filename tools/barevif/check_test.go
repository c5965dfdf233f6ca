package main

import (
	"barevif/tools/cli"
	"errors"
	"slices"
	"testing"
)

func TestSizesAreReadStrictly(t *testing.T) {
	for s, want := range map[string][]int{
		"1":                         {1},
		"1-3":                       {1, 2, 3},
		"1-9:4,65507":               {1, 5, 9, 65507},
		"7-7,7":                     {7, 7},
		"100-200:70,1472-2000:5000": {100, 170, 1472},
	} {
		if got, err := parseSizes(s); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "0", "1,", "-1", "1-", "2-1", "65508", "1-5:0", "1:2", "1-2-3", "a", "1e3", "1-5:x"} {
		_, err := parseSizes(s)
		var a *cli.Advice
		if !errors.As(err, &a) || !a.Usage {
			t.Errorf("%q: %v", s, err)
		}
	}
}
