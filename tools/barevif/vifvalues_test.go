package main

import (
	"maps"
	"testing"
)

func TestAValueIsForEachVifOrForOne(t *testing.T) {
	two := []string{"0", "1"}
	for _, c := range []struct {
		given []string
		want  map[string]string
	}{
		{nil, map[string]string{}},
		{[]string{"auto"}, map[string]string{"0": "auto", "1": "auto"}},
		{[]string{"1=x"}, map[string]string{"1": "x"}},
		{[]string{"auto/24", "1=x"}, map[string]string{"0": "auto/24", "1": "x"}},
		{[]string{"1=x", "auto/24"}, map[string]string{"0": "auto/24", "1": "x"}},
		{[]string{"0=fd00::1/64", "1="}, map[string]string{"0": "fd00::1/64", "1": ""}},
	} {
		got, err := (&vifValues{flag: "addr", given: c.given}).of(two, isLiteral)
		if err != nil || !maps.Equal(got, c.want) {
			t.Errorf("%q: %q, %v, want %q", c.given, got, err, c.want)
		}
	}
	// For the only vif an address needs no name.
	if got, err := (&vifValues{flag: "addr", given: []string{"10.9.0.2/24"}}).of([]string{"7"}, isLiteral); err != nil || got["7"] != "10.9.0.2/24" {
		t.Errorf("%q, %v", got, err)
	}
}
