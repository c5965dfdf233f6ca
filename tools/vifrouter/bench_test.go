package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/router"
	"barevif/tools/vifrouter/config"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// What the router forwards from a guest to the uplink, with NAT, in datagrams of one flow: both
// its vifs, their other ends and the router share the processors of this machine.
func BenchmarkForward(b *testing.B) {
	for _, size := range []int{64, 1514} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) { benchmarkForward(b, size) })
	}
}

func benchmarkForward(b *testing.B, size int) {
	lab := labtest.New(b, emu.Config{})
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	world, own, client := lab.Domain(worldDom), lab.Domain(routerDom), lab.Domain(firstDom)
	lab.Add(toolstack.Vif{Front: routerDom, Back: worldDom})
	vif := lab.Add(toolstack.Vif{Front: firstDom, Back: routerDom})
	serving, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	var arrived atomic.Int64
	go func() {
		served <- pvnet.Serve(serving, world, pvnet.ServeConfig{Hotplug: true}, func(dev *pvnet.Device) {
			dev.ListenBatch(serving, func(list []pvnet.Frame) {
				for i := range list {
					if list[i].Len() == size {
						arrived.Add(1)
					} else if f := list[i].Bytes(); f[12] == 8 && f[13] == 6 && f[21] == 1 { // an ARP request
						answer := append([]byte(nil), f[:42]...)
						m := [6]byte{2, 0, 0, 0, 0, 1}
						copy(answer, f[6:12])
						copy(answer[6:], m[:])
						answer[21] = 2
						copy(answer[22:], m[:])
						copy(answer[28:], f[38:42])
						copy(answer[32:], f[22:32])
						dev.Write(answer)
					}
				}
			})
		})
	}()
	c, err := newTestDaemon(own)
	if err != nil {
		b.Fatal(err)
	}
	running, end := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- c.run(running) }()
	defer func() {
		end()
		<-ran
		stop()
		<-served
	}()
	dev, err := pvnet.Connect(ctx, client, "0", pvnet.Config{StaticGrants: true})
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Disconnect()
	frame := udpFrame(vif.MAC, guestMAC, netip.MustParseAddrPort("10.137.0.100:1000"), netip.AddrPortFrom(worldAddr, 9), make([]byte, size-42))
	for arrived.Load() == 0 { // until the uplink and its neighbour are known
		if ctx.Err() != nil {
			b.Fatal("nothing is forwarded")
		}
		dev.Write(frame)
		time.Sleep(time.Millisecond)
	}
	list := make([][]byte, 32)
	for i := range list {
		list[i] = frame
	}
	b.SetBytes(int64(size))
	b.ResetTimer()
	before, sent := arrived.Load(), 0
	began := time.Now()
	for sent < b.N {
		n, err := dev.WriteBatch(list[:min(32, b.N-sent)])
		if err != nil {
			b.Fatal(err)
		}
		sent += n
	}
	seen := int64(-1)
	for n := arrived.Load(); n != seen; n = arrived.Load() { // until nothing more arrives
		seen = n
		time.Sleep(20 * time.Millisecond)
	}
	took := time.Since(began) - 20*time.Millisecond
	got := seen - before
	b.ReportMetric(float64(got)/took.Seconds(), "arrived/s")
	b.ReportMetric(float64(got)*float64(size)*8/took.Seconds()/1e9, "Gbit/s")
	b.ReportMetric(100*(1-float64(got)/float64(sent)), "lost%")
	if p, ok := c.core.PortStats(router.PortID(1)); !ok || p.Forwarded == 0 {
		b.Error("the router has forwarded nothing")
	}
}

// newTestDaemon is a router with the standard configuration that says nothing.
func newTestDaemon(own *emu.Domain) (*daemon, error) {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	cfg, err := config.Parse("bench.conf", []byte(standard))
	if err != nil {
		return nil, err
	}
	return newDaemon(own, cfg, pvnet.Config{Offload: true, StaticGrants: true}, func(string, ...any) {}, log)
}
