//go:build linux

package bpf

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"barevif/telemetry"
	"barevif/telemetry/bpf/bpftest"
)

func TestPruneRemovesThePinsOfTheDeadAlone(t *testing.T) {
	bpftest.Need(t)
	root := filepath.Join(filepath.Dir(DefaultRoot), "barevif-prune-test")
	at := func(handle uint32) telemetry.Info {
		return telemetry.Info{Role: telemetry.Backend, Own: 61301, Peer: 61302, Handle: handle}
	}
	dir := func(handle uint32) string { return filepath.Join(root, at(handle).Name()) }
	for handle := range uint32(2) {
		dead := start(t, plan{Store: Store{Root: root}, Info: at(handle)})
		if dead.Kind != withPins() {
			t.Fatalf("mirrored to %+v", dead.ready)
		}
		dead.Kill()
	}
	live := start(t, plan{Store: Store{Root: root}, Info: at(2)})
	foreign, taken := filepath.Join(root, "mine"), dir(3)
	for _, d := range []string{foreign, filepath.Join(foreign, "inside"), taken} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, d := range []string{filepath.Join(foreign, "inside"), foreign, root} {
			if err := os.Remove(d); err != nil {
				t.Error(err)
			}
		}
	})
	if err := os.Symlink(dir(2), filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(filepath.Join(root, "link")) })

	removed, err := Prune(root)
	slices.Sort(removed)
	if want := []string{dir(0), dir(1), taken}; err != nil || !slices.Equal(removed, want) {
		t.Errorf("removed %q, %v; want %q", removed, err, want)
	}
	for _, d := range []string{dir(0), dir(1), taken} {
		if _, err := os.Lstat(d); !os.IsNotExist(err) {
			t.Errorf("%s: %v", d, err)
		}
	}
	for _, d := range []string{filepath.Join(dir(2), pinCounters), filepath.Join(foreign, "inside"), filepath.Join(root, "link")} {
		if _, err := os.Lstat(d); err != nil {
			t.Error(err)
		}
	}
	live.End(t)
	if removed, err := Prune(root); len(removed) != 0 || err != nil {
		t.Errorf("removed %q, %v", removed, err)
	}
}

func TestPruneLeavesOtherUsersPinsToThem(t *testing.T) {
	bpftest.Need(t)
	root := filepath.Join(filepath.Dir(DefaultRoot), "barevif-prune-user")
	dead := start(t, plan{Store: Store{Root: root}, Info: telemetry.Info{Own: 61303, Peer: 61302}})
	dead.Kill()
	if user := start(t, plan{Prune: root}, as(t, 65534)...); user.Kind != "" || user.Reason != "<nil>" {
		t.Errorf("a user without rights removed %q, and heard %s", user.Kind, user.Reason)
	}
	if removed, err := Prune(root); len(removed) != 1 || err != nil {
		t.Errorf("removed %q, %v", removed, err)
	}
	if err := os.Remove(root); err != nil {
		t.Error(err)
	}
}

func TestPruneRefusesWhatIsNoPlaceOfPins(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "back-1-2-0"), 0o755); err != nil {
		t.Fatal(err)
	}
	if removed, err := Prune(dir); err == nil || len(removed) != 0 {
		t.Errorf("removed %q, %v", removed, err)
	}
	if removed, err := Prune(filepath.Join(dir, "none")); err != nil || len(removed) != 0 {
		t.Errorf("nothing there: removed %q, %v", removed, err)
	}
}
