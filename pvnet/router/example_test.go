package router_test

import (
	"fmt"
	"net/netip"
	"time"

	"barevif/pvnet/router"
)

// A router between one client and an uplink. The frame would come from the client's vif.
func ExampleRouter() {
	r, err := router.New(router.Limits{})
	if err != nil {
		fmt.Println(err)
		return
	}
	const client, uplink = 1, 2
	err = r.Configure(router.Config{
		Ports: []router.Port{
			{ID: client, Name: "work", MAC: [6]byte{2, 0, 0, 0, 0, 1}, Addrs: []netip.Prefix{netip.MustParsePrefix("10.1.0.1/24")},
				Sources: []netip.Prefix{netip.MustParsePrefix("10.1.0.5/32")}},
			{ID: uplink, Name: "uplink", MAC: [6]byte{2, 0, 0, 0, 0, 2}, Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24")}, Masquerade: true},
		},
		Routes: []router.Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Out: uplink, Via: netip.MustParseAddr("192.0.2.1")}},
		Rules: []router.Rule{
			{Name: "dns", In: router.Match{Ports: []router.PortID{client}}, Protocols: []uint8{17}, DstPorts: []router.PortRange{{First: 53, Last: 53}}, Action: router.Accept},
		},
		ClampMSS: true,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	frame := []byte{
		2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 1, 1, 8, 0, // to the router, from the client: IPv4
		0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0xae, 0x96, 10, 1, 0, 5, 192, 0, 2, 53, // UDP
		0x10, 0, 0, 53, 0, 8, 0, 0,
	}
	started := time.Now()
	batch := []router.Packet{{In: client, Head: frame, Total: len(frame)}}
	r.Process(time.Since(started), batch)
	p := &batch[0]
	fmt.Println(p.Verdict, p.Next, "at port", p.Out) // the caller asks for it by AppendSolicit

	if err := r.Learn(time.Since(started), uplink, p.Next, [6]byte{2, 0, 0, 0, 2, 1}); err != nil {
		fmt.Println(err)
		return
	}
	r.Process(time.Since(started), batch)
	fmt.Println(p.Verdict, "from", netip.AddrFrom4([4]byte(frame[26:30])), "with TTL", frame[22])
	// Output:
	// neighbour 192.0.2.53 at port 2
	// forward from 192.0.2.2 with TTL 63
}
