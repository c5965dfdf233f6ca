package pvnet_test

import (
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
)

// A busyDomain has a xenstore that is slow to answer each request.
type busyDomain struct {
	*emu.Domain
	each time.Duration
}

func (d busyDomain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := d.Domain.Store(ctx)
	return busyConn{c, d.each}, err
}

type busyConn struct {
	io.ReadWriteCloser
	each time.Duration
}

func (c busyConn) Write(b []byte) (int, error) {
	time.Sleep(c.each)
	return c.ReadWriteCloser.Write(b)
}

// On a busy machine each answer of xenstore may take long. Both ends still connect within
// the context of Connect, and neither makes the other close: Linux's netfront does not
// come back from that.
func TestASlowXenstoreOnlyTakesTime(t *testing.T) {
	for _, each := range []time.Duration{200 * time.Millisecond, 500 * time.Millisecond} {
		t.Run(each.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(t)
				fdom, bdom := l.domain(1), l.domain(2)
				v := l.add(toolstack.Vif{Front: 1, Back: 2})
				watch, err := l.tools.Watch(ctx(t), v.BackDir()+"/state")
				if err != nil {
					t.Fatal(err)
				}
				closed := make(chan bool, 1)
				go func() {
					ever := false
					for range watch.C() {
						watch.Paths()
						s := l.read(v.BackDir() + "/state")
						ever = ever || s == "5" || s == "6"
					}
					closed <- ever
				}()
				backs, _ := l.serve(busyDomain{bdom, each}, pvnet.ServeConfig{Hotplug: true})
				patience, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
				defer cancel()
				front, err := pvnet.Connect(patience, busyDomain{fdom, each}, "0", pvnet.Config{})
				if err != nil {
					t.Fatal(err)
				}
				<-backs
				watch.Close()
				if <-closed {
					t.Error("the backend closed meanwhile")
				}
				front.Disconnect()
			})
		})
	}
}

// A slow xenstore does not keep Connect beyond its context.
func TestConnectEndsInTimeWithASlowXenstore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		l.add(toolstack.Vif{Front: 1, Back: 2})
		l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		c, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		began := time.Now()
		if _, err := pvnet.Connect(c, busyDomain{fdom, 500 * time.Millisecond}, "0", pvnet.Config{}); err == nil {
			t.Fatal("it has not half of what it asks for by then")
		}
		if d := time.Since(began); d > 10*time.Second+connectGrace {
			t.Errorf("ended after %v", d)
		}
		time.Sleep(endTimeout) // the device still closes, with several slow requests
	})
}
