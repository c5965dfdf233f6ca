package guestinit

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Main is the program of process 1. Under the names poweroff, halt and reboot it is what the kernel runs
// when the toolstack asks for that (poweroff_cmd in Linux' kernel/reboot.c): it tells process 1.
func Main() {
	began := time.Now()
	if sig, ok := requestOf(filepath.Base(os.Args[0])); ok {
		if err := syscall.Kill(1, sig); err != nil {
			fmt.Fprintf(os.Stderr, "barevif: process 1 cannot be asked: %v\n", err)
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "barevif: this is process 1 of an image, and no program to run elsewhere")
		os.Exit(2)
	}
	p := realProcess(began)
	p.takeMachine()
	end(p.run(signals()))
}

// realProcess returns process 1 of a real kernel. Its uptime is that since it began, until clock can
// ask the kernel.
func realProcess(began time.Time) *initProcess {
	return &initProcess{
		calls: kernelCalls, processors: runtime.NumCPU(), out: os.Stderr,
		now: time.Now, began: began, uptime: func() time.Duration { return time.Since(began) },
	}
}

func requestOf(name string) (syscall.Signal, bool) {
	switch name {
	case "poweroff", "halt":
		return sigPowerOff, true
	case "reboot":
		return sigReboot, true
	}
	return 0, false
}

// signals returns the channel for [initProcess.run]. It takes those signals, too, that would end
// a program of Go, and with process 1 the kernel. They are not ignored, because the program would inherit that.
func signals() <-chan os.Signal {
	c := make(chan os.Signal, 64)
	signal.Notify(c, syscall.SIGCHLD, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGALRM, syscall.SIGPIPE)
	for sig := range endings {
		signal.Notify(c, sig)
	}
	return c
}

// takeMachine mounts the file systems and makes the console this process's input and output. The kernel has
// opened it already, unless its own initramfs lacks /dev/console.
func (p *initProcess) takeMachine() {
	p.mountAll()
	p.uptime = clock()
	if console, err := syscall.Open("/dev/console", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0); err == nil {
		for fd := range 3 { // which Go opens at its start if they are not
			if err := syscall.Dup3(console, fd, 0); err != nil {
				p.say("the console is not on descriptor %d: %v", fd, err)
			}
		}
		syscall.Close(console)
	}
	many := syscall.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &many); err != nil {
		p.say("the limit of open files stays as it is: %v", err)
	}
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		p.say("no settings: %v", err)
	}
	p.cmdline = strings.TrimSpace(string(b))
	if len(p.cmdline) >= MaxPV && p.text("/sys/hypervisor/guest_type") == "PV" {
		p.say("the command line has %d bytes, at which Xen cuts that of a PV guest: it may be incomplete", len(p.cmdline))
	}
}

// clock returns a function that tells for how long the kernel has run. It asks the kernel once, whose
// answer has a resolution of 10 ms. Without an answer the time is that since now.
func clock() func() time.Duration {
	b, _ := os.ReadFile("/proc/uptime")
	asked := time.Now()
	word, _, _ := strings.Cut(string(b), " ")
	s, err := strconv.ParseFloat(word, 64)
	if err != nil {
		s = 0
	}
	up := time.Duration(s * float64(time.Second))
	return func() time.Duration { return up + time.Since(asked) }
}

// kernelCalls are the calls of the real kernel.
var kernelCalls = calls{
	mount:    syscall.Mount,
	load:     initModule,
	hostname: func(name string) error { return syscall.Sethostname([]byte(name)) },
	loopback: loopbackUp,
	setClock: func(t time.Time) error {
		tv := syscall.NsecToTimeval(t.UnixNano())
		return syscall.Settimeofday(&tv)
	},
	start: func(path string, argv, env []string) (int, error) {
		return syscall.ForkExec(path, argv, &syscall.ProcAttr{
			Dir: "/", Env: env, Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
		})
	},
	reap: func() (pid int, status syscall.WaitStatus, err error) {
		pid, err = syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		return pid, status, err
	},
	kill: syscall.Kill,
}

// end ends the other processes, and then the guest.
func end(e ending) {
	if err := syscall.Kill(-1, syscall.SIGKILL); err == nil {
		for err == nil || errors.Is(err, syscall.EINTR) { // until there is none
			_, err = syscall.Wait4(-1, nil, 0, nil)
		}
	}
	syscall.Sync()
	how := syscall.LINUX_REBOOT_CMD_POWER_OFF
	if e == reboot {
		how = syscall.LINUX_REBOOT_CMD_RESTART
	}
	err := syscall.Reboot(how)
	fmt.Fprintf(os.Stderr, "barevif: the guest does not end: %v\n", err)
	select {} // process 1 must not exit
}
