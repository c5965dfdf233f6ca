//go:build linux

package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/telemetry"
	"barevif/telemetry/bpf/bpftest"
)

// as returns a command that runs another one as an unprivileged user with some
// capabilities.
func as(t *testing.T, uid int, caps ...string) []string {
	setpriv := bpftest.Tool(t, "setpriv")
	id := fmt.Sprint(uid)
	cmd := []string{setpriv, "--reuid", id, "--regid", id, "--clear-groups", "--no-new-privs"}
	if len(caps) == 0 {
		return append(cmd, "--bounding-set=-all", "--inh-caps=-all")
	}
	list := "+" + strings.Join(caps, ",+")
	return append(cmd, "--inh-caps=-all,"+list, "--ambient-caps=-all,"+list)
}

// ownDir makes a directory of the BPF file system that belongs to uid.
func ownDir(t *testing.T, uid int) string {
	t.Helper()
	dir := filepath.Join("/sys/fs/bpf", "test_"+strings.NewReplacer("/", "_", ".", "_", "+", "_").Replace(t.Name()))
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, uid, uid)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A process that lacks something gets the next lesser mirror, and its Reason names what
// is missing.
func TestStoreDoesWithWhatItIsAllowed(t *testing.T) {
	const uid = 4321
	for _, c := range []struct {
		name   string
		plan   func(t *testing.T, p *plan) (front []string)
		kind   string
		reason string
	}{
		{"everything", func(t *testing.T, _ *plan) []string {
			bpftest.NeedIterator(t)
			return nil
		}, KindIterator, ""},
		{"CAP_BPF and CAP_PERFMON", func(t *testing.T, p *plan) []string {
			bpftest.NeedIterator(t)
			p.Store.Root = ownDir(t, uid)
			return as(t, uid, "bpf", "perfmon")
		}, KindIterator, ""},
		{"no CAP_PERFMON", func(t *testing.T, p *plan) []string {
			p.Store.Root = ownDir(t, uid)
			return as(t, uid, "bpf")
		}, KindPins, "CAP_PERFMON is missing"},
		{"no BPF file system", func(t *testing.T, p *plan) []string {
			p.Store.Root = filepath.Join(t.TempDir(), "pins")
			return nil
		}, KindMaps, "no BPF file system is mounted at "},
		{"no directory of its own", func(t *testing.T, p *plan) []string {
			return as(t, uid, "bpf", "perfmon")
		}, KindMaps, "permission denied"},
		{"no capability", func(t *testing.T, p *plan) []string {
			return as(t, uid)
		}, KindMemfd, "CAP_BPF is missing"},
		{"seccomp refuses bpf", func(t *testing.T, p *plan) []string {
			p.Deny = []uint32{unix.SYS_BPF}
			return nil
		}, KindMemfd, "CAP_BPF is there; "},
		{"seccomp refuses the program", func(t *testing.T, p *plan) []string {
			p.DenyBPF = []uint32{unix.BPF_PROG_LOAD}
			return nil
		}, KindPins, "CAP_PERFMON is there; "},
		{"seccomp refuses bpf and memfd", func(t *testing.T, p *plan) []string {
			p.Deny = []uint32{unix.SYS_BPF, unix.SYS_MEMFD_CREATE}
			return nil
		}, "heap", "memfd: operation not permitted"},
		{"seccomp refuses flock", func(t *testing.T, p *plan) []string {
			p.Deny = []uint32{unix.SYS_FLOCK}
			return nil
		}, KindMaps, "lock "},
		{"seccomp refuses bpf and room for a memfd", func(t *testing.T, p *plan) []string {
			p.Deny = []uint32{unix.SYS_FTRUNCATE, unix.SYS_BPF}
			return nil
		}, "heap", "memfd: truncate"},
		{"seccomp refuses rename", func(t *testing.T, p *plan) []string {
			p.Deny = []uint32{unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2}
			return nil
		}, KindMaps, "pin "},
		{"no room for a directory", func(t *testing.T, p *plan) []string {
			p.Deny, p.Errno = []uint32{unix.SYS_MKDIRAT}, unix.ENOSPC
			return nil
		}, KindMaps, "no space left on device"},
		{"no room for a pin", func(t *testing.T, p *plan) []string {
			p.DenyBPF, p.Errno = []uint32{unix.BPF_OBJ_PIN}, unix.ENOSPC
			return nil
		}, KindMaps, "pin /sys/fs/bpf/barevif/"},
		{"no room for the name of a pin", func(t *testing.T, p *plan) []string {
			p.Deny, p.Errno = []uint32{unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2}, unix.ENOSPC
			return nil
		}, KindMaps, "no space left on device"},
		{"no memory for a map", func(t *testing.T, p *plan) []string {
			p.DenyBPF, p.Errno = []uint32{unix.BPF_MAP_CREATE}, unix.ENOMEM
			return nil
		}, KindMemfd, "no memory for one"},
		{"no memory for a map, nor for a memfd", func(t *testing.T, p *plan) []string {
			p.Deny, p.DenyBPF, p.Errno = []uint32{unix.SYS_FTRUNCATE}, []uint32{unix.BPF_MAP_CREATE}, unix.ENOSPC
			return nil
		}, "heap", "no space left on device"},
		{"no memory for the names", func(t *testing.T, p *plan) []string {
			p.DenyBPF, p.Errno = []uint32{unix.BPF_BTF_LOAD}, unix.ENOMEM
			return nil
		}, KindMemfd, "cannot allocate memory"},
		{"no memory for the program", func(t *testing.T, p *plan) []string {
			p.DenyBPF, p.Errno = []uint32{unix.BPF_PROG_LOAD}, unix.ENOMEM
			return nil
		}, KindPins, "cannot allocate memory"},
		{"no memory for the metrics", func(t *testing.T, p *plan) []string {
			bpftest.NeedIterator(t)
			p.DenyBPF, p.Errno = []uint32{unix.BPF_LINK_CREATE}, unix.ENOMEM
			return nil
		}, KindPins, "cannot allocate memory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bpftest.Need(t)
			p := plan{Info: device(t), Packets: 99}
			front := c.plan(t, &p)
			o := start(t, p, front...)
			t.Logf("%s: %q", o.Kind, o.Reason)
			if o.Kind != c.kind || !strings.Contains(o.Reason, c.reason) || (c.reason == "") != (o.Reason == "") {
				t.Fatalf("mirrored to %s (%s), want %s (...%s...)", o.Kind, o.Reason, c.kind, c.reason)
			}
			if o.Kind == KindMaps || o.Kind == "heap" {
				for _, root := range []string{DefaultRoot, p.Store.Root} {
					if _, err := os.Stat(filepath.Join(root, p.Info.Name())); !os.IsNotExist(err) {
						t.Errorf("something is left in %s: %v", root, err)
					}
				}
			}
			if o.Kind != "heap" && o.Kind != KindPins && p.Store.Root == "" {
				rep, err := reader(t, p.Info.Name()).Read()
				if err != nil {
					t.Fatal(err)
				}
				if rep.Stats.RX.Get(telemetry.Packets) != 99 || rep.Kind != o.Kind || !strings.HasPrefix(o.Reason, rep.Reason) {
					t.Errorf("a reader finds %d packets in %s (%s)", rep.Stats.RX.Get(telemetry.Packets), rep.Kind, rep.Reason)
				}
			}
			o.End(t)
		})
	}
}

// A directory that is unusable for pins costs the pins, not the maps.
func TestUnusableDirectoryIsRefused(t *testing.T) {
	bpftest.Need(t)
	base := ownDir(t, 0)
	for _, c := range []struct {
		name, reason string
		root         func(t *testing.T, name string) string
	}{
		{"relative", "not an absolute path", func(*testing.T, string) string { return "sys/fs/bpf/x" }},
		{"dots", "no dots", func(*testing.T, string) string { return base + "/bare.vif" }},
		{"too long", "file name too long", func(*testing.T, string) string { return base + "/" + strings.Repeat("x", 256) }},
		{"missing parent", "no such file", func(*testing.T, string) string { return base + "/a/b/c" }},
		{"not a BPF file system", "no BPF file system", func(t *testing.T, _ string) string { return t.TempDir() + "/x" }},
		{"root of somebody else", "belongs to uid 99", func(t *testing.T, _ string) string {
			return mkdir(t, base+"/foreign", 0o755, 99)
		}},
		{"root others may write", "others may write", func(t *testing.T, _ string) string {
			return mkdir(t, base+"/open", 0o777, 0)
		}},
		{"root is a link", "is not a directory", func(t *testing.T, _ string) string {
			if err := os.Symlink("/sys/fs/bpf", base+"/link"); err != nil {
				t.Fatal(err)
			}
			return base + "/link"
		}},
		{"directory of somebody else", "belongs to uid 99", func(t *testing.T, name string) string {
			root := mkdir(t, base+"/r1", 0o755, 0)
			mkdir(t, root+"/"+name, 0o755, 99)
			return root
		}},
		{"directory others may write", "others may write", func(t *testing.T, name string) string {
			root := mkdir(t, base+"/r2", 0o755, 0)
			mkdir(t, root+"/"+name, 0o775, 0)
			return root
		}},
		{"directory is a link", "not a directory", func(t *testing.T, name string) string {
			root := mkdir(t, base+"/r3", 0o755, 0)
			if err := os.Symlink(base, root+"/"+name); err != nil {
				t.Fatal(err)
			}
			return root
		}},
		{"a directory where a pin should be", "is a directory", func(t *testing.T, name string) string {
			root := mkdir(t, base+"/r4", 0o755, 0)
			mkdir(t, root+"/"+name, 0o755, 0)
			mkdir(t, root+"/"+name+"/counters-new", 0o755, 0)
			return root
		}},
		{"a directory where the last pin should be", "is a directory", func(t *testing.T, name string) string {
			root := mkdir(t, base+"/r6", 0o755, 0)
			mkdir(t, root+"/"+name, 0o755, 0)
			mkdir(t, root+"/"+name+"/fields-new", 0o755, 0)
			return root
		}},
		{"read-only", "read-only file system", func(t *testing.T, name string) string {
			root := mkdir(t, base+"/r5", 0o755, 0)
			if err := unix.Mount(root, root, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
			if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
			return root
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			info := device(t)
			s := &Store{Root: c.root(t, info.Name())}
			set := open(t, s, info, 1, KindMaps)
			_, reason := set.Backend()
			t.Log(reason)
			if !strings.Contains(reason, c.reason) {
				t.Errorf("the reason is %q, want ...%s...", reason, c.reason)
			}
			set.RX(0).Add(telemetry.Packets, 1)
			set.RX(0).Flush()
			if st := set.Snapshot(); st.RX.Get(telemetry.Packets) != 1 {
				t.Error("the counters do not count")
			}
			for _, pin := range pinNames {
				for _, suffix := range []string{"", fresh} {
					if st, err := os.Lstat(filepath.Join(s.Root, info.Name(), pin+suffix)); err == nil && !st.IsDir() {
						t.Errorf("%s%s is left", pin, suffix)
					}
				}
			}
		})
	}
}

func mkdir(t *testing.T, path string, mode os.FileMode, uid int) string {
	t.Helper()
	if err := errors.Join(os.Mkdir(path, 0o755), os.Chmod(path, mode), os.Chown(path, uid, uid)); err != nil {
		t.Fatal(err)
	}
	return path
}

// A directory that also holds foreign files is used, and these files stay.
func TestForeignFilesStay(t *testing.T) {
	bpftest.Need(t)
	root := ownDir(t, 0)
	info := device(t)
	dir := mkdir(t, filepath.Join(root, info.Name()), 0o755, 0)
	if err := os.Symlink("/etc/passwd", dir+"/mine"); err != nil {
		t.Fatal(err)
	}
	set := telemetry.NewSet(1)
	set.Open(&Store{Root: root}, info)
	if k, r := set.Backend(); k != withPins() {
		t.Fatal(k, r)
	}
	if err := set.Close(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != "mine" {
		t.Errorf("left is %v, %v", left, err)
	}
}

// Another process may remove the pins or replace them. The device goes on counting, and
// Close reports what it could not remove.
func TestPinsTakenAwayDoNotMatter(t *testing.T) {
	bpftest.Need(t)
	for _, c := range []struct {
		name string
		take func(t *testing.T, dir string)
		left []string
	}{
		{"all", func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"one", func(t *testing.T, dir string) {
			if err := os.Remove(dir + "/counters"); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"another map in its place", func(t *testing.T, dir string) {
			mp, err := array("bvf_test", queueBytes, 1, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer mp.Close()
			if err := errors.Join(os.Remove(dir+"/counters"), mp.Pin(dir+"/counters")); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"a directory in its place", func(t *testing.T, dir string) {
			if err := os.Remove(dir + "/counters"); err != nil {
				t.Fatal(err)
			}
			mkdir(t, dir+"/counters", 0o755, 0)
		}, []string{"counters"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := ownDir(t, 0)
			info := device(t)
			dir := filepath.Join(root, info.Name())
			set := telemetry.NewSet(1)
			set.Open(&Store{Root: root}, info)
			if k, r := set.Backend(); k != withPins() {
				t.Fatal(k, r)
			}
			c.take(t, dir)
			for range 3 {
				set.RX(0).Add(telemetry.Packets, 1)
				if n := set.RX(0).Refresh(); n != 0 {
					t.Errorf("%d words healed that nobody touched", n)
				}
				set.Tick()
			}
			if st := set.Snapshot(); st.RX.Get(telemetry.Packets) != 3 || len(set.Events()) != 0 {
				t.Errorf("%d packets, events %v", st.RX.Get(telemetry.Packets), set.Events())
			}
			if err := set.Close(); (err != nil) != (c.left != nil) {
				t.Errorf("Close: %v", err)
			}
			var left []string
			entries, _ := os.ReadDir(dir)
			for _, e := range entries {
				left = append(left, e.Name())
			}
			if !slices.Equal(left, c.left) {
				t.Errorf("left is %v", left)
			}
		})
	}
}

// No process can write to the memfd or resize it, not even root's.
func TestMemfdIsSealed(t *testing.T) {
	o := start(t, plan{Info: device(t), Packets: 12, Deny: []uint32{unix.SYS_BPF}})
	if o.Kind != KindMemfd {
		t.Fatalf("mirrored to %+v", o.ready)
	}
	src := source(t, device(t).Name())
	f, err := os.OpenFile(src.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, countersAt); !errors.Is(err, unix.EPERM) {
		t.Errorf("a write: %v", err)
	}
	for _, size := range []int64{0, 1 << 20} {
		if err := f.Truncate(size); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncate to %d: %v", size, err)
		}
	}
	if _, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
		t.Errorf("a writable mapping: %v", err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); !errors.Is(err, unix.EPERM) {
		t.Errorf("another seal: %v", err)
	}
	r := reader(t, device(t).Name())
	rep, err := r.Read()
	r.Close()
	if err != nil || rep.Stats.RX.Get(telemetry.Packets) != 12 || rep.PID != o.Cmd.Process.Pid {
		t.Errorf("%v, %+v", err, rep)
	}
	o.End(t)
	f.Close()
	all, err := List("")
	for _, s := range all {
		if s.Name == src.Name {
			t.Errorf("still listed after its owner ended: %+v (%v)", s, err)
		}
	}
}

// The same user reads a memfd without any privilege.
func TestMemfdNeedsNoRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	const uid = 4322
	info := device(t)
	o := start(t, plan{Info: info, Packets: 31}, as(t, uid)...)
	if o.Kind != KindMemfd {
		t.Fatalf("mirrored to %+v", o.ready)
	}
	out := start(t, plan{Info: info, Read: true}, as(t, uid)...)
	if out.Kind != KindMemfd || out.Reason != "31 packets" {
		t.Errorf("a reader of the same user finds %+v", out.ready)
	}
	other := start(t, plan{Info: info, Read: true}, as(t, uid+1)...)
	if other.Kind != "" {
		t.Errorf("another user finds %+v", other.ready)
	}
	o.End(t)
}

// A process that may read only the metrics gets the counters from the text.
func TestReaderWithoutRightsUsesTheText(t *testing.T) {
	bpftest.NeedIterator(t)
	info := device(t)
	set := open(t, &Store{Public: true}, info, 2, KindIterator)
	fill(set)
	st := set.Totals()
	out := start(t, plan{Info: info, Read: true}, as(t, 4323)...)
	if want := fmt.Sprintf("%d packets", st.RX.Get(telemetry.Packets)); out.Kind != KindMetrics || out.Reason != want {
		t.Errorf("found %+v, want %s", out.ready, want)
	}
	rep, err := readText(Source{Path: filepath.Join(DefaultRoot, info.Name())})
	if err != nil {
		t.Fatal(err)
	}
	for q := range st.Queues {
		for d, want := range []*telemetry.Values{&st.Queues[q].RX, &st.Queues[q].TX} {
			got := []*telemetry.Values{&rep.Stats.Queues[q].RX, &rep.Stats.Queues[q].TX}[d]
			if *got != *want {
				t.Errorf("queue %d %v read from the text differs", q, telemetry.Dir(d))
			}
		}
	}
}
