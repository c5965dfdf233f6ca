//go:build linux

package anyxen

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/hypercall/xendev"
	"barevif/hypercall/xendev/xendevtest"
)

// noXen is a machine that is no Xen domain, whose temporary directory is empty.
func noXen(t *testing.T) Config {
	t.Helper()
	t.Setenv("TMPDIR", emutest.SocketDir(t))
	t.Setenv("SUDO_UID", "")
	return Config{Xen: xendev.Config{Root: t.TempDir()}}
}

// host listens at a socket.
func host(t *testing.T, socket string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	h, err := emu.Listen(socket, emu.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
}

func open(t *testing.T, cfg Config) hypercall.Domain {
	t.Helper()
	d, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.(*emu.Domain).Destroy() })
	return d
}

func TestWithoutXenTheEmulatedHostIsJoined(t *testing.T) {
	cfg := noXen(t)
	_, err := Open(t.Context(), cfg)
	if !errors.Is(err, ErrNoXen) || !strings.Contains(err.Error(), Socket(os.Geteuid())) || !strings.Contains(err.Error(), "barevif host") {
		t.Errorf("neither: %v", err)
	}
	host(t, Socket(os.Geteuid()))
	if d := open(t, cfg); d.ID() != 1 {
		t.Error("domain ", d.ID())
	}
	if _, err := Open(t.Context(), cfg); !errors.Is(err, emu.ErrDomainExists) {
		t.Errorf("the same domain again: %v", err)
	}
	cfg.Domain = 2
	if d := open(t, cfg); d.ID() != 2 {
		t.Error("domain ", d.ID())
	}
}

func TestANamedSocketIsJoinedOnAXenToo(t *testing.T) {
	cfg := noXen(t)
	cfg.Xen.Root = xendevtest.Tree(t, map[string]string{"sys/hypervisor/type": "xen\n"})
	if _, err := Open(t.Context(), cfg); err == nil || errors.Is(err, ErrNoXen) || !strings.Contains(err.Error(), "/dev/xen") {
		t.Errorf("a Xen that lacks its nodes: %v", err)
	}
	cfg.Socket = filepath.Join(emutest.SocketDir(t), "s")
	if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrNoXen) || !strings.Contains(err.Error(), cfg.Socket) {
		t.Errorf("nobody listens: %v", err)
	}
	host(t, cfg.Socket)
	open(t, cfg)
}

// As root by sudo, the host of the user who ran sudo is found.
func TestTheHostOfWhoRanSudoIsFound(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to have become root by sudo")
	}
	cfg := noXen(t)
	t.Setenv("SUDO_UID", "4321")
	host(t, Socket(4321))
	open(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, cfg); !errors.Is(err, context.Canceled) && !errors.Is(err, emu.ErrDomainExists) {
		t.Errorf("%v", err)
	}
}
