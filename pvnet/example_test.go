package pvnet_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"net"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/xenstore/server/labtest"
)

// newWorld makes an emulated machine with a driver domain, guests, and a vif for each.
func newWorld(ctx context.Context, guests int) *labtest.World {
	w, err := labtest.NewWorld(ctx, guests)
	check(err)
	return w
}

// serve serves the guests' vifs and gives each device to f.
func serve(ctx context.Context, w *labtest.World, f func(*pvnet.Device)) {
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan error)
	go func() { ended <- pvnet.Serve(ctx, w.Driver, pvnet.ServeConfig{Hotplug: true}, f) }()
	w.Defer(func() { stop(); <-ended })
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// A driver domain prints what its guest sends. Listen lends each frame until the function
// returns.
func ExampleDevice_Listen() {
	ctx := context.Background()
	w := newWorld(ctx, 1)
	defer w.Close()
	heard := make(chan string)
	serve(ctx, w, func(back *pvnet.Device) {
		err := back.Listen(ctx, func(f pvnet.Frame) {
			heard <- fmt.Sprintf("domain %d sent %d bytes: %s", back.Peer(), f.Len(), bytes.TrimRight(f.Bytes()[14:], "\x00"))
		})
		if err != nil {
			log.Print(err)
		}
	})

	card, err := pvnet.Connect(ctx, w.Guests[0], "0", pvnet.Config{})
	check(err)
	defer card.Disconnect()
	frame := make([]byte, 60)
	copy(frame[14:], "hello")
	_, err = card.Write(frame)
	check(err)
	fmt.Println(<-heard)
	// Output: domain 2 sent 60 bytes: hello
}

// One goroutine owns both directions of a queue and sends every frame back to its sender,
// without a copy of its own and without an allocation: it sends the same frames that it
// receives into.
func ExampleRX_ReceiveInto() {
	ctx := context.Background()
	w := newWorld(ctx, 1)
	defer w.Close()
	serve(ctx, w, func(back *pvnet.Device) {
		rx, err := back.OwnRX(0)
		check(err)
		tx, err := back.OwnTX(0)
		check(err)
		var frames [32]pvnet.Frame
		held := 0 // we hold frames[:held]
		for {
			held += tx.AllocSize(frames[held:], 2048)
			n, err := rx.ReceiveInto(frames[:held])
			if err != nil {
				break // the vif is gone
			}
			for i := range frames[:n] {
				b := frames[i].Bytes()
				copy(b[:6], b[6:12]) // back to the sender
			}
			sent, _ := tx.SendWait(frames[:n])
			copy(frames[:], frames[sent:held])
			held -= sent
		}
		for i := range frames[:held] {
			frames[i].Release()
		}
	})

	card, err := pvnet.Connect(ctx, w.Guests[0], "0", pvnet.Config{})
	check(err)
	defer card.Disconnect()
	back := make(chan net.HardwareAddr)
	go card.Listen(ctx, func(f pvnet.Frame) { back <- append(net.HardwareAddr(nil), f.Bytes()[:6]...) })
	mac := card.MAC()
	frame := make([]byte, 60)
	copy(frame[6:], mac[:])
	_, err = card.Write(frame)
	check(err)
	fmt.Println("returned to", <-back)
	// Output: returned to 02:00:00:00:00:02
}

// A guest answers ARP requests for an address. Any program can speak its own protocol on
// Ethernet in this way.
func ExampleDevice_Write() {
	ctx := context.Background()
	w := newWorld(ctx, 1)
	defer w.Close()
	ours := [4]byte{192, 0, 2, 1}

	answers := make(chan pvnet.MAC)
	serve(ctx, w, func(back *pvnet.Device) {
		go back.Listen(ctx, func(f pvnet.Frame) { answers <- pvnet.MAC(f.Bytes()[22:28]) })
		ask := make([]byte, 60) // who has 192.0.2.1?
		copy(ask, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01")
		copy(ask[38:], ours[:])
		back.SetWriteDeadline(time.Now().Add(time.Minute)) // while the guest connects
		if _, err := back.Write(ask); err != nil {
			log.Print(err)
		}
	})

	card, err := pvnet.Connect(ctx, w.Guests[0], "0", pvnet.Config{})
	check(err)
	defer card.Disconnect()
	mac := card.MAC()
	go card.Listen(ctx, func(f pvnet.Frame) {
		ask := f.Bytes()
		if f.Len() < 42 || !bytes.Equal(ask[12:14], []byte{8, 6}) || ask[21] != 1 || [4]byte(ask[38:42]) != ours {
			return
		}
		answer := make([]byte, 60)
		copy(answer, ask[6:12])       // to the asking station
		copy(answer[6:], mac[:])      // from us
		copy(answer[12:], ask[12:20]) // ARP for IPv4 on Ethernet
		answer[21] = 2                // a reply
		copy(answer[22:], mac[:])
		copy(answer[28:], ours[:])
		copy(answer[32:], ask[22:32])
		if _, err := card.Write(answer); err != nil {
			log.Print(err)
		}
	})
	fmt.Println("192.0.2.1 is at", <-answers)
	// Output: 192.0.2.1 is at 02:00:00:00:00:02
}

// The counters of a device show how many frames it moved and lost, and why.
func ExampleDevice_Stats() {
	ctx := context.Background()
	w := newWorld(ctx, 1)
	defer w.Close()
	serve(ctx, w, func(*pvnet.Device) {})
	card, err := pvnet.Connect(ctx, w.Guests[0], "0", pvnet.Config{})
	check(err)
	for range 3 {
		_, err := card.Write(make([]byte, 100))
		check(err)
	}
	fmt.Println("sent:", card.Stats().TX)
	card.Disconnect() // the backend has not taken the frames
	tx := card.Stats().TX
	fmt.Println(tx.Lost(telemetry.DropDisconnected), "of", tx.Packets(), "were lost with the connection")
	// Output:
	// sent: 3 packets, 300 bytes
	// 3 of 3 were lost with the connection
}

// One goroutine serves the vifs of three guests. It sleeps while no guest sends, and
// never looks at the vifs of silent guests.
func ExamplePoller() {
	ctx := context.Background()
	w := newWorld(ctx, 3)
	defer w.Close()

	poller, err := pvnet.NewPoller(w.Driver, pvnet.PollerConfig{Wait: pvnet.Adaptive})
	check(err)
	defer poller.Close()

	// The receiving half of every vif that the toolstack makes goes into the Poller. It
	// may be added before the guest has connected.
	serve(ctx, w, func(d *pvnet.Device) {
		rx, err := d.OwnRX(0)
		check(err)
		check(poller.Add(rx, d))
	})
	for i, guest := range w.Guests {
		card, err := pvnet.Connect(ctx, guest, "0", pvnet.Config{})
		check(err)
		defer card.Disconnect()
		if i == 1 {
			continue // this guest is silent
		}
		frame := make([]byte, 60)
		frame[14] = byte(i)
		_, err = card.Write(frame)
		check(err)
	}

	var frames [32]pvnet.Frame
	from := map[byte]int{}
	for len(from) < 2 {
		ready, err := poller.Wait()
		check(err)
		for _, r := range ready { // one batch of each member
			if r.Err != nil {
				log.Printf("vif of domain %d: %v", r.Value.(*pvnet.Device).Peer(), r.Err)
				continue
			}
			n, _ := r.RX.Poll(frames[:])
			for i := range frames[:n] {
				from[frames[i].Bytes()[14]]++
			}
			r.RX.Release(frames[:n])
		}
	}
	fmt.Println(from)
	// Output: map[0:1 2:1]
}
