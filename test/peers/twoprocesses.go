package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"

	"golang.org/x/sys/unix"
)

// childVar holds the task of a child process, which runs this program.
const childVar = "BAREVIF_PEERS_CHILD"

// An childTask holds the parameters of the receiver's process. The board is its descriptor 3.
type childTask struct {
	Options vifOptions
	Size    int
	Ping    bool
	Verify  bool
	CPU     int // -1: any
	Host    string
}

// A processLink is a vif whose sender is in this process, with the emulated Xen,
// and whose receiver is in another one.
type processLink struct {
	o      vifOptions
	lab    *lab
	from   halves
	child  *exec.Cmd
	stderr strings.Builder // the child's stderr
	ended  chan struct{}   // closed when the child has ended
	err    error           // the child's error; valid once ended is closed
}

func newTwoProcesses(o vifOptions, j *job) (l *processLink, err error) {
	lab, err := newLab(j.socketPath("host"))
	if err != nil {
		return nil, err
	}
	l = &processLink{o: o, lab: lab, ended: make(chan struct{})}
	defer func() {
		if err != nil {
			j.stop.Store(1)
			err = errors.Join(err, l.close())
		}
	}()
	if err := lab.addVif(frontDomain, backDomain, 0); err != nil {
		return l, err
	}
	if err := l.start(j); err != nil {
		return l, err
	}
	id := frontDomain
	if o.Back {
		id = backDomain
	}
	domain, err := lab.domain(id)
	if err != nil {
		return l, err
	}
	device, done, err := openEnd(domain, o.Back, o.config(j))
	if err != nil {
		return l, err
	}
	lab.onClose(done)
	if err := l.from.ownHalves([]*pvnet.Device{device}, o); err != nil {
		return l, err
	}
	for limit := time.After(setupLimit); j.ready.Load() == 0; {
		select {
		case <-l.ended:
			return l, errors.New("the receiver's process ended before it was connected")
		case <-limit:
			return l, fmt.Errorf("the receiver's process was not ready in %v", setupLimit)
		case <-time.After(time.Millisecond):
		}
	}
	return l, nil
}

// openEnd opens one end of the vif in either process: the backend or the frontend.
func openEnd(d hypercall.Domain, back bool, cfg pvnet.Config) (device *pvnet.Device, done func(), err error) {
	if !back {
		device, err = connect(d, "0", cfg)
		if err != nil {
			return nil, nil, err
		}
		return device, device.Disconnect, nil
	}
	served := serve(d, cfg)
	if device, err = served.nextDevice(); err != nil {
		served.close()
		return nil, nil, err
	}
	return device, served.close, nil
}

func (l *processLink) start(j *job) error {
	e := childTask{Options: l.o, Size: j.size, Ping: j.ping, Verify: j.verify, CPU: j.cpus[1], Host: l.lab.path}
	if j.free {
		e.CPU = -1
	}
	text, err := json.Marshal(e)
	if err != nil {
		return err
	}
	fd, err := unix.FcntlInt(uintptr(j.mem.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("dup of the board: %w", err)
	}
	board := os.NewFile(uintptr(fd), "board")
	defer board.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVar+"="+string(text))
	cmd.ExtraFiles = []*os.File{board}
	cmd.Stderr = &l.stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("the receiver's process: %w", err)
	}
	l.child = cmd
	go func() {
		l.err = cmd.Wait()
		close(l.ended)
	}()
	return nil
}

// close ends the receiver's process, which the job has told to stop.
func (l *processLink) close() error {
	var err error
	if l.child != nil {
		select {
		case <-l.ended:
		case <-time.After(setupLimit):
			l.child.Process.Kill()
			<-l.ended
		}
		if l.err != nil {
			err = fmt.Errorf("the receiver's process: %w: %s", l.err, strings.TrimSpace(l.stderr.String()))
		}
	}
	l.lab.close()
	return err
}

func (l *processLink) pid() int         { return l.child.Process.Pid }
func (l *processLink) interrupt()       { l.from.interrupt() }
func (l *processLink) notifies() uint64 { return notified(l.from.devices) }

func (l *processLink) send(j *job) error { return l.from.send(j, l.o) }

// receive waits for the process that receives.
func (l *processLink) receive(*job) error {
	<-l.ended
	return nil // close returns the child's error
}

func (l *processLink) ping(j *job, rtt []int64) error { return l.from.ping(j, l.o, rtt) }
func (l *processLink) echo(*job) error                { return l.receive(nil) }

// runChild runs the receiver in its own process.
func runChild(text string) error {
	var e childTask
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		return err
	}
	page, err := mapMemory(3, os.Getpagesize())
	if err != nil {
		return err
	}
	j := &job{board: at[board](page, 0), size: e.Size, verify: e.Verify, free: e.CPU < 0, cpus: [2]int{e.CPU, e.CPU}}
	id := backDomain
	if e.Options.Back {
		id = frontDomain
	}
	ctx, cancel := timeout()
	defer cancel()
	domain, err := emu.Join(ctx, e.Host, id)
	if err != nil {
		return err
	}
	device, done, err := openEnd(domain, !e.Options.Back, e.Options.config(j))
	if err != nil {
		return err
	}
	defer done()
	var to halves
	if err := to.ownHalves([]*pvnet.Device{device}, e.Options); err != nil {
		return err
	}
	j.ready.Store(1)
	go func() {
		for {
			time.Sleep(20 * time.Millisecond) // not often: the wake-up of another thread disturbs the measurement
			if j.stopped() {
				to.interrupt()
			}
		}
	}()
	j.pin(1)
	if e.Ping {
		err = to.echo(j, e.Options)
	} else {
		err = to.receive(j, e.Options)
	}
	j.childNotifies.Store(notified(to.devices))
	return err
}
