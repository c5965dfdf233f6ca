package domainsuite_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/test/domainsuite"
)

// hostEnv makes the test binary run as a host. Its value is the path of the host's socket.
const hostEnv = "BAREVIF_DOMAINSUITE_HOST"

func TestMain(m *testing.M) {
	if path := os.Getenv(hostEnv); path != "" {
		if err := serve(path); err != nil {
			fmt.Fprintln(os.Stderr, "host:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// serve runs a host until its stdin ends. The host must then be clean.
func serve(path string) error {
	h, err := emu.Listen(path, emu.Config{})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	if err := h.CheckClean(); err != nil {
		return err
	}
	return h.Close()
}

func join(t testing.TB, path string, id hypercall.DomID) *emu.Domain {
	t.Helper()
	d, err := emu.Join(t.Context(), path, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Destroy)
	return d
}

func TestEmulatorWithHostInAnotherProcess(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(emutest.SocketDir(t), "xen")
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), hostEnv+"="+path)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if !bufio.NewScanner(out).Scan() {
		t.Fatal("the host did not start")
	}
	domainsuite.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		return join(t, path, frontID), join(t, path, backID)
	})
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error("the host:", err)
	}
}

// One domain is in the host's process, the other in another process, in both roles.
func TestEmulatorBetweenHostAndDomain(t *testing.T) {
	for _, hostIsFront := range []bool{true, false} {
		t.Run(fmt.Sprintf("front=%v", hostIsFront), func(t *testing.T) {
			domainsuite.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
				path := filepath.Join(emutest.SocketDir(t), "xen")
				h, err := emu.Listen(path, emu.Config{})
				if err != nil {
					t.Fatal(err)
				}
				ours(t, h)
				if hostIsFront {
					return domain(t, h.Machine, frontID), join(t, path, backID)
				}
				return join(t, path, frontID), domain(t, h.Machine, backID)
			})
		})
	}
}
