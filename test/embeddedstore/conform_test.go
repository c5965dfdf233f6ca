package store_test

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"barevif/xenbus/store"
	"barevif/xenbus/wire"
)

// conformance is what C xenstored 4.17 does, as observed. Every row runs against
// xenbus/store and, where it can be had, against Debian's xenstored itself.
var conformance = []struct {
	name string
	run  func(t *testing.T, r rig)
}{
	{"fresh store", func(t *testing.T, r rig) {
		c := r.dom0()
		c.want(wire.Directory, 0, z("/"), z("tool"))
		c.want(wire.Directory, 0, z("/tool"), z("xenstored"))
		c.want(wire.Directory, 0, z("/tool/xenstored"), "")
		c.want(wire.GetPerms, 0, z("/"), z("n0"))
	}},
	{"paths", func(t *testing.T, r rig) {
		c := r.dom0()
		long := "/" + strings.Repeat("a", 2047)
		c.want(wire.Write, 0, long+"\x00v", ok)
		c.want(wire.Read, 0, z(long), "v")
		c.want(wire.Write, 0, long+"a\x00v", "EINVAL")
		for _, home := range []string{"/local/domain/7/", "/local/domain/12345/"} {
			c.want(wire.Write, 0, home+strings.Repeat("b", 2048)+"\x00v", ok)
			c.want(wire.Write, 0, home+strings.Repeat("b", 2049)+"\x00v", "EINVAL")
		}
		c.want(wire.Write, 0, "/local/domain/123456/"+strings.Repeat("b", 2048)+"\x00v", "EINVAL")
		for _, bad := range []string{"//a", "/a//b", "/a/", "/a+b", "/a b", "/a.b", "/\x01", ""} {
			c.want(wire.Write, 0, bad+"\x00v", "EINVAL")
			c.want(wire.Mkdir, 0, z(bad), "EINVAL")
			c.want(wire.Read, 0, z(bad), "EINVAL")
			c.want(wire.Directory, 0, z(bad), "EINVAL")
			c.want(wire.Rm, 0, z(bad), "EINVAL")
			c.want(wire.GetPerms, 0, z(bad), "EINVAL")
			c.want(wire.SetPerms, 0, z(bad, "n0"), "EINVAL")
			c.want(wire.Watch, 0, z(bad, "t"), "EINVAL")
			c.want(wire.DirectoryPart, 0, z(bad, "0"), "EINVAL")
		}
		c.want(wire.Mkdir, 0, z("/A-Z_0@9"), ok)
		c.want(wire.Write, 0, "/no-nul", "EINVAL")
		c.want(wire.Read, 0, z("@releaseDomain"), "EINVAL")
		c.want(wire.GetPerms, 0, z("@releaseDomain"), "EINVAL")
	}},
	{"relative paths", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		c.want(wire.Write, 0, "rel/x\x001", ok)
		c.want(wire.Read, 0, z("/local/domain/0/rel/x"), "1")
		g.want(wire.Write, 0, "x\x002", ok)
		c.want(wire.Read, 0, z("/local/domain/3/x"), "2")
		g.want(wire.Read, 0, z("/local/domain/3/x"), "2")
	}},
	{"payload of 4096", func(t *testing.T, r rig) {
		c := r.dom0()
		value := strings.Repeat("v", 4096-3)
		c.want(wire.Write, 0, "/v\x00"+value, ok)
		c.want(wire.Read, 0, z("/v"), value)
	}},
	{"payload of 4097 kills", func(t *testing.T, r rig) {
		c := r.dom0()
		head, _ := wire.Append(nil, wire.Header{Op: wire.Read}, "")
		head[12], head[13] = 0x01, 0x10 // 4097
		if _, err := c.conn.Write(head); err != nil {
			t.Fatal(err)
		}
		if n, err := c.conn.Read(c.buf[:]); err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %d bytes, %v; want the end of the connection", n, err)
		}
		r.dom0().want(wire.Read, 0, z("/tool"), "")
	}},
	{"values", func(t *testing.T, r rig) {
		c := r.dom0()
		for _, v := range []string{"", "x", "\x00", "a\x00b\x00", "\xff\x00\x01"} {
			c.want(wire.Write, 0, "/v\x00"+v, ok)
			c.want(wire.Read, 0, z("/v"), v)
		}
		c.want(wire.Mkdir, 0, z("/d/e/f"), ok)
		c.want(wire.Read, 0, z("/d"), "")
		c.want(wire.Mkdir, 0, z("/v"), ok)
		c.want(wire.Read, 0, z("/v"), "\xff\x00\x01")
		c.want(wire.Read, 0, z("/none"), "ENOENT")
		c.want(wire.Directory, 0, z("/none"), "ENOENT")
	}},
	{"remove", func(t *testing.T, r rig) {
		c := r.dom0()
		c.want(wire.Write, 0, "/a/b/c\x00v", ok)
		c.want(wire.Rm, 0, z("/a/none"), ok)
		c.want(wire.Rm, 0, z("/none/none"), "ENOENT")
		c.want(wire.Rm, 0, z("/"), "EINVAL")
		c.want(wire.Rm, 0, z("/a"), ok)
		c.want(wire.Read, 0, z("/a/b/c"), "ENOENT")
		c.want(wire.Directory, 0, z("/"), z("tool"))
	}},
	{"order of children", func(t *testing.T, r rig) {
		c := r.dom0()
		for _, n := range []string{"z", "a", "m", "b"} {
			c.want(wire.Mkdir, 0, z("/d/"+n), ok)
		}
		c.want(wire.Rm, 0, z("/d/a"), ok)
		c.want(wire.Mkdir, 0, z("/d/a"), ok)
		c.want(wire.Directory, 0, z("/d"), z("z", "m", "b", "a"))
	}},
	{"transaction ids", func(t *testing.T, r rig) {
		c := r.dom0()
		c.want(wire.Read, 99, z("/tool"), "ENOENT")
		c.want(wire.TransactionStart, 99, z(""), "ENOENT")
		tx := c.start()
		c.want(wire.TransactionStart, tx, z(""), "EBUSY")
		c.want(wire.TransactionEnd, tx, "", "EINVAL")
		c.want(wire.TransactionEnd, tx, "T", "EINVAL")
		c.want(wire.TransactionEnd, tx, z("X"), "EINVAL")
		c.want(wire.TransactionEnd, 0, z("T"), "ENOENT")
		c.want(wire.TransactionEnd, tx, z("T"), ok)
		c.want(wire.TransactionEnd, tx, z("T"), "ENOENT")
		c.want(wire.Read, tx, z("/tool"), "ENOENT")
		r.dom0().want(wire.Read, c.start(), z("/tool"), "ENOENT") // ids are of one connection
	}},
	{"transaction isolation", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		tx := c.start()
		c.want(wire.Write, tx, "/a/x\x001", ok)
		c.want(wire.Read, tx, z("/a/x"), "1")
		d.want(wire.Read, 0, z("/a/x"), "ENOENT")
		c.want(wire.Read, 0, z("/a/x"), "ENOENT")
		c.want(wire.TransactionEnd, tx, z("T"), ok)
		d.want(wire.Read, 0, z("/a/x"), "1")
		tx = c.start()
		c.want(wire.Rm, tx, z("/a"), ok)
		c.want(wire.Read, tx, z("/a/x"), "ENOENT")
		c.want(wire.Directory, tx, z("/"), z("tool"))
		c.want(wire.TransactionEnd, tx, z("F"), ok)
		d.want(wire.Read, 0, z("/a/x"), "1")
	}},
	{"conflict: node read", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.want(wire.Write, 0, "/n\x000", ok)
		tx := c.start()
		c.want(wire.Read, tx, z("/n"), "0")
		d.want(wire.Write, 0, "/n\x001", ok)
		c.want(wire.Read, tx, z("/n"), "0")
		c.want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
		c.want(wire.TransactionEnd, tx, z("T"), "ENOENT")
	}},
	{"conflict: node absent", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		tx := c.start()
		c.want(wire.Read, tx, z("/n"), "ENOENT")
		d.want(wire.Write, 0, "/n\x001", ok)
		c.want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
	}},
	{"conflict: another child of one directory", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.want(wire.Mkdir, 0, z("/vif"), ok)
		tx := c.start()
		c.want(wire.Write, tx, "/vif/0\x00a", ok)
		d.want(wire.Write, 0, "/vif/1\x00b", ok)
		c.want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
		d.want(wire.Directory, 0, z("/vif"), z("1"))
	}},
	{"conflict: between two transactions", func(t *testing.T, r rig) {
		c := r.dom0()
		c.want(wire.Write, 0, "/a\x000", ok)
		c.want(wire.Write, 0, "/b\x000", ok)
		one, two := c.start(), c.start()
		c.want(wire.Read, one, z("/a"), "0")
		c.want(wire.Read, two, z("/b"), "0")
		c.want(wire.Write, one, "/b\x001", ok)
		c.want(wire.Write, two, "/a\x002", ok)
		c.want(wire.TransactionEnd, one, z("T"), ok)
		c.want(wire.TransactionEnd, two, z("T"), "EAGAIN")
	}},
	{"no conflict elsewhere", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.want(wire.Write, 0, "/a\x000", ok)
		c.want(wire.Write, 0, "/b\x000", ok)
		tx := c.start()
		c.want(wire.Write, tx, "/a\x001", ok)
		d.want(wire.Write, 0, "/b\x002", ok)
		c.want(wire.TransactionEnd, tx, z("T"), ok)
	}},
	{"watch", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.send(wire.Watch, 0, z("/w", "tok"))
		if h, p := c.receive(); h.Op != wire.Watch || p != ok || len(c.events) != 0 {
			t.Errorf("reply %d %q after %d events; the event comes after the reply", h.Op, p, len(c.events))
		}
		c.wantEvents("/w tok")
		c.want(wire.Watch, 0, z("/w", "tok"), "EEXIST")
		c.want(wire.Watch, 0, z("/w", "other"), ok)
		c.wantEvents("/w other")
		d.want(wire.Write, 0, "/w/x\x001", ok)
		c.wantEvents("/w/x tok", "/w/x other")
		d.want(wire.Write, 0, "/ww\x001", ok)
		d.want(wire.Mkdir, 0, z("/w/x"), ok)
		c.wantEvents()
		d.want(wire.Mkdir, 0, z("/w/y/z"), ok)
		c.wantEvents("/w/y/z tok", "/w/y/z other")
		c.want(wire.Unwatch, 0, z("/w", "other"), ok)
		c.want(wire.Unwatch, 0, z("/w", "other"), "ENOENT")
		c.want(wire.Unwatch, 0, z("/never", "tok"), "ENOENT")
		d.want(wire.SetPerms, 0, z("/w/x", "r0"), ok)
		c.wantEvents("/w/x tok")
	}},
	{"watch arguments", func(t *testing.T, r rig) {
		c := r.dom0()
		c.want(wire.Watch, 0, z("/missing/node", ""), ok)
		c.wantEvents("/missing/node ")
		c.want(wire.Watch, 0, z("@unknown", "t"), ok)
		c.wantEvents("@unknown t")
		c.want(wire.Watch, 0, z("@"+strings.Repeat("x", 2047), "t"), ok)
		c.want(wire.Watch, 0, z("@"+strings.Repeat("x", 2048), "t"), "EINVAL")
		c.want(wire.Watch, 0, z("/w", "t", "1"), "EINVAL") // a depth
		c.want(wire.Watch, 0, z("/w"), "EINVAL")
		c.want(wire.Watch, 0, "/w\x00t", "EINVAL")
		c.want(wire.Watch, 0, z("/w", "t")+"junk", ok)
		c.want(wire.Watch, 12345, z("/w2", "t"), ok) // the transaction id is of no interest
		c.want(wire.Unwatch, 12345, z("/w2", "t"), ok)
	}},
	{"watch relative in, relative out", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		g.want(wire.Watch, 0, z("dev", "t"), ok)
		g.wantEvents("dev t")
		c.want(wire.Write, 0, "/local/domain/3/dev/x\x001", ok)
		g.wantEvents("dev/x t")
		g.want(wire.Watch, 0, z("/local/domain/3/dev", "t"), "EEXIST")
		g.want(wire.Unwatch, 0, z("/local/domain/3/dev", "t"), ok)
	}},
	{"watch and removal of a parent", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		d.want(wire.Write, 0, "/p/q/r/s\x001", ok)
		d.want(wire.Write, 0, "/p/q/t\x001", ok)
		c.want(wire.Watch, 0, z("/p/q/r", "deep"), ok)
		c.want(wire.Watch, 0, z("/p", "top"), ok)
		c.heard()
		d.want(wire.Rm, 0, z("/p/q"), ok)
		c.wantEvents("/p/q/r deep", "/p/q top")
		d.want(wire.Rm, 0, z("/p"), ok)
		c.wantEvents("/p top")
	}},
	{"watch and transactions", func(t *testing.T, r rig) {
		c, d := r.dom0(), r.dom0()
		c.want(wire.Watch, 0, z("/t", "w"), ok)
		c.heard()
		tx := d.start()
		d.want(wire.Write, tx, "/t/a\x001", ok)
		d.want(wire.Write, tx, "/t/b\x001", ok)
		d.want(wire.Write, tx, "/t/a\x002", ok)
		d.want(wire.Write, tx, "/t/gone\x002", ok)
		d.want(wire.Rm, tx, z("/t/gone"), ok)
		c.wantEvents()
		d.want(wire.TransactionEnd, tx, z("T"), ok)
		c.wantEvents("/t/a w", "/t/b w")
		tx = d.start()
		d.want(wire.Rm, tx, z("/t"), ok)
		d.want(wire.TransactionEnd, tx, z("F"), ok)
		c.wantEvents()
		tx = d.start()
		d.want(wire.Write, tx, "/t/a\x003", ok) // all watches are told of a
		d.want(wire.Rm, tx, z("/t"), ok)        // and of t, now without exception
		d.want(wire.TransactionEnd, tx, z("T"), ok)
		c.wantEvents("/t/a w", "/t w")
	}},
	{"own events come before the reply", func(t *testing.T, r rig) {
		c := r.dom0()
		c.want(wire.Watch, 0, z("/own", "w"), ok)
		c.heard()
		c.want(wire.Write, 0, "/own\x001", ok)
		if len(c.events) != 1 {
			t.Errorf("%d events before the reply to the write, want 1", len(c.events))
		}
	}},
	{"reset watches", func(t *testing.T, r rig) {
		c := r.dom0()
		tx := c.start()
		c.want(wire.Watch, 0, z("/w", "t"), ok)
		c.want(wire.ResetWatches, 0, z(""), ok)
		c.want(wire.Unwatch, 0, z("/w", "t"), "ENOENT")
		c.want(wire.TransactionEnd, tx, z("T"), "ENOENT")
		tx = c.start()
		c.want(wire.Write, tx, "/r\x001", ok)
		c.want(wire.ResetWatches, tx, z(""), ok) // within a transaction: XSA-233
		c.want(wire.TransactionEnd, tx, z("T"), "ENOENT")
		c.want(wire.Read, 0, z("/r"), "ENOENT")
	}},
	{"directory in parts", func(t *testing.T, r rig) {
		c := r.dom0()
		var names []string
		for i := range 700 {
			names = append(names, fmt.Sprintf("entry%04d", i))
			c.want(wire.Mkdir, 0, z("/big/"+names[i]), ok)
		}
		c.want(wire.Directory, 0, z("/big"), "E2BIG")
		var sizes []int
		var all, gen string
		for !strings.HasSuffix(all, "\x00\x00") {
			reply := c.do(wire.DirectoryPart, 0, z("/big", strconv.Itoa(len(all))))
			g, part, found := strings.Cut(reply, "\x00")
			if !found || len(reply) > wire.MaxPayload || len(part) == 0 || gen != "" && g != gen {
				t.Fatalf("part %s of generation %q, had %q", short(part), g, gen)
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
		past := c.do(wire.DirectoryPart, 0, z("/big", "9999"))
		if past != gen+"\x00\x00" {
			t.Errorf("past the end: %q", past)
		}
		if got := c.do(wire.DirectoryPart, 0, z("/big", "6995")); got != gen+"\x000699\x00\x00" {
			t.Errorf("from within a name: %q", got)
		}
		c.want(wire.DirectoryPart, 0, z("/big"), "EINVAL")
		c.want(wire.DirectoryPart, 0, z("/big", "0", ""), "EINVAL")
		c.want(wire.Mkdir, 0, z("/big/one-more"), ok)
		if g, _, _ := strings.Cut(c.do(wire.DirectoryPart, 0, z("/big", "0")), "\x00"); g == gen {
			t.Error("the generation stays although the list has grown")
		}
		if got := c.do(wire.DirectoryPart, 0, z("/tool/xenstored", "0")); !strings.HasSuffix(got, "\x00\x00") {
			t.Errorf("empty directory: %q", got)
		}
	}},
	{"200 requests at once", func(t *testing.T, r rig) {
		c := r.dom0()
		first := c.lastID + 1
		for i := range 200 {
			c.send(wire.Write, 0, fmt.Sprintf("/pipe/%d\x00%d", i, i))
		}
		for i := range 200 {
			if h, p := c.receive(); h.ReqID != first+uint32(i) || p != ok {
				t.Fatalf("reply %d has req_id %d: %q", i, h.ReqID, p)
			}
		}
	}},
	{"unknown operations", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		for _, op := range []wire.Op{wire.WatchEvent, wire.Error, 20, wire.GetFeature, wire.SetFeature,
			wire.GetQuota, wire.SetQuota, 27, 99, 1 << 31} {
			c.want(op, 0, z("/"), "ENOSYS")
			g.want(op, 0, z("/"), "ENOSYS")
			c.want(op, 77, z("/"), "ENOSYS")
		}
	}},
	{"permissions of domain 0", func(t *testing.T, r rig) {
		c := r.dom0()
		r.guest(3)
		c.want(wire.Mkdir, 0, z("/p"), ok)
		c.want(wire.GetPerms, 0, z("/p"), z("n0"))
		c.want(wire.SetPerms, 0, z("/p", "r3", "w0", "b0"), ok)
		c.want(wire.GetPerms, 0, z("/p"), z("r3", "w0", "b0"))
		c.want(wire.Mkdir, 0, z("/p/inherits"), ok)
		c.want(wire.GetPerms, 0, z("/p/inherits"), z("r3", "w0", "b0"))
		c.want(wire.SetPerms, 0, z("/p", "n99"), "ENOENT") // no such domain
		c.want(wire.SetPerms, 0, z("/p", "n0", "r99"), ok)
		c.want(wire.SetPerms, 0, z("/p"), "EINVAL")
		c.want(wire.SetPerms, 0, z("/none", "n0"), "ENOENT")
		for _, bad := range []string{"", "n", "x0", "0", "n0x", "nn", "N0"} {
			c.want(wire.SetPerms, 0, z("/p", bad), "EINVAL")
		}
		c.want(wire.SetPerms, 0, z("/p", "n0x3"), ok)
		c.want(wire.GetPerms, 0, z("/p"), z("n3"))
		six := []string{"/p", "n0", "r3", "r3", "r3", "r3", "r3"}
		c.want(wire.SetPerms, 0, z(six...), ok) // the quota is not for domain 0
	}},
	{"permissions of a guest", func(t *testing.T, r rig) {
		c, g, h := r.dom0(), r.guest(3), r.guest(4)
		g.want(wire.Write, 0, "x\x001", ok)
		c.want(wire.GetPerms, 0, z("/local/domain/3/x"), z("n3"))
		h.want(wire.Read, 0, z("/local/domain/3/x"), "EACCES")
		h.want(wire.Read, 0, z("/local/domain/3/none"), "EACCES") // not even whether it exists
		h.want(wire.Read, 0, z("/none/at/all"), "EACCES")
		h.want(wire.Write, 0, "/local/domain/3/y\x00", "EACCES")
		h.want(wire.Rm, 0, z("/local/domain/3/x"), "EACCES")
		h.want(wire.Rm, 0, z("/"), "EACCES")
		h.want(wire.GetPerms, 0, z("/local/domain/3/x"), "EACCES")
		h.want(wire.SetPerms, 0, z("/local/domain/3/x", "n4"), "EACCES")
		h.want(wire.Directory, 0, z("/"), "EACCES")
		g.want(wire.SetPerms, 0, z("x", "n3", "r4"), ok)
		h.want(wire.Read, 0, z("/local/domain/3/x"), "1")
		h.want(wire.Write, 0, "/local/domain/3/x\x002", "EACCES")
		g.want(wire.SetPerms, 0, z("x", "r3", "n4"), ok)
		h.want(wire.Read, 0, z("/local/domain/3/x"), "EACCES") // its entry comes before the default
		g.want(wire.SetPerms, 0, z("x", "n3", "w4"), ok)
		h.want(wire.Write, 0, "/local/domain/3/x\x002", ok)
		h.want(wire.Read, 0, z("/local/domain/3/x"), "EACCES")
		g.want(wire.Read, 0, z("x"), "2")
		g.want(wire.SetPerms, 0, z("x", "b3"), ok)
		h.want(wire.Write, 0, "/local/domain/3/x/sub\x00", ok)
		c.want(wire.GetPerms, 0, z("/local/domain/3/x/sub"), z("b4")) // who makes a node owns it
		h.want(wire.SetPerms, 0, z("/local/domain/3/x", "b3", "b4"), "EACCES")
		g.want(wire.SetPerms, 0, z("x", "n4"), "EPERM")
		g.want(wire.SetPerms, 0, z("x", "n3", "n0", "n0", "n0", "n0"), ok)
		g.want(wire.SetPerms, 0, z("x", "n3", "n0", "n0", "n0", "n0", "n0"), "ENOSPC")
		g.want(wire.Read, 0, z("none"), "ENOENT")
		g.want(wire.Rm, 0, z("none"), ok)
		g.want(wire.Rm, 0, z("none/none"), "ENOENT")
		g.want(wire.Write, 0, "/new\x00", "EACCES")
	}},
	{"operations of domain 0 only", func(t *testing.T, r rig) {
		g := r.guest(3)
		for _, op := range []wire.Op{wire.Control, wire.Introduce, wire.Release, wire.IsDomainIntroduced,
			wire.Resume, wire.SetTarget} {
			g.want(op, 0, z("1", "1", "1"), "EACCES")
		}
		g.want(wire.GetDomainPath, 0, z("17"), z("/local/domain/17"))
		g.want(wire.GetDomainPath, 0, "17", "EINVAL")
	}},
	{"domains", func(t *testing.T, r rig) {
		c := r.dom0()
		r.guest(3)
		c.want(wire.IsDomainIntroduced, 0, z("3"), z("T"))
		c.want(wire.IsDomainIntroduced, 0, z("4"), z("F"))
		c.want(wire.IsDomainIntroduced, 0, z("0"), z("T"))
		c.want(wire.IsDomainIntroduced, 0, z("32752"), z("T")) // DOMID_SELF
		c.want(wire.IsDomainIntroduced, 0, "3", "EINVAL")
		c.want(wire.Introduce, 0, z("3"), "EINVAL")
		c.want(wire.Introduce, 0, z("3", "0", "0"), "EINVAL")
		c.want(wire.Resume, 0, z("3"), ok)
		c.want(wire.Resume, 0, z("4"), "ENOENT")
		c.want(wire.Release, 0, z("0"), "EINVAL")
		c.want(wire.Release, 0, z("4"), "ENOENT")
		c.want(wire.SetTarget, 0, z("3", "4"), "ENOENT")
		c.want(wire.SetTarget, 0, z("3"), "EINVAL")
		c.want(wire.Release, 0, z("3"), ok)
		c.want(wire.IsDomainIntroduced, 0, z("3"), z("F"))
	}},
	{"set target", func(t *testing.T, r rig) {
		c, stub, target := r.dom0(), r.guest(3), r.guest(4)
		target.want(wire.Write, 0, "x\x001", ok)
		stub.want(wire.Read, 0, z("/local/domain/4/x"), "EACCES")
		c.want(wire.SetTarget, 0, z("3", "4"), ok)
		stub.want(wire.Read, 0, z("/local/domain/4/x"), "1")
		target.want(wire.Read, 0, z("/local/domain/3"), "EACCES")
	}},
	{"special watches", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		for _, w := range []*raw{c, g} {
			w.want(wire.Watch, 0, z("@introduceDomain", "i"), ok)
			w.want(wire.Watch, 0, z("@releaseDomain", "r"), ok)
			w.wantEvents("@introduceDomain i", "@releaseDomain r")
		}
		r.guest(4)
		c.wantEvents("@introduceDomain i")
		c.want(wire.Release, 0, z("4"), ok)
		c.wantEvents("@releaseDomain r")
		g.wantEvents() // nothing after the first, and no error either
		c.want(wire.SetPerms, 0, z("@releaseDomain", "n0", "r3"), ok)
		r.guest(5)
		c.want(wire.Release, 0, z("5"), ok)
		c.wantEvents("@introduceDomain i", "@releaseDomain r")
		g.wantEvents("@releaseDomain r")
	}},
	{"who may hear of a change", func(t *testing.T, r rig) {
		g, h := r.guest(3), r.guest(4)
		h.want(wire.Watch, 0, z("/local/domain/3", "w"), ok)
		h.wantEvents("/local/domain/3 w")
		g.want(wire.Write, 0, "secret\x001", ok)
		h.wantEvents()
		g.want(wire.SetPerms, 0, z("secret", "n3", "r4"), ok)
		h.wantEvents("/local/domain/3/secret w")
		g.want(wire.Write, 0, "secret\x002", ok)
		h.wantEvents("/local/domain/3/secret w")
		g.want(wire.SetPerms, 0, z("secret", "n3"), ok)
		h.wantEvents("/local/domain/3/secret w") // it could read the node until now
		g.want(wire.Write, 0, "secret\x003", ok)
		h.wantEvents()
		g.want(wire.SetPerms, 0, z("secret", "n3", "r4"), ok)
		g.want(wire.Write, 0, "secret/below\x00", ok)
		g.want(wire.SetPerms, 0, z("secret/below", "n3"), ok)
		h.heard()
		g.want(wire.Write, 0, "secret/below\x001", ok)
		h.wantEvents("/local/domain/3/secret/below w") // the parent is readable
		g.want(wire.Rm, 0, z("secret"), ok)
		h.wantEvents("/local/domain/3/secret w")
	}},
	{"quota of node size", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		g.want(wire.Write, 0, "v\x00"+strings.Repeat("v", 2000), ok)
		g.want(wire.Write, 0, "v\x00"+strings.Repeat("v", 2015), ok) // 24 + 8 + 2015 = 2047
		g.want(wire.Write, 0, "v\x00"+strings.Repeat("v", 2016), "ENOSPC")
		g.want(wire.Write, 0, "v\x00"+strings.Repeat("v", 2048), "ENOSPC")
		g.want(wire.Write, 0, "new\x00"+strings.Repeat("v", 2048), "ENOSPC")
		g.want(wire.Read, 0, z("new"), "ENOENT")
		c.want(wire.Write, 0, "/local/domain/3/v\x00"+strings.Repeat("v", 4000), ok)
		// Names of children count: 2047 - 32 bytes of them fit into a directory.
		g.want(wire.Mkdir, 0, z("d"), ok)
		n := 0
		for size := 32; ; n++ {
			name := strconv.Itoa(n)
			size += len(name) + 1
			want := ok
			if size >= 2048 {
				want = "ENOSPC"
			}
			g.want(wire.Mkdir, 0, z("d/"+name), want)
			if want != ok {
				break
			}
		}
		g.want(wire.Rm, 0, z("d/0"), ok)
		if n < 400 {
			t.Errorf("only %d children", n)
		}
	}},
	{"quota of nodes", func(t *testing.T, r rig) {
		g := r.guest(3)
		n := 1 // its home
		for d := 0; n < 1000; d++ {
			g.want(wire.Mkdir, 0, z(fmt.Sprintf("d%d", d)), ok)
			n++
			for i := 0; i < 200 && n < 1000; i++ {
				g.want(wire.Mkdir, 0, z(fmt.Sprintf("d%d/%d", d, i)), ok)
				n++
			}
		}
		g.want(wire.Mkdir, 0, z("one-more"), "ENOSPC")
		g.want(wire.Mkdir, 0, z("d0"), ok)
		g.want(wire.Write, 0, "d0/0\x00v", ok)
		g.want(wire.Rm, 0, z("d0/0"), ok)
		g.want(wire.Mkdir, 0, z("two/more"), "ENOSPC")
		g.want(wire.Read, 0, z("two"), "ENOENT") // all or none
		g.want(wire.Mkdir, 0, z("one-more"), ok)
	}},
	{"quota of transactions", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		var last uint32
		for range 11 {
			last = g.start()
		}
		g.want(wire.TransactionStart, 0, z(""), "ENOSPC")
		g.want(wire.TransactionEnd, last, z("F"), ok)
		g.start()
		for range 40 {
			c.start()
		}
	}},
	{"quota of nodes in a transaction", func(t *testing.T, r rig) {
		g := r.guest(3)
		tx := g.start()
		for i := range 1023 { // and the home, which the search for the missing node passes
			g.want(wire.Read, tx, z(fmt.Sprint("none", i)), "ENOENT")
		}
		g.want(wire.Read, tx, z("none0"), "ENOENT")
		g.want(wire.Read, tx, z("another"), "ENOSPC")
		g.want(wire.TransactionEnd, tx, z("T"), "ENOMEM")
	}},
	{"refused write poisons a transaction", func(t *testing.T, r rig) {
		g := r.guest(3)
		tx := g.start()
		g.want(wire.Write, tx, "a\x00v", ok)
		g.want(wire.Write, tx, "a\x00"+strings.Repeat("v", 2048), "ENOSPC")
		g.want(wire.TransactionEnd, tx, z("T"), "ENOMEM")
		g.want(wire.Read, 0, z("a"), "ENOENT")
	}},
	{"quota of watches", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		for i := range 129 {
			g.want(wire.Watch, 0, z("/w", strconv.Itoa(i)), ok)
		}
		g.want(wire.Watch, 0, z("/w", "more"), "E2BIG")
		g.want(wire.Watch, 0, z("/w", "0"), "EEXIST")
		g.want(wire.Unwatch, 0, z("/w", "0"), ok)
		g.want(wire.Watch, 0, z("/w", "more"), ok)
		for i := range 300 {
			c.want(wire.Watch, 0, z("/w", strconv.Itoa(i)), ok)
		}
	}},
	{"nodes of a dead domain", func(t *testing.T, r rig) {
		c, g := r.dom0(), r.guest(3)
		r.guest(4)
		g.want(wire.Write, 0, "mine/deep\x001", ok)
		c.want(wire.Write, 0, "/local/domain/3/mine/of-dom0\x001", ok)
		c.want(wire.SetPerms, 0, z("/local/domain/3/mine/of-dom0", "n0"), ok)
		c.want(wire.Write, 0, "/local/domain/4/back/3\x001", ok)
		c.want(wire.SetPerms, 0, z("/local/domain/4/back/3", "n4", "b3"), ok)
		c.want(wire.Watch, 0, z("/local", "l"), ok)
		c.want(wire.Watch, 0, z("/local/domain/3/mine/deep", "d"), ok)
		c.want(wire.Watch, 0, z("@releaseDomain", "r"), ok)
		c.want(wire.Write, 0, "/elsewhere/of-3/and-below\x001", ok)
		c.want(wire.SetPerms, 0, z("/elsewhere/of-3", "n3"), ok)
		c.want(wire.Watch, 0, z("/elsewhere", "e"), ok)
		c.heard()
		g.conn.Close()
		r.kill(3)
		c.wantEvents("/local/domain/3/mine/deep d", "/local/domain/3 l", "/elsewhere/of-3 e", "@releaseDomain r")
		c.want(wire.Directory, 0, z("/elsewhere"), "")
		c.want(wire.Directory, 0, z("/local/domain"), z("4"))
		again := r.guest(3) // the same number, but another domain
		again.want(wire.Read, 0, z("/local/domain/4/back/3"), "EACCES")
		c.want(wire.Write, 0, "/local/domain/4/back/3\x002", ok)
		again.want(wire.Read, 0, z("/local/domain/4/back/3"), "EACCES")
		c.want(wire.SetPerms, 0, z("/local/domain/4/back/3", "n4", "r3"), ok)
		again.want(wire.Read, 0, z("/local/domain/4/back/3"), "2")
	}},
}

// C xenstored answers these with whatever errno held before, so they are not rows
// above.
func TestMalformedRequests(t *testing.T) {
	e := newEmbedded(t, store.Config{})
	c, g := e.dom0(), e.guest(3)
	g.want(wire.SetPerms, 0, z("@releaseDomain", "n3"), "EACCES")
	g.want(wire.SetPerms, 0, z("@nothing", "n3"), "EINVAL")
	c.want(wire.SetPerms, 0, z("@nothing", "n3"), "EINVAL")
	for _, op := range []wire.Op{wire.Read, wire.Directory, wire.GetPerms, wire.Mkdir, wire.Rm} {
		for _, payload := range []string{"", "/tool", z("/tool", ""), z("/tool") + "x"} {
			c.want(op, 0, payload, "EINVAL")
		}
	}
}

func TestAnswersLikeXenstored417(t *testing.T) {
	for _, row := range conformance {
		t.Run(row.name, func(t *testing.T) { row.run(t, newEmbedded(t, store.Config{})) })
	}
}
