package hostile

import (
	"bytes"
	"errors"
	"testing"

	"barevif/pvnet"
	"barevif/pvnet/bridge"
	"barevif/test/hostile/raw"
)

// A neighbour is a guest at a port of a bridge.
type neighbour struct {
	*guest
	port *bridge.Port
}

func (l *lab) neighbour(b *bridge.Bridge) *neighbour {
	l.t.Helper()
	g := l.newGuest()
	g.attach()
	port, err := b.Add(g.dev, bridge.PortConfig{})
	if err != nil {
		l.t.Fatal(err)
	}
	return &neighbour{g, port}
}

// broadcast sends n frames to everybody and waits for the answers.
func (n *neighbour) broadcast(frames int) (sent [][]byte) {
	n.l.t.Helper()
	for i := range frames {
		f := pattern(200, int(n.TxProd))
		copy(f, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1})
		copy(n.Pages.Page(i), f)
		n.Put(n.Req(i, 0, 200, 0).Words())
		sent = append(sent, f)
	}
	n.Push()
	n.awaitAnswers(frames)
	return sent
}

// hears requires that n gets what from broadcasts.
func (n *neighbour) hears(from *neighbour, frames int) {
	n.l.t.Helper()
	n.Post(frames)
	at := int(n.RxCons)
	sent := from.broadcast(frames)
	for i, rsp := range n.awaitReceived(frames) {
		page := n.Posted.Page((at + i) % raw.Size % 32)
		if rsp.Status != 200 || !bytes.Equal(page[:200], sent[i]) {
			n.l.t.Fatalf("frame %d of %d came as %v", i, frames, rsp)
		}
	}
}

// A guest that breaks the protocol, or goes in the middle of it, ends its own port of a bridge
// and nothing else. Nothing of it is left, neither its pages nor frames that wait for it.
func TestAttackersOfABridgeEndTheirPort(t *testing.T) {
	l := newServingLab(t)
	b, err := bridge.New(bridge.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	speaker, hearer := l.neighbour(b), l.neighbour(b)
	hearer.hears(speaker, 10)
	for _, attack := range []struct {
		name   string
		broken bool // the port ends with a PeerError
		do     func(*neighbour)
	}{
		{"impossible requests to send", true, func(n *neighbour) {
			n.Tx.Store(raw.ReqProd, n.TxProd+1<<16)
			n.TxPort.Notify()
		}},
		{"impossible requests to receive", true, func(n *neighbour) {
			n.Rx.Store(raw.ReqProd, n.RxProd+1<<16)
			hearer.hears(speaker, 10) // the bridge has something for it
		}},
		{"a frame in many slots and an impossible request behind it", true, func(n *neighbour) {
			for i := range 10 {
				n.Put(n.Req(i, 0, 4096, raw.TxMore).Words())
			}
			n.Push()
			n.Tx.Store(raw.ReqProd, n.TxProd+1<<20)
			n.TxPort.Notify()
		}},
		{"it takes nothing, sends, and goes", false, func(n *neighbour) {
			hearer.hears(speaker, 30)
			hearer.hears(speaker, 30)
			for i := range 20 {
				n.Put(n.Req(i, 0, 100, 0).Words()) // invalid: without a source address
			}
			n.Push()
		}},
	} {
		t.Run(attack.name, func(t *testing.T) {
			n := l.neighbour(b)
			hearer.hears(speaker, 5)
			attack.do(n)
			if attack.broken {
				wait(t, n.port.Done())
				var broken *pvnet.PeerError
				if err := n.port.Err(); !errors.As(err, &broken) {
					t.Errorf("the port ended with %v", err)
				}
				n.awaitBackend("5", "6")
				n.setState("6")
				wait(t, n.dev.Done())
				n.removeVif()
			} else {
				n.disconnect()
			}
			wait(t, n.port.Done())
			hearer.hears(speaker, 20)
			if len(b.Ports()) != 2 {
				t.Errorf("%d ports", len(b.Ports()))
			}
		})
	}
	if s := speaker.port.Stats(); s.Flooded != s.Received {
		t.Errorf("%+v", s)
	}
	hearer.disconnect()
	speaker.disconnect()
}
