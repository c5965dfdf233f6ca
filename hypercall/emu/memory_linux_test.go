package emu

import (
	"errors"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/emu/emutest"
)

func TestOnlySealedMemoryOfTheRightSizeIsMapped(t *testing.T) {
	ordinary, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer ordinary.Close()
	if err := ordinary.Truncate(shm.PageSize); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	memfd := func(size int64, seals int) *os.File {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "test")
		t.Cleanup(func() { f.Close() })
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		return f
	}
	for _, c := range []struct {
		name string
		f    *os.File
		good bool
	}{
		{"an ordinary file", ordinary, false},
		{"a pipe", r, false},
		{"an unsealed memfd", memfd(shm.PageSize, 0), false},
		{"a memfd that can grow", memfd(shm.PageSize, unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL), false},
		{"a memfd that can shrink", memfd(shm.PageSize, unix.F_SEAL_GROW|unix.F_SEAL_SEAL), false},
		{"a smaller memfd", memfd(shm.PageSize-1, seals), false},
		{"a larger memfd", memfd(2*shm.PageSize, seals), false},
		{"ours", memfd(shm.PageSize, seals), true},
	} {
		fd, err := fdOf(c.f)
		if err != nil {
			t.Fatal(err)
		}
		p := packet{fds: []int{fd}}
		b, err := p.takeMemory(shm.PageSize)
		if (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil {
			b.close()
		} else if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
			t.Errorf("%s: the refused descriptor stayed open", c.name)
		}
	}
	if _, err := new(packet).takeMemory(shm.PageSize); err == nil {
		t.Error("memory without a descriptor")
	}
}

func TestSharedMemoryCannotChangeItsSize(t *testing.T) {
	b, err := newFileBacking(2 * shm.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	for _, size := range []int64{0, shm.PageSize, 3 * shm.PageSize} {
		if err := b.file.Truncate(size); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncated to %d: %v", size, err)
		}
	}
}

func TestReadOnlyDescriptorCannotBeMappedWritable(t *testing.T) {
	b, err := newFileBacking(shm.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	fd, err := readOnly(b.file)
	if err != nil {
		t.Fatal(err)
	}
	ro := &fileBacking{os.NewFile(uintptr(fd), "ro")}
	defer ro.close()
	if err := checkMemory(fd, shm.PageSize); err != nil {
		t.Error("it is refused:", err)
	}
	if _, err := ro.view(0, 1, hypercall.ReadWrite); !errors.Is(err, unix.EACCES) {
		t.Errorf("mapped writable: %v", err)
	}
	r, err := ro.view(0, 1, hypercall.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer r.free()
	if err := unix.Mprotect(r.Bytes(), unix.PROT_READ|unix.PROT_WRITE); !errors.Is(err, unix.EACCES) {
		t.Errorf("made writable: %v", err)
	}
}

func TestHostHandsReadOnlyGrantsOutReadOnly(t *testing.T) {
	path := filepath.Join(emutest.SocketDir(t), "xen")
	h, err := Listen(path, Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	d, err := Join(t.Context(), path, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, access := range []hypercall.Access{hypercall.ReadOnly, hypercall.ReadWrite} {
		s, err := d.Share(1, 1, access)
		if err != nil {
			t.Fatal(err)
		}
		_, b, err := d.hv().attach(1, s.Refs[0])
		if err != nil {
			t.Fatal(err)
		}
		r, err := b.view(0, 1, hypercall.ReadWrite)
		if err == nil {
			r.free()
		}
		if (err == nil) != (access == hypercall.ReadWrite) {
			t.Errorf("a %v grant mapped writable: %v", access, err)
		}
		b.close()
	}
	// And its grant table.
	if err := unix.Mprotect(d.hv().(*remote).regions[0].Bytes(), unix.PROT_READ|unix.PROT_WRITE); !errors.Is(err, unix.EACCES) {
		t.Errorf("the grant tables can be made writable: %v", err)
	}
}

func TestWritingAReadOnlyMappingFaults(t *testing.T) {
	m, err := New(Config{Mapped: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	a, err := m.NewDomain(1)
	if err != nil {
		t.Fatal(err)
	}
	s, err := a.Share(1, 1, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.Map(1, s.Refs, hypercall.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no fault")
			}
		}()
		p.Bytes()[0] = 1
	}()
	if s.Bytes()[0] != 0 {
		t.Error("written")
	}
	if err := p.Release(); err != nil {
		t.Error(err)
	}
	if err := s.End(); err != nil {
		t.Error(err)
	}
}

// Pages that a domain has copied from are unmapped some time after their grant has ended.
func TestEndedSharesAreLetGoOf(t *testing.T) {
	m, err := New(Config{Mapped: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	a, err := m.NewDomain(1)
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.NewDomain(2)
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		s, err := a.Share(2, 2, hypercall.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		ops := []hypercall.CopyOp{{
			Src: hypercall.Area{Dom: 1, Ref: s.Refs[1]}, Dst: hypercall.Area{Local: make([]byte, 1)}, Len: 1,
		}}
		if err := b.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
			t.Fatal(err, ops[0].Status)
		}
		if err := s.End(); err != nil {
			t.Fatal(err)
		}
		b.mu.Lock()
		n := len((*b.views.Load())[1].attached)
		b.mu.Unlock()
		if n > 1 {
			t.Fatalf("%d shares attached", n)
		}
	}
	a.Destroy()
	if _, err := m.NewDomain(1); err != nil {
		t.Fatal(err)
	}
	ops := []hypercall.CopyOp{{
		Src: hypercall.Area{Dom: 1, Ref: 8}, Dst: hypercall.Area{Local: make([]byte, 1)}, Len: 1,
	}}
	if err := b.Copy(ops); err != nil || ops[0].Status == hypercall.OK {
		t.Fatal(err, ops[0].Status)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len((*b.views.Load())[1].attached); n != 0 {
		t.Errorf("%d shares of a dead domain attached", n)
	}
}
