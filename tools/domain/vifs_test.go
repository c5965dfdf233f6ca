package domain

import (
	"path/filepath"
	"slices"
	"testing"

	"barevif/hypercall/xendev"
	"barevif/hypercall/xendev/xendevtest"
	"barevif/tools/xenhost"
)

// Where no emulated host is, the vifs of the Xen domain are meant, with and without --xen.
func TestWithoutAHostTheVifsOfTheXenDomainAreMeant(t *testing.T) {
	cfg := xendev.Config{Root: xendevtest.Tree(t, map[string]string{
		"sys/hypervisor/type":                          "xen\n",
		"sys/bus/xen/devices/vif-12/nodename":          "device/vif/12\n",
		"sys/bus/xen/devices/vif-0/nodename":           "device/vif/0\n",
		"sys/bus/xen-backend/devices/vif-3-1/nodename": "backend/vif/3/1\n",
	})}
	for _, f := range []Flags{{Xen: true}, {Socket: filepath.Join(t.TempDir(), "none.sock"), Dom: 1}} {
		if got, want := f.Candidates(t.Context(), cfg), []string{"0", "12"}; !slices.Equal(got, want) {
			t.Errorf("%+v: %q, want %q", f, got, want)
		}
	}
}

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
