//go:build linux

package xendev

import (
	"errors"
	"os"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/domaintest"
)

// fakeGrants stands for Linux's gntalloc driver: each file has pages, which a memfd holds.
type fakeGrants struct {
	t *testing.T

	mu    sync.Mutex
	files map[uint64]int // guarded by mu; by inode: pages that are granted
	next  hypercall.GrantRef
}

func inode(f interface{ Stat() (os.FileInfo, error) }) (ino uint64, mode uint32) {
	var st unix.Stat_t
	raw, err := f.(*os.File).SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
	}
	if err != nil {
		return 0, 0
	}
	return st.Ino, st.Mode
}

func (g *fakeGrants) open(Config) (*os.File, error) {
	fd, err := unix.MemfdCreate("gntalloc", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "gntalloc")
	ino, _ := inode(f)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.files[ino] = 0
	return f, nil
}

func (g *fakeGrants) check(_ Config, f *os.File) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if ino, _ := inode(f); ino == 0 || g.files[ino] == 0 {
		return errors.New("no file of gntalloc")
	}
	return nil
}

func (g *fakeGrants) alloc(fd int, _ hypercall.DomID, _ uint16, pages int) (uint64, []hypercall.GrantRef, error) {
	if err := unix.Ftruncate(fd, int64(pages)*shm.PageSize); err != nil {
		return 0, nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.files[st.Ino] = pages
	var refs []hypercall.GrantRef
	for range pages {
		g.next += 3
		refs = append(refs, g.next)
	}
	return 0, refs, nil
}

func (g *fakeGrants) dealloc(fd int, index uint64, pages int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.files[st.Ino] != pages || index != 0 {
		g.t.Errorf("%d pages of %d are given back", pages, g.files[st.Ino])
		return unix.EINVAL
	}
	delete(g.files, st.Ino)
	return nil
}

// check refuses what the fake has not opened.
func (k *fakeKernel) check(_ Config, f *os.File) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if ino, mode := inode(f); mode&unix.S_IFMT != unix.S_IFSOCK || k.files[ino] == nil {
		return errors.New("no file of evtchn")
	}
	return nil
}

// Two domains on one fake kernel stand for two processes of a domain.
func TestHandover(t *testing.T) {
	domaintest.RunHandover(t, func(tb testing.TB) domaintest.Trio {
		t := tb.(*testing.T)
		k, old := newFakeKernel(t)
		g := &fakeGrants{t: t, files: make(map[uint64]int), next: 8}
		next, peer := newDomain(Config{}, 3), newDomain(Config{}, 4)
		for _, d := range []*Domain{old, next, peer} {
			d.evtchn, d.gntalloc = k, g
		}
		t.Cleanup(func() {
			for _, d := range []*Domain{old, next, peer} {
				if n := d.held.Load(); n != 0 || len(d.shares) > 0 || len(d.offered) > 0 || len(d.life.waiters) > 0 {
					t.Errorf("%d pages, %d files, %d offers and %d waiters are left", n, len(d.shares), len(d.offered), len(d.life.waiters))
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
			for ino, pages := range g.files {
				if pages > 0 {
					t.Errorf("%d pages of file %d are granted", pages, ino)
				}
			}
			k.mu.Lock()
			k.reap()
			k.mu.Unlock()
			if n := len(k.ports); n > 5 {
				t.Errorf("%d ports are open", n-5)
			}
			k.requireNoBug()
		})
		return domaintest.Trio{Old: old, New: next, Peer: peer, NoMap: true, Stray: os.Stderr}
	})
}

func TestRefsArePacked(t *testing.T) {
	for _, refs := range [][]hypercall.GrantRef{{8}, {8, 9, 10}, {1<<32 - 1, 8, 77}} {
		got, err := parseRefs(putRefs(refs))
		if err != nil || !slices.Equal(got, refs) {
			t.Errorf("%v: %v, %v", refs, got, err)
		}
	}
	for name, b := range map[string][]byte{
		"reserved":  putRefs([]hypercall.GrantRef{7}),
		"negative":  {1},
		"too large": append(putRefs([]hypercall.GrantRef{1<<32 - 1}), 2),
		"cut":       {0x80},
		"endless":   slices.Repeat([]byte{0xff}, 20),
		"too many":  slices.Repeat([]byte{20}, maxPages+1),
	} {
		if refs, err := parseRefs(b); err == nil {
			t.Errorf("%s: %d refs", name, len(refs))
		}
	}
}

// A resume of the domain before the offer is noticed: its ports are dead.
func TestDeadPortsAreNotOffered(t *testing.T) {
	k, d := newFakeKernel(t)
	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Unbound(1); err != nil {
		t.Fatal(err)
	}
	k.resume(9)
	if o, err := d.Offer(nil, []hypercall.Waiter{w}); !errors.Is(err, errResumed) {
		if err == nil {
			o.Withdraw()
		}
		t.Errorf("offered: %v", err)
	}
	if len(d.offered) > 0 {
		t.Error("the waiter counts as offered")
	}
}
