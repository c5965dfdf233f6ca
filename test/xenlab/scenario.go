//go:build linux

package xenlab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"barevif/test/xenlab/image"
	"barevif/test/xenlab/machine"
	"barevif/test/xenlab/proto"
)

// A Boot is one start of the machine, and the scenarios that run on it, in order.
type Boot struct {
	Name      string
	Xen       []string // additional arguments for Xen
	Linux     []string // additional arguments for dom0's kernel
	Scenarios []Scenario
}

// A Scenario is one row of the table.
type Scenario struct {
	Name  string
	Roles string        // which role runs in which domain
	Limit time.Duration // for all steps together, in the machine's time: see machine.Limit; 0: 3 minutes
	Asked bool          // runs only if selected by name, because it measures and needs a quiet machine
	// Complaints are regular expressions for lines that the scenario makes a kernel
	// or Xen log on purpose. Any other line that looks like a complaint fails it.
	Complaints []string
	Run        func(*T)
}

const (
	scenarioLimit = 3 * time.Minute
	stepLimit     = 60 * time.Second
)

// T is a running scenario. Like a testing.T it ends the scenario at the first failure. Its
// methods, and those of its domains and processes, may be called only from the goroutine of
// Scenario.Run.
type T struct {
	ctx     context.Context
	machine *machine.Machine
	dir     string // for this scenario's files
	log     *os.File
	start   time.Time
	dom0    *Domain

	guests []*Domain
	notes  []string
	xenLog string // Xen's output since the scenario began
	err    error
}

// Dom0 returns the domain with the toolstack.
func (t *T) Dom0() *Domain { return t.dom0 }

// Fatalf ends the scenario as failed.
func (t *T) Fatalf(format string, args ...any) {
	t.err = fmt.Errorf(format, args...)
	t.Logf("FAILED: %v", t.err)
	runtime.Goexit()
}

// Logf adds a line to the scenario's log.
func (t *T) Logf(format string, args ...any) {
	fmt.Fprintf(t.log, "%7.2f  %s\n", time.Since(t.start).Seconds(), fmt.Sprintf(format, args...))
}

// Note adds a note to the last column of the table.
func (t *T) Note(format string, args ...any) { t.notes = append(t.notes, fmt.Sprintf(format, args...)) }

// Save writes a file beside the scenario's log.
func (t *T) Save(name string, data []byte) {
	if err := os.WriteFile(filepath.Join(t.dir, name), data, 0o644); err != nil {
		t.Fatalf("%v", err)
	}
}

// A GuestType says how Xen runs a domain.
type GuestType string

const (
	PV  GuestType = "pv"
	PVH GuestType = "pvh"
)

// A Guest describes a domain to create. Its kernel has no network driver loaded.
type Guest struct {
	Name    string // unique in the scenario
	Type    GuestType
	VIFs    []VIF
	Systemd string   // a file of dom0, an image whose process 1 is systemd; "": image.GuestImage
	Linux   []string // additional arguments for its kernel, such as xen_privcmd.unrestricted=1
	Config  []string // additional lines for xl, such as driver_domain=1
}

// A VIF is one network card of a guest. The zero VIF has its backend in dom0.
type VIF struct {
	Backend string // name of the backend's domain; "": dom0
	MTU     int    // bytes; 0: 1500
	More    string // appended to xl's line unchanged
}

// MAC returns the address of a guest's i-th vif, in Xen's range.
func MAC(i int) string { return fmt.Sprintf("00:16:3e:77:00:%02x", i+1) }

// Spec returns the i-th vif in the syntax of xl's vif=.
func (v VIF) Spec(i int) string {
	spec := "mac=" + MAC(i) + ",script=" + image.VifScript
	if v.Backend != "" {
		spec += ",backend=" + v.Backend
	}
	if v.MTU != 0 {
		spec += ",mtu=" + strconv.Itoa(v.MTU)
	}
	if v.More != "" {
		spec += "," + v.More
	}
	return spec
}

// pvhConfig are the lines for xl that every PVH guest needs on this machine.
var pvhConfig = []string{
	`tsc_mode="native"`, // RDTSCP is masked
	fmt.Sprintf("cpus=%q", strconv.Itoa(machine.PVHProcessor)), // see there
}

func (g Guest) config() string {
	role, ramdisk := proto.RoleGuest, image.GuestImage
	kernel := []string{"console=hvc0", "loglevel=5", "mitigations=off", "panic=1"}
	if g.Systemd != "" {
		role, ramdisk = proto.RoleSystemd, g.Systemd
		kernel = append(kernel, "rdinit="+image.SystemdInit, "systemd.show_status=0")
	}
	kernel = append(append(kernel, proto.Role+"="+role), g.Linux...)
	vifs := make([]string, len(g.VIFs))
	for i, v := range g.VIFs {
		vifs[i] = strconv.Quote(v.Spec(i))
	}
	lines := append([]string{
		fmt.Sprintf("name=%q", g.Name),
		fmt.Sprintf("type=%q", g.Type),
		fmt.Sprintf("kernel=%q", image.GuestKernel),
		fmt.Sprintf("ramdisk=%q", ramdisk),
		"memory=448", // MiB: an initramfs of 130 MB takes its size twice while it is unpacked
		"vcpus=1",
		fmt.Sprintf("extra=%q", strings.Join(kernel, " ")),
		fmt.Sprintf("vif=[%s]", strings.Join(vifs, ",")),
		`on_crash="destroy"`, `on_poweroff="destroy"`, `on_reboot="destroy"`,
	}, g.Config...)
	if g.Type == PVH {
		lines = append(lines, pvhConfig...)
	}
	return strings.Join(lines, "\n") + "\n"
}

// Create starts a domain and waits until its agent answers. The domain is
// destroyed at the end of the scenario.
func (t *T) Create(g Guest) *Domain {
	cfg := "/run/" + g.Name + ".cfg"
	t.dom0.Put(cfg, []byte(g.config()), 0o644)
	t.dom0.Within(2*time.Minute).Run("xl", "create", cfg)
	d := &Domain{t: t, ID: t.domid(g.Name), Name: g.Name, limit: stepLimit}
	t.guests = append(t.guests, d)
	d.Within(2 * time.Minute).Run("true")
	return d
}

// Attach adds a vif to a running guest, as its first.
func (t *T) Attach(guest *Domain, v VIF) {
	t.dom0.Run(append([]string{"xl", "network-attach", guest.Name}, strings.Split(v.Spec(0), ",")...)...)
}

// Destroy ends a domain before the end of the scenario, without a shutdown.
func (t *T) Destroy(d *Domain) {
	t.dom0.Run("xl", "destroy", d.Name)
	t.saveConsole(d)
	d.destroyed = true
}

// saveHelper is the program with which libxl saves and restores domains. Debian's libxl expects
// it elsewhere.
const saveHelper = "LIBXL_SAVE_HELPER=/usr/sbin/libxl-save-helper"

// Checkpoint saves a domain to a file, which it removes, and lets the domain go on.
func (t *T) Checkpoint(d *Domain) {
	file := "/run/" + d.Name + ".saved"
	t.dom0.Within(2*time.Minute).WithEnv(saveHelper).Run("xl", "save", "-c", d.Name, file)
	t.dom0.Run("rm", file)
	d.Within(2 * time.Minute).Run("true")
}

// Resume saves a domain to a file, which ends it, and restores it from there. It returns the
// new domain, in which the programs of the old one go on.
func (t *T) Resume(d *Domain) *Domain {
	file := "/run/" + d.Name + ".saved"
	dom0 := t.dom0.Within(2 * time.Minute).WithEnv(saveHelper)
	dom0.Run("xl", "save", d.Name, file)
	d.destroyed = true
	dom0.Run("xl", "restore", file)
	t.dom0.Run("rm", file)
	resumed := &Domain{t: t, ID: t.domid(d.Name), Name: d.Name, limit: stepLimit}
	t.guests = append(t.guests, resumed)
	resumed.Within(2 * time.Minute).Run("true")
	return resumed
}

// domid asks the toolstack for a domain's number.
func (t *T) domid(name string) int {
	said := t.dom0.Run("xl", "domid", name).Text()
	id, err := strconv.Atoi(said)
	if err != nil {
		t.Fatalf("xl domid %s said %q", name, said)
	}
	return id
}

// saveConsole keeps the output on the domain's console.
func (t *T) saveConsole(d *Domain) {
	log := t.dom0.try(proto.Call{Op: proto.Get, Path: "/var/log/xen/console/guest-" + d.Name + ".log"})
	d.console = log.Stdout
	if err := os.WriteFile(filepath.Join(t.dir, d.Name+".console.log"), log.Stdout, 0o644); err != nil {
		t.Logf("%v", err)
	}
	// Truncate the log, because a later domain of the same name appends to it.
	t.dom0.try(proto.Call{Op: proto.Run, Argv: []string{"truncate", "-s", "0", "/var/log/xen/console/guest-" + d.Name + ".log"}})
}

// A Domain runs the steps of a scenario.
type Domain struct {
	ID   int
	Name string

	t         *T
	limit     time.Duration
	env       []string
	procs     *procs
	console   []byte
	destroyed bool
}

type procs struct {
	sync.Mutex
	running []*Process // guarded by Mutex
}

// Within returns the same domain with another limit for each step; the default is a minute.
// Limits grow while other programs keep QEMU from its processors.
func (d *Domain) Within(limit time.Duration) *Domain {
	other := *d
	other.limit = limit
	return &other
}

// WithEnv returns the same domain with additional environment variables, KEY=value, for each
// program.
func (d *Domain) WithEnv(env ...string) *Domain {
	other := *d
	other.env = append(slices.Clone(d.env), env...)
	return &other
}

// VIF returns the name of the kernel's backend interface for the domain's i-th vif.
func (d *Domain) VIF(i int) string { return fmt.Sprintf("vif%d.%d", d.ID, i) }

// Frontend and Backend return the xenstore directories of the domain's i-th vif. The one of
// Backend is below the directory of the domain backend.
func (d *Domain) Frontend(i int) string {
	return fmt.Sprintf("/local/domain/%d/device/vif/%d", d.ID, i)
}
func (d *Domain) Backend(backend *Domain, i int) string {
	return fmt.Sprintf("/local/domain/%d/backend/vif/%d/%d", backend.ID, d.ID, i)
}

// A Result is the outcome of a program.
type Result struct {
	Exit           int // like a shell's: 128 + signal if a signal ended it
	Stdout, Stderr []byte
	Err            error // why the program could not be run, or not to its end
}

// Text returns the standard output, without the whitespace around it.
func (r Result) Text() string { return strings.TrimSpace(string(r.Stdout)) }

func (r Result) problem() error {
	if r.Err == nil && r.Exit == 0 {
		return nil
	}
	var errs []error
	if r.Err != nil {
		errs = append(errs, r.Err)
	}
	if r.Exit != 0 {
		errs = append(errs, fmt.Errorf("exit status %d", r.Exit))
	}
	said := r.Stderr
	if len(said) == 0 {
		said = r.Stdout
	}
	if s := strings.TrimSpace(string(said)); s != "" {
		errs = append(errs, errors.New(s[max(0, len(s)-300):]))
	}
	return errors.Join(errs...)
}

// call makes one step, with a time limit, and logs it.
func (d *Domain) call(c proto.Call) (proto.Reply, error) {
	c.Domain, c.Timeout = d.ID, d.t.machine.Stretched(d.limit)
	if len(c.Argv) > 0 && len(d.env) > 0 {
		c.Argv = slices.Concat([]string{"env"}, d.env, c.Argv)
	}
	begin := time.Now()
	r, err := d.t.machine.Call(d.t.ctx, c)
	what := c.Path
	if c.Argv != nil {
		what = strings.Join(strings.Fields(strings.Join(c.Argv, " ")), " ")
		what = what[:min(len(what), 200)]
	}
	if c.Proc != 0 {
		what += fmt.Sprintf("process %d", c.Proc)
	}
	d.t.Logf("%s: %s %s: exit %d, %.2f s%s", d.Name, c.Op, what, r.Exit, time.Since(begin).Seconds(), errorSuffix(err))
	for _, s := range [...][]byte{r.Stdout, r.Stderr} {
		if text := strings.TrimSpace(string(s)); text != "" && c.Op != proto.Get {
			d.t.Logf("    %s", strings.ReplaceAll(text[max(0, len(text)-4000):], "\n", "\n             "))
		}
	}
	return r, err
}

func errorSuffix(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

func (d *Domain) try(c proto.Call) Result {
	r, err := d.call(c)
	return Result{Exit: r.Exit, Stdout: r.Stdout, Stderr: r.Stderr, Err: err}
}

func (d *Domain) must(c proto.Call, what string) Result {
	r := d.try(c)
	if err := r.problem(); err != nil {
		d.t.Fatalf("%s: %s: %w", d.Name, what, err)
	}
	return r
}

// Try runs a program and returns its outcome. The program may fail.
func (d *Domain) Try(argv ...string) Result { return d.try(proto.Call{Op: proto.Run, Argv: argv}) }

// Run runs a program that must succeed.
func (d *Domain) Run(argv ...string) Result {
	return d.must(proto.Call{Op: proto.Run, Argv: argv}, strings.Join(argv, " "))
}

// Sh runs a shell script that must succeed and returns its standard output.
func (d *Domain) Sh(format string, args ...any) string {
	script := fmt.Sprintf(format, args...)
	return d.must(proto.Call{Op: proto.Run, Argv: []string{"sh", "-ec", script}}, script).Text()
}

// Await repeats a shell script until it succeeds.
func (d *Domain) Await(what, format string, args ...any) {
	script := fmt.Sprintf(format, args...)
	d.must(proto.Call{Op: proto.Run, Argv: []string{"sh", "-ec", script}, Until: true}, "waiting for "+what)
}

// awaitCarrier waits until a network interface has a carrier.
func (d *Domain) awaitCarrier(iface string) {
	d.Await("carrier", `[ "$(cat /sys/class/net/%s/carrier)" = 1 ]`, iface)
}

// Put writes a file.
func (d *Domain) Put(path string, data []byte, mode os.FileMode) {
	d.must(proto.Call{Op: proto.Put, Path: path, Stdin: data, Mode: uint32(mode)}, "writing "+path)
}

// Get reads a file.
func (d *Domain) Get(path string) []byte {
	return d.must(proto.Call{Op: proto.Get, Path: path}, "reading "+path).Stdout
}

// Test runs one of the image's test binaries in the domain. It saves the output as name.log.
func (d *Domain) Test(name string, args ...string) {
	limit := d.t.machine.Stretched(d.limit)
	argv := append([]string{image.ProgramDir + "/" + name, "-test.v", "-test.timeout=" + limit.String()}, args...)
	r := d.Within(d.limit + 10*time.Second).try(proto.Call{Op: proto.Run, Argv: argv})
	d.t.Save(name+"."+d.Name+".log", append(r.Stdout, r.Stderr...))
	passed, failed, skipped := countTests(string(r.Stdout))
	d.t.Note("%s: %d passed, %d skipped", name, passed, skipped)
	if err := r.problem(); err != nil || failed > 0 {
		d.t.Fatalf("%s: %s: %d tests failed: %w", d.Name, name, failed, err)
	}
	if passed == 0 {
		d.t.Fatalf("%s: %s: no test ran", d.Name, name)
	}
}

// countTests counts the top-level tests in the output of -test.v.
func countTests(out string) (passed, failed, skipped int) {
	for line := range strings.Lines(out) {
		switch {
		case strings.HasPrefix(line, "--- PASS: "):
			passed++
		case strings.HasPrefix(line, "--- FAIL: "):
			failed++
		case strings.HasPrefix(line, "--- SKIP: "):
			skipped++
		}
	}
	return
}

// A Process is a program that runs beside the following steps. At the end of the scenario,
// processes in dom0 are killed; those in a guest end with the guest.
type Process struct {
	d    *Domain
	id   int
	name string
}

// Start starts a program and does not wait for it.
func (d *Domain) Start(argv ...string) *Process {
	r, err := d.call(proto.Call{Op: proto.Start, Argv: argv})
	name := strings.Join(argv, " ")
	if err != nil {
		d.t.Fatalf("%s: %s: %w", d.Name, name, err)
	}
	p := &Process{d: d, id: r.Proc, name: name}
	if d.procs != nil {
		d.procs.Lock()
		d.procs.running = append(d.procs.running, p)
		d.procs.Unlock()
	}
	return p
}

// In returns the process in the domain in which its own was resumed.
func (p *Process) In(d *Domain) *Process { return &Process{d: d, id: p.id, name: p.name} }

// Await waits until the output of the process, on either stream, matches a regular expression,
// and returns the output.
func (p *Process) Await(match string) Result {
	r, err := p.d.call(proto.Call{Op: proto.Wait, Proc: p.id, Match: match})
	res := Result{Exit: r.Exit, Stdout: r.Stdout, Stderr: r.Stderr, Err: err}
	if err == nil && !r.Running {
		res.Err = errors.New("ended before it printed that")
	}
	if res.Err != nil {
		p.d.t.Fatalf("%s: %s: waiting for %q: %w", p.d.Name, p.name, match, res.problem())
	}
	return res
}

// Wait waits until the process ends, and returns its outcome. The process may fail.
func (p *Process) Wait() Result {
	r, err := p.d.call(proto.Call{Op: proto.Wait, Proc: p.id})
	return Result{Exit: r.Exit, Stdout: r.Stdout, Stderr: r.Stderr, Err: err}
}

// Succeed waits until the process ends, which it must with status 0.
func (p *Process) Succeed() Result {
	r := p.Wait()
	if err := r.problem(); err != nil {
		p.d.t.Fatalf("%s: %s: %w", p.d.Name, p.name, err)
	}
	return r
}

// Signal sends a signal to the process and its children.
func (p *Process) Signal(sig syscall.Signal) {
	if _, err := p.d.call(proto.Call{Op: proto.Kill, Proc: p.id, Signal: int(sig)}); err != nil {
		p.d.t.Fatalf("%s: %s: %w", p.d.Name, p.name, err)
	}
}

// Terminate asks the process to end, which it must with status 0.
func (p *Process) Terminate() Result {
	p.Signal(syscall.SIGTERM)
	return p.Succeed()
}

// Kill ends the process with SIGKILL and waits for its end.
func (p *Process) Kill() Result {
	p.Signal(syscall.SIGKILL)
	return p.Wait()
}
