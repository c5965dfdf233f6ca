package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Machine describes the machine on which a result was measured.
type Machine struct {
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Arch   string `json:"arch"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
}

func thisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Arch: runtime.GOARCH, Go: runtime.Version(), CPU: "unknown"}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		if key = strings.TrimSpace(key); key == "model name" || key == "CPU part" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	return m
}

// commit returns the commit that is measured, with a "+" if the tree has changes.
func commit() string {
	id, err := exec.Command("git", "rev-parse", "--short=12", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	name := strings.TrimSpace(string(id))
	if changed, err := exec.Command("git", "status", "--porcelain", "--untracked-files=no").Output(); err != nil || len(changed) > 0 {
		name += "+"
	}
	return name
}

// twoCPUs returns the first two CPUs that this process may use.
func twoCPUs() (cpus [2]int, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return cpus, fmt.Errorf("sched_getaffinity: %w", err)
	}
	if set.Count() < 2 {
		return cpus, errors.New("this process may use one CPU only, and the sender and the receiver need one each: " +
			"run it on a machine with two, or allow it another with taskset")
	}
	n := 0
	for cpu := 0; n < 2; cpu++ {
		if set.IsSet(cpu) {
			cpus[n] = cpu
			n++
		}
	}
	return cpus, nil
}

// lineRoundTrip measures the median time in nanoseconds for a cache line to go from one CPU
// to the other and back. In a virtual machine this depends on where the host places the two
// CPUs, which changes during a run and affects every figure for shared memory.
func lineRoundTrip(cpus [2]int, n int) (float64, error) {
	mem, err := newMemory("peers-line", os.Getpagesize())
	if err != nil {
		return 0, err
	}
	defer mem.close()
	there, back := at[atomic.Uint32](mem.b, 0), at[atomic.Uint32](mem.b, 256)
	limit := time.Now().Add(hangLimit)
	echoed := make(chan struct{})
	go func() {
		defer close(echoed)
		pin(cpus[1])
		for i := uint32(1); i <= uint32(n); i++ {
			for there.Load() != i {
				if there.Load() == ^uint32(0) {
					return
				}
			}
			back.Store(i)
		}
	}()
	rtt := make([]int64, n)
	pinged := make(chan bool)
	go func() {
		pin(cpus[0])
		for i := range rtt {
			start := nano()
			there.Store(uint32(i + 1))
			for looks := 0; back.Load() != uint32(i+1); looks++ {
				if looks%4096 == 4095 && time.Now().After(limit) {
					there.Store(^uint32(0))
					pinged <- false
					return
				}
			}
			rtt[i] = nano() - start
		}
		pinged <- true
	}()
	ok := <-pinged
	<-echoed
	if !ok {
		return 0, fmt.Errorf("%d round trips of a cache line between CPU %d and CPU %d did not end in %v", n, cpus[0], cpus[1], hangLimit)
	}
	slices.Sort(rtt)
	return float64(rtt[n/2]), nil
}

// cpuTime returns the processor time of this process and of the child process of l.
func cpuTime(l link) time.Duration {
	used := clock(unix.CLOCK_PROCESS_CPUTIME_ID)
	if f, ok := l.(forked); ok {
		used += clock(int32(^f.pid()<<3 | 2)) // clock_getcpuclockid(3)
	}
	return used
}

func clock(id int32) time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(id, &t) != nil {
		return 0 // the process has ended
	}
	return time.Duration(t.Nano())
}

// A cpuSample holds the processor times of the machine at one moment.
type cpuSample struct {
	at         time.Time
	busy, ours time.Duration
}

func sampleCPU(l link) cpuSample { return cpuSample{time.Now(), busyTime(), cpuTime(l)} }

// since returns how many CPUs this process and the child process of l have used since g, and
// the share of all CPUs that other work has used.
func (g cpuSample) since(l link) (cpus, others float64) {
	now := sampleCPU(l)
	took, ours := float64(now.at.Sub(g.at)), now.ours-g.ours
	others = float64(now.busy-g.busy-ours) / took / float64(runtime.NumCPU())
	return float64(ours) / took, max(0, others)
}

// busyTime returns the time for which the CPUs were not idle, summed over all. Time that the
// host has stolen counts as busy.
func busyTime() time.Duration {
	text, _ := os.ReadFile("/proc/stat")
	var user, nice, system, idle, iowait, irq, softirq, steal int64
	fmt.Sscanf(string(text), "cpu %d %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal)
	const tick = time.Second / 100 // USER_HZ
	return time.Duration(user+nice+system+irq+softirq+steal) * tick
}

// A missing is the error for something that a peer needs and this machine lacks.
type missing struct {
	what, next string
	err        error
}

func (m *missing) Error() string {
	s := m.what
	if m.err != nil {
		s += ": " + m.err.Error()
	}
	return s + " (" + m.next + ")"
}

func (m *missing) Unwrap() error { return m.err }

// socketPath returns a path for a socket that no other link of this run uses.
func (j *job) socketPath(name string) string {
	return filepath.Join(j.tmp, fmt.Sprintf("%s-%d", name, sockets.Add(1)))
}

var sockets atomic.Uint32
