package link

import (
	"errors"

	"barevif/pvnet"
	"barevif/pvnet/steer"

	"golang.org/x/sys/unix"
)

// steer makes the kernel spread frames over all queues of the card as s says, or as it likes
// if s is nil. If it fails the kernel does as it likes. The program is loaded when it is first
// needed, and stays loaded until Close; the card has it until it is taken off, also after Close.
func (t *TAP) steer(s *pvnet.Steering) error {
	t.steerMu.Lock()
	defer t.steerMu.Unlock()
	if s == nil {
		_ = t.setProgram(-1) // fails in a kernel that steers with no program
		return nil
	}
	err := t.steerLocked(s)
	if err != nil {
		_ = t.setProgram(-1)
	}
	return err
}

func (t *TAP) steerLocked(s *pvnet.Steering) (err error) {
	if t.closed.Load() {
		return ErrGone
	}
	if t.program == nil {
		if t.program, err = steer.New(); err != nil {
			return err
		}
	}
	if err := t.program.Set(s); err != nil {
		return err
	}
	return t.setProgram(t.program.FD())
}

// setProgram makes the kernel ask the program of that descriptor for the queue of a frame, or
// none if it is -1.
func (t *TAP) setProgram(program int) (err error) {
	ctlErr := t.conn.Control(func(fd uintptr) {
		err = unix.IoctlSetPointerInt(int(fd), unix.TUNSETSTEERINGEBPF, program)
	})
	if err = errors.Join(ctlErr, err); err != nil {
		return tapError(t.Name(), "TUNSETSTEERINGEBPF", err)
	}
	return nil
}

func (t *TAP) closeSteering() {
	t.steerMu.Lock()
	defer t.steerMu.Unlock()
	if t.program != nil {
		_ = t.program.Close() // the kernel closes the descriptors in any case
		t.program = nil
	}
}
