//go:build linux

package guestinit

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"barevif/telemetry/logtest"
)

// A machine is a guest for process 1: files below a directory, and a kernel that writes down
// what it is asked for.
type machine struct {
	*initProcess
	signals chan os.Signal
	console logtest.Log

	mu      sync.Mutex
	log     []string            // calls; guarded by mu, as all below
	refuses map[string]error    // by the beginning of a call
	dead    []death             // to be reaped
	pid     int                 // of the program that was started last
	stops   *syscall.WaitStatus // how the program ends when asked to; nil: not at all
}

type death struct {
	pid    int
	status syscall.WaitStatus
}

func exited(code int) syscall.WaitStatus             { return syscall.WaitStatus(code << 8) }
func signaled(sig syscall.Signal) syscall.WaitStatus { return syscall.WaitStatus(sig) }

// last returns the program that was started last.
func (m *machine) last() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pid
}

func newMachine(t *testing.T, files map[string]string) *machine {
	t.Helper()
	m := &machine{signals: make(chan os.Signal, 64), refuses: map[string]error{}, pid: 100}
	begun := time.Now()
	m.initProcess = &initProcess{
		root: t.TempDir(), out: &m.console, processors: 2, now: time.Now, began: begun, uptime: func() time.Duration { return time.Since(begun) + 1500*time.Millisecond },
		calls: calls{
			mount: func(source, dir, kind string, flags uintptr, data string) error {
				return m.call("mount %s %s %s", kind, strings.TrimPrefix(dir, m.root), data)
			},
			load:     func(module []byte) error { return m.call("load %s", module) },
			hostname: func(name string) error { return m.call("hostname %s", name) },
			loopback: func() error { return m.call("loopback") },
			setClock: func(to time.Time) error { return m.call("clock %s", to.UTC().Format(time.DateOnly)) },
			kill: func(pid int, sig syscall.Signal) error {
				m.mu.Lock()
				stops := m.stops
				m.mu.Unlock()
				if stops != nil {
					m.die(pid, *stops)
				}
				return m.call("kill %d %v", pid, sig)
			},
			start: func(path string, argv, env []string) (int, error) {
				m.mu.Lock()
				m.pid++
				pid := m.pid
				m.mu.Unlock()
				return pid, m.call("start %s %q %q", strings.TrimPrefix(path, m.root), argv, env[3:])
			},
			reap: func() (int, syscall.WaitStatus, error) {
				m.mu.Lock()
				defer m.mu.Unlock()
				if len(m.dead) == 0 {
					return 0, 0, nil
				}
				d := m.dead[0]
				m.dead = m.dead[1:]
				return d.pid, d.status, nil
			},
		},
	}
	m.write(t, ImageFile, imageText(t, Image{
		Program: "/app/web", Kernel: "6.1.0-9", Modules: []string{"b.ko", "xen_gntdev.ko", "tun.ko"}, Built: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC),
	}))
	m.write(t, "/proc/sys/kernel/osrelease", "6.1.0-9\n")
	for name, text := range files {
		m.write(t, name, text)
	}
	return m
}

func imageText(t *testing.T, img Image) string {
	t.Helper()
	text, err := img.Format()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (m *machine) write(t *testing.T, name, text string) {
	t.Helper()
	file := m.path(name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) call(format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log = append(m.log, line)
	for begin, err := range m.refuses {
		if strings.HasPrefix(line, begin) {
			return err
		}
	}
	return nil
}

// die reports the end of a process.
func (m *machine) die(pid int, status syscall.WaitStatus) {
	m.mu.Lock()
	m.dead = append(m.dead, death{pid, status})
	m.mu.Unlock()
	m.signals <- syscall.SIGCHLD
}

func (m *machine) said(t *testing.T, lines ...string) {
	t.Helper()
	text := m.console.String()
	for _, line := range lines {
		if _, rest, ok := strings.Cut(text, line); ok {
			text = rest
		} else {
			t.Errorf("no %q, in this order, in\n%s", line, &m.console)
		}
	}
}

func (m *machine) asked(t *testing.T, prefix string, want ...string) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	var got []string
	for _, line := range m.log {
		if strings.HasPrefix(line, prefix) {
			got = append(got, line)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("calls\n%s, want\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// xenFilesOf are the files of a guest on Xen with one vif and two processors.
func xenFilesOf() map[string]string {
	files := map[string]string{
		"/sys/hypervisor/type": "xen\n", grantLimit: "1024\n", "/sys/bus/xen/devices/vif-0/nodename": "device/vif/0",
		"/sys/bus/xen/devices/console-0/nodename": "device/console/0", "/sys/bus/xen/drivers/vif/bind": "",
		ModuleDir + "/b.ko": "B", ModuleDir + "/tun.ko": "TUN", ModuleDir + "/xen_gntdev.ko": "GNTDEV",
	}
	for _, d := range devices {
		files[d.node] = ""
	}
	return files
}

func TestGuestIsPreparedForItsProgram(t *testing.T) {
	m := newMachine(t, xenFilesOf())
	m.uptime = func() time.Duration { return 1500 * time.Millisecond }
	m.began = time.Date(2026, 3, 4, 6, 6, 7, 89e6, time.FixedZone("", 3600))
	m.now = func() time.Time { return m.began.Add(250 * time.Millisecond) }
	m.cmdline = "console=hvc0 -- GOGC=50 --addr '10.9.0.2/24'"
	m.mountAll()
	m.asked(t, "mount", "mount proc /proc ", "mount sysfs /sys ", "mount devtmpfs /dev mode=0755",
		"mount devpts /dev/pts gid=5,mode=620,ptmxmode=666", "mount tmpfs /dev/shm mode=1777", "mount tmpfs /run mode=0755",
		"mount tmpfs /tmp mode=1777", "mount bpf /sys/fs/bpf mode=0700", "mount cgroup2 /sys/fs/cgroup ")
	m.log = nil
	m.stops = new(exited(0))
	m.signals <- sigPowerOff
	if e := m.run(m.signals); e != powerOff {
		t.Errorf("ends with %v", e)
	}
	m.asked(t, "", "hostname web", "loopback", "load B", "load GNTDEV", "load TUN", "mount xenfs /proc/xen ",
		`start /app/web ["/app/web" "--addr" "10.9.0.2/24"] ["GOGC=50"]`, "kill 101 terminated")
	if limit := m.text(grantLimit); limit != "2060" { // twice two queues of 514, and 2
		t.Errorf("the limit of grants is %s", limit)
	}
	if text := m.console.String(); strings.Contains(text, "belongs to the kernel's") || strings.Contains(text, "no vif") {
		t.Error(text)
	}
	m.said(t, "[    1.500000] barevif: kernel 6.1.0-9 has started after 1.25 s, at 2026-03-04T05:06:07.089Z\n", "loaded b xen_gntdev tun\n",
		"up to 2060 pages may be granted", "/app/web runs, with 2 arguments\n", "asked to power off\n", "/app/web exited with status 0\n")
}

// What is missing is said, once, and the program is started all the same.
func TestWhatIsMissingIsSaid(t *testing.T) {
	for name, c := range map[string]struct {
		spoil   func(files map[string]string, m *machine)
		refuses string
		says    string
	}{
		"xen":      {func(f map[string]string, _ *machine) { delete(f, "/sys/hypervisor/type") }, "", "this is no guest of Xen"},
		"vif":      {func(f map[string]string, _ *machine) { delete(f, "/sys/bus/xen/devices/vif-0/nodename") }, "", "this guest has no vif: does its configuration have vif=[...]?"},
		"netfront": {func(f map[string]string, _ *machine) { f["/sys/bus/xen/drivers/vif/vif-0"] = "" }, "", "vif-0 belongs to the kernel's xen-netfront"},
		"module":   {func(f map[string]string, _ *machine) { delete(f, ModuleDir+"/tun.ko") }, "", "module tun is not loaded: open "},
		"refused":  {nil, "load TUN", "module tun is not loaded: refused"},
		"kernel":   {func(f map[string]string, _ *machine) { f["/proc/sys/kernel/osrelease"] = "6.2" }, "", "the kernel is 6.2 and the modules are for 6.1.0-9"},
		"node":     {func(f map[string]string, _ *machine) { delete(f, "/dev/xen/gntalloc") }, "", "/dev/xen/gntalloc is missing: it needs xen-gntalloc"},
		"limit":    {func(f map[string]string, _ *machine) { delete(f, grantLimit) }, "", "the limit of pages to grant stays as it is: open "},
		"xenfs":    {nil, "mount xenfs", "xenfs is not mounted on /proc/xen: refused"},
		"hostname": {nil, "hostname", "the host name stays as it is: refused"},
		"loopback": {nil, "loopback", "127.0.0.1 does not answer: refused"},
		"setting":  {func(_ map[string]string, m *machine) { m.cmdline = "barevif.stop=x" }, "", "barevif.stop=x: not a time"},
	} {
		files := xenFilesOf()
		var m *machine
		if c.spoil != nil {
			c.spoil(files, &machine{initProcess: &initProcess{}})
		}
		m = newMachine(t, files)
		if c.spoil != nil {
			c.spoil(map[string]string{}, m)
		}
		switch name {
		case "limit":
			if err := os.RemoveAll(filepath.Dir(m.path(grantLimit))); err != nil {
				t.Fatal(err)
			}
		case "refused", "xenfs", "hostname", "loopback":
			m.refuses[c.refuses] = fmt.Errorf("refused")
		}
		m.stops = new(exited(0))
		m.signals <- sigPowerOff
		m.run(m.signals)
		m.said(t, c.says, "/app/web runs")
		if n := strings.Count(m.console.String(), c.says); n != 1 {
			t.Errorf("%s: said %d times", name, n)
		}
	}
}

// What an image was made without is not missed, and nothing is set that belongs to it.
func TestWhatWasLeftOutIsNotMissed(t *testing.T) {
	for _, c := range []struct {
		without []string
		missed  []string // nodes
		calls   []string
		limit   string
	}{
		{nil, []string{"evtchn", "gntalloc", "gntdev"}, []string{"mount xenfs /proc/xen "}, "2060"},
		{[]string{"xen-gntdev", "xenfs"}, []string{"evtchn", "gntalloc"}, nil, "2060"},
		{[]string{"xen_gntalloc"}, []string{"evtchn", "gntdev"}, []string{"mount xenfs /proc/xen "}, "1024"},
	} {
		files := xenFilesOf()
		for _, node := range []string{"evtchn", "gntalloc", "gntdev"} {
			delete(files, "/dev/xen/"+node)
		}
		m := newMachine(t, files)
		m.image.Without = c.without
		m.prepareXen()
		m.asked(t, "mount", c.calls...)
		for _, node := range []string{"evtchn", "gntalloc", "gntdev"} {
			if says, want := strings.Contains(m.console.String(), "/dev/xen/"+node+" is missing"), slices.Contains(c.missed, node); says != want {
				t.Errorf("without %q: %s is missed: %v, want %v", c.without, node, says, want)
			}
		}
		if limit := m.text(grantLimit); limit != c.limit {
			t.Errorf("without %q: the limit of grants is %s, want %s", c.without, limit, c.limit)
		}
	}
}

func TestAModuleThatIsThereAlreadyIsNoFault(t *testing.T) {
	m := newMachine(t, xenFilesOf())
	m.refuses["load"] = syscall.EEXIST
	m.refuses["mount"] = syscall.EBUSY
	m.mountAll()
	m.prepareXenFor(t)
	for _, bad := range []string{"not loaded", "not mounted"} {
		if strings.Contains(m.console.String(), bad) {
			t.Errorf("%s", &m.console)
		}
	}
}

func (m *machine) prepareXenFor(t *testing.T) {
	t.Helper()
	if err := m.prepare(); err != nil {
		t.Fatal(err)
	}
}

func TestFileSystemsThatAreMissingAreSaid(t *testing.T) {
	m := newMachine(t, nil)
	m.refuses["mount bpf"], m.refuses["mount cgroup2"] = syscall.ENODEV, syscall.EPERM
	m.mountAll()
	m.said(t, "bpf is not mounted on /sys/fs/bpf, so these do not work: pinned BPF maps: no such device",
		"cgroup2 is not mounted on /sys/fs/cgroup, so these do not work: control groups: operation not permitted")
	m.asked(t, "mount cgroup2", "mount cgroup2 /sys/fs/cgroup ") // the last: one that fails stops none
}

func TestGrantLimitFollowsSettingAndMachine(t *testing.T) {
	for _, c := range []struct{ cmdline, before, want string }{
		{"", "1024", "2060"},
		{"", "5000", "5000"}, // more is never less
		{"barevif.grants=700", "1024", "700"},
	} {
		m := newMachine(t, xenFilesOf())
		m.write(t, grantLimit, c.before)
		m.cmdline = c.cmdline
		m.prepareXenFor(t)
		if got := m.text(grantLimit); got != c.want {
			t.Errorf("%q with %s: %s, want %s", c.cmdline, c.before, got, c.want)
		}
	}
}

func TestClockIsNotBeforeTheKernel(t *testing.T) {
	m := newMachine(t, nil)
	m.image.Built = time.Now().Add(-time.Hour)
	m.checkClock()
	m.asked(t, "clock")
	m.image.Built = time.Date(2199, 5, 6, 0, 0, 0, 0, time.UTC)
	m.checkClock()
	m.asked(t, "clock", "clock 2199-05-06")
	m.said(t, "the clock said ", "and is now 2199-05-06")
	m.refuses["clock"] = syscall.EPERM
	m.checkClock()
	m.said(t, "which is wrong, and cannot be set: operation not permitted")
}

func TestGuestWithoutAnImageOrWithABadLineEnds(t *testing.T) {
	for name, c := range map[string]struct {
		image, cmdline, says string
	}{
		"no image":   {"", "", "the program is not started: this is no image of barevif: open "},
		"damaged":    {"program /app/web\n{\n", "", "the program is not started: /etc/barevif/image: a line \"{\\n\": not of this version"},
		"no time":    {"program /app/web\nbuilt soon\n", "", "the program is not started: /etc/barevif/image: when the kernel was built: "},
		"no program": {"program web\n", "", "the program is not started: /etc/barevif/image names no program"},
		"open quote": {"program /app/web\n", "a -- 'b", `the program is not started: extra=, behind "--": a quotation mark is not closed`},
	} {
		m := newMachine(t, map[string]string{ImageFile: c.image})
		if c.image == "" {
			if err := os.Remove(m.path(ImageFile)); err != nil {
				t.Fatal(err)
			}
		}
		m.cmdline = c.cmdline
		if e := m.run(m.signals); e != powerOff {
			t.Errorf("%s: ends with %v", name, e)
		}
		m.said(t, c.says)
		m.asked(t, "start")
	}
}

func TestRestartFollowsThePolicy(t *testing.T) {
	for _, c := range []struct {
		policy Restart
		status syscall.WaitStatus
		again  bool
		says   string
	}{
		{Never, exited(0), false, "exited with status 0; this guest powers off (barevif.restart=never)"},
		{Never, exited(3), false, "exited with status 3; this guest powers off (barevif.restart=never)"},
		{OnFailure, exited(0), false, "exited with status 0; this guest powers off (barevif.restart=on-failure)"},
		{OnFailure, exited(3), true, "exited with status 3; it is started again in 1s (barevif.restart=on-failure)"},
		{OnFailure, signaled(syscall.SIGSEGV), true, "was ended by signal 11 (segmentation fault); it is started again in 1s"},
		{Always, exited(0), true, "exited with status 0; it is started again in 1s (barevif.restart=always)"},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := newMachine(t, nil)
			m.cmdline = "barevif.restart=" + string(c.policy)
			m.die(7, exited(1)) // an orphan, which means nothing
			m.die(101, c.status)
			done := make(chan ending)
			go func() { done <- m.run(m.signals) }()
			if !c.again {
				if e := <-done; e != powerOff {
					t.Errorf("ends with %v", e)
				}
			} else {
				time.Sleep(firstWait - time.Millisecond)
				synctest.Wait()
				if m.last() != 101 {
					t.Error("started again too early")
				}
				time.Sleep(2 * time.Millisecond)
				synctest.Wait()
				if m.last() != 102 {
					t.Error("not started again")
				}
				m.mu.Lock()
				m.stops = new(signaled(syscall.SIGTERM))
				m.mu.Unlock()
				m.signals <- sigReboot
				if e := <-done; e != reboot {
					t.Errorf("ends with %v", e)
				}
				m.said(t, c.says, "asked to reboot", "was ended by signal 15 (terminated)\n")
			}
			m.said(t, c.says)
		})
	}
}

// The waits double, up to a bound, and begin anew once the program has run for long.
func TestWaitsBeforeARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t, nil)
		m.refuses["start"] = syscall.ENOEXEC
		done := make(chan ending)
		go func() { done <- m.run(m.signals) }()
		synctest.Wait()
		for _, wait := range []time.Duration{1, 2, 4, 8, 16, 30} {
			before := m.last()
			time.Sleep(wait*time.Second - time.Millisecond)
			synctest.Wait()
			if m.last() != before {
				t.Errorf("started within %v s", int(wait))
			}
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if m.last() != before+1 {
				t.Errorf("not started after %v s", int(wait))
			}
		}
		m.mu.Lock()
		delete(m.refuses, "start")
		m.mu.Unlock()
		time.Sleep(lastWait)
		synctest.Wait()
		time.Sleep(steady)
		m.die(m.last(), exited(1))
		synctest.Wait()
		m.said(t, "/app/web cannot be started: exec format error; it is started again in 1s", "again in 2s", "again in 30s", "exited with status 1; it is started again in 1s")
		m.signals <- syscall.SIGPWR // while none runs
		if e := <-done; e != powerOff {
			t.Errorf("ends with %v", e)
		}
	})
}

func TestAProgramThatDoesNotEndIsKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t, nil)
		m.cmdline = "barevif.stop=3s"
		done := make(chan ending)
		go func() { done <- m.run(m.signals) }()
		m.signals <- syscall.SIGUSR2
		m.signals <- sigReboot // the first request counts
		synctest.Wait()
		m.asked(t, "kill", "kill 101 terminated")
		time.Sleep(3 * time.Second)
		synctest.Wait()
		m.asked(t, "kill", "kill 101 terminated", "kill 101 killed")
		m.said(t, "the program has not ended within 3s, and is killed")
		time.Sleep(killWait) // not even then
		if e := <-done; e != powerOff {
			t.Errorf("ends with %v", e)
		}
		m.said(t, "the program does not end, and this guest ends without that")
	})
}

// A signal that means nothing, or comes instead of a lost SIGCHLD, is one to look for the dead.
func TestEverySignalIsOneToReap(t *testing.T) {
	m := newMachine(t, nil)
	m.refuses["kill"] = syscall.ESRCH
	m.dead = append(m.dead, death{101, exited(0)})
	m.signals <- syscall.SIGHUP
	if e := m.run(m.signals); e != powerOff {
		t.Errorf("ends with %v", e)
	}
	m.asked(t, "kill")
}

func TestOutOfMemoryIsSaid(t *testing.T) {
	for _, c := range []struct {
		status syscall.WaitStatus
		ooms   string
		says   bool
	}{{signaled(syscall.SIGKILL), "4", true}, {signaled(syscall.SIGKILL), "3", false}, {exited(1), "4", false}} {
		synctest.Test(t, func(t *testing.T) {
			m := newMachine(t, map[string]string{"/proc/vmstat": "nr_free_pages 1\noom_kill 3\n", "/proc/meminfo": "MemTotal:         131072 kB\n"})
			done := make(chan ending)
			m.cmdline = "barevif.restart=never"
			go func() { done <- m.run(m.signals) }()
			synctest.Wait()
			m.write(t, "/proc/vmstat", "nr_free_pages 1\noom_kill "+c.ooms+"\n")
			m.die(101, c.status)
			<-done
			if got := strings.Contains(m.console.String(), "this guest is out of memory; it has 128 MiB, which memory= in its configuration sets"); got != c.says {
				t.Errorf("%v, %s kills: %s", c.status, c.ooms, &m.console)
			}
		})
	}
}

// Process 1 parses the file that the builder writes about an image into the same facts.
func TestImageIsReadAsItWasWritten(t *testing.T) {
	for _, img := range []Image{
		{Program: "/app/a b ", Kernel: "6.1.0-9-amd64", Modules: []string{"b.ko", "a.ko"}, Without: []string{"xen-gntdev", "xenfs"}, Built: time.Unix(1700000000, 0)},
		{Program: "/app/web", Built: time.Unix(0, 0)},
	} {
		if got, err := parseImage(imageText(t, img)); err != nil || !reflect.DeepEqual(got, img) {
			t.Errorf("%+v, %v, want %+v", got, err, img)
		}
	}
	for _, img := range []Image{{Program: "/app/a\nb"}, {Program: "/app/web", Without: []string{"tun\nmodule x"}}} {
		if text, err := img.Format(); err == nil {
			t.Errorf("%+v is written as %q", img, text)
		}
	}
}

func TestNamesOfTheKernelsRequests(t *testing.T) {
	for name, want := range map[string]syscall.Signal{"poweroff": sigPowerOff, "halt": sigPowerOff, "reboot": sigReboot, "init": 0} {
		if sig, ok := requestOf(name); sig != want || ok != (want != 0) {
			t.Errorf("%s: %v", name, sig)
		}
	}
	if endings[sigPowerOff] != powerOff || endings[sigReboot] != reboot {
		t.Error("the signals of the requests mean something else to process 1")
	}
}

// The builder of images refuses files below the mount points, so it has to know them all.
func TestEveryFileSystemIsBelowAMountPoint(t *testing.T) {
	for _, fs := range fileSystems {
		below := func(dir string) bool { return fs.dir == dir || strings.HasPrefix(fs.dir, dir+"/") }
		if !slices.ContainsFunc(MountPoints[:], below) {
			t.Errorf("%s is below none of %q", fs.dir, MountPoints)
		}
	}
}
