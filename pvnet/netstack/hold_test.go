package netstack

import (
	"context"
	"fmt"
	"testing"
	"time"

	"barevif/pvnet"
)

// While a stack is held it receives and sends nothing, and holds no page of its device. What
// comes meanwhile is answered after Resume, once and in order.
func TestAHeldStackGoesOn(t *testing.T) {
	front, back := two(t, 1500, pvnet.Config{Queues: 2})
	c, err := front.ListenPacket("udp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	echoed := make(chan struct{})
	go func() {
		defer close(echoed)
		b := make([]byte, 2000)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(b[:n], from)
		}
	}()
	d, err := back.Dial("udp", front.Addr().String()+":7")
	if err != nil {
		t.Fatal(err)
	}
	send := func(i int) {
		t.Helper()
		if _, err := d.Write(fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, 2000)
	want := func(i int) {
		t.Helper()
		d.SetReadDeadline(time.Now().Add(limit))
		if n, err := d.Read(b); err != nil || string(b[:n]) != fmt.Sprint(i) {
			t.Fatalf("%q, %v; want %d", b[:n], err, i)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	send(-1) // finds the addresses
	want(-1)
	for range 5 {
		for i := range 20 {
			send(i)
		}
		if err := front.Hold(ctx); err != nil {
			t.Fatal(err)
		}
		if err := front.Hold(ctx); err == nil {
			t.Error("held twice")
		}
		next := 0
		answers := func() { // what was received before is answered, and its answers may be late
			t.Helper()
			for ; ; next++ {
				d.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
				n, err := d.Read(b)
				if err != nil {
					return
				}
				if string(b[:n]) != fmt.Sprint(next) || next == 20 {
					t.Fatalf("%q while it is held, want %d", b[:n], next)
				}
			}
		}
		answers()
		send(20)
		answers()
		front.Resume()
		for ; next <= 20; next++ {
			want(next)
		}
	}
	ended, end := context.WithCancel(ctx)
	end()
	if err := front.Hold(ended); err == nil {
		t.Error("held although its context had ended")
	}
	send(7)
	want(7)
	if err := front.Hold(ctx); err != nil {
		t.Fatal(err)
	}
	front.Close()
	<-echoed
	if err := front.Hold(ctx); err == nil {
		t.Error("held after Close")
	}
	front.Resume()
}
