//go:build linux

package store_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/store"
	"barevif/xenbus/wire"
)

// debian is where Debian's xenstored and xenstore clients are unpacked.
type debian struct {
	root string
}

var unpacked = sync.OnceValues(func() (debian, error) {
	cache := os.Getenv("BAREVIF_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return debian{}, err
		}
		cache = filepath.Join(dir, "barevif")
	}
	root := filepath.Join(cache, "xenstore-4.17-"+runtime.GOARCH)
	if _, err := os.Stat(root); err == nil {
		return debian{root}, nil
	}
	for _, tool := range []string{"apt-get", "dpkg"} {
		if _, err := exec.LookPath(tool); err != nil {
			return debian{}, err
		}
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return debian{}, err
	}
	tmp, err := os.MkdirTemp(cache, "unpack")
	if err != nil {
		return debian{}, err
	}
	defer os.RemoveAll(tmp)
	get := exec.Command("apt-get", "download", "xenstore-utils", "xen-utils-4.17", "libxenstore4",
		"libxentoolcore1", "libxentoollog1", "libxenevtchn1", "libxengnttab1", "libxencall1",
		"libxenforeignmemory1", "libxendevicemodel1", "libxenmisc4.17")
	get.Dir = tmp
	if out, err := get.CombinedOutput(); err != nil {
		return debian{}, fmt.Errorf("packages of xenstore 4.17: %v: %s", err, lastLine(out))
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	files := filepath.Join(tmp, "root")
	for _, deb := range debs {
		if out, err := exec.Command("dpkg", "-x", deb, files).CombinedOutput(); err != nil {
			return debian{}, fmt.Errorf("unpack %s: %v: %s", filepath.Base(deb), err, lastLine(out))
		}
	}
	// Another test may have been faster; what it has is as good.
	if err := os.Rename(files, root); err != nil && !errors.Is(err, os.ErrExist) {
		return debian{}, err
	}
	return debian{root}, nil
})

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

func needDebian(t testing.TB) debian {
	t.Helper()
	d, err := unpacked()
	if err != nil {
		t.Skip("no xenstore of Debian: ", err)
	}
	return d
}

func (d debian) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(d.root, name), args...)
	libs, _ := filepath.Glob(filepath.Join(d.root, "usr/lib/*-linux-gnu"))
	cmd.Env = []string{"LD_LIBRARY_PATH=" + strings.Join(libs, ":"), "PATH=/nowhere"}
	return cmd
}

// xenstored is the rig of the real daemon. testdata/fakexen.c makes it believe in a
// hypervisor.
type xenstored struct {
	t    testing.TB
	dir  string
	fake string
	fifo *os.File // doorbells of all guests
}

func startXenstored(t testing.TB, args ...string) *xenstored {
	d := needDebian(t)
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no C compiler for the library that stands in for Xen: ", err)
	}
	dir, err := os.MkdirTemp("", "xs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	x := &xenstored{t: t, dir: dir, fake: filepath.Join(dir, "fake")}
	if err := os.Mkdir(x.fake, 0o700); err != nil {
		t.Fatal(err)
	}
	shim := filepath.Join(dir, "fakexen.so")
	if out, err := exec.Command(gcc, "-shared", "-fPIC", "-w", "-o", shim, "testdata/fakexen.c").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd := d.command("usr/lib/xen-4.17/bin/xenstored", append(args, "-N")...)
	cmd.Env = append(cmd.Env, "LD_PRELOAD="+shim, "FAKE_DIR="+x.fake, "XENSTORED_RUNDIR="+dir,
		"XENSTORED_ROOTDIR="+dir, "XENSTORED_PATH="+x.socket())
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	t.Cleanup(func() { cmd.Process.Kill(); <-exited })
	ready := func() bool {
		c, err := net.Dial("unix", x.socket())
		if err == nil {
			c.Close()
		}
		_, ferr := os.Stat(filepath.Join(x.fake, "evtchn0"))
		return err == nil && ferr == nil
	}
	for deadline := time.Now().Add(patience); !ready(); time.Sleep(time.Millisecond) {
		select {
		case <-exited:
			t.Fatalf("xenstored: %v %s", cmd.ProcessState, log.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("xenstored does not listen: %s", log.String())
		}
	}
	x.fifo, err = os.OpenFile(filepath.Join(x.fake, "evtchn0"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.fifo.Close() })
	return x
}

func (x *xenstored) socket() string { return filepath.Join(x.dir, "socket") }

func (x *xenstored) dom0() *raw {
	// It listens with a backlog of 1, over which Linux says EAGAIN.
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		conn, err := net.Dial("unix", x.socket())
		if err == nil {
			return newRaw(x.t, conn)
		}
		if !errors.Is(err, syscall.EAGAIN) || time.Now().After(deadline) {
			x.t.Fatal(err)
		}
	}
}

func (x *xenstored) guest(id hypercall.DomID) *raw {
	ring, err := os.Create(filepath.Join(x.fake, fmt.Sprintf("ring.dom%d", id)))
	if err != nil {
		x.t.Fatal(err)
	}
	if err := ring.Truncate(4096); err != nil {
		x.t.Fatal(err)
	}
	home := fmt.Sprintf("/local/domain/%d", id)
	c := x.dom0()
	c.want(wire.Introduce, 0, z(strconv.Itoa(int(id)), "1", strconv.Itoa(int(id))), ok)
	c.want(wire.Mkdir, 0, z(home), ok)
	c.want(wire.SetPerms, 0, z(home, fmt.Sprintf("n%d", id)), ok)
	c.conn.Close()
	bell, err := os.OpenFile(filepath.Join(x.fake, fmt.Sprintf("to_dom_port%d", id)), os.O_RDWR, 0)
	if err != nil {
		x.t.Fatal(err)
	}
	return newRaw(x.t, &ringConn{ring: ring, bell: bell, out: x.fifo, port: uint32(id)})
}

// ringConn is the domain's side of a xenstore ring page
// (docs/misc/xenstore-ring.txt), reached as a file.
type ringConn struct {
	ring *os.File
	bell *os.File // a byte for every notification
	out  *os.File
	port uint32
}

const ringSize = 1024

func (r *ringConn) word(at int64) uint32 {
	var b [4]byte
	r.ring.ReadAt(b[:], at)
	return binary.LittleEndian.Uint32(b[:])
}

func (r *ringConn) advance(at int64, index uint32) error {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], index)
	if _, err := r.ring.WriteAt(b[:], at); err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(b[:], r.port)
	_, err := r.out.Write(b[:])
	return err
}

func (r *ringConn) waitBell() error {
	r.bell.SetReadDeadline(time.Now().Add(patience))
	var b [64]byte
	_, err := r.bell.Read(b[:])
	return err
}

func (r *ringConn) Write(p []byte) (n int, err error) {
	for n < len(p) {
		cons, prod := r.word(2048), r.word(2052)
		room := ringSize - (prod - cons)
		if room == 0 {
			if err := r.waitBell(); err != nil {
				return n, err
			}
			continue
		}
		chunk := p[n:min(len(p), n+int(min(room, ringSize-prod%ringSize)))]
		if _, err := r.ring.WriteAt(chunk, int64(prod%ringSize)); err != nil {
			return n, err
		}
		n += len(chunk)
		if err := r.advance(2052, prod+uint32(len(chunk))); err != nil {
			return n, err
		}
	}
	return n, nil
}

func (r *ringConn) Read(p []byte) (int, error) {
	for {
		cons, prod := r.word(2056), r.word(2060)
		if cons == prod {
			if err := r.waitBell(); err != nil {
				return 0, err
			}
			continue
		}
		chunk := p[:min(len(p), int(min(prod-cons, ringSize-cons%ringSize)))]
		if _, err := r.ring.ReadAt(chunk, ringSize+int64(cons%ringSize)); err != nil {
			return 0, err
		}
		return len(chunk), r.advance(2056, cons+uint32(len(chunk)))
	}
}

func (r *ringConn) Close() error {
	r.ring.Close()
	return r.bell.Close()
}

var _ io.ReadWriteCloser = (*ringConn)(nil)

// TestRowsHoldForDebiansXenstored keeps the conformance table honest.
func TestRowsHoldForDebiansXenstored(t *testing.T) {
	for _, row := range conformance {
		t.Run(row.name, func(t *testing.T) { row.run(t, startXenstored(t)) })
	}
}

// A twin does the same to both daemons.
type twin struct{ ours, theirs *raw }

func (w twin) do(op wire.Op, tx uint32, payload string) (ours, theirs string) {
	return w.ours.do(op, tx, payload), w.theirs.do(op, tx, payload)
}

// TestRandomScriptsAnswerLikeXenstored runs the same requests against both daemons:
// every reply and every event has to be the same. Small quotas are met often.
func TestRandomScriptsAnswerLikeXenstored(t *testing.T) {
	needDebian(t)
	scripts := uint64(4)
	if s := os.Getenv("BAREVIF_SCRIPTS"); s != "" {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		scripts = n
	}
	for seed := range scripts {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { runScript(t, seed, 1000) })
	}
}

func runScript(t *testing.T, seed uint64, steps int) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	ours := newEmbedded(t, store.Config{Quota: store.Quota{Nodes: 25, NodeSize: 400, Watches: 4, Transactions: 3}})
	theirs := startXenstored(t, "--entry-nb", "25", "--entry-size", "400", "--watch-nb", "4", "--transaction", "3")
	guest := func(id hypercall.DomID) twin { return twin{ours.guest(id), theirs.guest(id)} }
	clients := []twin{{ours.dom0(), theirs.dom0()}, {ours.dom0(), theirs.dom0()}, guest(3), guest(4)}
	txs := make([][]uint32, len(clients))

	pick := func(from ...string) string { return from[rnd.IntN(len(from))] }
	path := func() string {
		p := pick("", "", "/", "/local/domain/3/", "/local/domain/4/", "/local/domain/0/")
		for range 1 + rnd.IntN(3) {
			p += pick("a", "b", "long-name-of-a-node") + "/"
		}
		if rnd.IntN(30) == 0 {
			return pick("/", "", "/local", "/local/domain", "/local/domain/3", "/a//b", p)
		}
		return strings.TrimSuffix(p, "/")
	}
	for step := range steps {
		who := rnd.IntN(len(clients))
		c := clients[who]
		var tx uint32
		if n := len(txs[who]); n > 0 && rnd.IntN(2) == 0 {
			tx = txs[who][rnd.IntN(n)]
		}
		var op wire.Op
		payload := z(path())
		switch k := rnd.IntN(100); {
		case k < 30:
			op, payload = wire.Write, payload+strings.Repeat("v", rnd.IntN(20)*rnd.IntN(20))
		case k < 40:
			op = wire.Mkdir
		case k < 48:
			op = wire.Rm
		case k < 56:
			op = wire.Read
		case k < 62:
			op = wire.Directory
		case k < 66:
			op = wire.GetPerms
		case k < 76:
			op = wire.SetPerms
			if payload == z("/") {
				continue // xenstored loses all nodes if the owner of / dies
			}
			for range 1 + rnd.IntN(4) {
				payload += z(pick("n", "r", "w", "b") + pick("0", "3", "3", "4", "4", "9"))
			}
		case k < 81:
			op, payload = wire.Watch, payload+z(pick("t", "u"))
		case k < 83:
			op, payload = wire.Unwatch, payload+z(pick("t", "u"))
		case k < 90:
			op = wire.TransactionStart
			tx = uint32(rnd.IntN(30) / 29 * 77)
		case k < 98:
			op, payload = wire.TransactionEnd, z(pick("T", "T", "T", "F"))
		case k < 99:
			op, payload = wire.Watch, z(pick("@introduceDomain", "@releaseDomain"), "s")
		default:
			// Xenstored would let a transaction begun in its life make the new
			// domain owner of a node.
			for i, c := range clients {
				for _, tx := range txs[i] {
					c.do(wire.TransactionEnd, tx, z("F"))
				}
				txs[i] = nil
			}
			i := 2 + rnd.IntN(2)
			id := hypercall.DomID(i + 1)
			clients[0].do(wire.Release, 0, z(fmt.Sprint(id)))
			// It takes permissions on the node last written before a domain came
			// for the domain's own.
			clients[0].do(wire.Write, 0, z("/tool/bump"))
			clients[i] = guest(id)
			for _, c := range clients {
				// How many merge, and in which order a domain's nodes go, is chance.
				c.ours.heard()
				c.theirs.heard()
			}
			continue
		}
		got, want := c.do(op, tx, payload)
		if op == wire.Rm && tx != 0 && got == ok && (want == "EIO" || want == "EINVAL") {
			// The transaction sees a parent older than its children, or the
			// other way round. Xenstored has removed half of them; neither
			// will let it be committed.
			if got := c.ours.do(wire.TransactionEnd, tx, z("T")); got != "EAGAIN" {
				t.Fatalf("step %d: doomed transaction: %s", step, short(got))
			}
			if want := c.theirs.do(wire.TransactionEnd, tx, z("T")); want != "EAGAIN" {
				t.Fatalf("step %d: doomed transaction of xenstored: %s", step, short(want))
			}
			op, got, want = wire.TransactionEnd, ok, ok
		}
		if got != want {
			t.Fatalf("step %d: client %d op %d tx %d %s: got %s, want %s", step, who, op, tx, short(payload), short(got), short(want))
		}
		switch {
		case op == wire.TransactionStart && strings.HasSuffix(got, "\x00"):
			txs[who] = append(txs[who], atou(t, got))
		case op == wire.TransactionEnd:
			txs[who] = slices.DeleteFunc(txs[who], func(id uint32) bool { return id == tx })
		}
		for i, c := range clients {
			if got, want := c.ours.heard(), c.theirs.heard(); !slices.Equal(got, want) {
				t.Fatalf("step %d: after client %d op %d tx %d %s: client %d hears %q, want %q",
					step, who, op, tx, short(payload), i, got, want)
			}
		}
	}
}
