package guestimage

import (
	"fmt"
	"strconv"
	"strings"

	"barevif/tools/guestimage/guestinit"
)

// A GuestType says how Xen runs a guest.
type GuestType string

const (
	PV  GuestType = "pv"
	PVH GuestType = "pvh"
)

// A Domain is what a configuration for xl says, xl.cfg(5).
type Domain struct {
	Name            string
	Type            GuestType
	Kernel, Ramdisk string // paths in dom0
	Memory, VCPUs   int    // MiB, and processors
	Linux           []string
	Program         string   // arguments and environment: see guestinit.Format
	VIFs            []string // in xl's syntax
	Lines           []string // more of the configuration, unchanged
}

// maxCommandLine is the length of a command line that Linux takes on amd64, without the final NUL.
const maxCommandLine = 2047

// extra returns the kernel's command line.
func (d Domain) extra() (string, error) {
	words := append([]string{"console=hvc0"}, d.Linux...)
	for _, w := range words {
		if w == "--" || strings.ContainsFunc(w, func(c rune) bool { return c < ' ' || c == 0x7f }) {
			return "", fmt.Errorf("%q is no argument for a kernel", w)
		}
	}
	if d.Program != "" {
		words = append(words, "--", d.Program)
	}
	extra := strings.Join(words, " ")
	limit := maxCommandLine
	if d.Type == PV {
		limit = guestinit.MaxPV
	}
	if len(extra) > limit {
		return "", fmt.Errorf("extra= has %d bytes, and a %s guest takes %d: put what is long into a file (--file)", len(extra), d.Type, limit)
	}
	return extra, nil
}

// Config returns the text of the configuration.
func (d Domain) Config() (string, error) {
	extra, err := d.extra()
	if err != nil {
		return "", err
	}
	vifs := make([]string, len(d.VIFs))
	for i, v := range d.VIFs {
		if vifs[i], err = quoteXL(v); err != nil {
			return "", err
		}
	}
	var b strings.Builder
	b.WriteString("# Made by barevif image, which writes it anew: keep changes in a copy.\n" +
		"# In extra=, what is behind \" -- \" belongs to the program: NAME=VALUE..., then arguments, quoted as in a shell.\n" +
		"# barevif.restart=never|on-failure|always, .stop=10s, .hostname=NAME and .grants=PAGES stand before that.\n")
	for _, line := range []struct{ key, text string }{
		{"name", d.Name}, {"type", string(d.Type)}, {"kernel", d.Kernel}, {"ramdisk", d.Ramdisk}, {"extra", extra},
	} {
		quoted, err := quoteXL(line.text)
		if err != nil {
			return "", fmt.Errorf("%s: %w", line.key, err)
		}
		fmt.Fprintf(&b, "%s=%s\n", line.key, quoted)
	}
	fmt.Fprintf(&b, "memory=%d\nvcpus=%d\nvif=[%s]\n", d.Memory, d.VCPUs, strings.Join(vifs, ","))
	b.WriteString("on_poweroff=\"destroy\"\non_reboot=\"restart\"\non_crash=\"restart\"\n")
	for _, line := range d.Lines {
		b.WriteString(line + "\n")
	}
	return b.String(), nil
}

// quoteXL returns a string in the syntax of xl's configurations. It escapes a quotation mark only
// where the string has both kinds.
func quoteXL(s string) (string, error) {
	if strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return "", fmt.Errorf("%s has control characters, which no string of xl may have", strconv.Quote(s))
	}
	s = strings.ReplaceAll(s, `\`, `\\`)
	if !strings.Contains(s, `"`) {
		return `"` + s + `"`, nil
	}
	if !strings.Contains(s, "'") {
		return "'" + s + "'", nil
	}
	return `"` + strings.ReplaceAll(s, `"`, `\"`) + `"`, nil
}
