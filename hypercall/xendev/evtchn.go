//go:build linux

package xendev

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
)

// An evtchn is Linux's driver behind /dev/xen/evtchn (drivers/xen/evtchn.c), or what a test
// puts in its place.
type evtchn interface {
	// open opens the node, for reads that do not block.
	open(Config) (*os.File, error)

	// check refuses a file that open has not opened.
	check(Config, *os.File) error

	bindUnbound(fd int, peer hypercall.DomID) (hypercall.PortID, error)
	bindPeer(fd int, peer hypercall.DomID, remote hypercall.PortID) (hypercall.PortID, error)
	unbind(fd int, p hypercall.PortID) error
	notify(fd int, p hypercall.PortID) error

	// ownID asks xenstore which domain this is.
	ownID(Config) (hypercall.DomID, error)
}

type linuxEvtchn struct{}

func (linuxEvtchn) open(cfg Config) (*os.File, error) {
	path := cfg.path("dev/xen/evtchn")
	f, err := openFile(path, unix.O_NONBLOCK)
	if err != nil {
		return nil, cfg.explain(path, "xen-evtchn", err)
	}
	return f, nil
}

func (linuxEvtchn) check(cfg Config, f *os.File) error {
	return sameNode(cfg.path("dev/xen/evtchn"), f)
}

func (linuxEvtchn) bindUnbound(fd int, peer hypercall.DomID) (hypercall.PortID, error) {
	return bindUnbound(fd, peer)
}

func (linuxEvtchn) bindPeer(fd int, peer hypercall.DomID, remote hypercall.PortID) (hypercall.PortID, error) {
	return bindPeer(fd, peer, remote)
}

func (linuxEvtchn) unbind(fd int, p hypercall.PortID) error { return unbind(fd, p) }
func (linuxEvtchn) notify(fd int, p hypercall.PortID) error { return notify(fd, p) }

func (linuxEvtchn) ownID(cfg Config) (hypercall.DomID, error) { return askID(cfg) }

// descriptor opens the node as a plain descriptor, which no garbage collection closes.
func (d *Domain) descriptor() (fd int, err error) {
	f, err := d.evtchn.open(d.cfg)
	if err != nil {
		return -1, err
	}
	defer f.Close()
	return duplicate(f)
}

// duplicate returns another descriptor of an open file. With both closed, the file is.
func duplicate(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(old uintptr) {
		fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if cerr != nil {
		return -1, cerr
	}
	if err != nil {
		return -1, fmt.Errorf("xendev: duplicate the descriptor of %s: %w", f.Name(), err)
	}
	return fd, nil
}

// readable waits until fd can be read, and reports false if it cannot within limit.
func readable(fd int, limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		left := max(time.Until(end), 0)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int((left+time.Millisecond-1)/time.Millisecond))
		if err != unix.EINTR {
			return n > 0
		}
	}
}
