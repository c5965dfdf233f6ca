//go:build linux

package xendev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

// idTimeout bounds the request for our own domid. A running xenstore answers in
// milliseconds.
const idTimeout = 5 * time.Second

// maxRequest is the largest payload of a request to the device: the driver's
// buffer has 4096 bytes with the header (drivers/xen/xenbus/xenbus_dev_frontend.c).
const maxRequest = wire.MaxPayload - wire.HeaderSize

// Store opens a connection to xenstore: a new open file of the kernel's device. It also
// asks again for this domain's id, which changes when the domain is migrated.
//
// The driver keeps one request per open file: a second one overwrites the first. So the
// connection opens up to four files as requests come, and sends those that only read,
// outside of a transaction, on any of them; all others go one after another on the first
// file, to which the driver binds watches and transactions. A Write must be of whole
// messages. For a request that the driver cannot pass on, its write fails. The connection
// instead answers such a request with an error message, so that the stream stays in step:
// E2BIG for a payload over 4080 bytes, else the driver's errno.
//
// ctx bounds the opening only.
func (d *Domain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := openStore(d.cfg)
	if err != nil {
		return nil, err
	}
	id, err := readID(ctx, d.cfg, f)
	if err == nil {
		err = f.SetReadDeadline(time.Time{})
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	d.id.Store(uint32(id))
	return newStore(f, func() (io.ReadWriteCloser, error) { return openStore(d.cfg) }), nil
}

func openStore(cfg Config) (*os.File, error) {
	path := cfg.path("dev/xen/xenbus")
	f, err := openFile(path, unix.O_NONBLOCK)
	if errors.Is(err, fs.ErrNotExist) {
		// The module is older than the node, or nothing populates /dev.
		if g, gerr := openFile(cfg.path("proc/xen/xenbus"), unix.O_NONBLOCK); gerr == nil {
			return g, nil
		}
	}
	if err != nil {
		return nil, cfg.explain(path, "xenfs", err)
	}
	return f, nil
}

// askID is readID on a file that it opens.
func askID(cfg Config) (hypercall.DomID, error) {
	f, err := openStore(cfg)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return readID(context.Background(), cfg, f)
}

// readID reads this domain's node domid, which the toolstack writes. A control domain is
// domain 0 if there is no such node or if xenstore does not run yet.
func readID(ctx context.Context, cfg Config, f *os.File) (hypercall.DomID, error) {
	if err := f.SetReadDeadline(time.Now().Add(idTimeout)); err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(past) })
	v, err := readNode(f, "domid")
	if !stop() {
		return 0, ctx.Err()
	}
	if err != nil {
		if b, cerr := os.ReadFile(cfg.path("proc/xen/capabilities")); cerr == nil && strings.Contains(string(b), "control_d") {
			return 0, nil
		}
		return 0, fmt.Errorf("xendev: ask xenstore for our domid: %w", err)
	}
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil || hypercall.DomID(n) >= hypercall.DomSelf {
		return 0, fmt.Errorf("xendev: xenstore says our domid is %q", v)
	}
	return hypercall.DomID(n), nil
}

// readNode makes one READ request, on a file without a watch.
func readNode(f *os.File, path string) (string, error) {
	b, err := wire.Append(nil, wire.Header{Op: wire.Read}, path, "\x00")
	if err != nil {
		return "", err
	}
	if _, err := f.Write(b); err != nil {
		return "", err
	}
	h, p, err := wire.ReadMessage(f, make([]byte, wire.HeaderSize+wire.MaxPayload))
	switch {
	case err != nil:
		return "", err
	case h.Op == wire.Error:
		return "", errors.New(string(bytes.TrimRight(p, "\x00")))
	case h.Op != wire.Read:
		return "", fmt.Errorf("xenstore answered a read with a message of type %d", h.Op)
	}
	return string(p), nil
}
