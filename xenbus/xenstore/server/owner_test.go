package server_test

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire"
)

// TestMemoryQuotaToTheByte fills the quota exactly, and then asks for one more byte.
func TestMemoryQuotaToTheByte(t *testing.T) {
	const quota = 3300
	for _, inTx := range []bool{false, true} {
		e := newEmbedded(t, server.Config{Quota: server.Quota{Memory: quota}})
		g := e.guest(3)
		g.Want(wire.Write, 0, "a\x00"+strings.Repeat("v", 1500), ok)
		g.Want(wire.Write, 0, "b\x00", ok)
		var tx uint32
		if inTx {
			tx = g.Start()
			g.Want(wire.Read, tx, z("b"), "")
			g.Want(wire.Write, tx, "b\x00", ok)
		}
		room := quota - e.MemoryOf(3)
		if room < 100 || room > 1900 {
			t.Fatalf("room for %d bytes", room)
		}
		g.Want(wire.Write, tx, "b\x00"+strings.Repeat("v", room), ok)
		if m := e.MemoryOf(3); m != quota {
			t.Errorf("in a transaction %v: it holds %d bytes of %d", inTx, m, quota)
		}
		g.Want(wire.Write, tx, "b\x00"+strings.Repeat("v", room+1), "ENOMEM")
		if inTx {
			g.Want(wire.Read, tx, z("never/looked/for"), "ENOMEM") // the record of a touched node costs too
			g.Want(wire.TransactionEnd, tx, z("T"), "ENOMEM")
			g.Want(wire.Read, 0, z("b"), "")
			continue
		}
		g.Want(wire.Write, 0, "c\x00", "ENOMEM")
		g.Want(wire.Read, 0, z("b"), strings.Repeat("v", room))
		g.Want(wire.Write, 0, "b\x00"+strings.Repeat("v", room-1), ok)
		g.Want(wire.Write, 0, "b\x00"+strings.Repeat("w", room), ok)
	}
}

// Nodes that a transaction only looked for count too.
func TestMemoryOfWhatATransactionLookedFor(t *testing.T) {
	const quota = 2000
	e := newEmbedded(t, server.Config{Quota: server.Quota{Memory: quota}})
	g := e.guest(3)
	g.Want(wire.Write, 0, "b\x00", ok)
	tx := g.Start()
	g.Want(wire.Write, tx, "b\x00", ok)
	g.Want(wire.Read, tx, z("none"), "ENOENT") // touches its home too, which is above the node
	before := e.MemoryOf(3)
	g.Want(wire.Read, tx, z("none0"), "ENOENT")
	cost := e.MemoryOf(3) - before
	if cost < len("/local/domain/3/none0") {
		t.Fatalf("a node that was looked for takes %d bytes", cost)
	}
	g.Want(wire.Write, tx, "b\x00"+strings.Repeat("v", quota-e.MemoryOf(3)-cost), ok)
	g.Want(wire.Read, tx, z("none1"), "ENOENT")
	if m := e.MemoryOf(3); m != quota {
		t.Errorf("it holds %d bytes of %d", m, quota)
	}
	g.Want(wire.Read, tx, z("none0"), "ENOENT")
	g.Want(wire.Read, tx, z("none2"), "ENOMEM")
	g.Want(wire.TransactionEnd, tx, z("F"), ok)
	if m := e.MemoryOf(3); m >= before {
		t.Errorf("%d bytes after the transaction, %d in it", m, before)
	}
}

func TestPermissionsCountForTheQuotas(t *testing.T) {
	e := newEmbedded(t, server.Config{Quota: server.Quota{Memory: 4500}})
	g := e.guest(3)
	full := strings.Repeat("v", 2047-24-8)
	g.Want(wire.Write, 0, "a\x00"+full, ok)
	g.Want(wire.SetPerms, 0, z("a", "n3", "r0"), "ENOSPC")
	g.Want(wire.Write, 0, "b\x00"+full[8:], ok)
	g.Want(wire.SetPerms, 0, z("b", "n3", "r0"), ok)
	g.Want(wire.Write, 0, "c\x00", ok)
	g.Want(wire.Write, 0, "c\x00"+strings.Repeat("v", 4500-e.MemoryOf(3)-8), ok)
	g.Want(wire.SetPerms, 0, z("c", "n3", "r0", "r0"), "ENOMEM")
	g.Want(wire.SetPerms, 0, z("c", "n3", "r0"), ok)
	g.Want(wire.GetPerms, 0, z("c"), z("n3", "r0"))
}

// The path of a node counts when the node is made, not when it is written again.
func TestMemoryOfANewNode(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	g := e.guest(3)
	before := e.MemoryOf(3)
	g.Want(wire.Write, 0, "name\x00value", ok)
	// 24 + 8 for the node and its permission; its parent lists "name" and a NUL.
	const path = "/local/domain/3/name"
	if got, want := e.MemoryOf(3)-before, 24+8+len("value")+len(path)+len("name")+1; got != want {
		t.Errorf("a new node takes %d bytes, want %d", got, want)
	}
	g.Want(wire.Rm, 0, z("name"), ok)
	if got := e.MemoryOf(3); got != before {
		t.Errorf("%d bytes once it is removed, want %d", got, before)
	}
	// The quota is compared with the same number.
	e = newEmbedded(t, server.Config{Quota: server.Quota{Memory: before + 24 + 8 + len(path) + len("name") + 1}})
	g = e.guest(3)
	g.Want(wire.Write, 0, "name\x00v", "ENOMEM")
	g.Want(wire.Write, 0, "name\x00", ok)
}

// The owner of a node pays for the bytes that other domains write there.
func TestTheOwnerPays(t *testing.T) {
	const quota = 6000
	e := newEmbedded(t, server.Config{Quota: server.Quota{Memory: quota}})
	c, g, h := e.dom0(), e.guest(3), e.guest(4)

	// Domain 4 writes a node of domain 3, and fills domain 3's quota.
	g.Want(wire.Mkdir, 0, z("shared"), ok)
	g.Want(wire.SetPerms, 0, z("shared", "b3"), ok)
	before := e.MemoryOf(4)
	const shared = "/local/domain/3/shared"
	h.Want(wire.Write, 0, shared+"\x00"+strings.Repeat("v", 1000), ok)
	if m := e.MemoryOf(3); e.MemoryOf(4) != before || m < 1000 {
		t.Errorf("domain 3 pays %d bytes, domain 4 %d more than before", m, e.MemoryOf(4)-before)
	}
	for _, name := range []string{"x", "y", "z"} {
		g.Do(wire.Write, 0, name+"\x00"+strings.Repeat("v", 1900))
	}
	room := quota - e.MemoryOf(3)
	h.Want(wire.Write, 0, shared+"\x00"+strings.Repeat("v", 1000+room+1), "ENOMEM")
	h.Want(wire.Write, 0, shared+"\x00"+strings.Repeat("v", 1000+room), ok)
	h.Want(wire.Write, 0, shared+"/by4\x00", "ENOMEM") // the list of children grows, for which domain 3 pays
	h.Want(wire.Write, 0, "own\x00v", ok)              // domain 4 pays for its own node

	// Domain 0 pays nothing: a guest may write a node of domain 0 of any size.
	for i := range 10 {
		c.Want(wire.Write, 0, fmt.Sprintf("/dom0/%d\x00%s", i, strings.Repeat("v", 1900)), ok)
	}
	c.Want(wire.SetPerms, 0, z("/dom0", "b0"), ok)
	h.Want(wire.Write, 0, "/dom0/by4\x00v", ok)
	c.Want(wire.GetPerms, 0, z("/dom0/by4"), z("b4"))
	h.Want(wire.Rm, 0, z("/dom0/by4"), ok)
}

// A domain with nodes over its quota may still make them smaller.
func TestOverTheQuotaLessIsAllowed(t *testing.T) {
	e := newEmbedded(t, server.Config{Quota: server.Quota{Memory: 2500, Nodes: 4}})
	c, g := e.dom0(), e.guest(3)
	g.Want(wire.Write, 0, "v\x00"+strings.Repeat("v", 1000), ok)
	for i := range 5 {
		given := fmt.Sprintf("/given%d", i)
		c.Want(wire.Write, 0, given+"\x00"+strings.Repeat("v", 1000), ok)
		c.Want(wire.SetPerms, 0, z(given, "n3"), ok)
	}
	if m := e.MemoryOf(3); m < 6000 {
		t.Fatalf("it holds %d bytes", m)
	}
	g.Want(wire.Write, 0, "v\x00"+strings.Repeat("v", 1001), "ENOMEM")
	g.Want(wire.Write, 0, "v\x00"+strings.Repeat("w", 1000), ok)
	g.Want(wire.Write, 0, "v\x00", ok)
	g.Want(wire.Mkdir, 0, z("more"), "ENOSPC")
	g.Want(wire.Rm, 0, z("/given0"), ok)
	for _, emptied := range []string{"/given1", "/given2", "/given3", "/given4"} {
		g.Want(wire.Write, 0, emptied+"\x00", ok)
	}
	g.Want(wire.Mkdir, g.Start(), z("more"), "ENOSPC")
}

// A commit counts one node less for the owner of each removed node, and one more for the
// owner of each new node. Domain 0 has no limit.
func TestNodesAreCountedForTheirOwnersAtTheCommit(t *testing.T) {
	e := newEmbedded(t, server.Config{Quota: server.Quota{Nodes: 10}})
	c, g, h := e.dom0(), e.guest(3), e.guest(4)
	for i := range 30 {
		c.Want(wire.Mkdir, 0, z(fmt.Sprint("/dom0/", i)), ok)
	}
	c.Want(wire.SetPerms, 0, z("/dom0", "b0"), ok)
	c.Want(wire.SetPerms, 0, z("/dom0/0", "b0"), ok)
	tx := g.Start()
	g.Want(wire.Rm, tx, z("/dom0/0"), ok)
	g.Want(wire.Mkdir, tx, z("/dom0/mine"), ok)
	g.Want(wire.TransactionEnd, tx, z("T"), ok)
	c.Want(wire.GetPerms, 0, z("/dom0/mine"), z("b3"))

	// Up to 9 nodes at a commit: its home, /dom0/mine and 7 more.
	fill := func(names ...string) uint32 {
		tx := g.Start()
		for _, name := range names {
			g.Want(wire.Mkdir, tx, z(name), ok)
		}
		return tx
	}
	g.Want(wire.TransactionEnd, fill("a", "b", "c", "d", "e", "f", "g", "h"), z("T"), "ENOSPC")
	g.Want(wire.TransactionEnd, fill("a", "b", "c", "d", "e", "f", "g"), z("T"), ok)
	g.Want(wire.TransactionEnd, fill("h"), z("T"), "ENOSPC")

	// One removed and one new node do not change the number.
	tx = g.Start()
	g.Want(wire.Rm, tx, z("a"), ok)
	g.Want(wire.Mkdir, tx, z("h"), ok)
	g.Want(wire.TransactionEnd, tx, z("T"), ok)

	// A node that is made and removed again does not count.
	tx = g.Start()
	g.Want(wire.Mkdir, tx, z("i"), ok)
	g.Want(wire.Rm, tx, z("i"), ok)
	g.Want(wire.TransactionEnd, tx, z("T"), ok)

	// Domain 4 may use the path of a node that domain 3 removed; each domain counts its
	// own nodes.
	g.Want(wire.SetPerms, 0, z("/dom0/mine", "b3"), ok)
	tx = h.Start()
	h.Want(wire.Rm, tx, z("/dom0/mine"), ok)
	h.Want(wire.Mkdir, tx, z("/dom0/yours"), ok)
	h.Want(wire.TransactionEnd, tx, z("T"), ok)
	c.Want(wire.GetPerms, 0, z("/dom0/yours"), z("b4"))
	g.Want(wire.TransactionEnd, fill("i"), z("T"), ok)
}

// With the quota of nodes used up a transaction may start and write, but not add a node.
func TestNodeQuotaToTheNode(t *testing.T) {
	e := newEmbedded(t, server.Config{Quota: server.Quota{Nodes: 4}})
	g := e.guest(3)
	g.Want(wire.Mkdir, 0, z("a/b"), ok)
	g.Want(wire.Mkdir, 0, z("c/d"), "ENOSPC")
	g.Want(wire.Mkdir, 0, z("c"), ok)
	g.Want(wire.Mkdir, 0, z("d"), "ENOSPC")
	tx := g.Start()
	g.Want(wire.Write, tx, "c\x00v", ok)
	g.Want(wire.TransactionEnd, tx, z("T"), ok)
	tx = g.Start()
	g.Want(wire.Mkdir, tx, z("d"), "ENOSPC")
	g.Want(wire.Rm, tx, z("c"), ok)
	g.Want(wire.TransactionEnd, tx, z("T"), ok)
	g.Want(wire.Mkdir, 0, z("d"), ok)
}

func TestConnectionQuota(t *testing.T) {
	e := newEmbedded(t, server.Config{Quota: server.Quota{Connections: 2}})
	g := e.guest(3)
	second := e.connect(3)
	second.Want(wire.Read, 0, z("none"), "ENOENT")
	third, refused := e.dial(3)
	third.SetReadDeadline(time.Now().Add(patience))
	if n, err := third.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("the third connection: read %d bytes, %v", n, err)
	}
	if err := <-refused; err != server.ErrConnections {
		t.Errorf("the third connection: %v, want %v", err, server.ErrConnections)
	}
	g.Want(wire.Read, 0, z("none"), "ENOENT")
	for range 5 {
		e.dom0().Want(wire.Read, 0, z("/tool"), "")
	}
}

// SET_TARGET gives a device model the rights of the domain that it serves, until that
// domain dies.
func TestRightsOfATarget(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	c, g, h := e.dom0(), e.guest(3), e.guest(4)
	g.Want(wire.Write, 0, "x\x001", ok)
	c.Want(wire.Write, 0, "/of-dom0\x002", ok)
	c.Want(wire.SetPerms, 0, z("/of-dom0", "n0", "r3"), ok)
	h.Want(wire.Read, 0, z("/local/domain/3/x"), "EACCES")
	h.Want(wire.Read, 0, z("/of-dom0"), "EACCES")
	c.Want(wire.SetTarget, 0, z("4", "3"), ok)
	h.Want(wire.Read, 0, z("/local/domain/3/x"), "1")
	h.Want(wire.Read, 0, z("/of-dom0"), "2")
	h.Want(wire.Write, 0, "/of-dom0\x003", "EACCES")
	h.Want(wire.SetPerms, 0, z("/local/domain/3/x", "n3", "r4"), ok)
	h.Want(wire.SetPerms, 0, z("/local/domain/3/x", "n4"), "EPERM") // its owner stays
	g.Want(wire.Read, 0, z("/local/domain/4/none"), "EACCES")       // in one direction only
	c.Want(wire.SetPerms, 0, z("/of-dom0", "n0", "r3"), ok)
	e.DomainDied(3)
	h.Want(wire.Read, 0, z("/of-dom0"), "EACCES")
	e.guest(3)
	h.Want(wire.Read, 0, z("/local/domain/3/none"), "EACCES") // another domain 3
}

// 65539 is 3 in 16 bits, and names no domain.
func TestPermissionsForNoDomain(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	c, g := e.dom0(), e.guest(3)
	c.Want(wire.Write, 0, "/x\x001", ok)
	c.Want(wire.SetPerms, 0, z("/x", "n65539"), "ENOENT")
	c.Do(wire.SetPerms, 0, z("/x", "n0", "r65539"))
	c.Want(wire.GetPerms, 0, z("/x"), z("n0"))
	g.Want(wire.Read, 0, z("/x"), "EACCES")
	for _, bad := range []string{"r", "", "n-1", "n4294967296"} {
		c.Want(wire.SetPerms, 0, z("/x", "n0", bad), "EINVAL")
	}
}

// Id 0 means no transaction, and an id is not reused while its transaction is open.
func TestTransactionIDsStartAgain(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	c := e.dom0()
	first, second := c.Start(), c.Start()
	e.SkipTransactions(^uint32(0) - 1)
	if id := c.Start(); id != ^uint32(0) {
		t.Errorf("transaction %d, want the last there is", id)
	}
	if id := c.Start(); id == 0 || id == first || id == second {
		t.Errorf("transaction %d while %d and %d are open", id, first, second)
	}
}
