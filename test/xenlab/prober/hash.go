//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"time"

	"barevif/hypercall/xendev"
	"barevif/pvnet"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
	"barevif/telemetry"
)

// enough is how many frames with a hash each table has to steer.
const enough = 30

// patience bounds the wait for them.
const patience = 100 * time.Second

// hash goes through tables while frames come.
func hash(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: prober hash QUEUES")
	}
	queues, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	dom, err := xendev.Open(xendev.Config{})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*patience)
	defer cancel()
	c := &checker{key: []byte("a key of which the prober knows each bit"), queues: queues}
	c.ours = toeplitz.NewTable(c.key)
	c.table = make([]int, 128)
	for i := range c.table {
		c.table[i] = (i*7 + i/5) % queues
	}
	dev, err := pvnet.Connect(ctx, dom, "0", pvnet.Config{
		Queues: queues, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Hash: &pvnet.HashConfig{Key: c.key, Table: c.table},
	})
	if err != nil {
		return err
	}
	defer dev.Disconnect()
	if dev.Active() != queues {
		return fmt.Errorf("%d queues, want %d", dev.Active(), queues)
	}
	if err := c.await(func() bool { return dev.Features()&telemetry.FeatureHash != 0 }); err != nil {
		return fmt.Errorf("the backend has not taken the hash: %w", err)
	}
	for i := range queues {
		rx, err := dev.OwnRX(i)
		if err != nil {
			return err
		}
		go c.receive(rx, i)
	}
	fmt.Println("connected, MAC", dev.MAC())
	if err := c.change(c.table, false, func() error { return nil }); err != nil { // the kernel sends some before it is told to hash
		return err
	}
	if err := c.see("a table that spreads", queues); err != nil {
		return err
	}
	last := make([]int, 16)
	for i := range last {
		last[i] = queues - 1
	}
	for _, next := range []struct {
		what  string
		table []int
	}{{"a table of one queue", last}, {"no table", nil}} {
		if err := c.change(next.table, false, func() error {
			return dev.SetHash(ctx, &pvnet.HashConfig{Key: c.key, Table: next.table})
		}); err != nil {
			return err
		}
		least := queues
		if next.table != nil {
			least = 1
		}
		if err := c.see(next.what, least); err != nil {
			return err
		}
	}
	if err := c.change(nil, true, func() error { return dev.SetHash(ctx, nil) }); err != nil {
		return err
	}
	c.mu.Lock()
	c.plain = 0
	c.mu.Unlock()
	if err := c.await(func() bool { return c.plain >= enough }); err != nil {
		return fmt.Errorf("no frames without a hash: %w", err)
	}
	fmt.Println("checked")
	return nil
}

// A checker compares what arrives with what it should be.
type checker struct {
	key    []byte
	ours   *toeplitz.Table
	queues int

	mu      sync.Mutex
	table   []int // nil: the queue is the hash mod the number of queues
	unsure  bool  // the table is being changed: the queue may be that of the old one
	off     bool  // no frame may have a hash
	hashed  map[pvnet.HashType]int
	on      map[int]int // frames with a hash by queue
	plain   int         // IPv4 frames without one
	failure error
}

func (c *checker) receive(rx *pvnet.RX, queue int) {
	var frames [32]pvnet.Frame
	for {
		n, err := rx.Receive(frames[:])
		if err != nil {
			return
		}
		for i := range frames[:n] {
			c.check(&frames[i], queue)
		}
		rx.Release(frames[:n])
	}
}

func (c *checker) check(f *pvnet.Frame, queue int) {
	if f.Bytes()[0]&1 != 0 {
		return // Linux's own reports of multicast groups come without a hash
	}
	want, typ, ok := c.ours.Frame(f.Bytes(), f.Len(), netif.HashFlagsAll)
	got, hashed := f.Hash()
	c.mu.Lock()
	defer c.mu.Unlock()
	if ok && !hashed {
		c.plain++
	}
	switch {
	case c.failure != nil || c.unsure:
	case c.off:
		if hashed {
			c.failure = fmt.Errorf("a hash after its end: %+v", got)
		}
	case hashed != ok || hashed && got != pvnet.FlowHash{Type: typ, Value: want}:
		c.failure = fmt.Errorf("queue %d: a frame with %+v, %v; want %v %#x, %v: % x", queue, got, hashed, typ, want, ok, f.Bytes()[:min(60, f.Len())])
	default:
		q := int(want) % c.queues
		if len(c.table) > 0 {
			q = c.table[int(want)%len(c.table)]
		}
		if q != queue {
			c.failure = fmt.Errorf("%v %#x came on queue %d, not %d", typ, want, queue, q)
		}
		if hashed {
			c.hashed[typ]++
			c.on[queue]++
		}
	}
}

// change changes the table, or ends the hash, while frames move.
func (c *checker) change(table []int, off bool, set func() error) error {
	c.mu.Lock()
	c.unsure = true
	c.off = off
	c.mu.Unlock()
	if err := set(); err != nil {
		return err
	}
	time.Sleep(time.Second) // for frames that are under way
	c.mu.Lock()
	c.unsure, c.table = false, table
	c.mu.Unlock()
	return nil
}

// see waits for enough frames with a hash, TCP's and others, on at least that many queues.
func (c *checker) see(what string, queues int) error {
	c.mu.Lock()
	c.hashed, c.on = make(map[pvnet.HashType]int), make(map[int]int)
	c.mu.Unlock()
	err := c.await(func() bool {
		return c.hashed[pvnet.HashIPv4] >= enough && c.hashed[pvnet.HashIPv4TCP] >= enough && len(c.on) >= queues
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Printf("%s: frames by hash %v, by queue %v\n", what, c.hashed, c.on)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// await waits until ok holds, which mu guards.
func (c *checker) await(ok func() bool) error {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		c.mu.Lock()
		done, err := ok(), c.failure
		c.mu.Unlock()
		switch {
		case err != nil || done:
			return err
		case time.Now().After(end):
			return fmt.Errorf("not within %v", patience)
		}
	}
}
