//go:build linux

package link

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const inside = "BAREVIF_LINK_TEST_INSIDE"

// TestMain runs the tests in a user and network namespace of their own: they make
// and break interfaces, and must not need root.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		if err := quiet(); err != nil {
			fmt.Fprintln(os.Stderr, "link tests:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig fires when this thread ends
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		// Only the portable tests can run here; the others skip.
		fmt.Fprintln(os.Stderr, "link tests: no user and network namespace:", err)
		os.Exit(m.Run())
	}
}

// quiet keeps the kernel from sending frames by itself.
func quiet() error {
	for _, which := range []string{"all", "default"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// needTAP skips where no TAP can be opened, and says what is missing.
func needTAP(t testing.TB) {
	t.Helper()
	needNamespace(t)
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Skip("this machine gives no TAP:", err)
	}
	f.Close()
}

func needNamespace(t testing.TB) {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("this machine gives no user and network namespace")
	}
}
