//go:build linux

// Package anyxen makes a program a domain, on the Xen that it runs on or on an emulated one, in
// one call:
//
//	domain, err := anyxen.Open(ctx, anyxen.Config{})
//
// So the same program runs in a guest and, beside a "barevif host", on the developer's machine.
// A program that links it links both; one for a guest alone calls [xendev.Open].
package anyxen

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/userdir"
	"barevif/hypercall/xendev"
)

// Config says which domain the program is where there is a choice: on an emulated Xen.
type Config struct {
	Socket string          // of the emulated host; empty: the usual one of this user, or the one who ran sudo
	Domain hypercall.DomID // number on the emulated host; 0: domain 1, the guest of "barevif host"

	Xen xendev.Config // the real Xen; its zero value works
}

// ErrNoXen is wrapped by the error of [Open] where there is neither a Xen nor an emulated one.
var ErrNoXen = errors.New("this machine is no Xen domain, and no emulated host runs")

// Open makes this process the Xen domain that it runs in, if the machine is one and
// Config.Socket is empty, and otherwise a domain of an emulated host, which must be of this
// user, of root, or of the user who ran sudo. It is one until the process ends.
//
// Errors: [ErrNoXen]. On a Xen, the errors of [xendev.Open], which name the device node that is
// missing. On an emulated host, the errors of [emu.Join].
func Open(ctx context.Context, cfg Config) (hypercall.Domain, error) {
	if cfg.Socket == "" {
		d, err := xendev.Open(cfg.Xen)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, xendev.ErrNotXen) {
			return nil, fmt.Errorf("anyxen: %w", err)
		}
	}
	if cfg.Domain == 0 {
		cfg.Domain = 1
	}
	return join(ctx, cfg)
}

// join joins the emulated host.
func join(ctx context.Context, cfg Config) (hypercall.Domain, error) {
	sockets, users := []string{cfg.Socket}, []int{os.Geteuid()}
	if cfg.Socket == "" {
		sockets[0] = Socket(os.Geteuid())
	}
	if uid, ok := sudo(); ok {
		users = append(users, uid)
		if cfg.Socket == "" {
			sockets = append(sockets, Socket(uid))
		}
	}
	for _, socket := range sockets {
		d, err := emu.Join(ctx, socket, cfg.Domain, users...)
		switch {
		case err == nil:
			return d, nil
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
			continue
		}
		return nil, fmt.Errorf("anyxen: join the emulated host at %s: %w", socket, err)
	}
	return nil, fmt.Errorf("anyxen: %w at %s: start one with \"barevif host\"", ErrNoXen, sockets[0])
}

// Socket returns the usual socket of an emulated host of a user, which "barevif host" makes.
func Socket(uid int) string {
	const name = "host.sock"
	socket := filepath.Join(userdir.Temp(uid), name)
	if former := userdir.Former(uid); former != "" && !exists(socket) && exists(filepath.Join(former, name)) {
		return filepath.Join(former, name)
	}
	return socket
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// sudo returns the user who became root by sudo.
func sudo() (uid int, ok bool) {
	if os.Geteuid() != 0 {
		return 0, false
	}
	n, err := strconv.ParseUint(os.Getenv("SUDO_UID"), 10, 32)
	if err != nil || n == 0 || n == 1<<32-1 {
		return 0, false
	}
	return int(n), true
}
