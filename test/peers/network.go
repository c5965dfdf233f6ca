package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
)

// netVar is set in the process that runs in the program's own network namespace. It holds the
// directory for the sockets.
const netVar = "BAREVIF_PEERS_NAMESPACE"

// The addresses and the type of the frames that go through the kernel.
var (
	macA = [6]byte{2, 0, 0, 0, 0, 0xa}
	macB = [6]byte{2, 0, 0, 0, 0, 0xb}
)

const etherType = 0x88b5 // IEEE 802: local experimental

// rerunInNamespace runs this program once more, in a network namespace of its own, and waits
// for it. The error says why that namespace could not be made; then nothing ran.
func rerunInNamespace(tmp string) (status int, err error) {
	how := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		how.Cloneflags |= syscall.CLONE_NEWUSER
		how.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		how.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), netVar+"="+tmp)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = how
	runtime.LockOSThread() // Pdeathsig fires when the thread that started the child ends
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		for s := range signals {
			if s != os.Interrupt { // a terminal sends that to both
				cmd.Process.Signal(s)
			}
		}
	}()
	if err := cmd.Wait(); cmd.ProcessState == nil {
		return 1, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

// A network holds the devices for the peers that go through the kernel, in the namespace of
// this process. err says why there is none.
type network struct {
	err error
	tap [2]*os.File
}

// Names of the devices.
const (
	vethA, vethB = "peers-a", "peers-b" // for packet sockets
	xdpA, xdpB   = "peers-xa", "peers-xb"
	bridgeName   = "peers-br"
)

// newNetwork makes the devices that need no device node: two veth pairs. They vanish with the
// namespace.
func newNetwork() *network {
	// Without IPv6 the kernel sends no frames by itself. A kernel without IPv6 does not
	// have these files.
	for _, which := range []string{"all", "default"} {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
	}
	return &network{err: errors.Join(newVeth(vethA, vethB, 65535), newVeth(xdpA, xdpB, 1500))}
}

// noNetwork returns the network of a process that could not make a namespace.
func noNetwork(err error) *network {
	return &network{err: &missing{"a network namespace of its own",
		"run as root, or see that sysctl user.max_user_namespaces and user.max_net_namespaces are not 0", err}}
}

func newVeth(a, b string, mtu int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = a, mtu
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: b, PeerMTU: uint32(mtu)}); err != nil {
		return &missing{"veth", "load the module veth as root", err}
	}
	return errors.Join(up(a), up(b))
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func ifIndex(name string) (int, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return l.Attrs().Index, nil
}
