//go:build linux

// Agent is the init process of every domain of the lab, except one whose process 1 is systemd, where
// it is a service. As process 1 it only reaps zombies; its child sets up the domain and executes the
// calls of the host. In dom0 these come through a virtio-serial port; in another domain they come
// through nodes of xenstore, from the agent in dom0.
//
// It is part of the tests and trusts the host.
package main

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"barevif/test/xenlab/proto"
)

const (
	xenstoreSocket = "/run/xenstored/socket"
	path           = "/usr/sbin:/usr/bin:/sbin:/bin:/barevif"
)

func main() {
	os.Setenv("PATH", path)
	os.Setenv("HOME", "/root")
	if os.Getpid() == 1 {
		reap()
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "xenlab agent:", err)
		os.Exit(1)
	}
}

// reap starts the agent, collects orphans, and ends the domain with the agent.
func reap() {
	agent, err := os.StartProcess("/init", []string{"agent"}, &os.ProcAttr{
		Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	for err == nil {
		var status syscall.WaitStatus
		pid, werr := syscall.Wait4(-1, &status, 0, nil)
		if pid == agent.Pid {
			err = fmt.Errorf("ended with status %d", status.ExitStatus())
		} else if werr == syscall.ECHILD {
			err = werr
		}
	}
	fmt.Fprintln(os.Stderr, "xenlab agent:", err)
	powerOff()
	os.Exit(1) // not reached; the kernel would panic
}

func powerOff() {
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func serve() error {
	if argument(proto.Role) == proto.RoleSystemd { // elsewhere there is no /proc yet
		return serveLink()
	}
	if err := mounts(); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if argument(proto.Role) == proto.RoleDom0 {
		return serveDom0()
	}
	return serveGuest()
}

func serveGuest() error {
	if err := xenDevices(); err != nil {
		return err
	}
	return serveLink()
}

// serveLink executes the calls that come through xenstore.
func serveLink() error {
	f, err := os.OpenFile("/dev/xen/xenbus", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	l, err := upLink(newStore(f))
	if err != nil {
		return err
	}
	log("ready")
	out, e := &replies{w: l}, newExecutor()
	return each(l, func(c proto.Call) error {
		switch c.Op {
		case proto.Off:
			powerOff()
		default:
			go out.send(e.do(c))
		}
		return nil
	})
}

func serveDom0() error {
	port, err := hostPort()
	if err != nil {
		return err
	}
	out, e := &replies{w: port}, newExecutor()
	hello := proto.Reply{}
	if err := toolstack(); err != nil {
		hello.Err = err.Error() // go on all the same, so that the host can look around
	}
	log("ready")
	if err := out.send(hello); err != nil {
		return err
	}
	r := &relay{
		host: out, peers: map[int]*peer{},
		dial: func() (io.ReadWriteCloser, error) { return net.Dial("unix", xenstoreSocket) },
	}
	return each(port, func(c proto.Call) error {
		switch {
		case c.Domain != 0:
			if err := r.call(c); err != nil {
				return out.send(proto.Reply{ID: c.ID, Err: err.Error()})
			}
		case c.Op == proto.Off:
			powerOff()
		case c.Op == proto.Shell:
			go shell()
			return out.send(proto.Reply{ID: c.ID})
		default:
			go out.send(e.do(c))
		}
		return nil
	})
}

// hostPort opens the virtio-serial port the host listens on.
func hostPort() (io.ReadWriter, error) {
	for _, module := range [...]string{"virtio_pci", "virtio_console"} {
		if err := modprobe(module); err != nil {
			return nil, err
		}
	}
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, file := range names {
			if b, _ := os.ReadFile(file); strings.TrimSpace(string(b)) == proto.Port {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(file)), os.O_RDWR, 0)
			}
		}
	}
	return nil, fmt.Errorf("no virtio port named %s", proto.Port)
}

// toolstack starts what xl needs, in the order of Debian's init script. The kernel's command
// line may name another xenstore daemon.
func toolstack() error {
	if err := xenDevices(); err != nil {
		return err
	}
	for _, dir := range [...]string{"/run/xen", "/run/xenstored", "/var/lib/xen", "/var/log/xen/console"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for _, argv := range [...][]string{
		{cmp.Or(argument(proto.StoreArgument), "xenstored"), "--pid-file", "/run/xenstored.pid"},
		{"xen-init-dom0"},
		{"xenstore-write", "/local/domain/0/error", ""}, // libxl makes this node for all other domains
		{"xenconsoled", "--pid-file=/run/xenconsoled.pid", "--log=guest", "--log-dir=/var/log/xen/console"},
	} {
		if err := command(argv...); err != nil {
			return err
		}
	}
	conn, err := net.Dial("unix", xenstoreSocket)
	if err != nil {
		return err
	}
	return conn.Close()
}

// xenDevices loads the modules that make /dev/xen.
func xenDevices() error {
	for _, module := range [...]string{"xen-evtchn", "xen-gntalloc", "xen-gntdev", "xen-privcmd", "xenfs"} {
		if err := modprobe(module); err != nil {
			return err
		}
	}
	return mount("xenfs", "/proc/xen", "xenfs")
}

func mounts() error {
	for _, m := range [...]struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"devpts", "/dev/pts"},
		{"tmpfs", "/dev/shm"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"}, {"bpf", "/sys/fs/bpf"},
	} {
		if err := mount(m.kind, m.dir, m.kind); err != nil {
			return err
		}
	}
	return os.MkdirAll("/run/lock", 0o755)
}

func mount(source, dir, kind string) error {
	if kind != "xenfs" && kind != "bpf" { // the kernel makes the mount points of these two
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(source, dir, kind, 0, ""); err != nil && err != unix.EBUSY {
		return fmt.Errorf("mount %s on %s: %w", kind, dir, err)
	}
	return nil
}

func loopbackUp() error { return command("ip", "link", "set", "lo", "up") }

func modprobe(module string) error { return command("modprobe", module) }

func command(argv ...string) error {
	// The output goes to the console: a daemon may keep its streams open.
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
	}
	return nil
}

// shell keeps a shell on the console for the developer.
func shell() {
	for {
		cmd := exec.Command("/bin/sh", "-i")
		console, err := os.OpenFile("/dev/hvc0", os.O_RDWR, 0)
		if err != nil {
			log(err.Error())
			return
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = console, console, console
		cmd.Env = append(os.Environ(), "PS1=dom0# ", "TERM=vt100")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		if err := cmd.Run(); err != nil {
			log("shell: " + err.Error())
		}
		console.Close()
	}
}

// argument returns the value of name= on the kernel command line.
func argument(name string) string {
	b, _ := os.ReadFile("/proc/cmdline")
	for _, word := range strings.Fields(string(b)) {
		if value, ok := strings.CutPrefix(word, name+"="); ok {
			return value
		}
	}
	return ""
}

func log(s string) { fmt.Fprintln(os.Stdout, "xenlab agent:", s) }
