//go:build linux

// Package machine runs Xen with a Linux dom0 on a CPU that QEMU emulates, and sends calls to
// the agents in its domains.
//
// The machine has no network card and no disk. It has a console, which the package logs and
// searches for panics, and a virtio-serial port, through which the agent in dom0 takes calls.
// The machine ends with the process that started it. It needs QEMU, and the files that package
// image builds.
package machine

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"barevif/test/xenlab/image"
	"barevif/test/xenlab/proto"
)

// Config describes a machine. Sizes are MiB.
type Config struct {
	Images *image.Set
	Dir    string    // for console.log
	Xen    []string  // additional arguments for Xen
	Linux  []string  // additional arguments for dom0's kernel; without commas, at which QEMU splits
	Memory int       // 0: 3072
	Dom0   int       // 0: 1280
	Tee    io.Writer // gets a copy of the console; may be nil
}

// bootLimit is for the start of QEMU, Xen, dom0 and its toolstack, which takes 20 s on a
// quiet machine.
const bootLimit = 120 * time.Second

// grace is how long after its timeout a call may still be without a reply, before the machine
// counts as hung.
const grace = 30 * time.Second

// A Machine is a running machine. Its methods may be called from any goroutine.
type Machine struct {
	console net.Conn
	port    net.Conn
	ended   chan struct{} // closed once QEMU has ended and the console is read
	failed  chan struct{} // closed when err is set

	mu      sync.Mutex
	err     error                       // guarded by mu; why the machine can no longer be used
	last    uint64                      // guarded by mu
	pending map[uint64]chan proto.Reply // guarded by mu
	qemu    *os.Process                 // guarded by mu; nil once the process was waited for
	pace    pace                        // guarded by mu
	hello   chan proto.Reply
}

// Start boots a machine and waits until its toolstack is up.
func Start(ctx context.Context, cfg Config) (*Machine, error) {
	for _, a := range cfg.Linux {
		if strings.Contains(a, ",") {
			return nil, fmt.Errorf("machine: QEMU would split the kernel's arguments at the comma in %q", a)
		}
	}
	// Not in cfg.Dir, because the path of a socket has at most 107 bytes. For QEMU a comma ends it.
	tmp := os.TempDir()
	if len(tmp) > 70 || strings.Contains(tmp, ",") {
		tmp = "/tmp"
	}
	sockets, err := os.MkdirTemp(tmp, "xenlab")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(sockets)
	log, err := os.Create(filepath.Join(cfg.Dir, "console.log"))
	if err != nil {
		return nil, err
	}
	m := &Machine{
		ended: make(chan struct{}), failed: make(chan struct{}),
		pending: map[uint64]chan proto.Reply{}, hello: make(chan proto.Reply, 1),
	}
	var conns [2]net.Conn
	accepted := make(chan error, len(conns))
	for i, name := range [...]string{"console", "port"} {
		l, err := net.Listen("unix", filepath.Join(sockets, name))
		if err != nil {
			log.Close()
			return nil, err
		}
		defer l.Close() // ends Accept if QEMU never connects
		go func() {
			var err error
			conns[i], err = l.Accept()
			accepted <- err
		}()
	}
	stderr := &bytes.Buffer{}
	exited, err := m.startQEMU(qemuArgs(cfg, sockets), stderr)
	if err != nil {
		log.Close()
		return nil, err
	}
	for range conns {
		select {
		case err = <-accepted:
		case err = <-exited:
			err = fmt.Errorf("qemu-system-x86_64: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		case <-ctx.Done():
			err = ctx.Err()
		}
		if err != nil {
			m.kill()
			log.Close()
			return nil, err
		}
	}
	m.console, m.port = conns[0], conns[1]
	go m.receive()
	go func() {
		m.watch(log, cfg.Tee)
		err := <-exited
		m.fail(fmt.Errorf("QEMU ended: %w %s", errOr(err, errPoweredOff), bytes.TrimSpace(stderr.Bytes())))
		m.port.Close()
		close(m.ended)
	}()

	if err := m.awaitToolstack(ctx); err != nil {
		m.Stop()
		return nil, fmt.Errorf("machine: boot: %w (console: %s)", err, log.Name())
	}
	return m, nil
}

// awaitToolstack waits until the agent in dom0 reports that the toolstack is up.
func (m *Machine) awaitToolstack(ctx context.Context) error {
	ctx, cancel := m.Within(ctx, bootLimit)
	defer cancel()
	select {
	case hello := <-m.hello:
		if hello.Err != "" {
			return fmt.Errorf("dom0: %s", hello.Err)
		}
		return nil
	case <-m.failed:
		return m.Err()
	case <-ctx.Done():
		return fmt.Errorf("dom0's agent said nothing: %w", context.Cause(ctx))
	}
}

var errPoweredOff = errors.New("powered off")

func errOr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// PVHProcessor is the physical processor on which PVH guests must run, which is any but the first. When a processor
// restores a program's FPU registers, QEMU clears a flag of the first processor (IGNNE#), together with that one's flags
// of a running guest, and without a lock (cpu_clear_ignne in target/i386/tcg/sysemu/fpu_helper.c, as of 7.2). If the
// first processor enters or leaves a guest meanwhile, it is left with nested paging on in Xen, or off in the guest,
// which then ends with a triple fault, often with Xen's registers as its own. One of 48 guests did that at its
// boot, while Linux read the PIT in a loop, where each read leaves the guest.
const PVHProcessor = 1

// qemuArgs returns QEMU's arguments. SMAP is off because QEMU 7.2 treats a PV kernel's IRETQ
// as a supervisor access, RDTSCP because QEMU's SVM intercept of it confuses Xen (PVH). Xen
// must switch vector registers eagerly: if it does so at first use, QEMU misses some uses, and
// programs see the registers of other domains. Without XSAVE there is less to switch; with it
// a PVH guest sometimes finds its sizes inconsistent. ERMS is off because kernels and Go's
// runtime believe it, and copy by REP MOVSB, which QEMU emulates byte by byte: every copy
// would cost some eight times what it costs by words, and an end that copies once more would
// look far slower than it is.
func qemuArgs(cfg Config, sockets string) []string {
	memory, dom0 := cfg.Memory, cfg.Dom0
	if memory == 0 {
		memory = 3072
	}
	if dom0 == 0 {
		dom0 = 1280
	}
	xen := append([]string{
		"console=com1", "com1=115200,8n1", "loglvl=all", "guest_loglvl=all", "conring_size=256k",
		fmt.Sprintf("dom0_mem=%dM,max:%dM", dom0, dom0), "dom0_max_vcpus=2",
		"spec-ctrl=no,eager-fpu", "xpti=no", "watchdog=0",
	}, cfg.Xen...)
	linux := append([]string{
		"console=hvc0", "earlyprintk=xen", "loglevel=6", "mitigations=off", "panic=5", proto.Role + "=" + proto.RoleDom0,
	}, cfg.Linux...)
	return []string{
		"-accel", "tcg,thread=multi", "-cpu", "max,-smap,-rdtscp,-xsave,-erms", "-smp", "2", "-m", fmt.Sprint(memory),
		"-display", "none", "-nic", "none", "-no-reboot", "-monitor", "none",
		"-chardev", "socket,id=console,path=" + filepath.Join(sockets, "console"), "-serial", "chardev:console",
		"-chardev", "socket,id=port,path=" + filepath.Join(sockets, "port"),
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=" + proto.Port,
		"-kernel", cfg.Images.Xen, "-append", strings.Join(xen, " "),
		"-initrd", cfg.Images.Kernel + " " + strings.Join(linux, " ") + "," + cfg.Images.Dom0,
	}
}

// startQEMU starts QEMU so that it dies with this process, even if that gets SIGKILL. The
// kernel ties this to the starting thread, so a goroutine keeps that thread until QEMU ends.
func (m *Machine) startQEMU(args []string, stderr io.Writer) (exited <-chan error, err error) {
	started, end := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd := exec.Command("qemu-system-x86_64", args...)
		cmd.Stderr = stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
		err := cmd.Start()
		m.qemu = cmd.Process
		started <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		m.mu.Lock()
		m.qemu = nil
		m.mu.Unlock()
		end <- err
	}()
	return end, <-started
}

func (m *Machine) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.qemu != nil {
		m.qemu.Kill()
	}
}

// fatal matches the messages of Xen and Linux after which they cannot go on.
var fatal = regexp.MustCompile(`Kernel panic|Xen BUG at|Panic on CPU|FATAL (TRAP|PAGE)|\bOops\b|\bBUG: |kernel BUG at|general protection fault|DOUBLE FAULT`)

// Fatal reports whether a line of a log says that Xen or the kernel crashed.
func Fatal(line string) bool { return fatal.MatchString(line) }

// watch logs the console until QEMU closes it.
func (m *Machine) watch(log *os.File, tee io.Writer) {
	defer log.Close()
	defer m.console.Close()
	var r io.Reader = io.TeeReader(m.console, log)
	if tee != nil {
		r = io.TeeReader(r, tee)
	}
	for s := bufio.NewReaderSize(r, 64<<10); ; {
		line, err := s.ReadString('\n')
		if Fatal(line) {
			// Give the rest of the message time to reach the log.
			time.AfterFunc(2*time.Second, func() {
				m.fail(fmt.Errorf("on the console: %s", strings.TrimSpace(line)))
				m.kill()
			})
		}
		if err != nil {
			return
		}
	}
}

func (m *Machine) receive() {
	for r := bufio.NewReaderSize(m.port, 1<<20); ; {
		line, err := r.ReadBytes('\n')
		var reply proto.Reply
		if err == nil {
			err = json.Unmarshal(line, &reply)
		}
		if err != nil {
			select { // prefer the error of QEMU's end
			case <-m.ended:
			case <-time.After(5 * time.Second):
			}
			m.fail(fmt.Errorf("the agent's port: %w", err))
			return
		}
		if reply.ID == 0 {
			m.hello <- reply
			continue
		}
		m.mu.Lock()
		c := m.pending[reply.ID]
		delete(m.pending, reply.ID)
		m.mu.Unlock()
		if c != nil {
			c <- reply
		}
	}
}

// fail ends all calls with err. Only the first error is kept.
func (m *Machine) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = err
		close(m.failed)
	}
}

// Err returns why the machine can no longer be used, or nil.
func (m *Machine) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Call sends c to an agent and waits for its reply, at most somewhat longer than c.Timeout,
// which must be set. An error means that the agent could not be reached, or could not make the
// call. If a program ran and failed, the Reply says so, without an error.
func (m *Machine) Call(ctx context.Context, c proto.Call) (proto.Reply, error) {
	answer := make(chan proto.Reply, 1)
	m.mu.Lock()
	if m.err != nil {
		m.mu.Unlock()
		return proto.Reply{}, m.err
	}
	m.last++
	c.ID = m.last
	m.pending[c.ID] = answer
	line, err := json.Marshal(c)
	if err == nil {
		// Write under the lock, so that lines stay whole. It does not block for long,
		// because the agent always reads.
		_, err = m.port.Write(append(line, '\n'))
	}
	m.mu.Unlock()
	if err != nil {
		return proto.Reply{}, err
	}
	ctx, cancel := m.Within(ctx, c.Timeout+grace)
	defer cancel()
	select {
	case r := <-answer:
		if r.Err != "" {
			return r, errors.New(r.Err)
		}
		return r, nil
	case <-m.failed:
		return proto.Reply{}, m.Err()
	case <-ctx.Done():
		m.mu.Lock()
		delete(m.pending, c.ID)
		m.mu.Unlock()
		return proto.Reply{}, fmt.Errorf("no reply from domain %d: %w", c.Domain, context.Cause(ctx))
	}
}

// Console returns the input of dom0's console.
func (m *Machine) Console() io.Writer { return m.console }

// Stop ends the machine and waits for its end.
func (m *Machine) Stop() {
	m.fail(net.ErrClosed)
	m.kill()
	<-m.ended
}

// Ended returns a channel that is closed once the machine has ended.
func (m *Machine) Ended() <-chan struct{} { return m.ended }
