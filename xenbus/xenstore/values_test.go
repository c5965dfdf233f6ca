package xenstore_test

import (
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"strings"
	"testing"

	"barevif/xenbus/xenstore"
)

func TestNumbersAreReadStrictly(t *testing.T) {
	for _, ok := range []struct {
		s     string
		limit uint64
		want  uint64
	}{
		{"0", 0, 0}, {"7", 7, 7}, {"65535", 65535, 65535}, {"1000", math.MaxUint64, 1000},
		{"18446744073709551615", math.MaxUint64, math.MaxUint64},
		{"18446744073709551614", math.MaxUint64 - 1, math.MaxUint64 - 1},
	} {
		if n, err := xenstore.ParseUint(ok.s, ok.limit); n != ok.want || err != nil {
			t.Errorf("%q: %d, %v", ok.s, n, err)
		}
	}
	for _, bad := range []struct {
		s     string
		limit uint64
	}{
		{"", 9}, {"8", 7}, {"1", 0}, {"10", 9}, {"-1", 9}, {"+1", 9}, {" 1", 9}, {"1 ", 9}, {"1\n", 9}, {"1\x00", 9},
		{"01", 9}, {"00", 9}, {"0x1", 99}, {"1e0", 99}, {"1_0", 99}, {"١", 9}, {"1.0", 9}, {"a", 99}, {":", 99}, {"/", 99},
		{"18446744073709551616", math.MaxUint64}, {"18446744073709551615", math.MaxUint64 - 1},
		{"99999999999999999999", math.MaxUint64}, {"65536", 65535}, {strings.Repeat("1", 4096), math.MaxUint64},
	} {
		var typed *xenstore.ValueError
		if n, err := xenstore.ParseUint(bad.s, bad.limit); !errors.As(err, &typed) || n != 0 {
			t.Errorf("%.30q up to %d: %d, %v", bad.s, bad.limit, n, err)
		} else if len(err.Error()) > 300 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
}

func TestBoolsAreZeroOrOne(t *testing.T) {
	for s, want := range map[string]bool{"0": false, "1": true} {
		if b, err := xenstore.ParseBool(s); b != want || err != nil {
			t.Errorf("%q: %v, %v", s, b, err)
		}
	}
	for _, s := range []string{"", "2", "true", "yes", " 1", "1 ", "01", "-1", "1\x00"} {
		if b, err := xenstore.ParseBool(s); err == nil {
			t.Errorf("%q is taken for %v", s, b)
		}
	}
}

func TestMACsAreReadStrictly(t *testing.T) {
	for s, want := range map[string][6]byte{
		"00:16:3e:01:02:03": {0, 0x16, 0x3e, 1, 2, 3},
		"fF:Ff:aB:Cd:0E:9f": {0xff, 0xff, 0xab, 0xcd, 0x0e, 0x9f},
	} {
		if mac, err := xenstore.ParseMAC(s); mac != want || err != nil {
			t.Errorf("%q: %x, %v", s, mac, err)
		}
	}
	for _, s := range []string{
		"", "00:16:3e:01:02", "00:16:3e:01:02:03:04", "00-16-3e-01-02-03", "00163e010203", "0:16:3e:1:2:3",
		"00:16:3e:01:02:0g", "00:16:3e:01:02:03\x00", " 00:16:3e:01:02:03", "00:16:3e:01:02:+3", "00:16:3e:01:020:3",
	} {
		var typed *xenstore.ValueError
		if mac, err := xenstore.ParseMAC(s); !errors.As(err, &typed) {
			t.Errorf("%q: %x, %v", s, mac, err)
		}
	}
}

func TestValuesHaveDefaultsButNoTolerance(t *testing.T) {
	v := xenstore.Values{"n": "8", "on": "1", "bad": "x", "mac": "00:16:3e:00:00:01"}
	if n, err := v.Uint("n", 8, 1); n != 8 || err != nil {
		t.Error(n, err)
	}
	if n, err := v.Uint("none", 8, 1); n != 1 || err != nil {
		t.Error(n, err)
	}
	if on, err := v.Bool("none", true); !on || err != nil {
		t.Error(on, err)
	}
	if on, err := v.Bool("on", false); !on || err != nil {
		t.Error(on, err)
	}
	for what, err := range map[string]error{
		"uint":  second(v.Uint("bad", 8, 1)),
		"limit": second(v.Uint("n", 7, 1)),
		"bool":  second(v.Bool("bad", true)),
		"mac":   second(v.MAC("bad")),
		"none":  second(v.MAC("none")),
	} {
		var typed *xenstore.ValueError
		if !errors.As(err, &typed) || typed.Path == "" {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func FuzzValues(f *testing.F) {
	for _, s := range []string{"0", "18446744073709551616", "00:16:3e:00:00:01", " 1", "\xff"} {
		f.Add(s, uint64(100))
	}
	f.Fuzz(func(t *testing.T, s string, limit uint64) {
		n, err := xenstore.ParseUint(s, limit)
		want, goErr := strconv.ParseUint(s, 10, 64)
		canonical := goErr == nil && fmt.Sprint(want) == s && want <= limit
		if (err == nil) != canonical || err == nil && n != want {
			t.Errorf("%q up to %d: %d, %v", s, limit, n, err)
		}
		if mac, err := xenstore.ParseMAC(s); err == nil {
			if std, err := net.ParseMAC(s); err != nil || [6]byte(std) != mac {
				t.Errorf("%q: %x", s, mac)
			}
		}
		if xenstore.ValidPath(s) && (strings.ContainsAny(s, "\x00 +") || strings.Contains(s, "//")) {
			t.Errorf("%q is a valid path", s)
		}
	})
}
