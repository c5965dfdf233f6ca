package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/wire"
)

// A vif is a device as the toolstack makes it.
type vif struct {
	r           *rig
	tools       *xenstore.Client // domain 0
	front, back hypercall.DomID
	id          string
}

func (v vif) frontDir() string {
	return fmt.Sprintf("/local/domain/%d/device/vif/%s", v.front, v.id)
}

func (v vif) backDir() string {
	return fmt.Sprintf("/local/domain/%d/backend/vif/%d/%s", v.back, v.front, v.id)
}

// plug writes both directories in one transaction, with libxl's permissions
// (tools/libs/light/libxl_device.c). skip lists keys to omit, by full path.
func (v vif) plug(skip ...string) {
	v.r.Helper()
	front, back := v.frontDir(), v.backDir()
	keys := [][2]string{
		{front + "/backend", back}, {front + "/backend-id", fmt.Sprint(v.back)},
		{front + "/state", "1"}, {front + "/handle", v.id}, {front + "/mac", "00:16:3e:00:00:01"},
		{back + "/frontend", front}, {back + "/frontend-id", fmt.Sprint(v.front)},
		{back + "/online", "1"}, {back + "/state", "1"}, {back + "/hotplug-status", ""},
	}
	v.r.must(v.tools.Transact(v.r.ctx, func(tx xenstore.Tx) error {
		for dir, perms := range map[string][]xenstore.Perm{
			front: {{Dom: v.front, Access: xenstore.None}, {Dom: v.back, Access: xenstore.ReadOnly}},
			back:  {{Dom: v.back, Access: xenstore.None}, {Dom: v.front, Access: xenstore.ReadOnly}},
		} {
			if err := tx.Mkdir(dir); err != nil {
				return err
			}
			if err := tx.SetPerms(dir, perms...); err != nil {
				return err
			}
		}
		for _, kv := range keys {
			if slices.Contains(skip, kv[0]) {
				continue
			}
			if err := tx.Write(kv[0], kv[1]); err != nil {
				return err
			}
			perms := []xenstore.Perm{{Dom: v.front, Access: xenstore.None}, {Dom: v.back, Access: xenstore.ReadOnly}}
			if strings.HasPrefix(kv[0], back) {
				perms = []xenstore.Perm{{Dom: v.back, Access: xenstore.None}, {Dom: v.front, Access: xenstore.ReadOnly}}
			}
			if err := tx.SetPerms(kv[0], perms...); err != nil {
				return err
			}
		}
		return nil
	}))
}

func (v vif) unplug() {
	v.r.Helper()
	v.r.must(v.tools.Transact(v.r.ctx, func(tx xenstore.Tx) error {
		if err := tx.Remove(v.frontDir()); err != nil {
			return err
		}
		return tx.Remove(v.backDir())
	}))
}

// vif plugs device id of domain 7 with its backend in domain back, and connects both
// domains.
func (r *rig) vif(back hypercall.DomID, id string) (v vif, front, backend *xenstore.Client) {
	r.Helper()
	tools := r.client(0)
	front, backend = r.client(7), tools
	if back != 0 {
		backend = r.client(back)
	}
	v = vif{r, tools, 7, back, id}
	v.plug()
	return v, front, backend
}

func (r *rig) closes(d *xenbus.Device) {
	r.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		d.Close(ctx)
	})
}

func (r *rig) frontend(c *xenstore.Client, id string) *xenbus.Device {
	r.Helper()
	d, err := xenbus.OpenFrontend(r.ctx, c, "vif", id)
	r.must(err)
	r.closes(d)
	return d
}

func (r *rig) backend(c *xenstore.Client, front hypercall.DomID, id string) *xenbus.Device {
	r.Helper()
	d, err := xenbus.OpenBackend(r.ctx, c, "vif", front, id)
	r.must(err)
	r.closes(d)
	return d
}

// await waits for a Change that ok accepts.
func (r *rig) await(d *xenbus.Device, ok func(xenbus.Change) bool) xenbus.Change {
	r.Helper()
	if ch := d.Current(); ok(ch) {
		return ch
	}
	ch, err := d.Await(r.ctx, ok)
	r.must(err)
	return ch
}

// drive runs a device as its owner would, until stop accepts a step or the device has
// finished.
func (r *rig) drive(d *xenbus.Device, f *xenbus.Facts, stop func(xenbus.Step) bool) error {
	for {
		ch, err := d.Await(r.ctx, func(xenbus.Change) bool { return true })
		if err != nil {
			return err
		}
		for {
			f.Change = ch
			step := xenbus.Next(d.Role(), *f)
			switch step.Do {
			case xenbus.Connect:
				f.Attached = f.Generation
			case xenbus.Release:
				f.Attached = 0
			}
			if step.State != xenbus.Unknown {
				if err := d.SetState(r.ctx, step.State); err != nil {
					return err
				}
			}
			if stop(step) || step.Do == xenbus.Finish {
				return nil
			}
			if step.Do != xenbus.Release || step.State != xenbus.Unknown {
				break
			}
		}
	}
}

func running(s xenbus.Step) bool  { return s == xenbus.Step{Do: xenbus.Run} }
func finished(s xenbus.Step) bool { return s.Do == xenbus.Finish }

func frontendIsFoundOrThoseThatExistAreNamed(t *testing.T, r *rig) {
	v, front, _ := r.vif(0, "0")
	for _, id := range []string{"2", "10"} {
		v.id = id
		v.plug()
	}
	ids, err := xenbus.Frontends(r.ctx, front, "vif")
	r.must(err)
	if !slices.Equal(ids, []string{"0", "2", "10"}) {
		t.Errorf("frontends %q", ids)
	}
	if ids, err := xenbus.Frontends(r.ctx, front, "vbd"); len(ids) != 0 || err != nil {
		t.Errorf("frontends of another type: %q, %v", ids, err)
	}
	for _, id := range []string{"1", "", "00", "-1", "0x0", "0/state", "../0", "4294967296", "eth0", strings.Repeat("1", 5000)} {
		_, err := xenbus.OpenFrontend(r.ctx, front, "vif", id)
		var absent *xenbus.NoDeviceError
		if !errors.As(err, &absent) || !slices.Equal(absent.Have, ids) || !errors.Is(err, xenstore.ErrNotFound) {
			t.Errorf("id %.20q: %v", id, err)
		}
	}
	for _, typ := range []string{"", "vif/0", "..", "v f"} {
		if _, err := xenbus.OpenFrontend(r.ctx, front, typ, "0"); err == nil {
			t.Errorf("type %q is taken", typ)
		}
	}
	d := r.frontend(front, "10")
	if dir, dom := d.Peer(); dir != v.backDir() || dom != 0 || d.Dir() != "device/vif/10" || d.ID() != "10" {
		t.Errorf("peer %s of domain %d", dir, dom)
	}
	_, err = xenbus.OpenBackend(r.ctx, r.client(0), "vif", 7, "3")
	var absent *xenbus.NoDeviceError
	if !errors.As(err, &absent) || len(absent.Have) != 3 {
		t.Errorf("backend that is not there: %v", err)
	}
}

func halfWrittenDirectoryIsWaitedFor(t *testing.T, r *rig) {
	v, front, back := r.vif(0, "0")
	asFront := func(ctx context.Context, id string) (*xenbus.Device, error) {
		return xenbus.OpenFrontend(ctx, front, "vif", id)
	}
	asBack := func(ctx context.Context, id string) (*xenbus.Device, error) {
		return xenbus.OpenBackend(ctx, back, "vif", 7, id)
	}
	// Each key is missing in a vif of its own. All are waited for at the same time, so that the
	// test is quick and the time is enough to begin each wait on a slow machine.
	var waits sync.WaitGroup
	defer waits.Wait() // also if a vif cannot be plugged
	var late []func()
	for i, l := range []struct {
		dir  func(vif) string
		key  string
		open func(ctx context.Context, id string) (*xenbus.Device, error)
	}{
		{vif.frontDir, "backend-id", asFront},
		{vif.frontDir, "backend", asFront},
		{vif.frontDir, "state", asFront},
		{vif.backDir, "frontend", asFront},
		{vif.backDir, "frontend", asBack},
		{vif.backDir, "frontend-id", asBack},
		{vif.frontDir, "state", asBack},
	} {
		v := v
		v.id = fmt.Sprint(1 + i)
		path := l.dir(v) + "/" + l.key
		v.plug(path)
		waits.Go(func() {
			short, cancel := context.WithTimeout(r.ctx, 3*time.Second)
			defer cancel()
			_, err := l.open(short, v.id)
			var wait *xenbus.WaitError
			if !errors.As(err, &wait) || !errors.Is(err, context.DeadlineExceeded) || len(wait.Missing) != 1 ||
				!strings.HasSuffix(path, wait.Missing[0]) {
				t.Errorf("without %s: %v", path, err)
			}
		})
		late = append(late, func() {
			opened := make(chan error)
			go func() {
				d, err := l.open(r.ctx, v.id)
				if err == nil {
					err = d.Close(r.ctx)
				}
				opened <- err
			}()
			values := map[string]string{
				"backend-id": "0", "backend": v.backDir(), "state": "1", "frontend": v.frontDir(), "frontend-id": "7",
			}
			r.must(v.tools.Write(r.ctx, path, values[l.key]))
			if err := <-opened; err != nil {
				t.Errorf("%s came late: %v", path, err)
			}
			v.unplug()
		})
	}
	waits.Wait()
	for _, comes := range late {
		comes()
	}

	// The frontend's domain, and its directory with it, was gone before the backend looked.
	v.id = "1"
	v.plug(v.frontDir() + "/state")
	opened := make(chan *xenbus.Device, 1)
	go func() {
		d, err := asBack(r.ctx, v.id)
		if err != nil {
			t.Errorf("a vif that is taken away: %v", err)
		}
		opened <- d
	}()
	r.must(v.tools.Remove(r.ctx, v.frontDir()))
	r.must(v.tools.Write(r.ctx, v.backDir()+"/online", "0"))
	if d := <-opened; d != nil {
		r.closes(d)
		r.await(d, func(ch xenbus.Change) bool { return ch.Vanished && !ch.Online })
	}
}

func directoriesThatContradictAreRefused(t *testing.T, r *rig) {
	v, front, back := r.vif(3, "0")
	tools := v.tools
	var bad *xenstore.ValueError
	for _, c := range []struct{ key, value string }{
		{v.frontDir() + "/backend-id", "4"},
		{v.frontDir() + "/backend-id", "-1"},
		{v.frontDir() + "/backend-id", "65536"},
		{v.frontDir() + "/backend-id", "3 "},
		{v.frontDir() + "/backend", "/local/domain/4/backend/vif/7/0"},
		{v.frontDir() + "/backend", "/local/domain/3/backend"},
		{v.frontDir() + "/backend", "/local/domain/3/backend/vif/7/0/../1"},
		{v.frontDir() + "/backend", "/local/domain/3/backend/vif/7/0/"},
		{v.frontDir() + "/backend", "/local/domain/3/backend/vif/seven/0"},
		{v.frontDir() + "/backend", "/local/domain/3/device/vif/0"},
		{v.frontDir() + "/backend", strings.Repeat("/x", 900)},
		{v.frontDir() + "/backend", ""},
		{v.backDir() + "/frontend", "/local/domain/7/device/vif/1"},
		{v.backDir() + "/frontend", "/local/domain/8/device/vif/0"},
		{v.backDir() + "/frontend-id", "8"},
	} {
		was := r.read(tools, c.key)
		r.must(tools.Write(r.ctx, c.key, c.value))
		if _, err := xenbus.OpenFrontend(r.ctx, front, "vif", "0"); !errors.As(err, &bad) {
			t.Errorf("frontend, %s = %.40q: %v", c.key, c.value, err)
		}
		r.must(tools.Write(r.ctx, c.key, was))
	}
	for _, c := range []struct{ key, value string }{
		{v.backDir() + "/frontend-id", "8"},
		{v.backDir() + "/frontend-id", "x"},
		{v.backDir() + "/frontend", "/local/domain/8/device/vif/0"},
		{v.backDir() + "/frontend", "/local/domain/7"},
		{v.backDir() + "/frontend", "/local/domain/3/backend/vif/7/0"},
	} {
		was := r.read(tools, c.key)
		r.must(tools.Write(r.ctx, c.key, c.value))
		if _, err := xenbus.OpenBackend(r.ctx, back, "vif", 7, "0"); !errors.As(err, &bad) {
			t.Errorf("backend, %s = %.40q: %v", c.key, c.value, err)
		}
		r.must(tools.Write(r.ctx, c.key, was))
	}
	r.frontend(front, "0")
	r.backend(back, 7, "0")
}

// A path of another depth than that of a vif's directory is refused, whatever the
// directory holds.
func pathsOfAnotherDepthAreRefused(t *testing.T, r *rig) {
	v, front, back := r.vif(3, "0")
	tools := v.tools
	refused := func(key, value string, open func() (*xenbus.Device, error)) {
		t.Helper()
		was := r.read(tools, key)
		r.must(tools.Write(r.ctx, key, value))
		d, err := open()
		if bad := (*xenstore.ValueError)(nil); !errors.As(err, &bad) || !strings.HasSuffix(key, "/"+bad.Path) {
			t.Errorf("%s = %s: %v", key, value, err)
		}
		if err == nil {
			r.must(d.Close(r.ctx))
		}
		r.must(tools.Write(r.ctx, key, was))
	}
	for _, path := range []string{"/local/domain/3/backend/vif", "/local/domain/3/backend/vif/7", v.backDir() + "/x", v.backDir() + "/x/y"} {
		if path != "/local/domain/3/backend/vif" { // below it are directories of domains
			r.must(tools.Write(r.ctx, path+"/frontend", v.frontDir()))
			r.must(tools.Write(r.ctx, path+"/frontend-id", "7"))
		}
		refused(v.frontDir()+"/backend", path, func() (*xenbus.Device, error) { return xenbus.OpenFrontend(r.ctx, front, "vif", "0") })
	}
	for _, path := range []string{"/local/domain/7/device/vif", v.frontDir() + "/x"} {
		r.must(tools.Write(r.ctx, path+"/state", "1"))
		refused(v.backDir()+"/frontend", path, func() (*xenbus.Device, error) { return xenbus.OpenBackend(r.ctx, back, "vif", 7, "0") })
	}
}

func bothEndsConnectAndClose(t *testing.T, r *rig)        { connectAndClose(t, r, 0) }
func driverDomainServesAnotherGuest(t *testing.T, r *rig) { connectAndClose(t, r, 3) }

// connectAndClose connects a vif, closes it from one side, and does the same from the
// other side.
func connectAndClose(t *testing.T, r *rig, backDom hypercall.DomID) {
	v, fc, bc := r.vif(backDom, "0")
	for _, frontLeaves := range []bool{true, false} {
		front, back := r.frontend(fc, "0"), r.backend(bc, 7, "0")
		var ff, bf xenbus.Facts
		ended := make(chan error, 1)
		go func() { ended <- r.drive(back, &bf, running) }()
		if frontLeaves { // the hotplug script may be slow
			r.must(v.tools.Write(r.ctx, v.backDir()+"/hotplug-status", "connected"))
		}
		r.must(r.drive(front, &ff, running))
		r.must(<-ended)

		ff.Leaving, bf.Leaving = frontLeaves, !frontLeaves
		leaver, lf, stayer, sf := front, &ff, back, &bf
		if !frontLeaves {
			leaver, lf, stayer, sf = back, &bf, front, &ff
		}
		go func() {
			ended <- r.drive(stayer, sf, func(xenbus.Step) bool { return sf.Own == xenbus.Closed && sf.Attached == 0 })
		}()
		r.must(leave(r, leaver, lf))
		r.must(<-ended)
		if lf.Attached != 0 || sf.Attached != 0 {
			t.Errorf("attached: %d, %d", lf.Attached, sf.Attached)
		}
		r.must(leaver.Close(r.ctx))
		r.must(stayer.Close(r.ctx))
	}
}

// leave drives a device that is up until it has finished.
func leave(r *rig, d *xenbus.Device, f *xenbus.Facts) error {
	for {
		step := xenbus.Next(d.Role(), *f)
		if step.Do == xenbus.Release {
			f.Attached = 0
		}
		if step.State != xenbus.Unknown {
			if err := d.SetState(r.ctx, step.State); err != nil {
				return err
			}
			break
		}
		if step.Do != xenbus.Release {
			break
		}
	}
	return r.drive(d, f, finished)
}

func frontendThatMayNotReadBack(t *testing.T, r *rig) {
	// Qubes OS does not let a guest read frontend-id; another toolstack may hide all
	// nodes but the state.
	v, fc, _ := r.vif(0, "0")
	hidden := xenstore.Perm{Dom: 0, Access: xenstore.None}
	for _, key := range []string{"/frontend-id", "/frontend"} {
		r.must(v.tools.SetPerms(r.ctx, v.backDir()+key, hidden))
		d := r.frontend(fc, "0")
		ch := r.await(d, func(xenbus.Change) bool { return true })
		if ch.Peer != xenbus.Initialising || ch.Vanished {
			t.Errorf("%+v", ch)
		}
		r.must(d.Close(r.ctx))
	}
	d := r.frontend(fc, "0")
	r.must(v.tools.SetPerms(r.ctx, v.backDir()+"/state", hidden))
	r.must(v.tools.Write(r.ctx, v.backDir()+"/state", "6"))
	r.must(v.tools.Write(r.ctx, v.frontDir()+"/state", "1")) // the backend's event may be hidden too
	if _, err := d.ReadPeer(r.ctx, "state"); !errors.Is(err, xenstore.ErrAccess) {
		t.Errorf("reading it: %v", err)
	}
	r.must(d.Close(r.ctx))
	d = r.frontend(fc, "0")
	r.await(d, func(ch xenbus.Change) bool { return ch.Vanished && ch.Peer == xenbus.Unknown })
}

func statesOfGarbageAreUnknown(t *testing.T, r *rig) {
	v, fc, bc := r.vif(3, "0")
	front, back := r.frontend(fc, "0"), r.backend(bc, 7, "0")
	for _, value := range []string{"", "9", "-1", "4 ", " 4", "0x4", "1e0", "+4", "04", "4\x00", "\x00",
		"18446744073709551620", strings.Repeat("4", 1800)} {
		for _, state := range []string{"2", value} {
			r.must(v.tools.Write(r.ctx, v.backDir()+"/state", state))
			r.must(v.tools.Write(r.ctx, v.frontDir()+"/state", state))
			want := xenbus.Unknown
			if state == "2" {
				want = xenbus.InitWait
			}
			for _, d := range []*xenbus.Device{front, back} {
				r.await(d, func(ch xenbus.Change) bool { return ch.Peer == want && ch.Own == want && !ch.Vanished })
			}
		}
	}
}

func setStateDoesNotBringBackADirectory(t *testing.T, r *rig) {
	v, fc, _ := r.vif(0, "0")
	d := r.frontend(fc, "0")
	r.must(d.SetState(r.ctx, xenbus.Closing))
	v.unplug()
	r.want(d.SetState(r.ctx, xenbus.Closed), xenbus.ErrGone)
	r.want(d.Publish(r.ctx, xenstore.Values{"feature-sg": "1"}), xenbus.ErrGone)
	_, err := v.tools.Read(r.ctx, v.frontDir())
	r.want(err, xenstore.ErrNotFound)
	if ch := r.await(d, func(ch xenbus.Change) bool { return ch.Gone && ch.Vanished }); ch.Own != xenbus.Unknown {
		t.Errorf("%+v", ch)
	}
}

// A lateConn can hold back the replies to commits; all other messages pass.
type lateConn struct {
	io.ReadWriteCloser
	from   *io.PipeReader
	hold   atomic.Bool
	held   chan struct{} // one for each reply held back
	let    chan struct{} // one for each reply that may pass
	unwrap sync.WaitGroup
}

// late returns a client whose commits are answered late once hold is set.
func (r *rig) late(dom hypercall.DomID) (*xenstore.Client, *lateConn) {
	r.Helper()
	inner, err := r.dial(r.ctx, dom)
	r.must(err)
	from, to := io.Pipe()
	l := &lateConn{ReadWriteCloser: inner, from: from, held: make(chan struct{}, 1), let: make(chan struct{}, 1)}
	l.unwrap.Go(func() {
		buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
		for {
			h, payload, err := wire.ReadMessage(inner, buf)
			if err != nil {
				to.CloseWithError(err)
				return
			}
			msg, _ := wire.Append(nil, h, string(payload))
			if h.Op == wire.TransactionEnd && l.hold.Load() {
				l.held <- struct{}{}
				l.unwrap.Go(func() {
					select {
					case <-l.let:
						to.Write(msg)
					case <-r.ctx.Done():
					}
				})
				continue
			}
			to.Write(msg) // whole messages, so that the writers do not interleave
		}
	})
	r.Cleanup(l.unwrap.Wait)
	c, err := xenstore.Dial(r.ctx, func(context.Context) (io.ReadWriteCloser, error) { return l, nil }, xenstore.Config{Pipeline: 8})
	r.must(err)
	r.Cleanup(func() { c.Close() })
	return c, l
}

func (l *lateConn) Read(b []byte) (int, error) { return l.from.Read(b) }
func (l *lateConn) Close() error               { l.from.Close(); return l.ReadWriteCloser.Close() }

// lateDevices calls f with each end of a vif in turn, on a connection with late replies.
func lateDevices(r *rig, f func(name string, v vif, d *xenbus.Device, l *lateConn)) {
	r.client(3)
	for _, role := range []xenbus.Role{xenbus.Frontend, xenbus.Backend} {
		v := vif{r, r.client(0), 7, 3, "0"}
		var d *xenbus.Device
		var l *lateConn
		if role == xenbus.Frontend {
			c, late := r.late(7)
			v.plug()
			d, l = r.frontend(c, v.id), late
		} else {
			v.back, v.id = 4, "1" // a domain of a real daemon has one connection
			c, late := r.late(4)
			v.plug()
			d, l = r.backend(c, 7, v.id), late
		}
		f(role.String(), v, d, l)
	}
}

// The toolstack takes the vif away after our state was written and before we get the
// reply.
func removalDuringAWriteIsNotLost(t *testing.T, r *rig) {
	lateDevices(r, func(name string, v vif, d *xenbus.Device, l *lateConn) {
		l.hold.Store(true)
		wrote := make(chan error, 1)
		go func() { wrote <- d.SetState(r.ctx, xenbus.Closing) }()
		<-l.held
		l.hold.Store(false)
		v.unplug()
		r.await(d, func(ch xenbus.Change) bool { return ch.Gone })
		l.let <- struct{}{}
		r.must(<-wrote)
		if ch := d.Current(); !ch.Gone {
			t.Errorf("%s: the removal is forgotten: %+v", name, ch)
		}
		r.want(d.SetState(r.ctx, xenbus.Closed), xenbus.ErrGone)
		if ch := d.Current(); !ch.Gone {
			t.Errorf("%s: %+v", name, ch)
		}
	})
}

// A write that finds the directory gone sets Gone, even if no event tells of the removal.
func removalMetByAWriteIsSeen(t *testing.T, r *rig) {
	v, fc, bc := r.vif(3, "0")
	for _, d := range []*xenbus.Device{r.frontend(fc, "0"), r.backend(bc, 7, "0")} {
		r.must(d.SetState(r.ctx, xenbus.Closing))
		v.unplug()
		r.want(d.SetState(r.ctx, xenbus.Closed), xenbus.ErrGone)
		if ch := d.Current(); !ch.Gone {
			t.Errorf("%s: ErrGone, and %+v", d.Dir(), ch)
		}
		v.plug()
		r.await(d, func(ch xenbus.Change) bool { return !ch.Gone && ch.Generation > 1 })
	}
}

func stateOverwrittenDuringAWriteIsSeen(t *testing.T, r *rig) {
	v := vif{r, r.client(0), 7, 3, "0"}
	c, l := r.late(3)
	r.client(7)
	v.plug()
	d := r.backend(c, 7, "0")
	for i := range 30 { // the event of the last write comes before the reply in some rounds, after it in others
		r.must(d.SetState(r.ctx, xenbus.InitWait))
		l.hold.Store(true)
		wrote := make(chan error, 1)
		go func() { wrote <- d.SetState(r.ctx, xenbus.Connected) }()
		<-l.held
		l.hold.Store(false)
		r.must(v.tools.Write(r.ctx, v.backDir()+"/state", "6"))
		status := []string{"connected", "again"}[i%2]
		r.must(v.tools.Write(r.ctx, v.backDir()+"/hotplug-status", status))
		r.await(d, func(ch xenbus.Change) bool { return ch.Hotplug == (status == "connected") }) // the state was read before hotplug-status
		l.let <- struct{}{}
		r.must(<-wrote)
		r.await(d, func(ch xenbus.Change) bool { return ch.Own == xenbus.Connected && ch.Overwritten == `"6"` })
	}
}

// Own keeps the state we wrote when another domain overwrites it. The exceptions are a
// directory that was made again, and a toolstack that takes the vif away.
func stateOverwrittenByOthersIsKnownAndPutRight(t *testing.T, r *rig) {
	v, fc, bc := r.vif(3, "0")
	front, back := r.frontend(fc, "0"), r.backend(bc, 7, "0")
	for _, c := range []struct {
		d   *xenbus.Device
		dir string
		own xenbus.State
	}{{front, v.frontDir(), xenbus.Connected}, {back, v.backDir(), xenbus.InitWait}} {
		r.must(c.d.Publish(r.ctx, xenstore.Values{"feature-rx-copy": "1", "hotplug-status": "connected"}))
		r.must(c.d.SetState(r.ctx, c.own))
		was := c.d.Current().Generation
		for _, found := range []string{"0", "1", "3", "5", "6", "7", "9", "", "x y", strings.Repeat("4", 500)} {
			r.must(v.tools.Write(r.ctx, c.dir+"/state", found))
			ch := r.await(c.d, func(ch xenbus.Change) bool { return ch.Overwritten != "" })
			if ch.Own != c.own || ch.Generation != was || len(ch.Overwritten) > 80 || !strings.HasPrefix(ch.Overwritten, `"`+found[:min(len(found), 60)]) {
				t.Errorf("%s after %.10q: %+v", c.dir, found, ch)
			}
			r.must(c.d.SetState(r.ctx, ch.Own))
			if got := r.read(v.tools, c.dir+"/state"); got != fmt.Sprint(uint8(c.own)) {
				t.Errorf("%s holds %q", c.dir, got)
			}
			r.await(c.d, func(ch xenbus.Change) bool { return ch.Overwritten == "" && ch.Own == c.own })
		}
	}
	v.unplug()
	v.plug()
	for _, d := range []*xenbus.Device{front, back} {
		ch := r.await(d, func(ch xenbus.Change) bool { return ch.Generation > 1 && !ch.Gone })
		if ch.Own != xenbus.Initialising || ch.Overwritten != "" {
			t.Errorf("%s made anew: %+v", d.Dir(), ch)
		}
	}
}

// Without a reply it is unknown whether the state was written. A state that SetState
// tried to write must then not count as overwritten.
func writeWithoutAnAnswerIsOurs(t *testing.T, r *rig) {
	lateDevices(r, func(name string, v vif, d *xenbus.Device, l *lateConn) {
		r.must(d.SetState(r.ctx, xenbus.Closing))
		l.hold.Store(true)
		ctx, cancel := context.WithCancel(r.ctx)
		wrote := make(chan error, 1)
		go func() { wrote <- d.SetState(ctx, xenbus.Closed) }()
		<-l.held
		l.hold.Store(false)
		cancel()
		err := <-wrote
		r.want(err, context.Canceled)
		r.want(err, xenstore.ErrUnanswered)
		l.let <- struct{}{}
		ch := r.await(d, func(ch xenbus.Change) bool { return ch.Own == xenbus.Closed || ch.Overwritten != "" })
		if ch.Overwritten != "" {
			t.Errorf("%s: %+v", name, ch)
		}
	})
}

func publishReplacesWholeSets(t *testing.T, r *rig) {
	_, fc, bc := r.vif(0, "0")
	front, back := r.frontend(fc, "0"), r.backend(bc, 7, "0")
	r.must(front.Publish(r.ctx, xenstore.Values{"tx-ring-ref": "8", "rx-ring-ref": "9", "event-channel": "3"}))
	r.must(front.Publish(r.ctx, xenstore.Values{"queue-0/tx-ring-ref": "10", "queue-1/tx-ring-ref": "11"},
		"tx-ring-ref", "rx-ring-ref", "event-channel", "queue-2", "never/was"))
	v, err := back.PeerValues(r.ctx, "tx-ring-ref", "queue-0/tx-ring-ref", "queue-1/tx-ring-ref", "mac", "feature-sg")
	r.must(err)
	if v.Has("tx-ring-ref") || v["queue-1/tx-ring-ref"] != "11" || len(v) != 3 {
		t.Errorf("%v", v)
	}
	if mac, err := v.MAC("mac"); mac != [6]byte{0, 0x16, 0x3e, 0, 0, 1} || err != nil {
		t.Errorf("%x, %v", mac, err)
	}
	if n, err := v.Uint("queue-0/tx-ring-ref", 1<<32-1, 0); n != 10 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if on, err := v.Bool("feature-sg", false); on || err != nil {
		t.Errorf("absent feature: %v, %v", on, err)
	}

	// All or nothing: the last key does not fit into a node.
	err = front.Publish(r.ctx, xenstore.Values{"a": "1", "z": strings.Repeat("v", 3000)}, "queue-0")
	r.want(err, xenstore.ErrQuota)
	own, err := front.OwnValues(r.ctx, "a", "queue-0/tx-ring-ref")
	r.must(err)
	if own.Has("a") || !own.Has("queue-0/tx-ring-ref") {
		t.Errorf("half published: %v", own)
	}
	if s, err := back.ReadPeer(r.ctx, "queue-0/tx-ring-ref"); s != "10" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	r.want(front.Publish(r.ctx, xenstore.Values{"a//b": ""}), xenstore.ErrInvalid)
}

func publishStateIsWholeOrNot(t *testing.T, r *rig) {
	v, fc, bc := r.vif(0, "0")
	front, back := r.frontend(fc, "0"), r.backend(bc, 7, "0")
	r.must(front.Publish(r.ctx, xenstore.Values{"old": "1"}))

	err := front.PublishState(r.ctx, xenbus.Connected, xenstore.Values{"z": strings.Repeat("v", 3000)}, "old")
	if r.want(err, xenstore.ErrQuota); errors.Is(err, xenstore.ErrUnanswered) {
		t.Errorf("maybe written: %v", err)
	}
	own, err := front.OwnValues(r.ctx, "state", "old")
	r.must(err)
	if own["state"] != "1" || !own.Has("old") || front.Current().Own != xenbus.Initialising {
		t.Errorf("half published: %v, %+v", own, front.Current())
	}

	r.must(front.PublishState(r.ctx, xenbus.Connected, xenstore.Values{"tx-ring-ref": "8"}, "old"))
	if own := front.Current().Own; own != xenbus.Connected {
		t.Errorf("our state is %v", own)
	}
	r.await(back, func(ch xenbus.Change) bool { return ch.Peer == xenbus.Connected })
	got, err := back.PeerValues(r.ctx, "tx-ring-ref", "old")
	if r.must(err); got["tx-ring-ref"] != "8" || got.Has("old") {
		t.Errorf("the other end sees %v", got)
	}
	// The same state again takes the keys, too, and is not written.
	w := r.watch(v.tools, v.frontDir()+"/state")
	defer w.Close()
	r.event(w)
	r.must(front.PublishState(r.ctx, xenbus.Connected, xenstore.Values{"tx-ring-ref": "9"}))
	r.must(front.SetState(r.ctx, xenbus.Connected))
	r.quiet(v.tools, w)
	if s, err := back.ReadPeer(r.ctx, "tx-ring-ref"); s != "9" || err != nil {
		t.Errorf("%q, %v", s, err)
	}

	ctx, cancel := context.WithCancel(r.ctx)
	cancel()
	err = front.PublishState(ctx, xenbus.Closing, nil)
	if r.want(err, context.Canceled); errors.Is(err, xenstore.ErrUnanswered) {
		t.Errorf("maybe written, though it was not sent: %v", err)
	}
	v.unplug()
	err = front.PublishState(r.ctx, xenbus.Connected, xenstore.Values{"tx-ring-ref": "8"})
	if r.want(err, xenbus.ErrGone); errors.Is(err, xenstore.ErrUnanswered) {
		t.Errorf("maybe written: %v", err)
	}
	_, err = v.tools.Read(r.ctx, v.frontDir())
	r.want(err, xenstore.ErrNotFound)
}

func unplugIsSeenByBothEnds(t *testing.T, r *rig) {
	v, fc, bc := r.vif(3, "0")
	front, back := r.frontend(fc, "0"), r.backend(bc, 7, "0")
	r.must(back.SetState(r.ctx, xenbus.InitWait))
	r.await(front, func(ch xenbus.Change) bool { return ch.Peer == xenbus.InitWait && ch.Online })

	// libxl writes the state for the backend.
	r.must(v.tools.Transact(r.ctx, func(tx xenstore.Tx) error {
		if err := tx.Write(v.backDir()+"/online", "0"); err != nil {
			return err
		}
		return tx.Write(v.backDir()+"/state", "5")
	}))
	r.await(back, func(ch xenbus.Change) bool { return ch.Own == xenbus.Closing && !ch.Online })
	r.await(front, func(ch xenbus.Change) bool { return ch.Peer == xenbus.Closing && ch.SawClosing })
	r.must(back.SetState(r.ctx, xenbus.Closed))
	r.await(front, func(ch xenbus.Change) bool { return ch.Peer == xenbus.Closed && !ch.Online })

	v.unplug()
	r.await(front, func(ch xenbus.Change) bool { return ch.Gone && ch.Vanished })
	r.await(back, func(ch xenbus.Change) bool { return ch.Gone && ch.Vanished })
}

func driverDomainCleansUp(t *testing.T, r *rig) {
	v, _, bc := r.vif(3, "0")
	v.id = "1"
	v.plug()
	one, two := r.backend(bc, 7, "0"), r.backend(bc, 7, "1")
	r.must(one.Claim(r.ctx, 0))
	for _, d := range []*xenbus.Device{one, two} {
		if _, err := bc.Read(r.ctx, "backend/vif/7"); err != nil {
			t.Errorf("before %s is removed: %v", d.Dir(), err)
		}
		r.must(d.Remove(r.ctx))
		r.must(d.Remove(r.ctx))
		r.await(d, func(ch xenbus.Change) bool { return ch.Gone })
	}
	_, err := bc.Read(r.ctx, "backend/vif/7")
	r.want(err, xenstore.ErrNotFound)
	if _, err := bc.Read(r.ctx, "backend/vif"); err != nil {
		t.Error(err)
	}
	if _, err := v.tools.Read(r.ctx, v.frontDir()); err != nil {
		t.Errorf("the frontend's directory: %v", err)
	}
}

func frontendFollowsANewBackend(t *testing.T, r *rig) {
	v, fc, _ := r.vif(3, "0")
	front := r.frontend(fc, "0")
	r.must(front.SetState(r.ctx, xenbus.Connected))
	r.await(front, func(ch xenbus.Change) bool { return ch.Own == xenbus.Connected && ch.Generation == 1 })

	// The driver domain was restarted under another number.
	r.client(4)
	r.must(v.tools.Remove(r.ctx, v.backDir()))
	r.await(front, func(ch xenbus.Change) bool { return ch.Vanished })
	v.back = 4
	v.plug()
	ch := r.await(front, func(ch xenbus.Change) bool { return ch.Generation > 1 && ch.Own == xenbus.Initialising && !ch.Vanished })
	if dir, dom := front.Peer(); dir != v.backDir() || dom != 4 || ch.Peer != xenbus.Initialising {
		t.Errorf("peer %s of domain %d, %+v", dir, dom, ch)
	}
	if s := xenbus.Next(xenbus.Frontend, xenbus.Facts{Change: ch, Attached: 1}); s.Do != xenbus.Release {
		t.Errorf("rings of the old backend: %v", s)
	}
	r.must(v.tools.Write(r.ctx, v.backDir()+"/state", "2"))
	r.await(front, func(ch xenbus.Change) bool { return ch.Peer == xenbus.InitWait })
}

// A meddler calls meddle before it passes on the first read of a key.
type meddler struct {
	io.ReadWriteCloser
	key    string
	meddle func()
	once   sync.Once
}

func (m *meddler) Write(b []byte) (int, error) {
	if bytes.HasSuffix(b, []byte("/"+m.key+"\x00")) {
		m.once.Do(m.meddle)
	}
	return m.ReadWriteCloser.Write(b)
}

// Between the reads of two keys, the toolstack takes a vif away and plugs another one in its place.
func directoryMadeAnewWhileItIsRead(t *testing.T, r *rig) {
	for _, back := range []hypercall.DomID{3, 4} {
		r.client(back)
	}
	v := vif{r, r.client(0), 7, 3, "0"}
	r.client(7).Close()
	v.plug()
	inner, err := r.dial(r.ctx, 7)
	r.must(err)
	met := false
	conn := &meddler{ReadWriteCloser: inner, key: "backend-id", meddle: func() {
		v.unplug()
		v.back = 4
		v.plug()
		met = true
	}}
	// One request at a time, so that the key before was answered.
	c, err := xenstore.Dial(r.ctx, func(context.Context) (io.ReadWriteCloser, error) { return conn, nil }, xenstore.Config{Pipeline: 1})
	r.must(err)
	defer c.Close()
	d := r.frontend(c, "0")
	if dir, dom := d.Peer(); dir != v.backDir() || dom != 4 || !met {
		t.Errorf("the other end is %q of domain %d, not %q", dir, dom, v.backDir())
	}
}

func peerThatTogglesIsMerged(t *testing.T, r *rig) {
	v, fc, _ := r.vif(0, "0")
	front := r.frontend(fc, "0")
	for range 300 {
		r.must(v.tools.Write(r.ctx, v.backDir()+"/state", "4"))
		r.must(v.tools.Write(r.ctx, v.backDir()+"/state", "6"))
	}
	r.must(v.tools.Write(r.ctx, v.backDir()+"/state", "2"))
	r.await(front, func(ch xenbus.Change) bool { return ch.Peer == xenbus.InitWait })
	if n := len(front.Seen()); n > 16 {
		t.Errorf("remembers %d states", n)
	}
}

func awaitSaysWhatItSaw(t *testing.T, r *rig) {
	v, fc, _ := r.vif(0, "0")
	front := r.frontend(fc, "0")
	r.await(front, func(ch xenbus.Change) bool { return ch.Peer == xenbus.Initialising })
	r.must(v.tools.Write(r.ctx, v.backDir()+"/state", "2"))
	r.await(front, func(ch xenbus.Change) bool { return ch.Peer == xenbus.InitWait })
	ctx, cancel := context.WithTimeout(r.ctx, 20*time.Millisecond)
	defer cancel()
	_, err := front.Await(ctx, func(ch xenbus.Change) bool { return ch.Peer == xenbus.Connected })
	var wait *xenbus.WaitError
	if !errors.As(err, &wait) || !errors.Is(err, context.DeadlineExceeded) ||
		!slices.Equal(wait.Seen, []xenbus.State{xenbus.Initialising, xenbus.InitWait}) ||
		!strings.Contains(err.Error(), "Initialising InitWait") {
		t.Errorf("%v", err)
	}
	r.must(front.Close(r.ctx))
	for range front.Changes() { // until it is closed
	}
	_, err = front.Await(r.ctx, func(xenbus.Change) bool { return true })
	r.want(err, net.ErrClosed)
}

const soon = 250 * time.Millisecond

func claimKeepsOthersOut(t *testing.T, r *rig) {
	v, _, _ := r.vif(0, "0")
	first, second := r.backend(r.client(0), 7, "0"), r.backend(r.client(0), 7, "0")
	r.must(first.Claim(r.ctx, 0))
	for range 3 { // the holder answers each time
		r.want(second.Claim(r.ctx, time.Minute), xenbus.ErrClaimed)
	}
	r.must(first.SetState(r.ctx, xenbus.InitWait))
	r.must(first.Close(r.ctx)) // gives the claim back
	if _, err := v.tools.Read(r.ctx, v.backDir()+"/claim"); !errors.Is(err, xenstore.ErrNotFound) {
		t.Errorf("claim is left: %v", err)
	}
	r.must(second.Claim(r.ctx, time.Minute))
}

func claimOfTheDeadIsTakenOver(t *testing.T, r *rig) {
	r.vif(0, "0")
	deadClient := r.client(0)
	dead := r.backend(deadClient, 7, "0")
	r.must(dead.Claim(r.ctx, 0))
	deadClient.Close() // its nodes stay
	second, third := r.backend(r.client(0), 7, "0"), r.backend(r.client(0), 7, "0")
	r.must(second.Claim(r.ctx, soon))
	r.must(second.SetState(r.ctx, xenbus.InitWait))

	// A holder that was stopped for long finds that it has lost its claim.
	r.must(r.usurp(third))
	ch := r.await(second, func(ch xenbus.Change) bool { return ch.Lost })
	r.want(second.SetState(r.ctx, xenbus.Connected), xenbus.ErrClaimed)
	r.want(second.Publish(r.ctx, xenstore.Values{"feature-sg": "1"}), xenbus.ErrClaimed)
	r.want(second.PublishState(r.ctx, xenbus.Connected, xenstore.Values{"feature-sg": "1"}), xenbus.ErrClaimed)
	if s := xenbus.Next(xenbus.Backend, xenbus.Facts{Change: ch, Attached: 1}); s != (xenbus.Step{Do: xenbus.Release}) {
		t.Errorf("%v after the claim is lost", s)
	}
	r.must(second.Close(r.ctx))
	r.must(third.SetState(r.ctx, xenbus.Closing)) // Close of second has not removed its claim
}

// usurp takes a claim over as if its holder had been silent.
func (r *rig) usurp(d *xenbus.Device) error {
	r.must(r.client(0).Remove(r.ctx, "/local/domain/0/"+d.Dir()+"/claim"))
	err := d.Claim(r.ctx, soon)
	if errors.Is(err, xenbus.ErrClaimed) { // the holder took it again first
		return r.usurp(d)
	}
	return err
}

func claimSurvivesANewDirectory(t *testing.T, r *rig) {
	v, fc, bc := r.vif(3, "0")
	front, back := r.frontend(fc, "0"), r.backend(bc, 7, "0")
	r.must(front.Claim(r.ctx, 0))
	r.must(back.Claim(r.ctx, 0))
	r.must(back.SetState(r.ctx, xenbus.InitWait))
	r.must(front.SetState(r.ctx, xenbus.Connected))
	v.unplug()
	v.plug()
	for _, d := range []*xenbus.Device{front, back} {
		ch := r.await(d, func(ch xenbus.Change) bool { return ch.Generation > 1 && !ch.Gone && ch.Own == xenbus.Initialising })
		if ch.Lost {
			t.Errorf("%s: lost to nobody", d.Dir())
		}
		r.must(d.SetState(r.ctx, xenbus.InitWait))
	}
	other := r.client(0)
	if got := r.read(other, v.backDir()+"/claim"); got == "" {
		t.Error("new directory is not claimed")
	}
}

func failLeavesANote(t *testing.T, r *rig) {
	v, _, bc := r.vif(3, "0")
	back := r.backend(bc, 7, "0")
	why := errors.New("the rings are of no use")
	r.must(back.Fail(r.ctx, why))
	note := "/local/domain/3/error/backend/vif/7/0/error"
	if got := r.read(v.tools, note); got != why.Error() {
		t.Errorf("note %q", got)
	}
	r.must(back.Fail(r.ctx, errors.New(strings.Repeat("x", 5000))))
	other := strings.Replace(note, "/0/error", "/1/error", 1)
	r.must(bc.Write(r.ctx, other, "another device of that peer"))
	r.must(back.Fail(r.ctx, nil))
	_, err := v.tools.Read(r.ctx, note)
	r.want(err, xenstore.ErrNotFound)
	if got := r.read(v.tools, other); got == "" {
		t.Error("the other device's note is gone too")
	}
	r.must(bc.Remove(r.ctx, strings.TrimSuffix(other, "/error")))
	r.must(back.Fail(r.ctx, nil))
	_, err = v.tools.Directory(r.ctx, "/local/domain/3/error/backend")
	r.want(err, xenstore.ErrNotFound)
	_, err = v.tools.Directory(r.ctx, "/local/domain/3/error")
	r.must(err)
	r.must(back.Fail(r.ctx, nil))
}

func backendsAppearAndVanish(t *testing.T, r *rig) {
	v, _, bc := r.vif(3, "0")
	b, err := xenbus.WatchBackends(r.ctx, bc, "vif")
	r.must(err)
	defer b.Close()
	next := func(front hypercall.DomID, id string, vanished bool) {
		t.Helper()
		ev, err := b.Next(r.ctx)
		r.must(err)
		if want := (xenbus.BackendEvent{BackendID: xenbus.BackendID{Front: front, ID: id}, Vanished: vanished}); ev != want {
			t.Errorf("%+v, want %+v", ev, want)
		}
	}
	next(7, "0", false)
	v.id = "1"
	v.plug()
	next(7, "1", false)
	b.Forget(xenbus.BackendID{Front: 7, ID: "1"})
	next(7, "1", false)
	d := r.backend(bc, 7, "1")
	r.must(d.Publish(r.ctx, xenstore.Values{"feature-sg": "1"})) // makes no event of Backends
	r.must(v.tools.Remove(r.ctx, v.backDir()))
	next(7, "1", true)
	r.client(8)
	v.front, v.id = 8, "0"
	v.plug()
	next(8, "0", false)
	// All devices of a domain at once.
	r.must(v.tools.Remove(r.ctx, "/local/domain/3/backend/vif/7"))
	next(7, "0", true)
	// Directories that are no device are ignored.
	r.must(v.tools.Write(r.ctx, "/local/domain/3/backend/vif/garbage/0/state", "1"))
	r.must(v.tools.Write(r.ctx, "/local/domain/3/backend/vif/8/garbage/state", "1"))
	r.must(v.tools.Remove(r.ctx, "/local/domain/3/backend"))
	next(8, "0", true)

	ctx, cancel := context.WithTimeout(r.ctx, 20*time.Millisecond)
	defer cancel()
	_, err = b.Next(ctx)
	r.want(err, context.DeadlineExceeded)
	bc.Close()
	_, err = b.Next(r.ctx)
	r.want(err, net.ErrClosed)
}

func deviceSurvivesALostConnection(t *testing.T, r *rig) {
	v, _, _ := r.vif(0, "0")
	bc, cut := r.breakable(0, xenstore.Config{})
	back := r.backend(bc, 7, "0")
	r.must(back.Claim(r.ctx, 0))
	for _, state := range []string{"4", "5", "6"} {
		cut()
		r.must(v.tools.Write(r.ctx, v.frontDir()+"/state", state))
		r.await(back, func(ch xenbus.Change) bool { return fmt.Sprint(uint8(ch.Peer)) == state })
	}
	r.must(back.SetState(r.ctx, xenbus.Closed))
	if n := bc.Stats().Reconnects; n == 0 {
		t.Error("the connection was not lost")
	}
}
