package forward_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/pvnet/pvnettest"
)

// vifs makes two vifs, each with both ends in this process. A program has its own end of each,
// from pvnet.Connect or pvnet.Serve.
func vifs(ctx context.Context) (guests, ours [2]*pvnet.Device, end func()) {
	var ends [2]func()
	for i := range guests {
		var err error
		if guests[i], ours[i], ends[i], err = pvnettest.Open(ctx, pvnet.Config{}, pvnet.Config{}); err != nil {
			log.Fatal(err)
		}
	}
	return guests, ours, func() { ends[0](); ends[1]() }
}

// Two guests are connected back to back.
func ExampleJoin() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	guests, ours, end := vifs(ctx)
	defer end()

	joining, stop := context.WithCancel(ctx)
	joined := make(chan error)
	go func() { joined <- forward.Join(joining, ours[0], ours[1]) }()

	guests[0].Write(append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5}, "hello"...))
	hearing, heard := context.WithCancel(ctx)
	guests[1].Listen(hearing, func(f pvnet.Frame) {
		fmt.Printf("%s\n", f.Bytes()[14:])
		heard()
	})
	stop()
	fmt.Println(<-joined)
	// Output:
	// hello
	// context canceled
}

// A filter between two guests: it looks at each frame before it sends it on.
func ExampleSender() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	guests, ours, end := vifs(ctx)
	defer end()

	sender, err := forward.NewSender(ours[1], forward.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer sender.Close()
	in, err := sender.Input(forward.NewSource(0))
	if err != nil {
		log.Fatal(err)
	}
	go forward.Receive(ctx, ours[0], func(_ int, frames []pvnet.Frame) (lost int, err error) {
		passed := frames[:0]
		for i := range frames {
			if string(frames[i].Bytes()[14:]) == "secret" {
				frames[i].Release()
				continue
			}
			passed = append(passed, frames[i])
		}
		return in.Send(passed)
	})

	ethernet := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5}
	guests[0].Writev(ethernet, []byte("secret"))
	guests[0].Writev(ethernet, []byte("news"))
	hearing, heard := context.WithCancel(ctx)
	guests[1].Listen(hearing, func(f pvnet.Frame) {
		fmt.Printf("%s\n", f.Bytes()[14:])
		heard()
	})
	// Output:
	// news
}
