//go:build linux

// Package netns gives a program a piece of kernel network of its own, without
// asking for root: a user and network namespace with one card in it, whose other
// end is a [link.Link] in the program's hands.
//
// A child process, the program itself started again, holds the namespace; see
// [Main]. It opens sockets there on request and passes them back, so that an
// http.Client of the program talks through the namespace's TCP/IP to whatever the
// program has behind the link. The child ends with the program, however that ends;
// if it ends alone, the link still works, but nothing can be dialled any more.
//
// The card is a TAP where /dev/net/tun can be opened. Elsewhere it is one end of a
// veth pair, with a packet socket on the other.
package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"barevif/pvnet/link"

	"golang.org/x/sys/unix"
)

// Config describes the card.
type Config struct {
	Addr netip.Prefix // the kernel's address and its network: required
	MTU  int          // bytes of payload, 68 to 65521; 0 means 1500
	Name string       // of the card; empty means "eth0"

	// NoTAP takes a veth pair and a packet socket also where there are TAPs.
	NoTAP bool
}

// A Sandbox is a namespace and the card in it. Its methods may be called from any
// goroutine.
type Sandbox struct {
	link     link.Link
	describe string
	child    *exec.Cmd

	askMu sync.Mutex // one request at a time
	ctl   *net.UnixConn

	closeOnce sync.Once
	closeErr  error
}

// A RefusedError says that the system does not let this user have a namespace.
type RefusedError struct {
	Knob string // what decides it and how it is set: "user.max_user_namespaces = 0"; empty if unknown
	Err  error
}

func (e *RefusedError) Error() string {
	s := "netns: this system refuses a user and network namespace: " + e.Err.Error()
	if e.Knob == "" {
		return s + "; a container's seccomp profile may forbid it, root does not need it"
	}
	return s + "; the reason is likely " + e.Knob
}

func (e *RefusedError) Unwrap() error { return e.Err }

// patience bounds what the child is asked for: it makes system calls that do not
// wait, apart from the kernel bringing a card up, which takes a second at most.
const patience = 30 * time.Second

// Start makes a namespace with a card in it. ctx bounds the start only. The
// program must call [Main] first thing.
//
// The error is a [*RefusedError] where there are no namespaces to be had.
func Start(ctx context.Context, cfg Config) (*Sandbox, error) {
	if !cfg.Addr.IsValid() {
		return nil, errors.New("netns: Config.Addr is required")
	}
	if cfg.Name == "" {
		cfg.Name = "eth0"
	}
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	child, ctl, how, err := startChild()
	if err != nil {
		return nil, err
	}
	s := &Sandbox{child: child, ctl: ctl}
	stop := context.AfterFunc(ctx, func() { ctl.SetDeadline(time.Unix(1, 0)) })
	made, f, err := s.ask(request{Card: &cfg})
	if !stop() && err != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = s.adopt(made, f)
	}
	if err != nil {
		s.Close()
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			// The namespace came without the rights that belong to it.
			return nil, &RefusedError{Knob: knob(), Err: err}
		}
		return nil, fmt.Errorf("netns: set up the card: %w", err)
	}
	s.describe = fmt.Sprintf("%s of process %d: %s %s, address %s, MTU %d",
		how, child.Process.Pid, made.Kind, made.Info.Name, cfg.Addr, made.Info.MTU)
	if made.Note != "" {
		s.describe += " (" + made.Note + ")"
	}
	return s, nil
}

func (s *Sandbox) adopt(made answer, f *os.File) (err error) {
	if f == nil {
		return errors.New("the child passed no link")
	}
	if made.Kind == kindTAP {
		s.link, err = asLink(link.NewTAP(f, made.Info))
	} else {
		s.link, err = asLink(link.NewPacket(f, made.Info))
	}
	return err
}

func asLink[L link.Link](l L, err error) (link.Link, error) {
	if err != nil {
		return nil, err
	}
	return l, nil
}

// Link is the outside of the card. The Sandbox owns it and closes it.
func (s *Sandbox) Link() link.Link { return s.link }

// Describe says in one line what was set up.
func (s *Sandbox) Describe() string { return s.describe }

// Close removes the card and the namespace, and waits for the child to end.
// Connections that DialContext gave stay open, but nothing answers them any more.
// Close is idempotent.
func (s *Sandbox) Close() error {
	s.closeOnce.Do(func() {
		if s.link != nil {
			s.link.Close()
		}
		s.ctl.Close() // the child's cue
		kill := time.AfterFunc(patience, func() { s.child.Process.Kill() })
		s.closeErr = s.child.Wait()
		kill.Stop()
	})
	return s.closeErr
}

// startChild starts this program again inside new namespaces. How says inside what.
func startChild() (child *exec.Cmd, ctl *net.UnixConn, how string, err error) {
	ids := func(id int) []syscall.SysProcIDMap {
		return []syscall.SysProcIDMap{{ContainerID: 0, HostID: id, Size: 1}}
	}
	child, ctl, err = spawn(&syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: ids(os.Geteuid()),
		GidMappings: ids(os.Getegid()),
	})
	if err == nil {
		return child, ctl, "user and network namespace", nil
	}
	if os.Geteuid() == 0 {
		// Root may do without a user namespace.
		if child, ctl, err := spawn(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}); err == nil {
			return child, ctl, "network namespace", nil
		}
	}
	return nil, nil, "", &RefusedError{Knob: knob(), Err: err}
}

func spawn(attr *syscall.SysProcAttr) (*exec.Cmd, *net.UnixConn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "netns"), os.NewFile(uintptr(fds[1]), "netns")
	defer ours.Close()
	defer theirs.Close()
	ctl, err := unixConn(ours)
	if err != nil {
		return nil, nil, err
	}
	attr.Setpgid = true // an interrupt from the terminal is for the program, which then ends the child
	child := &exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{childName},
		Stderr:      os.Stderr,
		ExtraFiles:  []*os.File{theirs},
		SysProcAttr: attr,
	}
	if err := child.Start(); err != nil {
		ctl.Close()
		return nil, nil, err
	}
	return child, ctl, nil
}

// unixConn is a net.UnixConn on a duplicate of f.
func unixConn(f *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("netns: not a unix socket")
	}
	return u, nil
}

// knob finds the setting that most likely forbids namespaces.
func knob() string {
	for _, k := range []struct{ name, forbids string }{
		{"kernel.unprivileged_userns_clone", "0"}, // Debian's
		{"user.max_user_namespaces", "0"},
		{"user.max_net_namespaces", "0"},
		{"kernel.apparmor_restrict_unprivileged_userns", "1"}, // Ubuntu's
	} {
		b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(k.name, ".", "/"))
		if v := strings.TrimSpace(string(b)); err == nil && v == k.forbids {
			return k.name + " = " + v
		}
	}
	return ""
}

// ask sends the child a request, and returns its answer and the descriptor that
// came with it, if any.
func (s *Sandbox) ask(r request) (a answer, f *os.File, err error) {
	s.askMu.Lock()
	defer s.askMu.Unlock()
	b, err := json.Marshal(r)
	if err != nil {
		return a, nil, err
	}
	if r.Card == nil { // a card is bounded by Start's context
		s.ctl.SetDeadline(time.Now().Add(patience))
	}
	if _, err := s.ctl.Write(b); err != nil {
		return a, nil, fmt.Errorf("ask the child: %w", err)
	}
	f, err = readMessage(s.ctl, &a)
	if err == nil && a.Failed != "" {
		err = &childError{a.Failed, syscall.Errno(a.Errno)}
	}
	if err != nil && f != nil {
		f.Close()
		f = nil
	}
	return a, f, err
}

// childError is an error of the child, with the errno it was about, if any.
type childError struct {
	text  string
	errno syscall.Errno
}

func (e *childError) Error() string { return e.text }

func (e *childError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}
