package guestinit

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Restart says after which ends the program is started again.
type Restart string

const (
	Never     Restart = "never"
	OnFailure Restart = "on-failure" // any end but exit status 0
	Always    Restart = "always"
)

// Limits of the settings.
const (
	DefaultStop = 10 * time.Second
	MaxStop     = 10 * time.Minute
	MaxGrants   = 1 << 20 // pages: 4 GiB
	// MaxWords is how many words may follow the "--": the kernel keeps them for its process 1,
	// too, and panics if there are more than 32.
	MaxWords = 30
	// MaxPV is how long the command line of a PV guest can be, in bytes: Xen cuts it there.
	MaxPV = 1023
)

// Settings are what a command line asks for.
type Settings struct {
	Hostname string // "": the program's name
	Restart  Restart
	Stop     time.Duration // how long the program may take to end when asked to
	Grants   int           // pages that gntalloc may grant; 0: by the number of processors and vifs
	Env      []string      // of the program, NAME=value
	Args     []string      // of the program, without its name
}

// prefix begins the names of our parameters. The kernel ignores names with a dot that belong to no
// module of its own.
const prefix = "barevif."

// Parse reads a kernel command line:
//
//	PARAMETERS [-- [NAME=VALUE...] [--] [ARGUMENT...]]
//
// Of the parameters it takes these, and leaves the others to the kernel. Words are separated by
// white space; double quotes keep it, as for the kernel.
//
//	barevif.hostname=NAME
//	barevif.restart=never|on-failure|always
//	barevif.stop=TIME     such as 10s, from 0s to 10m
//	barevif.grants=PAGES
//
// What follows the first word "--" belongs to the program, in the syntax of [Words]. As for
// env(1), the first words of the form NAME=VALUE are its environment, and the rest are its
// arguments. A second "--" ends the environment, where an argument has that form.
//
// A parameter that makes no sense leaves its default and a complaint. The error is for the
// program's part, without which the program must not be started.
func Parse(line string) (s Settings, complaints []string, err error) {
	s = Settings{Restart: OnFailure, Stop: DefaultStop}
	params, program := cut(line)
	for _, p := range params {
		name, value, ok := strings.Cut(unquote(p), "=")
		name, ours := strings.CutPrefix(name, prefix)
		if !ours {
			continue
		}
		if err := s.set(name, unquote(value), ok); err != nil {
			complaints = append(complaints, err.Error())
		}
	}
	words, err := Words(program)
	if err != nil {
		return s, complaints, err
	}
	s.Env, s.Args = SplitEnv(words)
	return s, complaints, nil
}

// set sets one parameter.
func (s *Settings) set(name, value string, given bool) error {
	bad := func(want string) error {
		return fmt.Errorf("%s%s=%s: not %s; it is ignored", prefix, name, value, want)
	}
	switch name {
	case "hostname":
		if !given || CheckHostname(value) != nil {
			return bad("a name of letters, digits, dots and dashes, up to 64 bytes")
		}
		s.Hostname = value
	case "restart":
		r := Restart(value)
		if !slices.Contains([]Restart{Never, OnFailure, Always}, r) {
			return bad("never, on-failure or always")
		}
		s.Restart = r
	case "stop":
		d, err := time.ParseDuration(value)
		if err != nil || d < 0 || d > MaxStop {
			return bad("a time from 0s to 10m, such as 10s")
		}
		s.Stop = d
	case "grants":
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 || n > MaxGrants {
			return bad("a number of pages from 1 to " + strconv.Itoa(MaxGrants))
		}
		s.Grants = n
	default:
		return fmt.Errorf("%s%s: no such setting; there are %[1]shostname, %[1]srestart, %[1]sstop and %[1]sgrants", prefix, name)
	}
	return nil
}

// CheckHostname checks a name as Linux and DNS take it.
func CheckHostname(name string) error {
	if name == "" || len(name) > 64 {
		return errors.New("a host name has 1 to 64 bytes")
	}
	for _, c := range name {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.') {
			return fmt.Errorf("%q is in no host name", c)
		}
	}
	return nil
}

// cut splits a command line into its parameters and the text behind the word "--". A double
// quote begins or ends text in which white space does not separate, as in the kernel's next_arg.
func cut(line string) (params []string, program string) {
	quoted, begin := false, -1
	for i := 0; i <= len(line); i++ {
		if i < len(line) && (quoted || !isSpace(line[i])) {
			if begin < 0 {
				begin = i
			}
			if line[i] == '"' {
				quoted = !quoted
			}
			continue
		}
		if begin < 0 {
			continue
		}
		word := line[begin:i]
		if word == "--" {
			return params, line[i:]
		}
		params, begin = append(params, word), -1
	}
	return params, ""
}

// unquote takes the double quotes around a value away.
func unquote(s string) string {
	if rest, ok := strings.CutPrefix(s, `"`); ok {
		return strings.TrimSuffix(rest, `"`)
	}
	return s
}

func isSpace(c byte) bool { return c == ' ' || c >= '\t' && c <= '\r' }

// SplitEnv splits the program's words into its environment and its arguments.
func SplitEnv(words []string) (env, args []string) {
	for i, w := range words {
		if w == "--" {
			return words[:i], words[i+1:]
		}
		name, _, ok := strings.Cut(w, "=")
		if !ok || !isName(name) {
			return words[:i], words[i:]
		}
	}
	return words, nil
}

// isName reports whether s can be the name of an environment variable.
func isName(s string) bool {
	for i, c := range s {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || i > 0 && c >= '0' && c <= '9') {
			return false
		}
	}
	return s != ""
}

// Format returns the text behind "--" for which [Parse] finds env and args.
func Format(env, args []string) (string, error) {
	var words []string
	for _, e := range env {
		name, value, ok := strings.Cut(e, "=")
		if !ok || !isName(name) {
			return "", fmt.Errorf("%q is no NAME=VALUE of an environment", e)
		}
		words = append(words, name+"="+Quote(value))
	}
	if gotEnv, _ := SplitEnv(args); len(gotEnv) > 0 || len(args) > 0 && args[0] == "--" {
		words = append(words, "--")
	}
	for _, a := range args {
		words = append(words, Quote(a))
	}
	text := strings.Join(words, " ")
	for _, c := range text {
		if c < ' ' || c == 0x7f {
			return "", fmt.Errorf("%q: a command line has no control characters", c)
		}
	}
	if n := kernelWords(text); n > MaxWords {
		return "", fmt.Errorf("%d words, and the kernel takes %d", n, MaxWords)
	}
	return text, nil
}

// kernelWords counts the words in the kernel's syntax, which knows only double quotes, and for
// which the byte 0xa0 is white space.
func kernelWords(text string) int {
	text = strings.ReplaceAll(text, "\xa0", " ")
	n := 0
	for {
		words, rest := cut(text)
		n += len(words)
		if text = rest; text == "" {
			return n
		}
		n++ // the "--"
	}
}
