package storetrace

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"reflect"
	"sync"
	"testing"

	"barevif/hypercall"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire"
)

// A rig is a store with traced clients.
type rig struct {
	t     *testing.T
	store *server.Store
	mu    sync.Mutex
	told  [][]Change // guarded by mu
}

func (r *rig) client(dom hypercall.DomID) *xenstore.Client {
	r.store.Introduce(dom)
	c, err := xenstore.Dial(r.t.Context(), func(context.Context) (io.ReadWriteCloser, error) {
		ours, theirs := net.Pipe()
		go r.store.ServeConn(Tap(theirs, dom, func(c []Change) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.told = append(r.told, c)
		}), dom)
		return ours, nil
	}, xenstore.Config{Pipeline: 8})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// want checks the changes since the last call.
func (r *rig) want(all ...[]Change) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !reflect.DeepEqual(r.told, all) && len(r.told)+len(all) > 0 {
		r.t.Errorf("told %v, want %v", r.told, all)
	}
	r.told = nil
}

func TestChangesAreToldOnceTheyHappened(t *testing.T) {
	r := &rig{t: t, store: server.New(server.Config{})}
	defer r.store.Close()
	ctx := t.Context()
	tools := r.client(0)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(tools.Write(ctx, "/local/domain/1/device", "x"))
	r.want([]Change{{By: 0, Path: "/local/domain/1/device", Value: "x"}})
	guest := r.client(1)
	must(tools.SetPerms(ctx, "/local/domain/1/device", xenstore.Perm{Dom: 1, Access: xenstore.None}))
	if _, err := tools.Read(ctx, "/local/domain/1/device"); err != nil {
		t.Fatal(err)
	}
	r.want()

	must(guest.Write(ctx, "device/vif", "1"))
	must(guest.Mkdir(ctx, "device/dir"))
	must(guest.Remove(ctx, "device/vif"))
	r.want(
		[]Change{{By: 1, Path: "/local/domain/1/device/vif", Value: "1"}},
		[]Change{{By: 1, Path: "/local/domain/1/device/dir"}},
		[]Change{{By: 1, Path: "/local/domain/1/device/vif", Removed: true}},
	)
	if err := guest.Write(ctx, "/local/domain/0/forbidden", "1"); !errors.Is(err, xenstore.ErrAccess) {
		t.Fatal(err)
	}
	r.want()

	both := []Change{
		{By: 1, Path: "/local/domain/1/device/a", Value: "1"},
		{By: 1, Path: "/local/domain/1/device/b", Value: ""},
	}
	runs := 0
	must(guest.Transact(ctx, func(tx xenstore.Tx) error {
		if runs++; runs == 1 { // a conflict: the first run is undone
			if _, err := tx.Read("device/a"); !errors.Is(err, xenstore.ErrNotFound) {
				return err
			}
			must(tools.Write(ctx, "/local/domain/1/device/a", "0"))
		}
		if err := tx.Write("device/a", "1"); err != nil {
			return err
		}
		return tx.Write("device/b", "")
	}))
	if runs != 2 {
		t.Errorf("%d runs of the transaction", runs)
	}
	r.want([]Change{{By: 0, Path: "/local/domain/1/device/a", Value: "0"}}, both)

	stop := errors.New("stop")
	if err := guest.Transact(ctx, func(tx xenstore.Tx) error {
		if err := tx.Write("device/a", "9"); err != nil {
			return err
		}
		return stop
	}); err != stop {
		t.Fatal(err)
	}
	r.want()
}

// duplex reads and writes two buffers.
type duplex struct {
	io.Reader
	io.Writer
}

func (duplex) Close() error { return nil }

func TestATraceBearsWhatIsNoMessage(t *testing.T) {
	ask, err := wire.Append(nil, wire.Header{Op: wire.Write, ReqID: 1}, "/a\x00b")
	if err != nil {
		t.Fatal(err)
	}
	garbage := bytes.Repeat([]byte{0xff}, 64)
	for name, in := range map[string][]byte{
		"garbage first":  append(bytes.Clone(garbage), ask...),
		"garbage second": append(bytes.Clone(ask), garbage...),
		"cut":            ask[:len(ask)-1],
		"many":           bytes.Repeat(ask, maxWaiting+5),
	} {
		var told int
		var out bytes.Buffer
		c := Tap(duplex{bytes.NewReader(in), &out}, 3, func(ch []Change) {
			told++
			if len(ch) != 1 || ch[0] != (Change{By: 3, Path: "/a", Value: "b"}) {
				t.Errorf("%s: %v", name, ch)
			}
		})
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, in) {
			t.Errorf("%s: %d bytes passed of %d, %v", name, len(got), len(in), err)
		}
		answer, err := wire.Append(nil, wire.Header{Op: wire.Write, ReqID: 1}, "OK\x00")
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range append(answer, answer...) {
			if _, err := c.Write([]byte{b}); err != nil {
				t.Fatal(err)
			}
		}
		want := map[string]int{"garbage second": 1}[name]
		if told != want || out.Len() != 2*len(answer) {
			t.Errorf("%s: told %d times, want %d; %d bytes passed", name, told, want, out.Len())
		}
	}
}
