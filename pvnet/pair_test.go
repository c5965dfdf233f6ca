package pvnet

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore/server/labtest"
)

// A pair is a frontend and a backend that are connected without xenstore, for tests of
// the rings.
type pair struct {
	m           *emu.Machine
	front, back *Device
	fdom, bdom  *emu.Domain
	conns       [2]*conn
}

var plain = features{queues: 1, split: true, frontSG: true, backSG: true}

// needMapped skips the test where a machine cannot have mapped memory.
func needMapped(t testing.TB, mc emu.Config) {
	t.Helper()
	if mc.Mapped && runtime.GOOS != "linux" {
		t.Skip("memory that is mapped, so that pages of several shares follow each other, needs Linux's memfds")
	}
}

func join(t testing.TB, mc emu.Config, f features, cfg Config) *pair {
	t.Helper()
	needMapped(t, mc)
	before := runtime.NumGoroutine()
	m, err := emu.New(mc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		for end := time.Now().Add(labtest.Limit); runtime.NumGoroutine() > before; runtime.Gosched() {
			if time.Now().After(end) {
				buf := make([]byte, 1<<16)
				t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			}
		}
	})
	return joinIn(t, m, f, cfg)
}

// joinIn is join in a machine that the caller closes, after the cleanup of the test.
func joinIn(t testing.TB, m *emu.Machine, f features, cfg Config) *pair {
	t.Helper()
	p := &pair{m: m}
	var err error
	if p.fdom, err = m.NewDomain(1); err != nil {
		t.Fatal(err)
	}
	if p.bdom, err = m.NewDomain(2); err != nil {
		t.Fatal(err)
	}
	cfg.Queues = f.queues
	p.front = newDevice("0", telemetry.Frontend, p.fdom, cfg)
	p.back = newDevice("0", telemetry.Backend, p.bdom, cfg)
	p.connect(t, f)
	t.Cleanup(func() {
		p.disconnect()
		if err := labtest.Comes(m.CheckClean); err != nil {
			t.Error(err)
		}
	})
	return p
}

func (p *pair) connect(t testing.TB, f features) {
	t.Helper()
	fc, bc := new(conn), new(conn)
	p.conns = [2]*conn{fc, bc}
	fm := &setup{dom: p.fdom, peer: p.bdom.ID(), log: p.front.log, quarantined: &p.front.quarantined, c: fc, lockedThreads: p.front.cfg.LockedThreads}
	bm := &setup{dom: p.bdom, peer: p.fdom.ID(), log: p.back.log, quarantined: &p.back.quarantined, limiter: &p.back.limiter, groups: &p.back.groups, c: bc, lockedThreads: p.back.cfg.LockedThreads}
	var err error
	fc.queues, err = fm.frontQueues(f, &p.front.cfg, 0, func(i int) (rx, tx *telemetry.Block) { return p.front.rx[i].count, p.front.tx[i].count })
	if err != nil {
		t.Fatal(err)
	}
	for i, fq := range fc.queues {
		bq, err := bm.makeQueue(f, fq.keys, &p.back.cfg, p.back.rx[i].count, p.back.tx[i].count)
		if err == nil {
			err = bm.bindQueue(&bq)
		}
		if err != nil {
			t.Fatal(err)
		}
		bc.queues = append(bc.queues, bq)
	}
	p.front.bringUp(fc, p.bdom.ID(), xenbus.Connected)
	p.back.bringUp(bc, p.fdom.ID(), xenbus.Connected)
}

func (p *pair) disconnect() {
	for i, d := range []*Device{p.back, p.front} {
		if p.conns[1-i] == nil {
			continue
		}
		d.quiesce(p.conns[1-i], "test over")
		d.detach(p.conns[1-i])
		p.conns[1-i] = nil
	}
	for _, d := range []*Device{p.back, p.front} {
		d.finishWith(ErrDisconnected)
	}
}

// own takes both halves of queue 0 of d.
func own(t testing.TB, d *Device) (*TX, *RX) {
	t.Helper()
	tx, err := d.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	rx, err := d.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	limit := time.Now().Add(labtest.Limit)
	tx.SetDeadline(limit)
	rx.SetDeadline(limit)
	return tx, rx
}

// pattern fills b so that every byte depends on its position and on seed.
func pattern(b []byte, seed int) {
	for i := range b {
		b[i] = byte(i*7 + i>>8 + seed)
	}
	if len(b) > 0 {
		b[0] &^= 1
	}
}

func same(f *Frame, seed int) error {
	want := make([]byte, f.Len())
	pattern(want, seed)
	got := make([]byte, f.Len())
	if n := f.CopyTo(got); n != len(got) {
		return fmt.Errorf("CopyTo gave %d of %d bytes", n, len(got))
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("byte %d of %d is %#x, want %#x", i, len(got), got[i], want[i])
		}
	}
	return nil
}

// makeQueue maps a queue and makes the backend's side of it.
func (m *setup) makeQueue(f features, k queueKeys, cfg *Config, rx, tx *telemetry.Block) (connQueue, error) {
	q, err := m.mapQueue(k, cfg)
	if err != nil {
		return connQueue{}, err
	}
	return m.backQueue(f, &q, cfg, rx, tx)
}
