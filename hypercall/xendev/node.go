//go:build linux

package xendev

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotXen is wrapped by errors that occur because this kernel does not run on Xen.
var ErrNotXen = errors.New("this machine is not a Xen domain")

// A NodeError is a device node that cannot be opened. Its text says how to fix that.
type NodeError struct {
	Node   string // "/dev/xen/gntalloc"
	Module string // the kernel module that makes it
	Err    error  // the error of open; wraps [ErrNotXen] where that is the cause
}

func (e *NodeError) Unwrap() error { return e.Err }

func (e *NodeError) Error() string {
	s := fmt.Sprintf("open %s: %v", e.Node, e.Err)
	switch {
	case errors.Is(e.Err, ErrNotXen):
		return s
	case errors.Is(e.Err, fs.ErrNotExist), errors.Is(e.Err, unix.ENODEV), errors.Is(e.Err, unix.ENXIO):
		if e.Module == "xenfs" {
			return s + ": load the module and mount it: modprobe xenfs && mount -t xenfs xenfs /proc/xen"
		}
		return s + ": load the module: modprobe " + e.Module
	case errors.Is(e.Err, unix.EMFILE):
		return s + ": raise the limit of open files: ulimit -n, or LimitNOFILE= of a service"
	case errors.Is(e.Err, fs.ErrPermission):
		return s + ": be root, or let a group in by a udev rule: " + e.rule()
	}
	return s
}

// rule returns the udev rule that lets a group use the node. udev calls the device of
// /dev/xen/evtchn xen/evtchn.
func (e *NodeError) rule() string {
	name := e.Node[strings.LastIndexByte(e.Node, '/')+1:]
	return fmt.Sprintf(`SUBSYSTEM=="misc", KERNEL=="xen/%s", GROUP="barevif", MODE="0660"`, name)
}

// explain makes a NodeError from the error of opening path.
func (c Config) explain(path, module string, err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		err = p.Err
	}
	if errors.Is(err, fs.ErrNotExist) && !c.onXen() {
		err = fmt.Errorf("%w (%w)", ErrNotXen, err)
	}
	return &NodeError{Node: path, Module: module, Err: err}
}

// onXen asks the kernel whether it runs on Xen (drivers/xen/sys-hypervisor.c).
func (c Config) onXen() bool {
	b, err := os.ReadFile(c.path("sys/hypervisor/type"))
	return err == nil && strings.TrimSpace(string(b)) == "xen"
}

// A Node is a device node and the kernel module that makes it.
type Node struct {
	Path   string
	Module string
	Loaded bool  // the module is loaded or built into the kernel
	Err    error // error of opening the node; nil: the node is usable
}

// Nodes tries to open each node that a [Domain] may use.
func Nodes(cfg Config) []Node {
	var all []Node
	for _, n := range []struct{ name, module string }{
		{"evtchn", "xen-evtchn"},
		{"gntalloc", "xen-gntalloc"},
		{"gntdev", "xen-gntdev"},
		{"xenbus", "xenfs"},
		{"privcmd", "xen-privcmd"},
		{"hypercall", "xen-privcmd"},
	} {
		node := Node{Path: cfg.path("dev/xen", n.name), Module: n.module}
		dir := filepath.Join("sys/module", strings.ReplaceAll(n.module, "-", "_"))
		if _, err := os.Stat(cfg.path(dir)); err == nil {
			node.Loaded = true
		}
		if f, err := openFile(node.Path, unix.O_NONBLOCK); err != nil {
			node.Err = cfg.explain(node.Path, n.module, err)
		} else {
			node.Loaded = true
			node.Err = f.Close()
		}
		all = append(all, node)
	}
	return all
}

// A node is a device node without a poll operation. It is opened by the first enter.
// Between enter and leave it stays open: close waits, so that no call reaches another
// file that got the same descriptor number.
type node struct {
	path, module string

	mu     sync.RWMutex // held for reading between enter and leave
	file   *os.File     // guarded by mu
	fd     int          // descriptor of file
	closed bool         // guarded by mu
}

// enter returns the descriptor, which is valid until leave.
func (n *node) enter(cfg *Config) (fd int, err error) {
	n.mu.RLock()
	if n.file != nil {
		return n.fd, nil
	}
	n.mu.RUnlock()

	n.mu.Lock()
	if err := n.openLocked(cfg); err != nil {
		n.mu.Unlock()
		return -1, err
	}
	n.mu.Unlock()

	n.mu.RLock()
	if n.file == nil {
		n.mu.RUnlock()
		return -1, net.ErrClosed
	}
	return n.fd, nil
}

func (n *node) leave() { n.mu.RUnlock() }

func (n *node) openLocked(cfg *Config) error {
	if n.closed {
		return net.ErrClosed
	}
	if n.file != nil {
		return nil
	}
	f, err := openFile(n.path, 0)
	if err != nil {
		return cfg.explain(n.path, n.module, err)
	}
	conn, err := f.SyscallConn()
	if err == nil {
		err = conn.Control(func(fd uintptr) { n.fd = int(fd) })
	}
	if err != nil {
		f.Close()
		return err
	}
	n.file = f
	return nil
}

func (n *node) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	f := n.file
	n.file, n.closed = nil, true
	if f == nil {
		return nil
	}
	return f.Close()
}

// openFile opens a node for reading and writing.
func openFile(path string, flags int) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|syscall.O_CLOEXEC|flags, 0)
}

// sameNode refuses a file that is not an open one of the device node at path.
func sameNode(path string, f *os.File) error {
	node, err := os.Stat(path)
	if err != nil {
		return err
	}
	got, err := f.Stat()
	if err != nil {
		return err
	}
	want, ok := node.Sys().(*syscall.Stat_t)
	is, ok2 := got.Sys().(*syscall.Stat_t)
	if !ok || !ok2 || got.Mode()&fs.ModeCharDevice == 0 || node.Mode()&fs.ModeCharDevice == 0 || is.Rdev != want.Rdev {
		return fmt.Errorf("xendev: a file that is not one of %s", path)
	}
	return nil
}
