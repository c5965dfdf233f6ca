package netstack_test

import (
	"context"
	"fmt"
	"log"
	"net/netip"

	"barevif/pvnet"
	"barevif/pvnet/netstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// A guest answers datagrams. Both ends of its vif have a TCP/IP stack of their own, and no
// kernel's is involved.
func ExampleStack_ListenPacket() {
	ctx := context.Background()
	w, err := labtest.NewWorld(ctx, 1)
	check(err)
	defer w.Close()

	// The driver domain asks over its end of the vif.
	serving, stop := context.WithCancel(ctx)
	served := make(chan error)
	listening, answers := make(chan struct{}), make(chan string)
	go func() {
		served <- pvnet.Serve(serving, w.Driver, pvnet.ServeConfig{Hotplug: true}, func(back *pvnet.Device) {
			stack, err := netstack.New(back, netstack.Config{Addr: netip.MustParsePrefix("10.9.0.1/24")})
			check(err)
			defer stack.Close()
			<-listening
			conn, err := stack.Dial("udp", "10.9.0.2:7")
			check(err)
			defer conn.Close()
			_, err = conn.Write([]byte("hello"))
			check(err)
			b := make([]byte, 100)
			n, err := conn.Read(b)
			check(err)
			answers <- string(b[:n])
		})
	}()

	// The guest echoes on UDP port 7.
	card, err := pvnet.Connect(ctx, w.Guests[0], "0", pvnet.Config{Offload: true})
	check(err)
	defer card.Disconnect()
	stack, err := netstack.New(card, netstack.Config{Addr: netip.MustParsePrefix("10.9.0.2/24")})
	check(err)
	defer stack.Close()
	echo, err := stack.ListenPacket("udp", ":7")
	check(err)
	close(listening)
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := echo.ReadFrom(b)
			if err != nil {
				return // the stack was closed
			}
			echo.WriteTo(b[:n], from)
		}
	}()

	fmt.Println(<-answers)
	stop()
	<-served
	// Output: hello
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
