package bridge_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/bridge"
	"barevif/pvnet/pvnettest"
)

// Two tenants and their router: the tenants reach the router, and not each other. A driver
// domain calls Add in the function that it gives to pvnet.Serve, with each vif's address from
// Device.Toolstack; here both ends of each vif are in this process.
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	b, err := bridge.New(bridge.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer b.Close()
	addrs := []pvnet.MAC{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}, {2, 0, 0, 0, 0, 3}}
	var guests []*pvnet.Device
	var ports []*bridge.Port
	for i, addr := range addrs {
		guest, ours, end, err := pvnettest.Open(ctx, pvnet.Config{}, pvnet.Config{})
		if err != nil {
			log.Fatal(err)
		}
		defer end()
		tenant := i < 2
		port, err := b.Add(ours, bridge.PortConfig{Guard: []pvnet.MAC{addr}, Isolated: tenant})
		if err != nil {
			log.Fatal(err)
		}
		guests, ports = append(guests, guest), append(ports, port)
	}

	send := func(from int, to pvnet.MAC, what string) {
		guests[from].Writev(to[:], addrs[from][:], []byte{0x88, 0xb5}, []byte(what))
	}
	send(0, addrs[1], "to the other tenant")
	send(0, addrs[2], "to the router")
	hearing, heard := context.WithCancel(ctx)
	guests[2].Listen(hearing, func(f pvnet.Frame) {
		fmt.Printf("%s\n", f.Bytes()[14:])
		heard()
	})
	fmt.Println("not passed on:", ports[0].Stats().Isolated)
	// Output:
	// to the router
	// not passed on: 1
}
