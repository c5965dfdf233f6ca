//go:build linux

package bpf

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/telemetry"
	"barevif/telemetry/openmetrics"
)

// hostile makes a memfd with any content, as any process can.
func hostile(t testing.TB, content []byte) Source {
	t.Helper()
	fd, err := unix.MemfdCreate(memfdPrefix+"x", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "hostile")
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, memfdSeals); err != nil {
		t.Fatal(err)
	}
	return Source{Name: "x", Kind: KindMemfd, Path: fmt.Sprintf("/proc/self/fd/%d", fd), UID: os.Geteuid()}
}

// believable returns a file whose info record passes every check.
func believable(change func(*infoRecord)) []byte {
	rec := infoRecord{Version: telemetry.LayoutVersion, Layout: telemetry.Layout(), Slots: 1}
	copy(rec.Magic[:], infoMagic)
	change(&rec)
	b := make([]byte, countersAt+queueBytes)
	copy(b, encode(rec))
	return b
}

func TestHostileFilesAreErrors(t *testing.T) {
	if r, err := Open(hostile(t, believable(func(*infoRecord) {}))); err != nil {
		t.Fatal(err)
	} else if _, err := r.Read(); err != nil {
		t.Fatal(err)
	} else {
		r.Close()
	}
	for name, b := range map[string][]byte{
		"empty":       nil,
		"short info":  make([]byte, infoBytes-1),
		"zeroes":      make([]byte, countersAt+queueBytes),
		"no events":   believable(func(*infoRecord) {})[:eventsAt],
		"short":       believable(func(*infoRecord) {})[:countersAt+queueBytes-1],
		"more queues": believable(func(r *infoRecord) { r.Slots = 1024 }),
		"no queues":   believable(func(r *infoRecord) { r.Slots = 0 }),
		"huge":        believable(func(r *infoRecord) { r.Slots = 1<<32 - 1 }),
		"version":     believable(func(r *infoRecord) { r.Version++ }),
	} {
		r, err := Open(hostile(t, b))
		if err == nil {
			_, err = r.Read()
			r.Close()
		}
		if !errors.Is(err, ErrLayout) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A link in /proc may lead to another file by the time it is opened.
func TestOnlyMemfdsAreRead(t *testing.T) {
	dir := t.TempDir()
	fifo, file := filepath.Join(dir, "fifo"), filepath.Join(dir, "file")
	if err := errors.Join(unix.Mkfifo(fifo, 0o600), os.WriteFile(file, believable(func(*infoRecord) {}), 0o600)); err != nil {
		t.Fatal(err)
	}
	paths := []string{fifo, file, "/dev/zero", dir}
	// A file of a tmpfs has seals, as a memfd does.
	if f, err := os.CreateTemp("/dev/shm", "barevif"); err == nil {
		defer os.Remove(f.Name())
		_, err = f.Write(believable(func(*infoRecord) {}))
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, f.Name())
	}
	for _, path := range paths {
		if _, err := Open(Source{Kind: KindMemfd, Path: path}); !errors.Is(err, ErrLayout) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := Open(Source{Kind: KindMemfd, Path: dir + "/none"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := Open(Source{Kind: "paper"}); err == nil {
		t.Error("a source of no kind was opened")
	}
}

func FuzzReport(f *testing.F) {
	f.Add(believable(func(*infoRecord) {})[:infoBytes])
	f.Add(believable(func(r *infoRecord) {
		r.Role, r.State, r.PID, r.Beat = 1<<32-1, 1<<32-1, 1<<32-1, 1<<64-1
		set(r.MAC[:], "zz:00:::::")
		copy(r.Vif[:], slices.Repeat([]byte{0x1b}, len(r.Vif)))
	})[:infoBytes])
	f.Fuzz(func(t *testing.T, b []byte) {
		var rec infoRecord
		if decode(b, &rec) != nil {
			return
		}
		err := rec.check()
		rep := rec.report()
		for _, s := range []string{rep.Kind, rep.Reason} {
			for _, r := range s {
				if r < ' ' || r > '~' {
					t.Fatalf("%q would reach a terminal", s)
				}
			}
		}
		if err == nil && (rep.Info.Queues < 1 || rep.Info.Queues > maxQueues) {
			t.Fatalf("%d queues", rep.Info.Queues)
		}
	})
}

func FuzzText(f *testing.F) {
	s := telemetry.NewSet(2)
	fill(s)
	var text bytes.Buffer
	if err := openmetrics.Write(&text, openmetrics.Device{Name: "x", Stats: s.Totals()}); err != nil {
		f.Fatal(err)
	}
	f.Add(text.String())
	f.Add("# EOF\n")
	f.Add("barevif_rx_packets_total{queue=\"1023\"} 1\n# EOF\n")
	f.Add(strings.Repeat("barevif_rx_frame_size_bytes_bucket{queue=\"0\"} 1\n", 20) + "# EOF\n")
	f.Fuzz(func(t *testing.T, in string) {
		queues, err := parseText(strings.NewReader(in))
		if err != nil {
			return
		}
		if len(queues) > maxQueues {
			t.Fatalf("%d queues", len(queues))
		}
		// The result can be written and read again.
		var out bytes.Buffer
		if err := openmetrics.Write(&out, openmetrics.Device{Stats: telemetry.Sum(queues)}); err != nil {
			t.Fatal(err)
		}
		again, err := parseText(&out)
		if err != nil || !slices.Equal(again, queues) {
			t.Fatalf("%v: read differently the second time", err)
		}
	})
}
