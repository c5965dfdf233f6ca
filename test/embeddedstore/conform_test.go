package embeddedstore_test

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"barevif/test/xenstored"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire"
	"barevif/xenbus/xenstore/wire/wiretest"
)

// conformance is what C xenstored 4.17 does, as observed. Every row runs against
// xenbus/xenstore/server and, where it can be had, against Debian's xenstored itself.
var conformance = []struct {
	name string
	run  func(t *testing.T, r rig)
}{
	{"fresh store", func(t *testing.T, r rig) {
		c := r.dom0()
		c.Want(wire.Directory, 0, z("/"), z("tool"))
		c.Want(wire.Directory, 0, z("/tool"), z("xenstored"))
		c.Want(wire.Directory, 0, z("/tool/xenstored"), "")
		c.Want(wire.GetPerms, 0, z("/"), z("n0"))
	}},
	{"paths", func(t *testing.T, r rig) {
		c := r.dom0()
		long := "/" + strings.Repeat("a", 2047)
		c.Want(wire.Write, 0, long+"\x00v", ok)
		c.Want(wire.Read, 0, z(long), "v")
		c.Want(wire.Write, 0, long+"a\x00v", "EINVAL")
		for _, home := range []string{"/local/domain/7/", "/local/domain/12345/"} {
			c.Want(wire.Write, 0, home+strings.Repeat("b", 2048)+"\x00v", ok)
			c.Want(wire.Write, 0, home+strings.Repeat("b", 2049)+"\x00v", "EINVAL")
		}
		c.Want(wire.Write, 0, "/local/domain/123456/"+strings.Repeat("b", 2048)+"\x00v", "EINVAL")
		for _, bad := range []string{"//a", "/a//b", "/a/", "/a+b", "/a b", "/a.b", "/\x01", ""} {
			c.Want(wire.Write, 0, bad+"\x00v", "EINVAL")
			c.Want(wire.Mkdir, 0, z(bad), "EINVAL")
			c.Want(wire.Read, 0, z(bad), "EINVAL")
			c.Want(wire.Directory, 0, z(bad), "EINVAL")
			c.Want(wire.Rm, 0, z(bad), "EINVAL")
			c.Want(wire.GetPerms, 0, z(bad), "EINVAL")
			c.Want(wire.SetPerms, 0, z(bad, "n0"), "EINVAL")
			c.Want(wire.Watch, 0, z(bad, "t"), "EINVAL")
			c.Want(wire.DirectoryPart, 0, z(bad, "0"), "EINVAL")
		}
		c.Want(wire.Mkdir, 0, z("/A-Z_0@9"), ok)
		c.Want(wire.Write, 0, "/no-nul", "EINVAL")
		c.Want(wire.Read, 0, z("@releaseDomain"), "EINVAL")
		c.Want(wire.GetPerms, 0, z("@releaseDomain"), "EINVAL")
	}},
	{"relative paths", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		c.Want(wire.Write, 0, "rel/x\x001", ok)
		c.Want(wire.Read, 0, z("/local/domain/0/rel/x"), "1")
		g.Want(wire.Write, 0, "x\x002", ok)
		c.Want(wire.Read, 0, z("/local/domain/3/x"), "2")
		g.Want(wire.Read, 0, z("/local/domain/3/x"), "2")
	}},
	{"payload of 4096", func(t *testing.T, r rig) {
		c := r.dom0()
		value := strings.Repeat("v", 4096-3)
		c.Want(wire.Write, 0, "/v\x00"+value, ok)
		c.Want(wire.Read, 0, z("/v"), value)
	}},
	{"payload of 4097 kills", func(t *testing.T, r rig) {
		c := r.dom0()
		head, _ := wire.Append(nil, wire.Header{Op: wire.Read}, "")
		head[12], head[13] = 0x01, 0x10 // 4097
		if _, err := c.Conn.Write(head); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Conn.Read(c.Buf[:]); err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %d bytes, %v; want the end of the connection", n, err)
		}
		r.dom0().Want(wire.Read, 0, z("/tool"), "")
	}},
	{"values", func(t *testing.T, r rig) {
		c := r.dom0()
		for _, v := range []string{"", "x", "\x00", "a\x00b\x00", "\xff\x00\x01"} {
			c.Want(wire.Write, 0, "/v\x00"+v, ok)
			c.Want(wire.Read, 0, z("/v"), v)
		}
		c.Want(wire.Mkdir, 0, z("/d/e/f"), ok)
		c.Want(wire.Read, 0, z("/d"), "")
		c.Want(wire.Mkdir, 0, z("/v"), ok)
		c.Want(wire.Read, 0, z("/v"), "\xff\x00\x01")
		c.Want(wire.Read, 0, z("/none"), "ENOENT")
		c.Want(wire.Directory, 0, z("/none"), "ENOENT")
	}},
	{"remove", func(t *testing.T, r rig) {
		c := r.dom0()
		c.Want(wire.Write, 0, "/a/b/c\x00v", ok)
		c.Want(wire.Rm, 0, z("/a/none"), ok)
		c.Want(wire.Rm, 0, z("/none/none"), "ENOENT")
		c.Want(wire.Rm, 0, z("/"), "EINVAL")
		c.Want(wire.Rm, 0, z("/a"), ok)
		c.Want(wire.Read, 0, z("/a/b/c"), "ENOENT")
		c.Want(wire.Directory, 0, z("/"), z("tool"))
	}},
	{"order of children", func(t *testing.T, r rig) {
		c := r.dom0()
		for _, n := range []string{"z", "a", "m", "b"} {
			c.Want(wire.Mkdir, 0, z("/d/"+n), ok)
		}
		c.Want(wire.Rm, 0, z("/d/a"), ok)
		c.Want(wire.Mkdir, 0, z("/d/a"), ok)
		c.Want(wire.Directory, 0, z("/d"), z("z", "m", "b", "a"))
	}},
	{"transaction ids", func(t *testing.T, r rig) {
		c := r.dom0()
		c.Want(wire.Read, 99, z("/tool"), "ENOENT")
		c.Want(wire.TransactionStart, 99, z(""), "ENOENT")
		tx := c.Start()
		c.Want(wire.TransactionStart, tx, z(""), "EBUSY")
		c.Want(wire.TransactionEnd, tx, "", "EINVAL")
		c.Want(wire.TransactionEnd, tx, "T", "EINVAL")
		c.Want(wire.TransactionEnd, tx, z("X"), "EINVAL")
		c.Want(wire.TransactionEnd, 0, z("T"), "ENOENT")
		c.Want(wire.TransactionEnd, tx, z("T"), ok)
		c.Want(wire.TransactionEnd, tx, z("T"), "ENOENT")
		c.Want(wire.Read, tx, z("/tool"), "ENOENT")
		r.dom0().Want(wire.Read, c.Start(), z("/tool"), "ENOENT") // ids are of one connection
	}},
	{"transaction isolation", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		tx := c.Start()
		c.Want(wire.Write, tx, "/a/x\x001", ok)
		c.Want(wire.Read, tx, z("/a/x"), "1")
		d.Want(wire.Read, 0, z("/a/x"), "ENOENT")
		c.Want(wire.Read, 0, z("/a/x"), "ENOENT")
		c.Want(wire.TransactionEnd, tx, z("T"), ok)
		d.Want(wire.Read, 0, z("/a/x"), "1")
		tx = c.Start()
		c.Want(wire.Rm, tx, z("/a"), ok)
		c.Want(wire.Read, tx, z("/a/x"), "ENOENT")
		c.Want(wire.Directory, tx, z("/"), z("tool"))
		c.Want(wire.TransactionEnd, tx, z("F"), ok)
		d.Want(wire.Read, 0, z("/a/x"), "1")
	}},
	{"conflict: node read", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.Want(wire.Write, 0, "/n\x000", ok)
		tx := c.Start()
		c.Want(wire.Read, tx, z("/n"), "0")
		d.Want(wire.Write, 0, "/n\x001", ok)
		c.Want(wire.Read, tx, z("/n"), "0")
		c.Want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
		c.Want(wire.TransactionEnd, tx, z("T"), "ENOENT")
	}},
	{"conflict: node absent", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		tx := c.Start()
		c.Want(wire.Read, tx, z("/n"), "ENOENT")
		d.Want(wire.Write, 0, "/n\x001", ok)
		c.Want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
	}},
	{"conflict: another child of one directory", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.Want(wire.Mkdir, 0, z("/vif"), ok)
		tx := c.Start()
		c.Want(wire.Write, tx, "/vif/0\x00a", ok)
		d.Want(wire.Write, 0, "/vif/1\x00b", ok)
		c.Want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
		d.Want(wire.Directory, 0, z("/vif"), z("1"))
	}},
	{"conflict: between two transactions", func(t *testing.T, r rig) {
		c := r.dom0()
		c.Want(wire.Write, 0, "/a\x000", ok)
		c.Want(wire.Write, 0, "/b\x000", ok)
		one, two := c.Start(), c.Start()
		c.Want(wire.Read, one, z("/a"), "0")
		c.Want(wire.Read, two, z("/b"), "0")
		c.Want(wire.Write, one, "/b\x001", ok)
		c.Want(wire.Write, two, "/a\x002", ok)
		c.Want(wire.TransactionEnd, one, z("T"), ok)
		c.Want(wire.TransactionEnd, two, z("T"), "EAGAIN")
	}},
	{"no conflict elsewhere", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.Want(wire.Write, 0, "/a\x000", ok)
		c.Want(wire.Write, 0, "/b\x000", ok)
		tx := c.Start()
		c.Want(wire.Write, tx, "/a\x001", ok)
		d.Want(wire.Write, 0, "/b\x002", ok)
		c.Want(wire.TransactionEnd, tx, z("T"), ok)
	}},
	{"watch", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.Send(wire.Watch, 0, z("/w", "tok"))
		if h, p := c.Receive(); h.Op != wire.Watch || p != ok || len(c.Events) != 0 {
			t.Errorf("reply %d %q after %d events; the event comes after the reply", h.Op, p, len(c.Events))
		}
		c.WantEvents("/w tok")
		c.Want(wire.Watch, 0, z("/w", "tok"), "EEXIST")
		c.Want(wire.Watch, 0, z("/w", "other"), ok)
		c.WantEvents("/w other")
		d.Want(wire.Write, 0, "/w/x\x001", ok)
		c.WantEvents("/w/x tok", "/w/x other")
		d.Want(wire.Write, 0, "/ww\x001", ok)
		d.Want(wire.Mkdir, 0, z("/w/x"), ok)
		c.WantEvents()
		d.Want(wire.Mkdir, 0, z("/w/y/z"), ok)
		c.WantEvents("/w/y/z tok", "/w/y/z other")
		c.Want(wire.Unwatch, 0, z("/w", "other"), ok)
		c.Want(wire.Unwatch, 0, z("/w", "other"), "ENOENT")
		c.Want(wire.Unwatch, 0, z("/never", "tok"), "ENOENT")
		d.Want(wire.SetPerms, 0, z("/w/x", "r0"), ok)
		c.WantEvents("/w/x tok")
	}},
	{"watch arguments", func(t *testing.T, r rig) {
		c := r.dom0()
		c.Want(wire.Watch, 0, z("/missing/node", ""), ok)
		c.WantEvents("/missing/node ")
		c.Want(wire.Watch, 0, z("@unknown", "t"), ok)
		c.WantEvents("@unknown t")
		c.Want(wire.Watch, 0, z("@"+strings.Repeat("x", 2047), "t"), ok)
		c.Want(wire.Watch, 0, z("@"+strings.Repeat("x", 2048), "t"), "EINVAL")
		c.Want(wire.Watch, 0, z("/w", "t", "1"), "EINVAL") // a depth
		c.Want(wire.Watch, 0, z("/w"), "EINVAL")
		c.Want(wire.Watch, 0, "/w\x00t", "EINVAL")
		c.Want(wire.Watch, 0, z("/w", "t")+"junk", ok)
		c.Want(wire.Watch, 12345, z("/w2", "t"), ok) // the transaction id is of no interest
		c.Want(wire.Unwatch, 12345, z("/w2", "t"), ok)
	}},
	{"watch relative in, relative out", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		g.Want(wire.Watch, 0, z("dev", "t"), ok)
		g.WantEvents("dev t")
		c.Want(wire.Write, 0, "/local/domain/3/dev/x\x001", ok)
		g.WantEvents("dev/x t")
		g.Want(wire.Watch, 0, z("/local/domain/3/dev", "t"), "EEXIST")
		g.Want(wire.Unwatch, 0, z("/local/domain/3/dev", "t"), ok)
	}},
	{"watch and removal of a parent", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		d.Want(wire.Write, 0, "/p/q/r/s\x001", ok)
		d.Want(wire.Write, 0, "/p/q/t\x001", ok)
		c.Want(wire.Watch, 0, z("/p/q/r", "deep"), ok)
		c.Want(wire.Watch, 0, z("/p", "top"), ok)
		c.Heard()
		d.Want(wire.Rm, 0, z("/p/q"), ok)
		c.WantEvents("/p/q/r deep", "/p/q top")
		d.Want(wire.Rm, 0, z("/p"), ok)
		c.WantEvents("/p top")
	}},
	{"watch and transactions", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.Want(wire.Watch, 0, z("/t", "w"), ok)
		c.Heard()
		tx := d.Start()
		d.Want(wire.Write, tx, "/t/a\x001", ok)
		d.Want(wire.Write, tx, "/t/b\x001", ok)
		d.Want(wire.Write, tx, "/t/a\x002", ok)
		d.Want(wire.Write, tx, "/t/gone\x002", ok)
		d.Want(wire.Rm, tx, z("/t/gone"), ok)
		c.WantEvents()
		d.Want(wire.TransactionEnd, tx, z("T"), ok)
		c.WantEvents("/t/a w", "/t/b w")
		tx = d.Start()
		d.Want(wire.Rm, tx, z("/t"), ok)
		d.Want(wire.TransactionEnd, tx, z("F"), ok)
		c.WantEvents()
		tx = d.Start()
		d.Want(wire.Write, tx, "/t/a\x003", ok) // all watches are told of a
		d.Want(wire.Rm, tx, z("/t"), ok)        // and of t, now without exception
		d.Want(wire.TransactionEnd, tx, z("T"), ok)
		c.WantEvents("/t/a w", "/t w")
	}},
	{"own events come before the reply", func(t *testing.T, r rig) {
		c := r.dom0()
		c.Want(wire.Watch, 0, z("/own", "w"), ok)
		c.Heard()
		c.Want(wire.Write, 0, "/own\x001", ok)
		if len(c.Events) != 1 {
			t.Errorf("%d events before the reply to the write, want 1", len(c.Events))
		}
	}},
	{"reset watches", func(t *testing.T, r rig) {
		c := r.dom0()
		tx := c.Start()
		c.Want(wire.Watch, 0, z("/w", "t"), ok)
		c.Want(wire.ResetWatches, 0, z(""), ok)
		c.Want(wire.Unwatch, 0, z("/w", "t"), "ENOENT")
		c.Want(wire.TransactionEnd, tx, z("T"), "ENOENT")
	}},
	{"reset watches in a transaction", func(t *testing.T, r rig) {
		c := r.dom0()
		tx := c.Start()
		c.Want(wire.Write, tx, "/r\x001", ok)
		c.Send(wire.ResetWatches, tx, z(""))
		h, reply, err := wire.ReadMessage(c.Conn, c.Buf[:])
		if version, has := r.defect(xenstored.ResetInTransaction); has && err != nil {
			t.Skipf("xenstored %s has %v", version, xenstored.ResetInTransaction)
		}
		if err != nil || h.Op != wire.ResetWatches || string(reply) != ok {
			t.Fatalf("op %d %q, %v", h.Op, reply, err)
		}
		c.Want(wire.TransactionEnd, tx, z("T"), "ENOENT")
		c.Want(wire.Read, 0, z("/r"), "ENOENT")
	}},
	{"directory in parts", func(t *testing.T, r rig) {
		c := r.dom0()
		var names []string
		for i := range 700 {
			names = append(names, fmt.Sprintf("entry%04d", i))
			c.Want(wire.Mkdir, 0, z("/big/"+names[i]), ok)
		}
		c.Want(wire.Directory, 0, z("/big"), "E2BIG")
		var sizes []int
		var all, gen string
		for !strings.HasSuffix(all, "\x00\x00") {
			reply := c.Do(wire.DirectoryPart, 0, z("/big", strconv.Itoa(len(all))))
			g, part, found := strings.Cut(reply, "\x00")
			if !found || len(reply) > wire.MaxPayload || len(part) == 0 || gen != "" && g != gen {
				t.Fatalf("part %s of generation %q, had %q", wiretest.Short(part), g, gen)
			}
			gen = g
			all += part
			sizes = append(sizes, len(part))
		}
		if all != z(names...)+"\x00" {
			t.Error("parts do not add up to the list")
		}
		// 10 bytes a name: 409 whole ones fit, the rest has a NUL more.
		if fmt.Sprint(sizes) != "[4090 2911]" {
			t.Errorf("parts of %v bytes", sizes)
		}
		past := c.Do(wire.DirectoryPart, 0, z("/big", "9999"))
		if past != gen+"\x00\x00" {
			t.Errorf("past the end: %q", past)
		}
		if got := c.Do(wire.DirectoryPart, 0, z("/big", "6995")); got != gen+"\x000699\x00\x00" {
			t.Errorf("from within a name: %q", got)
		}
		c.Want(wire.DirectoryPart, 0, z("/big"), "EINVAL")
		c.Want(wire.DirectoryPart, 0, z("/big", "0", ""), "EINVAL")
		c.Want(wire.Mkdir, 0, z("/big/one-more"), ok)
		if g, _, _ := strings.Cut(c.Do(wire.DirectoryPart, 0, z("/big", "0")), "\x00"); g == gen {
			t.Error("the generation stays although the list has grown")
		}
		if got := c.Do(wire.DirectoryPart, 0, z("/tool/xenstored", "0")); !strings.HasSuffix(got, "\x00\x00") {
			t.Errorf("empty directory: %q", got)
		}
	}},
	{"200 requests at once", func(t *testing.T, r rig) {
		c := r.dom0()
		first := c.LastID + 1
		for i := range 200 {
			c.Send(wire.Write, 0, fmt.Sprintf("/pipe/%d\x00%d", i, i))
		}
		for i := range 200 {
			if h, p := c.Receive(); h.ReqID != first+uint32(i) || p != ok {
				t.Fatalf("reply %d has req_id %d: %q", i, h.ReqID, p)
			}
		}
	}},
	{"unknown operations", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		for _, op := range []wire.Op{wire.WatchEvent, wire.Error, 20, wire.GetFeature, wire.SetFeature,
			wire.GetQuota, wire.SetQuota, 27, 99, 1 << 31} {
			c.Want(op, 0, z("/"), "ENOSYS")
			g.Want(op, 0, z("/"), "ENOSYS")
			c.Want(op, 77, z("/"), "ENOSYS")
		}
	}},
	{"permissions of domain 0", func(t *testing.T, r rig) {
		c := r.dom0()
		r.guest(3)
		c.Want(wire.Mkdir, 0, z("/p"), ok)
		c.Want(wire.GetPerms, 0, z("/p"), z("n0"))
		c.Want(wire.SetPerms, 0, z("/p", "r3", "w0", "b0"), ok)
		c.Want(wire.GetPerms, 0, z("/p"), z("r3", "w0", "b0"))
		c.Want(wire.Mkdir, 0, z("/p/inherits"), ok)
		c.Want(wire.GetPerms, 0, z("/p/inherits"), z("r3", "w0", "b0"))
		c.Want(wire.SetPerms, 0, z("/p", "n99"), "ENOENT") // no such domain
		c.Want(wire.SetPerms, 0, z("/p", "n0", "r99"), ok)
		c.Want(wire.SetPerms, 0, z("/p"), "EINVAL")
		c.Want(wire.SetPerms, 0, z("/none", "n0"), "ENOENT")
		for _, bad := range []string{"", "n", "x0", "0", "n0x", "nn", "N0"} {
			c.Want(wire.SetPerms, 0, z("/p", bad), "EINVAL")
		}
		c.Want(wire.SetPerms, 0, z("/p", "n0x3"), ok)
		c.Want(wire.GetPerms, 0, z("/p"), z("n3"))
		six := []string{"/p", "n0", "r3", "r3", "r3", "r3", "r3"}
		c.Want(wire.SetPerms, 0, z(six...), ok) // the quota is not for domain 0
	}},
	{"permissions of a guest", func(t *testing.T, r rig) {
		c, g, h := r.dom0(), r.guest(3), r.guest(4)
		g.Want(wire.Write, 0, "x\x001", ok)
		c.Want(wire.GetPerms, 0, z("/local/domain/3/x"), z("n3"))
		h.Want(wire.Read, 0, z("/local/domain/3/x"), "EACCES")
		h.Want(wire.Read, 0, z("/local/domain/3/none"), "EACCES") // not even whether it exists
		h.Want(wire.Read, 0, z("/none/at/all"), "EACCES")
		h.Want(wire.Write, 0, "/local/domain/3/y\x00", "EACCES")
		h.Want(wire.Rm, 0, z("/local/domain/3/x"), "EACCES")
		h.Want(wire.Rm, 0, z("/"), "EACCES")
		h.Want(wire.GetPerms, 0, z("/local/domain/3/x"), "EACCES")
		h.Want(wire.SetPerms, 0, z("/local/domain/3/x", "n4"), "EACCES")
		h.Want(wire.Directory, 0, z("/"), "EACCES")
		g.Want(wire.SetPerms, 0, z("x", "n3", "r4"), ok)
		h.Want(wire.Read, 0, z("/local/domain/3/x"), "1")
		h.Want(wire.Write, 0, "/local/domain/3/x\x002", "EACCES")
		g.Want(wire.SetPerms, 0, z("x", "r3", "n4"), ok)
		h.Want(wire.Read, 0, z("/local/domain/3/x"), "EACCES") // its entry comes before the default
		g.Want(wire.SetPerms, 0, z("x", "n3", "w4"), ok)
		h.Want(wire.Write, 0, "/local/domain/3/x\x002", ok)
		h.Want(wire.Read, 0, z("/local/domain/3/x"), "EACCES")
		g.Want(wire.Read, 0, z("x"), "2")
		g.Want(wire.SetPerms, 0, z("x", "b3"), ok)
		h.Want(wire.Write, 0, "/local/domain/3/x/sub\x00", ok)
		c.Want(wire.GetPerms, 0, z("/local/domain/3/x/sub"), z("b4")) // who makes a node owns it
		h.Want(wire.SetPerms, 0, z("/local/domain/3/x", "b3", "b4"), "EACCES")
		g.Want(wire.SetPerms, 0, z("x", "n4"), "EPERM")
		g.Want(wire.SetPerms, 0, z("x", "n3", "n0", "n0", "n0", "n0"), ok)
		g.Want(wire.SetPerms, 0, z("x", "n3", "n0", "n0", "n0", "n0", "n0"), "ENOSPC")
		g.Want(wire.Read, 0, z("none"), "ENOENT")
		g.Want(wire.Rm, 0, z("none"), ok)
		g.Want(wire.Rm, 0, z("none/none"), "ENOENT")
		g.Want(wire.Write, 0, "/new\x00", "EACCES")
	}},
	{"operations of domain 0 only", func(t *testing.T, r rig) {
		g := r.guest(3)
		for _, op := range []wire.Op{wire.Control, wire.Introduce, wire.Release, wire.IsDomainIntroduced,
			wire.Resume, wire.SetTarget} {
			g.Want(op, 0, z("1", "1", "1"), "EACCES")
		}
		g.Want(wire.GetDomainPath, 0, z("17"), z("/local/domain/17"))
		g.Want(wire.GetDomainPath, 0, "17", "EINVAL")
	}},
	{"domains", func(t *testing.T, r rig) {
		c := r.dom0()
		r.guest(3)
		c.Want(wire.IsDomainIntroduced, 0, z("3"), z("T"))
		c.Want(wire.IsDomainIntroduced, 0, z("4"), z("F"))
		c.Want(wire.IsDomainIntroduced, 0, z("0"), z("T"))
		c.Want(wire.IsDomainIntroduced, 0, z("32752"), z("T")) // DOMID_SELF
		c.Want(wire.IsDomainIntroduced, 0, "3", "EINVAL")
		c.Want(wire.Introduce, 0, z("3"), "EINVAL")
		c.Want(wire.Introduce, 0, z("3", "0", "0"), "EINVAL")
		c.Want(wire.Resume, 0, z("3"), ok)
		c.Want(wire.Resume, 0, z("4"), "ENOENT")
		c.Want(wire.Release, 0, z("0"), "EINVAL")
		c.Want(wire.Release, 0, z("4"), "ENOENT")
		c.Want(wire.SetTarget, 0, z("3", "4"), "ENOENT")
		c.Want(wire.SetTarget, 0, z("3"), "EINVAL")
		c.Want(wire.Release, 0, z("3"), ok)
		c.Want(wire.IsDomainIntroduced, 0, z("3"), z("F"))
	}},
	{"set target", func(t *testing.T, r rig) {
		c, model, target := r.dom0(), r.guest(3), r.guest(4)
		target.Want(wire.Write, 0, "x\x001", ok)
		model.Want(wire.Read, 0, z("/local/domain/4/x"), "EACCES")
		c.Want(wire.SetTarget, 0, z("3", "4"), ok)
		model.Want(wire.Read, 0, z("/local/domain/4/x"), "1")
		target.Want(wire.Read, 0, z("/local/domain/3"), "EACCES")
	}},
	{"special watches", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		for _, w := range []*raw{c, g} {
			w.Want(wire.Watch, 0, z("@introduceDomain", "i"), ok)
			w.Want(wire.Watch, 0, z("@releaseDomain", "r"), ok)
			w.WantEvents("@introduceDomain i", "@releaseDomain r")
		}
		r.guest(4)
		c.WantEvents("@introduceDomain i")
		c.Want(wire.Release, 0, z("4"), ok)
		c.WantEvents("@releaseDomain r")
		g.WantEvents() // nothing after the first, and no error either
		c.Want(wire.SetPerms, 0, z("@releaseDomain", "n0", "r3"), ok)
		r.guest(5)
		c.Want(wire.Release, 0, z("5"), ok)
		c.WantEvents("@introduceDomain i", "@releaseDomain r")
		g.WantEvents("@releaseDomain r")
	}},
	{"who may hear of a change", func(t *testing.T, r rig) {
		g, h := r.guest(3), r.guest(4)
		h.Want(wire.Watch, 0, z("/local/domain/3", "w"), ok)
		h.WantEvents("/local/domain/3 w")
		g.Want(wire.Write, 0, "secret\x001", ok)
		h.WantEvents()
		g.Want(wire.SetPerms, 0, z("secret", "n3", "r4"), ok)
		h.WantEvents("/local/domain/3/secret w")
		g.Want(wire.Write, 0, "secret\x002", ok)
		h.WantEvents("/local/domain/3/secret w")
		g.Want(wire.SetPerms, 0, z("secret", "n3"), ok)
		h.WantEvents("/local/domain/3/secret w") // it could read the node until now
		g.Want(wire.Write, 0, "secret\x003", ok)
		h.WantEvents()
		g.Want(wire.SetPerms, 0, z("secret", "n3", "r4"), ok)
		g.Want(wire.Write, 0, "secret/below\x00", ok)
		g.Want(wire.SetPerms, 0, z("secret/below", "n3"), ok)
		h.Heard()
		g.Want(wire.Write, 0, "secret/below\x001", ok)
		h.WantEvents("/local/domain/3/secret/below w") // the parent is readable
		g.Want(wire.Rm, 0, z("secret"), ok)
		h.WantEvents("/local/domain/3/secret w")
	}},
	{"quota of node size", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		g.Want(wire.Write, 0, "v\x00"+strings.Repeat("v", 2000), ok)
		g.Want(wire.Write, 0, "v\x00"+strings.Repeat("v", 2015), ok) // 24 + 8 + 2015 = 2047
		g.Want(wire.Write, 0, "v\x00"+strings.Repeat("v", 2016), "ENOSPC")
		g.Want(wire.Write, 0, "v\x00"+strings.Repeat("v", 2048), "ENOSPC")
		g.Want(wire.Write, 0, "new\x00"+strings.Repeat("v", 2048), "ENOSPC")
		g.Want(wire.Read, 0, z("new"), "ENOENT")
		c.Want(wire.Write, 0, "/local/domain/3/v\x00"+strings.Repeat("v", 4000), ok)
		// Names of children count: 2047 - 32 bytes of them fit into a directory.
		g.Want(wire.Mkdir, 0, z("d"), ok)
		n := 0
		for size := 32; ; n++ {
			name := strconv.Itoa(n)
			size += len(name) + 1
			want := ok
			if size >= 2048 {
				want = "ENOSPC"
			}
			g.Want(wire.Mkdir, 0, z("d/"+name), want)
			if want != ok {
				break
			}
		}
		g.Want(wire.Rm, 0, z("d/0"), ok)
		if n < 400 {
			t.Errorf("only %d children", n)
		}
	}},
	{"quota of nodes", func(t *testing.T, r rig) {
		g := r.guest(3)
		n := 1 // its home
		for d := 0; n < 1000; d++ {
			g.Want(wire.Mkdir, 0, z(fmt.Sprintf("d%d", d)), ok)
			n++
			for i := 0; i < 200 && n < 1000; i++ {
				g.Want(wire.Mkdir, 0, z(fmt.Sprintf("d%d/%d", d, i)), ok)
				n++
			}
		}
		g.Want(wire.Mkdir, 0, z("one-more"), "ENOSPC")
		g.Want(wire.Mkdir, 0, z("d0"), ok)
		g.Want(wire.Write, 0, "d0/0\x00v", ok)
		g.Want(wire.Rm, 0, z("d0/0"), ok)
		g.Want(wire.Mkdir, 0, z("two/more"), "ENOSPC")
		g.Want(wire.Read, 0, z("two"), "ENOENT") // all or none
		g.Want(wire.Mkdir, 0, z("one-more"), ok)
	}},
	{"quota of transactions", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		var last uint32
		for range 11 {
			last = g.Start()
		}
		g.Want(wire.TransactionStart, 0, z(""), "ENOSPC")
		g.Want(wire.TransactionEnd, last, z("F"), ok)
		g.Start()
		for range 40 {
			c.Start()
		}
	}},
	{"quota of nodes in a transaction", func(t *testing.T, r rig) {
		g := r.guest(3)
		tx := g.Start()
		for i := range 1023 { // and the home, which the search for the missing node passes
			g.Want(wire.Read, tx, z(fmt.Sprint("none", i)), "ENOENT")
		}
		g.Want(wire.Read, tx, z("none0"), "ENOENT")
		g.Want(wire.Read, tx, z("another"), "ENOSPC")
		g.Want(wire.TransactionEnd, tx, z("T"), "ENOMEM")
	}},
	{"refused write poisons a transaction", func(t *testing.T, r rig) {
		g := r.guest(3)
		tx := g.Start()
		g.Want(wire.Write, tx, "a\x00v", ok)
		g.Want(wire.Write, tx, "a\x00"+strings.Repeat("v", 2048), "ENOSPC")
		g.Want(wire.TransactionEnd, tx, z("T"), "ENOMEM")
		g.Want(wire.Read, 0, z("a"), "ENOENT")
	}},
	{"quota of watches", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		for i := range 129 {
			g.Want(wire.Watch, 0, z("/w", strconv.Itoa(i)), ok)
		}
		g.Want(wire.Watch, 0, z("/w", "more"), "E2BIG")
		g.Want(wire.Watch, 0, z("/w", "0"), "EEXIST")
		g.Want(wire.Unwatch, 0, z("/w", "0"), ok)
		g.Want(wire.Watch, 0, z("/w", "more"), ok)
		for i := range 300 {
			c.Want(wire.Watch, 0, z("/w", strconv.Itoa(i)), ok)
		}
	}},
	{"nodes of a dead domain", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		r.guest(4)
		g.Want(wire.Write, 0, "mine/deep\x001", ok)
		c.Want(wire.Write, 0, "/local/domain/3/mine/of-dom0\x001", ok)
		c.Want(wire.SetPerms, 0, z("/local/domain/3/mine/of-dom0", "n0"), ok)
		c.Want(wire.Write, 0, "/local/domain/4/back/3\x001", ok)
		c.Want(wire.SetPerms, 0, z("/local/domain/4/back/3", "n4", "b3"), ok)
		c.Want(wire.Watch, 0, z("/local", "l"), ok)
		c.Want(wire.Watch, 0, z("/local/domain/3/mine/deep", "d"), ok)
		c.Want(wire.Watch, 0, z("@releaseDomain", "r"), ok)
		c.Want(wire.Write, 0, "/elsewhere/of-3/and-below\x001", ok)
		c.Want(wire.SetPerms, 0, z("/elsewhere/of-3", "n3"), ok)
		c.Want(wire.Watch, 0, z("/elsewhere", "e"), ok)
		c.Heard()
		g.Conn.Close()
		r.kill(3)
		c.WantEvents("/local/domain/3/mine/deep d", "/local/domain/3 l", "/elsewhere/of-3 e", "@releaseDomain r")
		c.Want(wire.Directory, 0, z("/elsewhere"), "")
		c.Want(wire.Directory, 0, z("/local/domain"), z("4"))
		again := r.guest(3) // the same number, but another domain
		again.Want(wire.Read, 0, z("/local/domain/4/back/3"), "EACCES")
		c.Want(wire.Write, 0, "/local/domain/4/back/3\x002", ok)
		again.Want(wire.Read, 0, z("/local/domain/4/back/3"), "EACCES")
		c.Want(wire.SetPerms, 0, z("/local/domain/4/back/3", "n4", "r3"), ok)
		again.Want(wire.Read, 0, z("/local/domain/4/back/3"), "2")
	}},
}

// C xenstored answers these with whatever errno held before, so they are not rows
// above.
func TestMalformedRequests(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	c, g := e.dom0(), e.guest(3)
	g.Want(wire.SetPerms, 0, z("@releaseDomain", "n3"), "EACCES")
	g.Want(wire.SetPerms, 0, z("@nothing", "n3"), "EINVAL")
	c.Want(wire.SetPerms, 0, z("@nothing", "n3"), "EINVAL")
	for _, op := range []wire.Op{wire.Read, wire.Directory, wire.GetPerms, wire.Mkdir, wire.Rm} {
		for _, payload := range []string{"", "/tool", z("/tool", ""), z("/tool") + "x"} {
			c.Want(op, 0, payload, "EINVAL")
		}
	}
}

func TestAnswersLikeXenstored417(t *testing.T) {
	for _, row := range conformance {
		t.Run(row.name, func(t *testing.T) { row.run(t, newEmbedded(t, server.Config{})) })
	}
}
