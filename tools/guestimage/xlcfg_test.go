package guestimage

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"barevif/tools/guestimage/guestinit"
)

// parseXL reads a configuration as xl's parser does: KEY=VALUE lines, where a value is a number, a string
// in either kind of quotes with backslash escapes, or a list of strings.
func parseXL(text string) (map[string][]string, error) {
	all := map[string][]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("no setting: %q", line)
		}
		if _, err := strconv.Atoi(value); err == nil {
			all[key] = []string{value}
			continue
		}
		list, isList := strings.CutPrefix(value, "[")
		for rest := list; rest != "" && rest != "]"; {
			s, after, err := stringXL(rest)
			if err != nil {
				return nil, fmt.Errorf("%q: %w", line, err)
			}
			all[key] = append(all[key], s)
			rest = strings.TrimPrefix(after, ",")
			if !isList && rest != "" || isList && rest == "" {
				return nil, fmt.Errorf("%q: %q follows", line, rest)
			}
		}
	}
	return all, nil
}

// stringXL reads a quoted string at the beginning of s, as xl's lexer and xlu__cfgl_dequote do.
func stringXL(s string) (value, rest string, err error) {
	if s == "" || s[0] != '"' && s[0] != '\'' {
		return "", "", fmt.Errorf("no string at %q", s)
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == s[0]:
			return b.String(), s[i+1:], nil
		case s[i] == '\\' && i+1 < len(s) && strings.IndexByte(`"'\`, s[i+1]) >= 0:
			i++
		case s[i] == '\\':
			return "", "", fmt.Errorf("an escape xl does not have at %q", s[i:])
		}
		b.WriteByte(s[i])
	}
	return "", "", fmt.Errorf("not closed: %q", s)
}

func TestConfigurationSaysWhatIsAskedFor(t *testing.T) {
	program, err := guestinit.Format([]string{"MSG=it's"}, []string{"-addr", "10.9.0.2/24", `say "yes"`, `back\slash`})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []GuestType{PV, PVH} {
		d := Domain{
			Name: "web-1", Type: kind, Kernel: "/srv/out/kernel", Ramdisk: `/srv/o'u"t/initramfs`, Memory: 160, VCPUs: 2,
			Linux: []string{"loglevel=4"}, Program: program, VIFs: []string{"bridge=br0,mac=00:16:3e:00:00:01", ""}, Lines: []string{`driver_domain=1`},
		}
		text, err := d.Config()
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseXL(text)
		if err != nil {
			t.Fatal(err)
		}
		for key, want := range map[string][]string{
			"name": {"web-1"}, "type": {string(kind)}, "kernel": {"/srv/out/kernel"}, "ramdisk": {`/srv/o'u"t/initramfs`}, "memory": {"160"}, "vcpus": {"2"},
			"vif": {"bridge=br0,mac=00:16:3e:00:00:01", ""}, "extra": {"console=hvc0 loglevel=4 -- " + program}, "driver_domain": {"1"},
			"on_poweroff": {"destroy"}, "on_reboot": {"restart"}, "on_crash": {"restart"},
		} {
			if !slices.Equal(got[key], want) {
				t.Errorf("%s: %s is %q, want %q", kind, key, got[key], want)
			}
			delete(got, key)
		}
		if len(got) != 0 {
			t.Errorf("%s: says %q, too", kind, got)
		}
		s, _, err := guestinit.Parse(d.mustExtra(t))
		if err != nil || !slices.Equal(s.Args, []string{"-addr", "10.9.0.2/24", `say "yes"`, `back\slash`}) || !slices.Equal(s.Env, []string{"MSG=it's"}) {
			t.Errorf("the guest reads %q, %q, %v", s.Env, s.Args, err)
		}
	}
}

func (d Domain) mustExtra(t *testing.T) string {
	t.Helper()
	extra, err := d.extra()
	if err != nil {
		t.Fatal(err)
	}
	return extra
}

func TestConfigurationThatXlWouldMisreadIsRefused(t *testing.T) {
	long := strings.Repeat("x", guestinit.MaxPV-len("console=hvc0 -- "))
	for _, c := range []struct {
		d    Domain
		want string
	}{
		{Domain{Type: PV, Program: long}, ""},
		{Domain{Type: PV, Program: long + "x"}, "extra= has 1024 bytes, and a pv guest takes 1023"},
		{Domain{Type: PVH, Program: long + "x"}, ""},
		{Domain{Type: PVH, Program: strings.Repeat("x", 2032)}, "a pvh guest takes 2047"},
		{Domain{Linux: []string{"--"}}, `"--" is no argument for a kernel`},
		{Domain{Linux: []string{"a\nb"}}, "is no argument for a kernel"},
		{Domain{Name: "a\nb"}, "name: "},
		{Domain{VIFs: []string{"a\x00"}}, "control characters"},
	} {
		_, err := c.d.Config()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.60v: %v, want %q", c.d, err, c.want)
		}
	}
}

// xl reads each string as it was, or it was refused.
func FuzzStringsSurviveXl(f *testing.F) {
	f.Add(`it's "a" \ `)
	f.Add(`\`)
	f.Fuzz(func(t *testing.T, s string) {
		quoted, err := quoteXL(s)
		if err != nil {
			return
		}
		got, rest, err := stringXL(quoted)
		if err != nil || got != s || rest != "" || strings.ContainsAny(quoted, "\n\r") {
			t.Errorf("%q as %s: %q, %q, %v", s, quoted, got, rest, err)
		}
	})
}
