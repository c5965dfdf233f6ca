package domain

import (
	"slices"
	"testing"

	"barevif/tools/xenhost"
)

func TestTheFrontendsOfADomainHaveIDs(t *testing.T) {
	for _, c := range []struct {
		vif xenhost.Vif
		id  string
		ok  bool
	}{
		{xenhost.Vif{Name: "vif-12"}, "12", true},
		{xenhost.Vif{Name: "vif-3-1", Backend: true}, "", false},
		{xenhost.Vif{Name: "console-0"}, "", false},
	} {
		if id, ok := FrontendID(c.vif); ok != c.ok || ok && id != c.id {
			t.Errorf("%+v: %q, %v", c.vif, id, ok)
		}
	}
}

// The names are what xenstore has, which others may have written.
func TestOnlyNumbersAreIDs(t *testing.T) {
	got := inOrder([]string{"10", "9", "", "-1", "0", "a\tb", "$(reboot)", "4294967296", "4294967295"})
	if want := []string{"0", "9", "10", "4294967295"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}
