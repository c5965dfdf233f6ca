package server_test

import (
	"fmt"
	"testing"

	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire"
)

// BenchmarkWrite changes a node while there are watches on other nodes.
func BenchmarkWrite(b *testing.B) {
	for _, watches := range []int{0, 1000} {
		b.Run(fmt.Sprint("watches=", watches), func(b *testing.B) {
			e := newEmbedded(b, server.Config{})
			c := e.dom0()
			for i := range watches {
				c.Want(wire.Watch, 0, z(fmt.Sprint("/local/domain/", i, "/device"), "t"), ok)
			}
			for b.Loop() {
				if err := e.Write("/local/domain/0/backend/vif/3/0/state", "4"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRoundTrip measures a request and its reply over a unix socket.
func BenchmarkRoundTrip(b *testing.B) {
	c := newEmbedded(b, server.Config{}).dom0()
	for b.Loop() {
		c.Want(wire.Read, 0, z("/tool"), "")
	}
}
