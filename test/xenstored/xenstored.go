//go:build linux

// Package xenstored runs Debian's own xenstored for tests, without Xen.
//
// The daemon is the distribution's binary, fetched with apt-get into a cache; only
// its calls to the hypervisor are answered by a small library that stands in for
// Xen. Domain 0 talks to it over its socket, any other domain over a shared ring,
// with the permissions and quotas of a real one.
package xenstored

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "embed"

	"barevif/hypercall"
	"barevif/hypercall/emu/emutest"
	"barevif/xenbus/xenstore/wire"
)

//go:embed testdata/xenstored-shim.c
var shimSource []byte

// A Daemon is a running xenstored with an empty tree.
type Daemon struct {
	t   testing.TB
	dir string
	release
	shim string

	mu      sync.Mutex
	cmd     *exec.Cmd                // guarded by mu; nil while killed
	exited  chan struct{}            // guarded by mu
	domains map[hypercall.DomID]bool // guarded by mu; introduced to this process
	log     *strings.Builder         // guarded by mu; written by the process's copier
}

// Start starts a daemon that ends with the test. It skips the test if the machine
// lacks what it takes, and says what.
func Start(t testing.TB) *Daemon {
	t.Helper()
	r, err := unpacked()
	if err != nil {
		t.Skip("no xenstored of Debian: ", err)
	}
	dir := emutest.SocketDir(t)
	shim, err := compile(dir)
	if err != nil {
		t.Skip("no library to stand in for Xen: ", err)
	}
	d := &Daemon{t: t, dir: dir, release: r, shim: shim}
	t.Cleanup(d.Kill)
	d.Restart()
	return d
}

func compile(dir string) (string, error) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		return "", err
	}
	source, shim := filepath.Join(dir, "shim.c"), filepath.Join(dir, "shim.so")
	if err := os.WriteFile(source, shimSource, 0o600); err != nil {
		return "", err
	}
	if out, err := exec.Command(gcc, "-shared", "-fPIC", "-O1", "-o", shim, source).CombinedOutput(); err != nil {
		return "", fmt.Errorf("gcc: %w: %s", err, lastLine(out))
	}
	return shim, nil
}

// Socket is the path of domain 0's socket.
func (d *Daemon) Socket() string { return filepath.Join(d.dir, "socket") }

// Version is that of Debian's packages.
func (d *Daemon) Version() string { return d.version }

// Has says whether the daemon has a defect.
func (d *Daemon) Has(defect Defect) bool {
	d.t.Helper()
	mended, err := d.mends(defect.CVE)
	if err != nil {
		d.t.Fatal(err)
	}
	return !mended
}

// Kill ends the daemon at once. All connections break.
func (d *Daemon) Kill() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return
	}
	_ = d.cmd.Process.Kill() // it may have ended by itself
	<-d.exited
	d.cmd = nil
	if d.t.Failed() {
		d.t.Logf("xenstored said: %s", d.log)
	}
}

// Restart starts the daemon again after Kill, with an empty tree.
func (d *Daemon) Restart() {
	d.t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd != nil {
		d.t.Fatal("xenstored runs already")
	}
	for _, old := range []string{"socket", "xenstored.pid", "tdb"} {
		os.Remove(filepath.Join(d.dir, old))
	}
	libs, err := filepath.Glob(filepath.Join(d.root, "usr/lib/*-linux-gnu"))
	if err != nil {
		d.t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(d.root, "usr/lib/xen-4.17/bin/xenstored"), "-N")
	cmd.Env = []string{
		// Spaces and colons part the libraries, and may be in the path of the directory.
		"LD_LIBRARY_PATH=" + strings.Join(libs, ":"), "LD_PRELOAD=./" + filepath.Base(d.shim), "SHIM_DIR=" + d.dir,
		"XENSTORED_RUNDIR=" + d.dir, "XENSTORED_ROOTDIR=" + d.dir, "XENSTORED_PATH=" + d.Socket(),
	}
	cmd.Dir = d.dir
	d.log = &strings.Builder{}
	cmd.Stdout, cmd.Stderr = d.log, d.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a test that is killed runs no cleanup
	started, exited := make(chan error), make(chan struct{})
	go func() {
		defer close(exited)
		runtime.LockOSThread() // Pdeathsig is about the thread that forked
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed: the status says nothing
		}
	}()
	if err := <-started; err != nil {
		d.t.Fatal(err)
	}
	d.cmd, d.exited, d.domains = cmd, exited, make(map[hypercall.DomID]bool)
	for deadline := time.Now().Add(2 * time.Minute); ; {
		conn, err := net.Dial("unix", d.Socket())
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-exited:
			d.t.Fatalf("xenstored ended: %s", d.log)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("xenstored does not listen: %v", err)
		}
	}
}

// Dial connects as a domain. Domain 0 may have any number of connections, at the
// socket; another has one, its ring, and is introduced and given a home of its own,
// /local/domain/<n>, the first time. What an earlier connection of it left is reset.
func (d *Daemon) Dial(ctx context.Context, dom hypercall.DomID) (io.ReadWriteCloser, error) {
	socket, err := d.dialSocket(ctx)
	if err != nil || dom == 0 {
		return socket, err
	}
	defer socket.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	known := d.domains[dom]
	if !known {
		if err := os.WriteFile(d.ringFile(dom), make([]byte, 4096), 0o600); err != nil {
			return nil, err
		}
		home := fmt.Sprintf("/local/domain/%d", dom)
		for _, m := range []struct {
			op      wire.Op
			payload string
		}{
			{wire.Introduce, fmt.Sprintf("%d\x001\x00%d\x00", dom, port(dom))},
			{wire.Mkdir, home + "\x00"},
			{wire.SetPerms, home + "\x00n" + fmt.Sprint(dom) + "\x00"},
		} {
			if err := call(socket, m.op, m.payload); err != nil {
				return nil, err
			}
		}
		d.domains[dom] = true
	}
	ring, err := d.openRing(dom)
	if err != nil {
		return nil, err
	}
	if known {
		if err := call(ring, wire.ResetWatches, "\x00"); err != nil {
			ring.Close()
			return nil, err
		}
	}
	return ring, nil
}

// dialSocket tries again while the daemon, which lets one caller wait, is busy.
func (d *Daemon) dialSocket(ctx context.Context) (net.Conn, error) {
	for {
		var dialer net.Dialer
		conn, err := dialer.DialContext(ctx, "unix", d.Socket())
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// call sends a message and waits for its answer, past whatever else comes.
func call(conn io.ReadWriter, op wire.Op, payload string) error {
	const id = 1<<32 - 1
	msg, err := wire.Append(nil, wire.Header{Op: op, ReqID: id}, payload)
	if err != nil {
		return err
	}
	if _, err := conn.Write(msg); err != nil {
		return err
	}
	for buf := make([]byte, wire.HeaderSize+wire.MaxPayload); ; {
		h, reply, err := wire.ReadMessage(conn, buf)
		switch {
		case err != nil:
			return err
		case h.ReqID == id && h.Op == wire.Error:
			return fmt.Errorf("request %d %q: %s", op, payload, reply)
		case h.ReqID == id && h.Op == op:
			return nil
		}
	}
}

// Destroy makes a domain vanish, as the toolstack does at the end of one.
func (d *Daemon) Destroy(dom hypercall.DomID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.domains[dom] {
		return errors.New("no such domain")
	}
	delete(d.domains, dom)
	socket, err := d.dialSocket(context.Background())
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := os.Remove(d.ringFile(dom)); err != nil {
		return err
	}
	if err := call(socket, wire.Rm, fmt.Sprintf("/local/domain/%d\x00", dom)); err != nil {
		return err
	}
	return call(socket, wire.Release, fmt.Sprintf("%d\x00", dom))
}

func (d *Daemon) ringFile(dom hypercall.DomID) string {
	return filepath.Join(d.dir, fmt.Sprintf("ring.%d", dom))
}

// port is the event channel between a domain and the daemon. Port 1 is domain 0's.
func port(dom hypercall.DomID) uint32 { return uint32(dom) + 1 }

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}
