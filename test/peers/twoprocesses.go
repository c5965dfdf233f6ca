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

// A childTask holds the parameters of the receiver's process. The board is its descriptor 3.
type childTask struct {
	Eventfd bool // answer on the eventfds that follow the board; there is no vif
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
	o     vifOptions
	lab   *lab
	from  halves
	child *child
}

// A child is a process that runs the task of the other party.
type child struct {
	cmd    *exec.Cmd
	stderr strings.Builder
	ended  chan struct{} // closed when it has ended
	err    error         // valid once ended is closed
}

func newTwoProcesses(o vifOptions, j *job) (l *processLink, err error) {
	lab, err := newLab(j.socketPath("host"))
	if err != nil {
		return nil, err
	}
	l = &processLink{o: o, lab: lab}
	defer func() {
		if err != nil {
			j.stop.Store(1)
			err = errors.Join(err, l.close())
		}
	}()
	if err := lab.addVif(frontDomain, backDomain, 0); err != nil {
		return l, err
	}
	if l.child, err = startChild(j, childTask{Options: o, Host: lab.path}); err != nil {
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
	return l, l.child.awaitReady(j)
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

// startChild starts a process for the receiving party of j. Descriptor 3 is its board, and files
// are those after it.
func startChild(j *job, e childTask, files ...*os.File) (*child, error) {
	e.Size, e.Ping, e.Verify, e.CPU = j.size, j.ping, j.verify, j.cpus[1]
	if j.free {
		e.CPU = -1
	}
	text, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	fd, err := unix.FcntlInt(uintptr(j.mem.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("dup of the board: %w", err)
	}
	board := os.NewFile(uintptr(fd), "board")
	defer board.Close()
	c := &child{cmd: exec.Command("/proc/self/exe"), ended: make(chan struct{})}
	c.cmd.Env = append(os.Environ(), childVar+"="+string(text))
	c.cmd.ExtraFiles = append([]*os.File{board}, files...)
	c.cmd.Stderr = &c.stderr
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("the receiver's process: %w", err)
	}
	go func() {
		c.err = c.cmd.Wait()
		close(c.ended)
	}()
	return c, nil
}

// awaitReady waits until the process is ready for the first frame.
func (c *child) awaitReady(j *job) error {
	for limit := time.After(setupLimit); j.ready.Load() == 0; {
		select {
		case <-c.ended:
			return errors.New("the receiver's process ended before it was connected")
		case <-limit:
			return fmt.Errorf("the receiver's process was not ready in %v", setupLimit)
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

// wait waits for the end of the process, which the job has told to stop. A nil child has ended.
func (c *child) wait() error {
	if c == nil {
		return nil
	}
	select {
	case <-c.ended:
	case <-time.After(setupLimit):
		c.cmd.Process.Kill()
		<-c.ended
	}
	if c.err != nil {
		return fmt.Errorf("the receiver's process: %w: %s", c.err, strings.TrimSpace(c.stderr.String()))
	}
	return nil
}

// close ends the receiver's process, which the job has told to stop.
func (l *processLink) close() error {
	err := l.child.wait()
	l.lab.close()
	return err
}

func (l *processLink) pid() int         { return l.child.cmd.Process.Pid }
func (l *processLink) interrupt()       { l.from.interrupt() }
func (l *processLink) notifies() uint64 { return notified(l.from.devices) }

func (l *processLink) send(j *job) error { return l.from.send(j, l.o) }

// receive waits for the process that receives.
func (l *processLink) receive(*job) error {
	<-l.child.ended
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
	if e.Eventfd {
		return echoEventfd(j)
	}
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
