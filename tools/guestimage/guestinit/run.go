//go:build linux

package guestinit

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// An ending is what becomes of the guest.
type ending int

const (
	powerOff ending = iota
	reboot
)

// Signals by which process 1 is asked to end the guest. The program that the kernel runs for a
// request of the toolstack sends them.
const (
	sigPowerOff = syscall.SIGTERM
	sigReboot   = syscall.SIGINT // also what Ctrl-Alt-Del sends
)

// endings are the signals that end the guest: our own, and those that other inits take for it.
var endings = map[os.Signal]ending{
	sigPowerOff: powerOff, syscall.SIGUSR2: powerOff, syscall.SIGPWR: powerOff, sigReboot: reboot,
}

// killWait is how long a killed program may take to end. One that waits for a device in the
// kernel may never do.
const killWait = 5 * time.Second

// Waits before the program is started again: each is twice the one before. Once it has run for as
// long as steady, they begin with the first.
const (
	firstWait = time.Second
	lastWait  = 30 * time.Second
	steady    = time.Minute
)

// A supervisor runs the program until the guest has to end.
type supervisor struct {
	*initProcess
	pid     int // of the program; 0: it does not run
	started time.Time
	wait    time.Duration
	ooms    string // the kernel's count of processes killed for want of memory, when the program started

	ending *ending          // not nil: the guest is to end thus
	again  <-chan time.Time // when to start the program again
	late   <-chan time.Time // when to wait for the program no longer
	killed bool
}

// run prepares the guest, runs its program and returns how the guest is to end. It takes the
// signals of process 1, SIGCHLD among them.
func (p *initProcess) run(signals <-chan os.Signal) ending {
	upAtStart := p.uptime() - p.now().Sub(p.began)
	p.say("kernel %s has started after %.2f s, at %s", p.text("/proc/sys/kernel/osrelease"),
		max(0, upAtStart).Seconds(), p.began.UTC().Format("2006-01-02T15:04:05.000Z"))
	if err := p.prepare(); err != nil {
		p.say("the program is not started: %v", err)
		return powerOff
	}
	s := &supervisor{initProcess: p, wait: firstWait}
	s.launch()
	for !s.over() {
		select {
		case sig := <-signals:
			s.signal(sig)
		case <-s.again:
			s.launch()
		case <-s.late:
			s.overdue()
		}
	}
	return *s.ending
}

// over reports whether nothing is left to do.
func (s *supervisor) over() bool { return s.ending != nil && s.pid == 0 }

// launch starts the program.
func (s *supervisor) launch() {
	s.again = nil
	s.ooms = s.oomKills()
	argv := append([]string{s.image.Program}, s.settings.Args...)
	env := append([]string{"PATH=" + ProgramDir + ":/usr/bin:/bin", "HOME=/", "TERM=vt100"}, s.settings.Env...)
	pid, err := s.start(s.path(s.image.Program), argv, env)
	if err != nil {
		s.ended(fmt.Sprintf("cannot be started: %v", err), true)
		return
	}
	s.pid, s.started = pid, s.now()
	s.say("%s runs, with %s", s.image.Program, counted(len(s.settings.Args), "argument"))
}

// signal acts on a signal. It looks for processes that have ended after any signal: a SIGCHLD
// may be lost where many signals arrive at once.
func (s *supervisor) signal(sig os.Signal) {
	s.reapAll()
	e, ok := endings[sig]
	if !ok || s.ending != nil {
		return
	}
	s.ending, s.again = &e, nil
	word := "power off"
	if e == reboot {
		word = "reboot"
	}
	s.say("asked to %s", word)
	if s.pid != 0 {
		s.late = time.After(s.settings.Stop)
		s.send(s.pid, syscall.SIGTERM)
	}
}

// overdue kills a program that does not end, and gives up on one that was killed.
func (s *supervisor) overdue() {
	if s.killed {
		s.say("the program does not end, and this guest ends without that")
		s.pid, s.late = 0, nil
		return
	}
	s.say("the program has not ended within %v, and is killed", s.settings.Stop)
	s.killed, s.late = true, time.After(killWait)
	s.send(s.pid, syscall.SIGKILL)
}

// send signals a process. It is no error that the process has just ended.
func (s *supervisor) send(pid int, sig syscall.Signal) {
	if err := s.kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		s.say("cannot send %v: %v", sig, err)
	}
}

// reapAll collects every process that has ended: one SIGCHLD may stand for many.
func (s *supervisor) reapAll() {
	for {
		pid, status, err := s.reap()
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid == 0 {
			return
		}
		if pid != s.pid {
			continue // an orphan
		}
		s.pid, s.late = 0, nil
		if ran := s.now().Sub(s.started); ran >= steady {
			s.wait = firstWait
		}
		s.ended(s.describe(status), !status.Exited() || status.ExitStatus() != 0)
	}
}

// describe says how the program ended.
func (s *supervisor) describe(status syscall.WaitStatus) string {
	if status.Exited() {
		return "exited with status " + strconv.Itoa(status.ExitStatus())
	}
	said := fmt.Sprintf("was ended by signal %d (%v)", int(status.Signal()), status.Signal())
	if status.Signal() == syscall.SIGKILL && s.oomKills() != s.ooms {
		said += ": this guest is out of memory; it has " + s.memory() + ", which memory= in its configuration sets"
	}
	return said
}

// ended decides what follows the end of the program.
func (s *supervisor) ended(how string, failed bool) {
	again := s.settings.Restart == Always || s.settings.Restart == OnFailure && failed
	switch {
	case s.ending != nil:
		s.say("%s %s", s.image.Program, how)
	case again:
		s.say("%s %s; it is started again in %v (%srestart=%s)", s.image.Program, how, s.wait, prefix, s.settings.Restart)
		s.again = time.After(s.wait)
		s.wait = min(2*s.wait, lastWait)
	default:
		s.say("%s %s; this guest powers off (%srestart=%s)", s.image.Program, how, prefix, s.settings.Restart)
		e := powerOff
		s.ending = &e
	}
}

// oomKills returns the kernel's count of processes that it killed for want of memory.
func (s *supervisor) oomKills() string { return field(s.text("/proc/vmstat"), "oom_kill") }

// memory returns the guest's memory.
func (s *supervisor) memory() string {
	kib, err := strconv.Atoi(field(s.text("/proc/meminfo"), "MemTotal:"))
	if err != nil {
		return "an unknown amount"
	}
	return strconv.Itoa(kib/1024) + " MiB"
}

// field returns the word after name in the line that begins with name.
func field(text, name string) string {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			return f[1]
		}
	}
	return ""
}
