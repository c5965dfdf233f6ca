package pvnet

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/xenbus/xenstore/server/labtest"
)

// When their own domain is gone, waiting calls return instead of retrying for ever.
func TestCallsEndWithTheirOwnDomain(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, rx := own(t, p.back)
	done := make(chan error, 2)
	go func() {
		_, err := rx.Receive(make([]Frame, 1))
		done <- err
	}()
	go func() {
		var f [1]Frame
		for { // until the ring is full, and beyond
			if _, err := tx.AllocWait(f[:], 60); err != nil {
				done <- err
				return
			}
			if _, err := tx.SendWait(f[:]); err != nil {
				f[0].Release()
				done <- err
				return
			}
		}
	}()
	comes(t, "the wait of both halves", func() bool { return waits(&rx.half) && waits(&tx.half) })
	p.bdom.Destroy()
	for range 2 {
		select {
		case err := <-done:
			var unknown *UnknownError
			if !errors.As(err, &unknown) || !errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("ended with %v", err)
			}
		case <-time.After(labtest.Limit):
			t.Fatal("a call goes on")
		}
	}
}
