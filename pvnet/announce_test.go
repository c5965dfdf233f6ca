package pvnet

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"testing"

	"barevif/hypercall/emu"
	"barevif/pvnet/packet"
	"barevif/xenbus"
)

func TestAnnounceAtEachLinkUp(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7"), {}}
	ctx, stop := context.WithCancelCause(context.Background())
	heard := make(chan []byte, 16)
	listening, mute := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() {
		done <- p.back.Listen(listening, func(f Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			heard <- b
		})
	}()
	p.front.identify(MAC{0, 0x16, 0x3e, 1, 2, 3}, 1500, true)
	go func() { done <- p.front.Announce(ctx, addrs...) }()
	var macs []MAC
	for range 2 {
		for _, addr := range addrs[:2] {
			b := <-heard
			mac := MAC(b[6:12])
			if want := packet.AppendAnnouncement(nil, mac, addr); !bytes.Equal(b, want) {
				t.Errorf("%x, want %x", b, want)
			}
			macs = append(macs, mac)
		}
		p.front.quiesce(p.conns[0], "the link is down")
		p.front.identify(MAC{0, 0x16, 0x3e, 7, 7, 7}, 1500, true)
		p.front.bringUp(p.conns[0], p.bdom.ID(), xenbus.Connected)
	}
	if macs[2] != (MAC{0, 0x16, 0x3e, 7, 7, 7}) {
		t.Errorf("addresses of the card: %v", macs)
	}
	cause := errors.New("enough")
	stop(cause)
	if err := <-done; err != cause {
		t.Error(err)
	}
	mute()
	<-done
}
