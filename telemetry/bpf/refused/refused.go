//go:build linux

// Package refused says why the kernel refuses a map or a program of eBPF.
package refused

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Lacking adds the probable cause of a refusal: number is that of the capability.
func Lacking(capability string, number int, err error) error {
	err = Terse(err)
	switch {
	case !errors.Is(err, unix.EPERM):
		return err
	case capable(number):
		return fmt.Errorf("%w (%s is there; in a user namespace it does not count, elsewhere the kernel, a security module or seccomp forbids it)", err, capability)
	}
	return fmt.Errorf("%w (%s is missing, or seccomp forbids it)", err, capability)
}

// capable reports whether this thread has a capability in its user namespace.
func capable(number int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	return err == nil && data[number/32].Effective&(1<<(number%32)) != 0
}

// Terse keeps the cause of a refusal. It drops the library's advice on limits, which does
// not apply to a missing capability, and all of the verifier's log but the complaint.
func Terse(err error) error {
	var errno unix.Errno
	var verifier *ebpf.VerifierError
	switch {
	case errors.As(err, &verifier) && len(verifier.Log) > 1:
		return fmt.Errorf("%w: %s", verifier.Cause, verifier.Log[len(verifier.Log)-2])
	case errors.As(err, &errno):
		return errno
	}
	return err
}
