package pvnet_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// A slowDomain is a domain in which one copy may block until the test ends it.
type slowDomain struct {
	*emu.Domain
	slow  atomic.Bool   // the next copy will block
	begun chan struct{} // the slow copy has begun
	end   chan struct{} // closed when the slow copy may end
}

func (d *slowDomain) Copy(ops []hypercall.CopyOp) error {
	err := d.Domain.Copy(ops)
	if d.slow.CompareAndSwap(true, false) {
		close(d.begun)
		<-d.end
	}
	return err
}

// The pages that a stuck caller uses are never unmapped, no matter how long it stays.
// Here they are mmapped: touching an unmapped one would crash.
func TestACallerThatIsStuckKeepsItsMemory(t *testing.T) {
	l := newLabOn(t, emu.Config{Mapped: true})
	fdom := l.domain(1)
	bdom := &slowDomain{Domain: l.domain(2), begun: make(chan struct{}), end: make(chan struct{})}
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: 2}})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 2, Buffers: 64})
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	back.SetPatience(50 * time.Millisecond)
	await(t, back, true)
	await(t, front, true)

	got := make(chan []byte, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- back.Listen(context.Background(), func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			got <- b
		})
	}()
	bdom.slow.Store(true)
	sent := frame(9000, 1)
	if _, err := front.Write(sent); err != nil {
		t.Fatal(err)
	}
	wait(t, bdom.begun)
	held := l.Ledger()
	leaving := make(chan struct{})
	go func() { defer close(leaving); front.Disconnect() }()
	wait(t, back.Done())
	wait(t, leaving)
	if now := l.Ledger(); now.Mappings != held.Mappings || now.Mappings != 5 { // with the control ring
		t.Errorf("%d ring pages mapped, %d before: %+v", now.Mappings, held.Mappings, now)
	}
	var unknown *pvnet.UnknownError
	if _, err := back.Write(sent); !errors.As(err, &unknown) {
		t.Errorf("Write on a device that was given up: %v", err)
	}
	var last pvnet.LinkEvent
	for last = range back.Links(ctx(t)) {
	}
	if last.Up || unknown == nil || last.Reason != unknown.Error() {
		t.Errorf("the last word of the link is %+v", last)
	}

	// Other vifs of the backend keep working.
	other := l.domain(3)
	l.add(toolstack.Vif{Front: 3, Back: 2})
	near, err := pvnet.Connect(ctx(t), other, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	far := wait(t, backs)
	heard := make(chan int, 1)
	go far.Listen(context.Background(), func(f pvnet.Frame) { heard <- f.Len() })
	if _, err := near.Write(sent); err != nil {
		t.Fatal(err)
	}
	if n := wait(t, heard); n != len(sent) {
		t.Errorf("%d bytes", n)
	}
	near.Disconnect()

	// The stuck caller continues, too, and finishes its call.
	close(bdom.end)
	if b := wait(t, got); !bytes.Equal(b, sent) {
		t.Errorf("%d bytes came as %d others", len(sent), len(b))
	}
	if err := wait(t, ended); !errors.As(err, &unknown) {
		t.Errorf("Listen ended with %v", err)
	}
	stop()
	bdom.Destroy() // frees the abandoned memory
}

// If the toolstack removes a vif and makes it again at once, a watch may show no
// difference.
func TestAVifMadeAnewAtOnceIsServed(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Buffers: 32})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	for round := range 30 {
		back := wait(t, backs)
		switch round % 3 {
		case 0:
			await(t, back, true)
			await(t, front, true)
		case 1: // the device ends before the vif is removed
			back.Disconnect()
		}
		if err := toolstack.Remove(ctx(t), l.tools, v); err != nil {
			t.Fatal(err)
		}
		l.add(v)
		wait(t, back.Done())
	}
	await(t, wait(t, backs), true)
	await(t, front, true)
}

// A vif that another process serves is claimed once that process has ended.
func TestAVifOfABackendThatEndedIsTakenOver(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	first, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Buffers: 32})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	await(t, wait(t, first), true)
	log := new(count)
	second, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: slog.New(log)}})
	soon(t, "refused the claim", func() bool { return log.n.Load() > 0 })
	stop()
	await(t, wait(t, second), true)
	await(t, front, true)
	for end := time.Now().Add(labtest.Limit); log.n.Load() < 2 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if n := log.n.Load(); n != 2 { // the refusal, and the link being up
		t.Errorf("%d lines of log", n)
	}
}

// count counts log lines.
type count struct {
	slog.Handler
	n atomic.Int32
}

func (c *count) Enabled(context.Context, slog.Level) bool  { return true }
func (c *count) Handle(context.Context, slog.Record) error { c.n.Add(1); return nil }
func (c *count) WithAttrs([]slog.Attr) slog.Handler        { return c }
func (c *count) WithGroup(string) slog.Handler             { return c }

// Many vifs of one backend come and go at the same time, with new ids and with old ones,
// and each connects.
func TestManyVifsComeAndGoAtOnce(t *testing.T) {
	for name, anew := range map[string]bool{"new numbers": false, "the same number": true} {
		t.Run(name, func(t *testing.T) {
			l := newLabOn(t, emu.Config{Grants: 8192})
			bdom := l.domain(100)
			c, cancel := context.WithCancel(context.Background())
			served := make(chan error, 1)
			go func() {
				served <- pvnet.Serve(c, bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Buffers: 32}}, func(*pvnet.Device) {})
			}()
			var wg sync.WaitGroup
			var connects atomic.Int64
			for i := range 8 {
				fdom := l.domain(hypercall.DomID(1 + i))
				wg.Go(func() {
					v := toolstack.Vif{Front: fdom.ID(), Back: 100, MAC: [6]byte{0, 0x16, 0x3e, 0, 0, byte(i)}}
					for end := time.Now().Add(time.Second); time.Now().Before(end); connects.Add(1) {
						if !anew {
							v.ID++
						}
						c, cancel := context.WithTimeout(context.Background(), labtest.Limit)
						err := toolstack.Add(c, l.tools, v)
						var d *pvnet.Device
						if err == nil {
							d, err = pvnet.Connect(c, fdom, fmt.Sprint(v.ID), pvnet.Config{Buffers: 32})
						}
						if err == nil {
							d.Disconnect()
							err = toolstack.Remove(c, l.tools, v)
						}
						cancel()
						if err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			t.Logf("%d connects", connects.Load())
			cancel()
			if err := wait(t, served); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
}

// Every state that an end writes is in its event log, with the one before.
func TestEachStateWrittenIsRecorded(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	await(t, back, true)
	front.Disconnect()
	for d, want := range map[*pvnet.Device]string{front: "[0>4 4>5 5>6]", back: "[0>2 2>4"} {
		var states []string
		for _, e := range d.Counters().Events() {
			if e.Kind == telemetry.EventState {
				states = append(states, fmt.Sprintf("%d>%d", e.A, e.B))
			}
		}
		if got := fmt.Sprint(states); !strings.HasPrefix(got, want) {
			t.Errorf("%v, want %s", got, want)
		}
	}
}
