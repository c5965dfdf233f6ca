// Package labtest makes emulated machines with a xenstore and a toolstack. It is for
// tests alone.
package labtest

import (
	"context"
	"io"
	"runtime"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
)

// Limit bounds every wait of a test; no test comes near it.
const Limit = 2 * time.Minute

// A Lab is an emulated machine with a xenstore and a toolstack. It ends with its test,
// and fails the test if goroutines or pages are left.
type Lab struct {
	*emu.Machine
	Store *server.Store
	Dom0  *emu.Domain
	Tools *xenstore.Client // the toolstack's client, in domain 0

	// Dirty says that the test leaves pages behind on purpose.
	Dirty bool

	t testing.TB
}

// New makes a machine. It adds the xenstore to cfg.
func New(t testing.TB, cfg emu.Config) *Lab {
	t.Helper()
	before := runtime.NumGoroutine()
	l := &Lab{Store: server.New(server.Config{}), t: t}
	cfg.Store = func(dom hypercall.DomID, c io.ReadWriteCloser) { l.Store.ServeConn(c, dom) }
	cfg.Admit = l.Store.Admit
	var err error
	if l.Machine, err = emu.New(cfg); err != nil {
		t.Fatal(err)
	}
	l.OnDeath(l.Store.DomainDied)
	t.Cleanup(func() {
		if l.Tools != nil {
			l.Tools.Close()
		}
		if !l.Dirty {
			if err := Comes(l.CheckClean); err != nil {
				t.Error(err)
			}
		}
		l.Machine.Close()
		l.Store.Close()
		for end := time.Now().Add(Limit); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				buf := make([]byte, 1<<16)
				t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			}
		}
	})
	l.Dom0 = l.Domain(0)
	if l.Tools, err = xenstore.Dial(l.context(), l.Dom0.Store, xenstore.Config{Pipeline: 8}); err != nil {
		t.Fatal(err)
	}
	return l
}

// Comes waits until ok returns no error, at most a minute, and returns the last error.
// It is needed for pages: a device may end a moment before its listener's goroutine gives
// back a frame. A leaked page never comes back.
func Comes(ok func() error) (err error) {
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if err = ok(); err == nil || time.Now().After(end) {
			return err
		}
	}
}

func (l *Lab) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	l.t.Cleanup(cancel)
	return ctx
}

// Domain makes a domain and its home directory in xenstore.
func (l *Lab) Domain(id hypercall.DomID) *emu.Domain {
	l.t.Helper()
	d, err := l.NewDomain(id)
	if err != nil {
		l.t.Fatal(err)
	}
	l.Store.Introduce(id)
	if id != 0 {
		if err := toolstack.Home(l.context(), l.Tools, id); err != nil {
			l.t.Fatal(err)
		}
	}
	return d
}

// Add adds a vif. It chooses a MAC if v has none.
func (l *Lab) Add(v toolstack.Vif) toolstack.Vif {
	l.t.Helper()
	if v.MAC == ([6]byte{}) {
		v.MAC = [6]byte{0, 0x16, 0x3e, 0, byte(v.Front), byte(v.ID)}
	}
	if err := toolstack.Add(l.context(), l.Tools, v); err != nil {
		l.t.Fatal(err)
	}
	return v
}
