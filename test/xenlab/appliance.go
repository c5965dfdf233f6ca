//go:build linux

package xenlab

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"barevif/test/xenlab/image"
	"barevif/tools/guestimage"
	"barevif/tools/guestimage/guestinit"
)

// appliancePackage is the program of which "barevif image" makes guests.
const appliancePackage = "barevif/tools/hello"

// firstPing creates a guest of the name $1 with the address $2 and the MAC $3 from the configuration $4, with the lines
// that follow in addition, and prints for how many seconds the machine has run before that and after it, what time it was
// when ping had its first answer, and a time with for how many seconds the machine has run by then. No ARP comes before the
// ping: the kernel repeats its requests only once a second.
const firstPing = `
now() { cut -d" " -f1 /proc/uptime; }
name=$1 address=$2 mac=$3
shift 3
begin=$(now)
xl create "$@" >/dev/null
created=$(now)
vif=vif$(xl domid "$name").0
ip addr add 10.88.0.1/24 dev $vif
ip neigh replace "$address" lladdr "$mac" dev $vif nud permanent
until answer=$(ping -D -n -c 1 -w 20 -i 0.02 "$address"); do :; done
echo $begin $created $(echo "$answer" | sed -n '/ bytes from /{s/^\[\(.*\)\].*/\1/p;q}') $(bash -c 'read up idle </proc/uptime; echo $EPOCHREALTIME $up')`

// imageBoots boots a guest of what "barevif image" made, fetches its page, and shuts it down. The PV guest has other
// arguments than those of the image.
func imageBoots(kind GuestType, dir string) func(*T) {
	return func(t *T) {
		t.loadNetback(true)
		config, more, host := dir+"/xl.cfg", pvhConfig, image.ApplianceName
		want := []string{`"-addr" "` + image.ApplianceAddr + `/24" "two words"]`, `"MSG=it's me"]`}
		if kind == PV {
			config, host = dir+"/xl-pv.cfg", "renamed"
			more = []string{fmt.Sprintf(`extra="console=hvc0 %s barevif.hostname=%s barevif.stop=20s -- MSG=changed -addr %s/24 'three more words'"`,
				strings.Join(image.ApplianceLinux, " "), host, image.ApplianceAddr)}
			want = []string{`"-addr" "` + image.ApplianceAddr + `/24" "three more words"]`, `"MSG=changed"]`}
		}
		t.noteImage(dir)
		guest, said := t.bootImage(config, more...)
		t.Dom0().Await("the page", "curl -sSf --max-time 5 http://%s/ >/run/page", image.ApplianceAddr)
		page := string(t.Dom0().Get("/run/page"))
		for _, w := range append(want, "host "+host+"\n") {
			if !strings.Contains(page, w) {
				t.Fatalf("no %q in the page %q", w, page)
			}
		}
		t.noteBoot(t.bootTimes(said, t.guestConsole(dir)))
		t.noteMemory()
		t.Ping(t.Dom0(), image.ApplianceAddr, 1472, 20)
		t.shutDown(guest, "hello: asked to end", "barevif: /app/hello exited with status 0")
	}
}

// noteImage notes the sizes of the files.
func (t *T) noteImage(dir string) {
	kernel := t.Dom0().Sh("stat -L -c %%s %s/kernel", dir)
	t.Note("kernel %s bytes, initramfs %s bytes", kernel, t.Dom0().Sh("stat -c %%s %s/initramfs", dir))
}

const applianceLog = "/var/log/xen/console/guest-" + image.ApplianceName + ".log"

// started is what process 1 of an image prints first, and shellStarted what that of KernelAppliance prints last.
var (
	started      = regexp.MustCompile(`barevif: kernel \S+ has started after \d+\.\d+ s, at (\S+)`)
	shellStarted = regexp.MustCompile(image.KernelServing + ` (\S+) (\S+) (\d+) (\d+)`)
)

// guestConsole returns what the guest of the image in dir has said on its console, which must not be that anything is
// missing.
func (t *T) guestConsole(dir string) string {
	t.Dom0().Await("the program's first line", "grep -q 'hello: serving' %s", applianceLog)
	if dir == image.Appliance {
		return t.requireWhole(applianceLog, image.NotInAppliance...)
	}
	return t.requireWhole(applianceLog)
}

// requireWhole returns the log of an image's console, which must say that all modules were loaded but those that the
// image is without, and not that anything is missing.
func (t *T) requireWhole(log string, without ...string) string {
	text := string(t.Dom0().Get(log))
	for _, missing := range [...]string{"is missing", "not mounted", "not loaded", "no vif", "no module", "stays as it is", "does not answer"} {
		if strings.Contains(text, missing) {
			t.Fatalf("something %s:\n%s", missing, text)
		}
	}
	_, loaded, _ := strings.Cut(text, "barevif: loaded ")
	loaded, _, _ = strings.Cut(loaded, "\n")
	for _, module := range guestimage.BaseModules {
		there := slices.Contains(strings.Fields(loaded), guestinit.ModuleName(module))
		if want := !slices.Contains(without, module); there != want {
			t.Fatalf("module %s is loaded: %v, want %v:\n%s", module, there, want, text)
		}
	}
	return text
}

// bootImage creates the guest of a configuration, with more lines, and waits for its answer to a ping. said is what
// firstPing printed.
func (t *T) bootImage(config string, more ...string) (guest *Domain, said string) {
	args := append([]string{"sh", "-ec", firstPing, "sh", image.ApplianceName, image.ApplianceAddr, image.ApplianceMAC, config}, more...)
	said = t.Dom0().Within(3 * time.Minute).Run(args...).Text()
	guest = &Domain{t: t, ID: t.domid(image.ApplianceName), Name: image.ApplianceName, limit: stepLimit}
	t.guests = append(t.guests, guest)
	return guest, said
}

// bootTimes are how long a guest took, in seconds: all until it answered, and of that xl create and the kernel until it
// started process 1. The kernel's own clock starts later than the guest: in a PVH guest of this lab 0.7 s later. So the
// kernel's time is measured by the clock that Xen gives to the guest and to dom0.
type bootTimes struct{ all, xl, kernel float64 }

// beyond is what the guest took without xl and the kernel's own start.
func (b bootTimes) beyond() float64 { return b.all - b.xl - b.kernel }

// bootTimes reads how long the guest took from what firstPing printed and from the guest's console.
func (t *T) bootTimes(said, console string) bootTimes {
	var begin, created, answered, clock, up float64
	if n, err := fmt.Sscan(said, &begin, &created, &answered, &clock, &up); n != 5 {
		t.Fatalf("%q are no times: %w", said, err)
	}
	first, err := processStarted(console)
	if err != nil {
		t.Fatalf("%w:\n%s", err, console)
	}
	answered -= clock - up // begin and created count from the machine's start
	first -= clock - up
	if first < created || first > answered {
		t.Fatalf("process 1 started at %.2f s by its clock, but xl had created its guest at %.2f s, and it answered at %.2f s", first, created, answered)
	}
	return bootTimes{answered - begin, created - begin, first - created}
}

// processStarted returns when process 1 of a guest started, by what it says on its console: in seconds of Unix time.
func processStarted(console string) (float64, error) {
	if m := started.FindStringSubmatch(console); m != nil {
		at, err := time.Parse(time.RFC3339, m[1])
		return float64(at.UnixMilli()) / 1000, err
	}
	m := shellStarted.FindStringSubmatch(console)
	if m == nil {
		return 0, errors.New("process 1 did not say when it started")
	}
	var first, late, sec, usec float64
	_, err := fmt.Sscan(strings.Join(m[1:], " "), &first, &late, &sec, &usec)
	return sec + usec/1e6 - (late - first), err
}

func (t *T) noteBoot(b bootTimes) {
	t.Note("from xl create to the first ping %.2f s: xl %.2f s, the kernel %.2f s, the rest %.2f s", b.all, b.xl, b.kernel, b.beyond())
}

// imageRounds is how often each guest of baselineImage boots.
const imageRounds = 3

// baselineImage boots the image of a program of ours and, in turns, a guest with the same kernel whose process 1 gives
// the same address to the kernel's netfront, and notes how long each takes beyond xl and the kernel's own start until
// it answers a ping. It asserts nothing, because times on an emulated processor vary.
func baselineImage(t *T) {
	t.loadNetback(true)
	for _, guests := range [...]struct {
		config string
		more   []string
	}{{"xl-pv.cfg", nil}, {"xl.cfg", pvhConfig}} {
		var ours, theirs, ourKernel, theirKernel []float64
		for range imageRounds {
			for _, one := range []struct {
				dir, last      string
				beyond, kernel *[]float64
			}{{image.Appliance, "hello: serving", &ours, &ourKernel}, {image.KernelAppliance, image.KernelServing, &theirs, &theirKernel}} {
				guest, said := t.bootImage(one.dir+"/"+guests.config, guests.more...)
				t.Dom0().Await("the last line", "grep -q '%s' %s", one.last, applianceLog)
				times := t.bootTimes(said, string(t.Dom0().Get(applianceLog)))
				*one.beyond, *one.kernel = append(*one.beyond, times.beyond()), append(*one.kernel, times.kernel)
				t.Destroy(guest) // its log begins anew
			}
		}
		for _, list := range [...][]float64{ours, theirs, ourKernel, theirKernel} {
			slices.Sort(list)
		}
		const median = imageRounds / 2
		t.Note("%s, beyond xl and the kernel's %.2f s: %.2f s (%.2f); the kernel's netfront and a shell, beyond xl and %.2f s: %.2f s (%.2f)",
			guests.config, ourKernel[median], ours[median], ours, theirKernel[median], theirs[median], theirs)
	}
}

// noteMemory notes how much of its memory the guest uses.
func (t *T) noteMemory() {
	text := t.Dom0().Sh("curl -sSf --max-time 20 http://%s/memory", image.ApplianceAddr)
	kib := func(name string) int {
		for line := range strings.Lines(text) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == name+":" {
				n, err := strconv.Atoi(f[1])
				if err != nil {
					t.Fatalf("%q: %w", line, err)
				}
				return n
			}
		}
		t.Fatalf("no %s in %q", name, text)
		return 0
	}
	total, free := kib("MemTotal"), kib("MemAvailable")
	t.Note("memory %d of %d MiB in use", (total-free)/1024, total/1024)
}

// shutDown has xl ask a guest made from an image to power off. The guest must end by itself, and
// its console must show each of the lines.
func (t *T) shutDown(guest *Domain, lines ...string) {
	t.Dom0().Run("xl", "shutdown", guest.Name)
	t.Dom0().Await("the guest to power off", "! xl domid %s 2>/dev/null", guest.Name)
	t.saveConsole(guest)
	guest.destroyed = true
	text := string(guest.console)
	for _, line := range append(lines, "barevif: asked to power off") {
		if !strings.Contains(text, line) {
			t.Fatalf("no %q on the console:\n%s", line, text)
		}
	}
}
