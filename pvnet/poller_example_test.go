package pvnet_test

import (
	"context"
	"fmt"
	"io"
	"log"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus"
	"barevif/xenbus/store"
	"barevif/xenbus/toolstack"
)

// One goroutine serves the vifs of three guests. While none has sent anything it sleeps, and
// it never looks at those that have not.
func ExamplePoller() {
	ctx := context.Background()
	xenstore := store.New(store.Config{})
	defer xenstore.Close()
	machine, err := emu.New(emu.Config{
		Store: func(dom hypercall.DomID, c io.ReadWriteCloser) { xenstore.ServeConn(c, dom) },
	})
	if err != nil {
		log.Fatal(err)
	}
	defer machine.Close()
	domain := func(id hypercall.DomID) *emu.Domain {
		xenstore.Introduce(id)
		d, err := machine.NewDomain(id)
		if err != nil {
			log.Fatal(err)
		}
		return d
	}
	tools, err := xenbus.Dial(ctx, domain(0).Store, xenbus.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer tools.Close()
	driver := domain(1)
	if err := toolstack.Home(ctx, tools, 1); err != nil {
		log.Fatal(err)
	}

	poller, err := pvnet.NewPoller(driver, pvnet.PollerConfig{Wait: pvnet.Adaptive})
	if err != nil {
		log.Fatal(err)
	}
	defer poller.Close()

	// Every vif that the toolstack makes gets its receiving half into the Poller. It may
	// be added before the guest has connected.
	serving, stop := context.WithCancel(ctx)
	served := make(chan error)
	go func() {
		served <- pvnet.Serve(serving, driver, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) {
			rx, err := d.OwnRX(0)
			if err == nil {
				err = poller.Add(rx, d)
			}
			if err != nil {
				log.Print(err)
			}
		})
	}()
	for id := hypercall.DomID(2); id <= 4; id++ {
		guest := domain(id)
		if err := toolstack.Home(ctx, tools, id); err != nil {
			log.Fatal(err)
		}
		if err := toolstack.Add(ctx, tools, toolstack.Vif{Front: id, Back: 1, MAC: [6]byte{2, 0, 0, 0, 0, byte(id)}}); err != nil {
			log.Fatal(err)
		}
		card, err := pvnet.Connect(ctx, guest, "0", pvnet.Config{})
		if err != nil {
			log.Fatal(err)
		}
		defer card.Disconnect()
		if id == 3 {
			continue // says nothing
		}
		frame := make([]byte, 60)
		frame[14] = byte(id)
		if _, err := card.Write(frame); err != nil {
			log.Fatal(err)
		}
	}

	var frames [32]pvnet.Frame
	from := map[byte]int{}
	for len(from) < 2 {
		ready, err := poller.Wait()
		if err != nil {
			log.Fatal(err)
		}
		for _, r := range ready { // a batch of each
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
	stop()
	<-served
	// Output: map[2:1 4:1]
}
