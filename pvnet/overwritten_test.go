package pvnet_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// passFrames sends frames each way until one has arrived, since the link may be about to go
// down.
func passFrames(t testing.TB, name string, front, back *pvnet.Device) {
	t.Helper()
	heard := func(to *pvnet.Device) uint64 {
		st := to.Stats()
		return st.RX.Get(telemetry.Packets)
	}
	for _, way := range [][2]*pvnet.Device{{front, back}, {back, front}} {
		before := heard(way[1])
		for end := time.Now().Add(time.Minute); heard(way[1]) == before; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: nothing passes from %v", name, way[0].Peer())
			}
			way[0].SetWriteDeadline(time.Now().Add(time.Second))
			way[0].Write(frame(100, 1))
		}
	}
}

// An operator overwrites the state of one end. That end writes its state again and logs
// it once, and frames move again, however the other end reacted meanwhile.
func TestAStateWrittenByAnotherIsPutRight(t *testing.T) {
	for _, role := range []string{"frontend", "backend"} {
		for _, found := range []string{"0", "1", "2", "3", "5", "6", "7", "8", "9", "", "Connected"} {
			for _, later := range []time.Duration{0, time.Second} {
				t.Run(fmt.Sprintf("%s/%q/%v", role, found, later), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						log := new(logtest.Log)
						l := newLab(t)
						fdom, bdom := l.domain(1), l.domain(2)
						v := l.add(toolstack.Vif{Front: 1, Back: 2})
						backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: log.Logger()}})
						front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Logger: log.Logger()})
						if err != nil {
							t.Fatal(err)
						}
						back := wait(t, backs)
						await(t, back, true)
						go front.Listen(context.Background(), func(pvnet.Frame) {})
						go back.Listen(context.Background(), func(pvnet.Frame) {})
						passFrames(t, "before", front, back)
						dir := v.FrontDir()
						if role == "backend" {
							dir = v.BackDir()
						}
						for round := range 3 {
							if err := l.tools.Write(ctx(t), dir+"/state", found); err != nil {
								t.Fatal(err)
							}
							time.Sleep(later)
							passFrames(t, fmt.Sprint("round ", round), front, back)
						}
						time.Sleep(time.Second)
						for _, dir := range []string{v.FrontDir(), v.BackDir()} {
							if s := l.read(dir + "/state"); s != "4" {
								t.Errorf("%s is left %q", dir, s)
							}
						}
						if n := len(log.Lines("changed by another")); n == 0 || later != 0 && n > 3 {
							t.Errorf("%d lines for 3 writes:\n%s", n, log)
						}
						front.Disconnect()
						stop()
					})
				})
			}
		}
	}
}

// If someone overwrites the state in a loop, the device repairs it at a slow pace, and
// the vif works once the loop has ended.
func TestAStateWrittenInALoopIsFollowedSlowly(t *testing.T) {
	for _, role := range []string{"frontend", "backend"} {
		t.Run(role, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := new(logtest.Log)
				l := newLab(t)
				fdom, bdom := l.domain(1), l.domain(2)
				v := l.add(toolstack.Vif{Front: 1, Back: 2})
				backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: log.Logger()}})
				front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Logger: log.Logger()})
				if err != nil {
					t.Fatal(err)
				}
				back := wait(t, backs)
				go front.Listen(context.Background(), func(pvnet.Frame) {})
				go back.Listen(context.Background(), func(pvnet.Frame) {})
				passFrames(t, "before", front, back)
				dir := v.FrontDir()
				if role == "backend" {
					dir = v.BackDir()
				}
				restored := 0
				for range 12_000 { // a minute
					if err := l.tools.Write(context.Background(), dir+"/state", "3"); err != nil {
						t.Fatal(err)
					}
					time.Sleep(5 * time.Millisecond)
					if l.read(dir+"/state") != "3" {
						restored++
					}
				}
				// 40 repairs at once, then 8 for each pause of up to a second.
				if restored > 40+8*70 {
					t.Errorf("written %d times in a minute", restored)
				}
				if n := len(log.Lines("changed by another")); n > 30 {
					t.Errorf("%d lines of log", n)
				}
				passFrames(t, "after", front, back)
				front.Disconnect()
				stop()
			})
		})
	}
}
