//go:build linux

// Package netns gives a program a separate piece of kernel network, without root: a user
// and network namespace with one card in it. The card's other end is a [link.Link] of the
// program.
//
// A child process, this program started again, holds the namespace; see [Main]. It opens
// sockets there on request and passes them back, so that an http.Client of the program
// talks through the namespace's TCP/IP to the program's end of the link. The child ends
// with the program, however that ends. If the child ends alone, the link still works, but
// nothing can be dialled any more.
//
// The card is a TAP if /dev/net/tun can be opened. Else it is one end of a veth pair,
// with a packet socket on the other end.
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
	Name string       // name of the card; empty means "eth0"

	// NoTAP selects a veth pair and a packet socket even if a TAP is possible.
	NoTAP bool
}

// A Sandbox is a namespace with the card in it. Any goroutine may call its methods.
type Sandbox struct {
	link     link.Link
	describe string
	child    *exec.Cmd

	askMu sync.Mutex // held for one request and its answer
	ctl   *net.UnixConn

	closeOnce sync.Once
	closeErr  error
}

// A RefusedError says that the system does not let this user make a namespace.
type RefusedError struct {
	Knob string // the setting that forbids it, with its value: "user.max_user_namespaces = 0"; empty if unknown
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

// patience bounds a request to the child. The child's system calls do not block, but the
// kernel may take up to a second to bring a card up.
const patience = 30 * time.Second

// Start makes a namespace with a card in it. ctx bounds only the start. The program must
// call [Main] first of all.
//
// The error is a [*RefusedError] if the system allows no namespaces.
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
			// The kernel made the namespace, but without the capabilities in it.
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

// Link returns the outside end of the card. The Sandbox owns it and closes it.
func (s *Sandbox) Link() link.Link { return s.link }

// Describe describes the namespace and the card in one line.
func (s *Sandbox) Describe() string { return s.describe }

// Close removes the card and the namespace, and waits for the child to end. Connections
// of DialContext stay open, but are cut off. Close is idempotent.
func (s *Sandbox) Close() error {
	s.closeOnce.Do(func() {
		if s.link != nil {
			s.link.Close()
		}
		s.ctl.Close() // makes the child end
		kill := time.AfterFunc(patience, func() { s.child.Process.Kill() })
		s.closeErr = s.child.Wait()
		kill.Stop()
	})
	return s.closeErr
}

// startChild starts this program again in new namespaces; how names them.
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
		// Root can make a network namespace without a user namespace.
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
	attr.Setpgid = true // an interrupt from the terminal must reach only the program, which then ends the child
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

// unixConn returns a net.UnixConn for a duplicate of f.
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

// knob returns the setting that most likely forbids namespaces.
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

// ask sends the child a request, and returns its answer with the descriptor that
// accompanies it, if any.
func (s *Sandbox) ask(r request) (a answer, f *os.File, err error) {
	s.askMu.Lock()
	defer s.askMu.Unlock()
	b, err := json.Marshal(r)
	if err != nil {
		return a, nil, err
	}
	if r.Card == nil { // Start's context bounds the request for a card
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

// A childError is an error of the child, with its errno, if any.
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
