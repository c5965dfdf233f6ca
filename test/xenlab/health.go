//go:build linux

package xenlab

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"barevif/test/xenlab/image"
	"barevif/test/xenlab/machine"
	"barevif/test/xenlab/proto"
)

// stateScript prints the resources that a scenario must give back, one per line: domains,
// including dead ones whose pages are still mapped; dom0's event channels without their
// numbers; its interrupts of vifs; its devices and network interfaces; the nodes of xenstore
// and their values.
const stateScript = `
xl list | sed 1d | while read -r name id rest; do echo "domain $name $id"; done
lsevtchn 0 | sed 's/^ *[0-9]*: VCPU [0-9]*: /port /'
sed -n 's/.*\(vif[0-9.]*\).*/interrupt \1/p' /proc/interrupts
for f in /sys/class/net/* /sys/bus/xen/devices/* /sys/bus/xen-backend/devices/*; do [ -e "$f" ] && echo "device $f"; done
xenstore-ls -f | sed '/^\/\(libxl\|vm\) = /d; s/^/xenstore /'
`

// settleLimit is how long the toolstack may take to clean up after a domain.
const settleLimit = 30 * time.Second

// dom0Resources returns the resources that are in use now, sorted.
func (t *T) dom0Resources() []string {
	r := t.dom0.try(proto.Call{Op: proto.Run, Argv: []string{"sh", "-c", stateScript}})
	if err := r.problem(); err != nil {
		t.Fatalf("looking at dom0: %w", err)
	}
	lines := strings.Split(r.Text(), "\n")
	slices.Sort(lines)
	return lines
}

// grantedPages returns the granted pages of a domain other than dom0, mapped or not. Of dom0's own
// grants Xen shows only the mapped ones: see mappedGrants.
func (t *T) grantedPages(d *Domain) []string {
	lines := strings.Split(t.Dom0().Run(image.ProgramDir+"/grants", fmt.Sprint(d.ID)).Text(), "\n")
	slices.Sort(lines)
	return lines
}

// domainResources returns the resources of a domain that goes on: granted pages, and event channels
// without their numbers.
func (t *T) domainResources(d *Domain) []string {
	ports := t.Dom0().Sh("lsevtchn %d | sed 's/^ *[0-9]*: VCPU [0-9]*: /port /; s/, Port [0-9]*$//; s/Remote Domain %[1]d$/Remote Domain itself/'", d.ID)
	lines := append(t.grantedPages(d), strings.Split(ports, "\n")...)
	slices.Sort(lines)
	return lines
}

// requireResources waits until a domain holds the same resources as before.
func (t *T) requireResources(d *Domain, before []string) {
	t.awaitResources(before, func() []string { return t.domainResources(d) })
}

// requireResourcesWithin is requireResources for a domain that may take that long.
func (t *T) requireResourcesWithin(d *Domain, before []string, patience time.Duration) {
	t.awaitResourcesWithin(before, func() []string { return t.domainResources(d) }, patience)
}

// awaitResources waits until state returns the same resources as before.
func (t *T) awaitResources(before []string, state func() []string) {
	t.awaitResourcesWithin(before, state, settleLimit)
}

func (t *T) awaitResourcesWithin(before []string, state func() []string, patience time.Duration) {
	for limit := t.machine.Limit(patience); ; time.Sleep(200 * time.Millisecond) {
		now := state()
		if slices.Equal(before, now) {
			return
		}
		if limit.Over() {
			t.Fatalf("left behind: %s", difference(before, now))
		}
	}
}

// difference returns the difference of two sorted lists, as + and - lines.
func difference(before, now []string) string {
	var out []string
	for len(before) > 0 || len(now) > 0 {
		switch {
		case len(before) == 0 || len(now) > 0 && now[0] < before[0]:
			out, now = append(out, "+ "+now[0]), now[1:]
		case len(now) == 0 || before[0] < now[0]:
			out, before = append(out, "- "+before[0]), before[1:]
		default:
			before, now = before[1:], now[1:]
		}
	}
	return strings.Join(out, "; ")
}

// mappedGrants returns the grants of all domains that some domain has mapped. Xen prints them
// to its log, so mappedGrants moves the whole log of Xen to the scenario's.
func (t *T) mappedGrants() []string {
	t.dom0.Run("xl", "debug-keys", "g")
	log := t.dom0.Run("xl", "dmesg", "-c").Text()
	t.xenLog += log + "\n"
	return grantEntries(log)
}

var grantLine = regexp.MustCompile(`^\(XEN\) (?:\[[^]]*\] )?(\[0x[0-9a-f]+\] .*)$`)

func grantEntries(xenLog string) (entries []string) {
	for line := range strings.Lines(xenLog) {
		if m := grantLine.FindStringSubmatch(strings.TrimRight(line, "\r\n")); m != nil {
			entries = append(entries, m[1])
		}
	}
	return entries
}

// complaint matches words with which a kernel or Xen reports a fault.
var complaint = regexp.MustCompile(`(?i)\b(warning|error|errors|fail|failed|failure|invalid|illegal|bad|fatal|broken|corrupt\w*|stall\w*|hung|leak\w*|disabled|deferring|unmap\w* failed|still in use|still pending|call trace|segfault|triple fault|unable|cannot|timed out|bogus|spurious|BUG)\b`)

// subject matches the subjects of complaints that concern the lab.
var subject = regexp.MustCompile(`(?i)\(XEN\)|xen|vif|gnt|grant|evtchn|netfront|netback|\bnet eth|call trace|segfault|hung|stall|\bBUG\b|barevif|\.test\b`)

// harmless matches complaints that do not show a fault. Linux's netback says this once of a frame that it queued while it
// had as many queues as processors, if the frontend then takes fewer; it sends the frame on another queue.
var harmless = regexp.MustCompile(`xen_netback:xenvif_start_xmit: Invalid queue \d+ for packet on interface vif`)

// complaints returns the lines of a kernel's or Xen's log that look like a complaint.
func complaints(log string, expected []*regexp.Regexp) (bad []string) {
	for line := range strings.Lines(log) {
		line = strings.TrimSpace(line)
		matches := func(re *regexp.Regexp) bool { return re.MatchString(line) }
		suspect := machine.Fatal(line) || complaint.MatchString(line) && subject.MatchString(line)
		if suspect && !harmless.MatchString(line) && !slices.ContainsFunc(expected, matches) {
			bad = append(bad, line)
		}
	}
	return bad
}

// requireNoComplaints fails the scenario if the log of dom0's kernel, a guest's or Xen's has a
// complaint.
func (t *T) requireNoComplaints(expected []*regexp.Regexp) {
	dmesg := t.dom0.Run("dmesg", "-c").Text()
	t.Save("dom0.dmesg", []byte(dmesg))
	t.Save("xen.dmesg", []byte(t.xenLog))
	logs := []struct{ who, text string }{{"dom0", dmesg}, {"Xen", t.xenLog}}
	for _, g := range t.guests {
		logs = append(logs, struct{ who, text string }{g.Name, string(g.console)})
	}
	for _, l := range logs {
		if bad := complaints(l.text, expected); len(bad) > 0 {
			t.Fatalf("%s complains: %s%s", l.who, bad[0], andMore(len(bad)-1))
		}
	}
}

func andMore(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" (and %d more lines)", n)
}
