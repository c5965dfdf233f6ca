package users

import (
	"os"
	"slices"
	"testing"
)

func TestUsersHaveNames(t *testing.T) {
	for uid, want := range map[int]string{0: "root (0)", -1: "unknown", 1<<32 - 2: "uid 4294967294"} {
		if got := Name(uid); got != want {
			t.Errorf("%d is %q, want %q", uid, got, want)
		}
	}
	for s, want := range map[string]int{"0": 0, "root": 0, "4321": 4321} {
		if got, err := Lookup(s); err != nil || got != want {
			t.Errorf("%q is %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "-1", "4294967295", "no such user"} {
		if uid, err := Lookup(s); err == nil {
			t.Errorf("%q is user %d", s, uid)
		}
	}
}

func TestOnlyRootIsSomebodyElseBySudo(t *testing.T) {
	for value, want := range map[string]int{"": 0, "0": 0, "x": 0, "-1": 0, "4294967295": 0, "1000": 1000} {
		t.Setenv("SUDO_UID", value)
		uid, ok := Sudo()
		if os.Geteuid() != 0 {
			want = 0
		}
		if ok != (want != 0) || uid != want {
			t.Errorf("SUDO_UID=%s: %d, %v", value, uid, ok)
		}
		if own := Own(); !slices.Contains(own, os.Geteuid()) || len(own) != 1+min(want, 1) {
			t.Errorf("SUDO_UID=%s: own %v", value, own)
		}
	}
}
