package stat

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"barevif/telemetry"
	"barevif/telemetry/bpf"

	"golang.org/x/sys/unix"
)

// stranger is a user other than the one who runs the test.
const stranger = 65534

// asStranger runs do on a thread of another user; the thread ends with it.
func asStranger(t *testing.T, do func() error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so that nothing else runs on this thread
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), stranger, ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		done <- do()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// shown makes a device whose counters other processes can read.
func shown(t *testing.T, root string, info telemetry.Info, tx uint64) *telemetry.Set {
	set := telemetry.NewSet(1)
	set.Open(&bpf.Store{Root: root}, info)
	t.Cleanup(func() { set.Close() })
	set.TX(0).Add(telemetry.Packets, tx)
	set.TX(0).Flush()
	return set
}

func watch(t *testing.T, root string, set func(*Watcher)) *Look {
	t.Helper()
	w, err := NewWatcher(root, "*-61031-*")
	if err != nil {
		t.Fatal(err)
	}
	set(w)
	return w.Look()
}

// Root's overview stays correct whatever another user calls a memfd.
func TestDevicesOfOtherUsersAreLeftOutUnlessAskedFor(t *testing.T) {
	t.Setenv("SUDO_UID", "")
	root := filepath.Join(t.TempDir(), "none")
	front := telemetry.Info{Role: telemetry.Frontend, Own: 61031, Peer: 61032, Handle: 1}
	back := telemetry.Info{Role: telemetry.Backend, Own: 61032, Peer: 61031, Handle: 1}
	asStranger(t, func() error {
		if kind, reason := shown(t, root, front, 666).Backend(); kind != bpf.KindMemfd {
			return fmt.Errorf("mirrored to %s: %s", kind, reason)
		}
		return nil
	})
	shown(t, root, front, 5)
	shown(t, root, back, 7)

	l := watch(t, root, func(*Watcher) {})
	if len(l.Devices) != 2 || l.Hidden != 1 || len(l.Pairs) != 1 || l.Left() != "1 device of another user is not shown" {
		t.Errorf("%d devices, %d hidden, %d pairs", len(l.Devices), l.Hidden, len(l.Pairs))
	}
	for _, d := range l.Devices {
		if d.Source.UID != 0 || d.Foreign || d.Report.Stats.TX.Get(telemetry.Packets) == 666 {
			t.Errorf("%+v", d.Source)
		}
	}

	l = watch(t, root, func(w *Watcher) { w.AllUsers = true })
	if len(l.Devices) != 3 || l.Hidden != 0 || l.Left() != "" {
		t.Fatalf("%d devices, %d hidden", len(l.Devices), l.Hidden)
	}
	var labels []string
	for _, d := range l.Labelled() {
		labels = append(labels, d.Label())
	}
	slices.Sort(labels)
	if want := []string{back.Name(), front.Name(), front.Name() + "@65534"}; !slices.Equal(labels, want) {
		t.Errorf("labels %v", labels)
	}
	if len(l.Pairs) != 1 || l.Devices[l.Pairs[0].Front].Foreign || l.Pairs[0].Flows[0].Sent != 5 {
		t.Errorf("pairs %+v", l.Pairs)
	}
	var text, table strings.Builder
	if err := Write(&text, l, plain); err != nil {
		t.Fatal(err)
	}
	WriteTable(&table, "", []*Device{&l.Devices[0], &l.Devices[1], &l.Devices[2]}, true, plain)
	for _, s := range []string{text.String(), table.String()} {
		if strings.Count(s, "of user nobody (65534)") != 1 || strings.Count(s, "of user root (0)") != 2 {
			t.Errorf("owners are not told:\n%s", s)
		}
	}
	b, err := json.Marshal(l.JSON())
	if err != nil || strings.Count(string(b), `"uid":65534`) != 1 || strings.Count(string(b), `"foreign":true`) != 1 {
		t.Errorf("%v, %s", err, b)
	}

	for what, set := range map[string]func(*Watcher){
		"named": func(w *Watcher) { w.Users = []int{7, stranger} },
		"sudo":  func(*Watcher) { t.Setenv("SUDO_UID", fmt.Sprint(stranger)) },
	} {
		l := watch(t, root, set)
		if len(l.Devices) != 3 || slices.ContainsFunc(l.Devices, func(d Device) bool { return d.Foreign }) {
			t.Errorf("%s: %d devices", what, len(l.Devices))
		}
		if len(l.Labelled()) != 2 {
			t.Errorf("%s: a label stands for two devices", what)
		}
		for _, d := range l.Labelled() {
			if d.Source.UID != 0 {
				t.Errorf("%s: root's device is shadowed by %+v", what, d.Source)
			}
		}
	}
}

func TestOneUserCannotFloodTheOthers(t *testing.T) {
	root := filepath.Join(t.TempDir(), "none")
	asStranger(t, func() error {
		for i := range mostForeign + 6 {
			fd, err := unix.MemfdCreate(fmt.Sprintf("barevif:flood-61031-%d", i), unix.MFD_CLOEXEC)
			if err != nil {
				return err
			}
			t.Cleanup(func() { unix.Close(fd) })
		}
		return nil
	})
	if l := watch(t, root, func(w *Watcher) { w.AllUsers = true }); len(l.Devices) != mostForeign || l.Hidden != 6 {
		t.Errorf("%d devices, %d hidden", len(l.Devices), l.Hidden)
	}
}

// foreign returns d as a device of another user.
func foreign(d Device) Device {
	d.Foreign, d.Source.UID, d.Source.Kind = true, stranger, bpf.KindMemfd
	return d
}

func TestForeignEndsGiveWay(t *testing.T) {
	front, back := device("front-1-2-0", 10, 5, 0), device("back-2-1-0", 5, 10, 0)
	for _, c := range []struct {
		devices     []Device
		front, back int // -1: no pair
	}{
		{[]Device{front, back, foreign(front), foreign(front), foreign(back)}, 0, 1},
		{[]Device{foreign(front), foreign(front), foreign(back), front, back}, 3, 4},
		{[]Device{foreign(front), back}, 0, 1},
		{[]Device{foreign(front), foreign(front), back}, -1, -1},
		{[]Device{front, front, foreign(front), back}, -1, -1},
	} {
		got := pairs(c.devices)
		if c.front < 0 != (len(got) == 0) || len(got) == 1 && (got[0].Front != c.front || got[0].Back != c.back) || len(got) > 1 {
			t.Errorf("%+v, want %d and %d", got, c.front, c.back)
		}
	}
}

func TestALabelIsThatOfTheHardestPlace(t *testing.T) {
	of := func(kind string, uid int) Device {
		d := device("front-1-2-0", 1, 1, 0)
		d.Source.Kind, d.Source.UID = kind, uid
		return d
	}
	unread := of(bpf.KindPins, 0)
	unread.Report = nil
	order := []Device{of(bpf.KindMemfd, 1000), of(bpf.KindMemfd, 0), of(bpf.KindMetrics, 1000), of(bpf.KindMaps, 0), of(bpf.KindPins, 1000), of(bpf.KindPins, 0)}
	for n := range order {
		l := Look{Devices: append(slices.Clone(order[:n+1]), unread)}
		for range 2 {
			if got := l.Labelled(); len(got) != 1 || got[0].Source != order[n].Source {
				t.Errorf("of %d: %+v", n+1, got[0].Source)
			}
			slices.Reverse(l.Devices)
		}
	}
	nowhere := foreign(order[0])
	nowhere.Source.UID = -1
	if nowhere.Label() != "front-1-2-0@unknown" {
		t.Error(nowhere.Label())
	}
}

func TestWhoKeepsThePins(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give a directory away")
	}
	parent := t.TempDir()
	root := filepath.Join(parent, "pins")
	if err := errors.Join(os.Mkdir(root, 0o755), os.Chown(root, 4321, 4321), os.Chmod(parent, 0o755)); err != nil {
		t.Fatal(err)
	}
	if uid, ok := keeper(root + "/"); !ok || uid != 4321 {
		t.Errorf("user %d, %v", uid, ok)
	}
	link := filepath.Join(parent, "link")
	if err := os.Symlink(root, link); err != nil {
		t.Fatal(err)
	}
	if uid, ok := keeper(link); ok {
		t.Errorf("a link: user %d", uid)
	}
	for _, spoil := range []func() error{
		func() error { return os.Chmod(parent, 0o777|os.ModeSticky) },
		func() error { return errors.Join(os.Chmod(parent, 0o755), os.Chown(parent, 4321, 4321)) },
		func() error { return os.RemoveAll(root) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if uid, ok := keeper(root); ok {
			t.Errorf("user %d, where others than root can have made it", uid)
		}
	}
}
