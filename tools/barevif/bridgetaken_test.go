package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/bridge"
	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
)

// What a bridge would refuse it does not take over, and two vifs that are under way at once do not
// get one address.
func TestWhichVifsABridgeTakesOver(t *testing.T) {
	mac := func(last byte) pvnet.MAC { return pvnet.MAC{2, 0, 0, 0, 0, last} }
	says := func(last byte) pvnet.Toolstack { return pvnet.Toolstack{MAC: mac(last), Done: true} }
	b := &bridged{bridge: "lan", most: 4, promised: make(map[string][]pvnet.MAC), ports: map[*bridge.Port]portInfo{
		new(bridge.Port): {name: "9.0", guard: []pvnet.MAC{mac(9)}},
	}}
	refused := func(vif string, ts pvnet.Toolstack, why string) {
		t.Helper()
		if err := b.promise(vif, ts); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want %q", vif, err, why)
		}
		if _, kept := b.promised[vif]; kept {
			t.Errorf("%s has a place, and was refused", vif)
		}
	}
	taken := func(vif string, ts pvnet.Toolstack) {
		t.Helper()
		if err := b.promise(vif, ts); err != nil {
			t.Errorf("%s: %v", vif, err)
		}
	}
	refused("1.0", pvnet.Toolstack{MAC: mac(1), Bridge: "dmz"}, "this is the bridge lan")
	refused("1.0", pvnet.Toolstack{}, "there is no usable one")
	refused("1.0", says(9), "mac=02:00:00:00:00:09: another vif of this bridge has it: 9.0")
	taken("1.0", says(1))
	taken("1.0", says(1)) // it may be asked again
	refused("3.0", says(1), "another vif of this bridge has it: 1.0")
	taken("3.0", says(3))
	taken("5.0", says(5))
	refused("7.0", says(7), "bridge lan has 4 ports")
	// A vif that comes the usual way takes nothing of those that are under way.
	for vif, want := range map[string]string{"8.0": "another vif of this bridge has it: 3.0", "1.0": ""} {
		err := b.leavesRoom(vif, []pvnet.MAC{mac(3 - 2*byte(strings.Count(vif, "1")))})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", vif, err, want)
		}
	}
	if err := b.leavesRoom("8.0", []pvnet.MAC{mac(8)}); err == nil || !strings.Contains(err.Error(), "bridge lan has 4 ports") {
		t.Errorf("%v", err)
	}
	taken("9.0", says(9)) // a port already: it needs no promise
	if len(b.promised) != 3 {
		t.Errorf("promises %v", b.promised)
	}
	b.forgetPromise("3.0")
	taken("7.0", says(3))
}

func TestABridgeHandsNothingOverWithoutASocket(t *testing.T) {
	socket := emulated(t, "--vif", "front=1")
	clitest.Build(rootCommand).Fails(t, cli.ExitUsage, []string{"bridge", "--emu", socket, "--handover", "none", "--take-over"}, `--handover "none": not a socket, with --take-over`)
}

// One process has the uplinks at a time. The next one waits for it, and begins when it has ended.
func TestOneBridgeHasTheUplinks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bridge.handover")
	one := &bridged{takeovers: takeovers{path: path}}
	said := make(chan struct{}, 16)
	two := &bridged{backend: backend{Program: &cli.Program{Stdout: writes(said), Stderr: writes(said)}}, takeovers: takeovers{path: path}}
	unlock, err := one.lockUplinks(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := two.lockUplinks(t.Context(), false); err == nil || !strings.Contains(err.Error(), "another process has locked") {
		t.Errorf("two have the uplinks: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("enough")
	ended := make(chan error, 1)
	go func() {
		_, err := two.lockUplinks(ctx, true)
		ended <- err
	}()
	<-said // it waits
	cancel(gone)
	if err := <-ended; !errors.Is(err, gone) {
		t.Errorf("a wait that ends: %v", err)
	}
	type lock struct {
		unlock func()
		err    error
	}
	got := make(chan lock, 1)
	go func() {
		free, err := two.lockUplinks(t.Context(), true)
		got <- lock{free, err}
	}()
	<-said // it waits
	if len(got) != 0 {
		t.Fatal("two have the uplinks")
	}
	unlock()
	select {
	case l := <-got:
		if l.err != nil {
			t.Fatal(l.err)
		}
		if _, err := one.lockUplinks(t.Context(), false); err == nil {
			t.Error("the file that was locked is not the one at the path")
		}
		l.unlock()
	case <-time.After(time.Minute):
		t.Fatal("the next one does not get the uplinks")
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 0 {
		t.Errorf("%v, %v are left", left, err)
	}
	if err := os.Symlink("elsewhere", path+".uplinks"); err != nil {
		t.Fatal(err)
	}
	if _, err := one.lockUplinks(t.Context(), true); err == nil {
		t.Error("a link to elsewhere was followed")
	}
	if free, err := new(bridged).lockUplinks(t.Context(), false); err != nil { // nothing is handed over
		t.Error(err)
	} else {
		free()
	}
}

// A lock on a file that its owner has removed meanwhile is none.
func TestALockIsAtItsPath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !isAt(f, path) {
		t.Error("a file is not where it was made")
	}
	if err := os.Remove(path); err != nil || isAt(f, path) {
		t.Errorf("a file that was removed is at its path: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil || isAt(f, path) {
		t.Errorf("another file is taken for it: %v", err)
	}
}

// writes tells of what is written.
type writes chan<- struct{}

func (w writes) Write(b []byte) (int, error) {
	w <- struct{}{}
	return len(b), nil
}
