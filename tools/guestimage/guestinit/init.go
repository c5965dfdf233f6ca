//go:build linux

package guestinit

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// calls are the system calls that change the machine. Tests have others.
type calls struct {
	mount    func(source, dir, kind string, flags uintptr, data string) error
	load     func(module []byte) error
	hostname func(string) error
	loopback func() error
	setClock func(time.Time) error
	start    func(path string, argv, env []string) (pid int, err error)
	reap     func() (pid int, status syscall.WaitStatus, err error) // does not block; pid 0: none has ended
	kill     func(pid int, sig syscall.Signal) error
}

// An initProcess is process 1 with what it works on.
type initProcess struct {
	calls
	root       string // "", or another directory that stands for /
	cmdline    string
	processors int
	now        func() time.Time
	uptime     func() time.Duration // since the kernel started
	began      time.Time            // when this process began
	out        io.Writer            // the console

	image    Image
	settings Settings
}

func (p *initProcess) path(name string) string { return p.root + name }

// say writes a line to the console, with the time as in the kernel's lines.
func (p *initProcess) say(format string, args ...any) {
	up := p.uptime()
	line := fmt.Sprintf(format, args...)
	fmt.Fprintf(p.out, "[%5d.%06d] barevif: %s\n", up/time.Second, up%time.Second/time.Microsecond, strings.ReplaceAll(line, "\n", " "))
}

// text returns the contents of a file without the white space around them, or "".
func (p *initProcess) text(name string) string {
	b, _ := os.ReadFile(p.path(name)) // a file that is missing says as much as an empty one
	return strings.TrimSpace(string(b))
}

// A fileSystem is one to mount. Without the optional ones a guest can still run most programs.
type fileSystem struct {
	kind, dir string
	flags     uintptr
	data      string
	without   string // what does not work without it
}

const plain = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC

var fileSystems = [...]fileSystem{
	{"proc", "/proc", plain, "", "most programs"},
	{"sysfs", "/sys", plain, "", "finding out about Xen"},
	{"devtmpfs", "/dev", syscall.MS_NOSUID, "mode=0755", "the devices of Xen"},
	{"devpts", "/dev/pts", syscall.MS_NOSUID | syscall.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666", "terminals"},
	{"tmpfs", "/dev/shm", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=1777", "shared memory by name"},
	{"tmpfs", "/run", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=0755", "files in /run"},
	{"tmpfs", "/tmp", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=1777", "temporary files"},
	{"bpf", "/sys/fs/bpf", plain, "mode=0700", "pinned BPF maps"},
	{"cgroup2", "/sys/fs/cgroup", plain, "", "control groups"},
}

// mountAll mounts all file systems and says which it cannot.
func (p *initProcess) mountAll() {
	for _, fs := range fileSystems {
		if err := p.mountOne(fs); err != nil {
			p.say("%s is not mounted on %s, so these do not work: %s: %v", fs.kind, fs.dir, fs.without, err)
		}
	}
}

func (p *initProcess) mountOne(fs fileSystem) error {
	dir := p.path(fs.dir)
	if _, err := os.Stat(dir); err != nil {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	err := p.mount(fs.kind, dir, fs.kind, fs.flags, fs.data)
	if err == syscall.EBUSY { // it is there
		return nil
	}
	return err
}

// prepare makes the guest ready for its program. The error means that the program cannot be
// started at all.
func (p *initProcess) prepare() error {
	b, err := os.ReadFile(p.path(ImageFile))
	if err != nil {
		return fmt.Errorf("this is no image of barevif: %w", err)
	}
	if p.image, err = parseImage(string(b)); err != nil {
		return err
	}
	settings, complaints, err := Parse(p.cmdline)
	for _, c := range complaints {
		p.say("%s", c)
	}
	if err != nil {
		return fmt.Errorf(`extra=, behind "--": %w`, err)
	}
	p.settings = settings
	if p.settings.Hostname == "" {
		p.settings.Hostname = filepath.Base(p.image.Program)
	}
	if err := p.hostname(p.settings.Hostname); err != nil {
		p.say("the host name stays as it is: %v", err)
	}
	if err := p.loopback(); err != nil {
		p.say("127.0.0.1 does not answer: %v", err)
	}
	p.checkClock()
	p.prepareXen()
	return nil
}

// checkClock sets a clock that is behind the image's kernel. Xen gives a guest the time of the
// machine, unless that has none.
func (p *initProcess) checkClock() {
	if now := p.now(); now.Before(p.image.Built) {
		if err := p.setClock(p.image.Built); err != nil {
			p.say("the clock says %s, which is wrong, and cannot be set: %v", now.UTC().Format(time.DateTime), err)
			return
		}
		p.say("the clock said %s, before this kernel was made, and is now %s: certificates may be refused",
			now.UTC().Format(time.DateTime), p.image.Built.UTC().Format(time.DateTime))
	}
}
