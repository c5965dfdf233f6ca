package guestinit

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestCommandLineIsTakenApart(t *testing.T) {
	for _, c := range []struct {
		line      string
		env, args []string
	}{
		{"", nil, nil},
		{"console=hvc0 quiet", nil, nil},
		{"console=hvc0 --", nil, nil},
		{"console=hvc0 -- serve --addr 10.9.0.2/24", nil, []string{"serve", "--addr", "10.9.0.2/24"}},
		{"-- -x\t--  y", nil, []string{"-x", "--", "y"}},
		{"a -- GOGC=50 _A1= x B=2", []string{"GOGC=50", "_A1="}, []string{"x", "B=2"}},
		{"a -- A=1 B=2", []string{"A=1", "B=2"}, nil},
		{"a -- A=1 -- B=2 c", []string{"A=1"}, []string{"B=2", "c"}},
		{"a -- -- A=1", nil, []string{"A=1"}},
		{"a -- 1A=1 --addr=2", nil, []string{"1A=1", "--addr=2"}},
		{`a -- 'two words' "and three more" back\ slash`, nil, []string{"two words", "and three more", "back slash"}},
		{`a -- MSG='it'\''s' ''`, []string{"MSG=it's"}, []string{""}},
		{`a -- "say \"yes\" \n \\" 'a\b' a"b"'c'`, nil, []string{`say "yes" \n \`, `a\b`, "abc"}},
		{`x="a -- b" -- c`, nil, []string{"c"}},
		{`x=a"-- b" --x -- c`, nil, []string{"c"}},
	} {
		s, complaints, err := Parse(c.line)
		if err != nil || complaints != nil || !slices.Equal(s.Env, c.env) || !slices.Equal(s.Args, c.args) {
			t.Errorf("%s: env %q, args %q, %q, %v", c.line, s.Env, s.Args, complaints, err)
		}
	}
	for line, want := range map[string]error{`a -- 'x`: errOpen, `a -- "x\"`: errOpen, `a -- x\`: errBackslash, `a -- "x\`: errOpen} {
		if _, _, err := Parse(line); err != want {
			t.Errorf("%s: %v", line, err)
		}
	}
}

func TestSettingsAreRead(t *testing.T) {
	s, complaints, err := Parse(`console=hvc0 barevif.hostname="web-1.example" barevif.restart=always barevif.stop=1m30s "barevif.grants=4114" -- barevif.restart=never`)
	want := Settings{Hostname: "web-1.example", Restart: Always, Stop: 90 * time.Second, Grants: 4114, Env: nil}
	if err != nil || complaints != nil || s.Hostname != want.Hostname || s.Restart != want.Restart || s.Stop != want.Stop || s.Grants != want.Grants {
		t.Errorf("%+v, %q, %v", s, complaints, err)
	}
	if !slices.Equal(s.Args, []string{"barevif.restart=never"}) {
		t.Errorf("the program's arguments are %q", s.Args)
	}
}

func TestSettingsThatMakeNoSenseAreNamed(t *testing.T) {
	for param, want := range map[string]string{
		"barevif.restart=sometimes":                   "never, on-failure or always",
		"barevif.restart":                             "never, on-failure or always",
		"barevif.stop=10":                             "a time from 0s to 10m",
		"barevif.stop=-1s":                            "a time from 0s to 10m",
		"barevif.stop=11m":                            "a time from 0s to 10m",
		"barevif.grants=0":                            "a number of pages",
		"barevif.grants=1048577":                      "a number of pages",
		"barevif.hostname":                            "a name of letters",
		"barevif.hostname=a/b":                        "a name of letters",
		"barevif.hostname=" + strings.Repeat("a", 65): "a name of letters",
		"barevif.colour=red":                          "no such setting; there are barevif.hostname",
	} {
		s, complaints, err := Parse("quiet " + param + " panic=1")
		if err != nil || len(complaints) != 1 || !strings.Contains(complaints[0], want) || !strings.HasPrefix(complaints[0], "barevif.") {
			t.Errorf("%s: %q, %v", param, complaints, err)
		}
		if s.Restart != OnFailure || s.Stop != DefaultStop || s.Grants != 0 || s.Hostname != "" {
			t.Errorf("%s changed the settings to %+v", param, s)
		}
	}
}

func TestTextThatNoCommandLineHoldsIsRefused(t *testing.T) {
	many := slices.Repeat([]string{"x"}, MaxWords)
	if _, err := Format(nil, many); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		env, args []string
		want      string
	}{
		{nil, append(many, "y"), "the kernel takes 30"},
		{nil, append(many[1:], "two words"), "the kernel takes 30"}, // which does not know our quotes
		{nil, append(many[1:], "à"), "the kernel takes 30"},         // of which it takes a byte for a blank
		{nil, []string{"a\nb"}, "control characters"},
		{[]string{"A"}, nil, "no NAME=VALUE"},
		{[]string{"1=2"}, nil, "no NAME=VALUE"},
		{[]string{"=2"}, nil, "no NAME=VALUE"},
	} {
		if text, err := Format(c.env, c.args); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q %q: %q, %v", c.env, c.args, text, err)
		}
	}
}

// What is written can be read, whatever the words are.
func FuzzWordsSurviveTheCommandLine(f *testing.F) {
	f.Add("A", "x y", "-- b", `it's "a" \ `)
	f.Add("GOGC", "", "A=1", "--")
	f.Add("_", "a=b", "", "\t")
	f.Fuzz(func(t *testing.T, name, value, arg1, arg2 string) {
		env, args := []string{name + "=" + value}, []string{arg1, arg2}
		text, err := Format(env, args)
		if err != nil {
			return
		}
		s, complaints, err := Parse(`console=hvc0 x="a b" -- ` + text)
		if err != nil || complaints != nil || !slices.Equal(s.Env, env) || !slices.Equal(s.Args, args) {
			t.Errorf("%q: env %q, args %q, %v", text, s.Env, s.Args, err)
		}
	})
}

// No command line makes the parser panic, or accept a setting outside its bounds.
func FuzzCommandLine(f *testing.F) {
	f.Add(`barevif.stop=1s barevif.restart="always" -- A=1 'b c' "d\"e"`)
	f.Add(`barevif.grants=99999999999999999999 "-- barevif.hostname=`)
	f.Fuzz(func(t *testing.T, line string) {
		s, _, err := Parse(line)
		if s.Stop < 0 || s.Stop > MaxStop || s.Grants < 0 || s.Grants > MaxGrants || len(s.Hostname) > 64 {
			t.Errorf("%+v", s)
		}
		if err != nil && (s.Args != nil || s.Env != nil) {
			t.Errorf("words beside an error: %+v", s)
		}
	})
}
