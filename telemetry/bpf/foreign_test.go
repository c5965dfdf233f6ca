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

// A text may name only queues and buckets that exist.
func TestTextNamesOnlyPlacesThatExist(t *testing.T) {
	const buckets = "barevif_rx_frame_size_bytes_bucket{vif=\"x\",queue=\"0\",le=\"1\"} 1\n"
	var field telemetry.Field
	for _, f := range telemetry.Fields() {
		if f.Metric(telemetry.RX) == "barevif_rx_frame_size_bytes" {
			field = f
		}
	}
	most := field.Words() - 1
	if most < 2 {
		t.Fatalf("%+v", field)
	}
	other := strings.ReplaceAll(buckets, `queue="0"`, `queue="1"`)
	for text, want := range map[string]int{ // queues, or -1 for an error
		"barevif_rx_packets_total{queue=\"0\"} 1\n":                 1,
		"barevif_rx_packets_total{queue=\"1023\"} 1\n":              maxQueues,
		"barevif_rx_packets_total{queue=\"1024\"} 1\n":              -1,
		"barevif_rx_packets_total{queue=\"-1\"} 1\n":                -1,
		"barevif_rx_packets_total{queue=\"\"} 1\n":                  -1,
		"barevif_rx_packets_total{queue=\"0\"} -1\n":                -1,
		"barevif_rx_packets_total 1\n":                              -1,
		"unknown_total{queue=\"7\"} 1\n":                            0,
		strings.Repeat(buckets, most):                               1,
		strings.Repeat(buckets, most+1):                             -1,
		strings.Repeat(buckets+other, most):                         2,
		strings.Repeat(buckets, most) + strings.Repeat(other, most): 2,
		buckets + strings.Replace(buckets, "} 1", "} 0", 1):         -1,
	} {
		queues, err := parseText(strings.NewReader(text + "# EOF\n"))
		if want < 0 && !errors.Is(err, ErrLayout) || want >= 0 && (err != nil || len(queues) != want) {
			t.Errorf("%.200q: %d queues, %v, want %d", text, len(queues), err, want)
		}
	}
	if _, err := parseText(strings.NewReader("barevif_rx_packets_total{queue=\"0\"} 1\n")); !errors.Is(err, ErrLayout) {
		t.Errorf("a text without its end: %v", err)
	}
	_, err := parseText(strings.NewReader("\x1b[2J\xff{queue=\"0\"} x\n# EOF\n"))
	if err == nil || strings.Contains(err.Error(), "\x1b") || strings.Contains(err.Error(), "\xff") || !strings.Contains(err.Error(), "?[2J") {
		t.Errorf("a line that moves the cursor: %q", err)
	}
}

// named makes a memfd of that name, as any process can.
func named(t *testing.T, name string, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(believable(func(*infoRecord) {})); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return f
}

func listed(t *testing.T, name string) (out []Source) {
	t.Helper()
	all, err := List(filepath.Join(t.TempDir(), "none"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Name == name {
			out = append(out, s)
		}
	}
	return out
}

func TestNamesOfMemfdsAreCleaned(t *testing.T) {
	named(t, memfdPrefix+"x\x1b[2J\n\xffy", memfdSeals)
	got := listed(t, "x?[2J??y")
	if len(got) != 1 || got[0].UID != os.Geteuid() {
		t.Fatalf("found %+v", got)
	}
	r, err := Open(got[0])
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
}

// Between List and Open another process can put any file of its own at the listed
// descriptor.
func TestWhatIsOpenedIsWhatWasListed(t *testing.T) {
	f := named(t, memfdPrefix+"listed", memfdSeals)
	src := listed(t, "listed")
	if len(src) != 1 {
		t.Fatalf("found %+v", src)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	pipe, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	for what, other := range map[string]*os.File{
		"another name": named(t, memfdPrefix+"other", memfdSeals),
		"no seals":     named(t, memfdPrefix+"listed", 0),
		"some seals":   named(t, memfdPrefix+"listed", unix.F_SEAL_SHRINK|unix.F_SEAL_GROW),
		"a FIFO":       pipe,
	} {
		if err := unix.Dup3(int(other.Fd()), int(f.Fd()), unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		if r, err := Open(src[0]); !errors.Is(err, ErrLayout) {
			t.Errorf("%s: %v", what, err)
			if err == nil {
				r.Close()
			}
		}
	}
	own := named(t, memfdPrefix+"listed", memfdSeals)
	if err := unix.Dup3(int(own.Fd()), int(f.Fd()), unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	foreign := src[0]
	foreign.UID++
	if _, err := Open(foreign); !errors.Is(err, ErrLayout) {
		t.Errorf("a memfd of another user than was listed: %v", err)
	}
	if r, err := Open(src[0]); err != nil {
		t.Error(err)
	} else {
		r.Close()
	}
}

// Two users each have a device of the same name: List finds both, each with its owner.
func TestMemfdsAreTheirOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	info := device(t)
	var got []int
	for _, uid := range []int{4324, 4325} {
		if o := start(t, plan{Info: info}, as(t, uid)...); o.Kind != KindMemfd {
			t.Fatalf("mirrored to %+v", o.ready)
		}
	}
	for _, s := range listed(t, info.Name()) {
		got = append(got, s.UID)
		if r, err := Open(s); err != nil {
			t.Error(err)
		} else {
			r.Close()
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, []int{4324, 4325}) {
		t.Errorf("owners %v", got)
	}
}

func TestPinsAreTheirDirectorysOwners(t *testing.T) {
	bpftest.Need(t)
	const uid = 4326
	info := device(t)
	root := ownDir(t, uid)
	o := start(t, plan{Info: info, Store: Store{Root: root}}, as(t, uid, "bpf", "perfmon")...)
	if o.Kind != KindIterator && o.Kind != KindPins {
		t.Fatalf("mirrored to %+v", o.ready)
	}
	pins := func() (out []Source) {
		t.Helper()
		all, err := List(root)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			if s.Kind == KindPins {
				out = append(out, s)
			}
		}
		return out
	}
	got := pins()
	if len(got) != 1 || got[0].UID != uid {
		t.Fatalf("found %+v", got)
	}
	text := got[0]
	text.Kind = KindMetrics
	readable := []Source{got[0]}
	if o.Kind == KindIterator {
		readable = append(readable, text)
	}
	for _, src := range readable {
		r, err := Open(src)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Read(); err != nil {
			t.Error(err)
		}
		r.Close()
	}
	dir := got[0].Path
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if open := pins(); len(open) != 1 || open[0].UID != -1 {
		t.Errorf("pins that anyone can replace: %+v", open)
	}
	for _, src := range []Source{got[0], text} {
		r, err := Open(src)
		if err == nil {
			_, err = r.Read()
			r.Close()
		}
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("pins that changed hands: %v", err)
		}
	}
}

// An error must not show a line of a file that only root may read.
func TestMetricsAreReadFromABPFFileSystemAlone(t *testing.T) {
	const secret = "root:secret"
	dir := t.TempDir()
	file := filepath.Join(dir, "shadow")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	src := Source{Name: "x", Kind: KindMetrics, Path: filepath.Join(dir, "x"), UID: os.Geteuid()}
	if err := os.Mkdir(src.Path, 0o755); err != nil {
		t.Fatal(err)
	}
	metrics := filepath.Join(src.Path, pinMetrics)
	for what, make := range map[string]func() error{
		"a link": func() error { return os.Symlink(file, metrics) },
		"a file": func() error { return os.Link(file, metrics) },
		"a FIFO": func() error { return unix.Mkfifo(metrics, 0o600) },
	} {
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if _, err := readText(src); err == nil || strings.Contains(fmt.Sprint(err), secret) {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.Remove(metrics); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := readText(Source{Path: dir + "/none"}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// Reading a device with torn blocks in every queue takes no longer than with one.
func TestPatienceIsOfTheWholeDevice(t *testing.T) {
	left, tries := 3, 0
	torn := func() (bool, error) { tries++; return false, nil }
	for range 4 {
		if whole, err := attempts(&left, torn); whole || err != nil {
			t.Fatal(whole, err)
		}
	}
	if left != 0 || tries != 4*64+3 {
		t.Errorf("%d tries, %d left", tries, left)
	}
}
