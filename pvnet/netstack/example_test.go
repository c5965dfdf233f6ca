package netstack_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/netip"
	"strings"

	"barevif/hypercall/anyxen"
	"barevif/pvnet"
	"barevif/pvnet/netstack"
	"barevif/pvnet/pvnettest"
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

// Both ends of a vif in one process, each with a TCP/IP stack: a test of a server has its client at
// the other end of the wire. In a test, pvnettest.New(t, ...) gives the devices and ends them.
func Example_bothEnds() {
	ctx := context.Background()
	front, back, end, err := pvnettest.Open(ctx, pvnet.Config{}, pvnet.Config{})
	check(err)
	defer end()
	guest, err := netstack.New(front, netstack.Config{Addr: netip.MustParsePrefix("10.9.0.2/24")})
	check(err)
	defer guest.Close()
	client, err := netstack.New(back, netstack.Config{Addr: netip.MustParsePrefix("10.9.0.1/24")})
	check(err)
	defer client.Close()

	// The server under test.
	l, err := guest.Listen("tcp", ":80")
	check(err)
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %s", r.RemoteAddr[:strings.LastIndex(r.RemoteAddr, ":")])
	}))

	web := http.Client{Transport: &http.Transport{DialContext: client.DialContext, DisableKeepAlives: true}}
	resp, err := web.Get("http://10.9.0.2/")
	check(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	check(err)
	fmt.Println(string(text))
	// Output: hello 10.9.0.1
}

// A guest that was told nothing: the toolstack, or DHCP and routers, give its address. On an
// emulated machine the domain is one of a "barevif host".
func ExampleConnect() {
	ctx := context.Background()
	domain, err := anyxen.Open(ctx, anyxen.Config{})
	check(err)
	stack, err := netstack.Connect(ctx, domain, "0", netstack.Config{})
	check(err)
	defer stack.Close()
	l, err := stack.Listen("tcp", ":80")
	check(err)
	log.Fatal(http.Serve(l, http.FileServer(http.Dir("."))))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
