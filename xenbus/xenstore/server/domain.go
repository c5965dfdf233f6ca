package server

import (
	"slices"
	"strconv"
	"time"

	"barevif/hypercall"
)

// A domain is one life of a domid. Permissions, ownership and quotas refer to the life,
// so that a later domain with the same number inherits nothing (XSA-322, XSA-483).
// Store.mu guards all fields but the first group.
type domain struct {
	id         hypercall.DomID
	home       string // prefix of its relative paths
	privileged bool

	dead     bool
	target   *domain // its rights as an owner are ours too (SET_TARGET)
	clients  int     // connections, including the admitted ones
	admitted int     // places that Admit reserved and connect has not used
	nodes    int     // nodes it owns
	watches  int
	txs      int
	memory   int // bytes the store holds for it
	credit   float64
	charged  time.Time // when credit was last computed
}

// A domain that writes while others have transactions open can make every commit of
// theirs fail (XSA-206). These constants bound its writes, as WRL_RATE and WRL_GBURST of
// xenstored_domain.h do.
const (
	writeRate  = 200 // a second
	writeBurst = 1000
)

// debitLocked charges the domain for one change of the tree.
func (d *domain) debitLocked(s *Store) {
	if d.privileged || s.openTxs == d.txs {
		return // no other domain has a transaction open
	}
	now := time.Now()
	earned := now.Sub(d.charged).Seconds() * writeRate
	d.credit = min(writeBurst, d.credit+earned) - 1
	d.charged = now
	if d.credit < 0 {
		s.stats.RateLimited++
	}
}

// pauseLocked returns how long a domain without credit is not read.
func (d *domain) pauseLocked() time.Duration {
	if d.credit >= 0 {
		return 0
	}
	due := d.charged.Add(time.Duration(-d.credit / writeRate * float64(time.Second)))
	return max(0, time.Until(due))
}

func homeOf(id uint32) string { return "/local/domain/" + strconv.FormatUint(uint64(id), 10) }

// access is what a permission entry allows: XS_PERM_READ and XS_PERM_WRITE of
// xenstore_lib.h, and XS_PERM_OWNER for the right to change permissions.
type access uint8

const (
	canRead  access = 1
	canWrite access = 2
	isOwner  access = 8
)

// A perm is one entry of a node's permissions. The first names the owner and the access
// of domains without an entry.
type perm struct {
	dom    *domain
	access access
}

func (p perm) String() string {
	return string("nrwb"[p.access&3]) + strconv.Itoa(int(p.dom.id))
}

// rights is perm_for_conn of xenstored_core.c. A nil target matches nothing, because
// every entry has a domain.
func (d *domain) rights(perms []perm) access {
	owner := perms[0].dom
	if d.privileged || owner == d || owner == d.target {
		return canRead | canWrite | isOwner
	}
	for _, p := range perms[1:] {
		if p.dom == d || p.dom == d.target {
			return p.access
		}
	}
	return perms[0].access
}

// parsePermsLocked decodes the entries of SET_PERMS. An entry for a domain that does not
// exist is kept, but will not match a later domain with that id.
func (s *Store) parsePermsLocked(entries []string) ([]perm, error) {
	perms := make([]perm, 0, len(entries))
	for _, e := range entries {
		if len(e) < 2 {
			return nil, EINVAL
		}
		var a access
		switch e[0] {
		case 'n':
		case 'r':
			a = canRead
		case 'w':
			a = canWrite
		case 'b':
			a = canRead | canWrite
		default:
			return nil, EINVAL
		}
		n, err := strconv.ParseUint(e[1:], 0, 32)
		if err != nil {
			return nil, EINVAL
		}
		if n > uint64(^hypercall.DomID(0)) {
			return nil, ENOENT
		}
		id := hypercall.DomID(n)
		d := s.domains[id]
		if d == nil {
			d = &domain{id: id, dead: true}
		}
		perms = append(perms, perm{d, a})
	}
	if perms[0].dom.dead {
		return nil, ENOENT
	}
	return perms, nil
}

// Introduce makes the domain known: its connections can be served and permissions can
// name it. It fires @introduceDomain unless the domain was known already.
func (s *Store) Introduce(dom hypercall.DomID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.introduceLocked(dom)
}

func (s *Store) introduceLocked(id hypercall.DomID) *domain {
	if d := s.domains[id]; d != nil {
		return d
	}
	d := &domain{
		id: id, home: homeOf(uint32(id)),
		privileged: slices.Contains(s.cfg.Privileged, id),
		credit:     writeBurst, charged: time.Now(),
	}
	s.domains[id] = d
	s.fireSpecialLocked(introduceDomain)
	return d
}

// DomainDied ends everything of the domain: its connections with their watches and
// transactions, and the nodes it owned with all nodes below them, as C xenstored does
// since XSA-419. Then it fires @releaseDomain. It ignores an unknown domain; domain 0
// never dies.
func (s *Store) DomainDied(dom hypercall.DomID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.domains[dom]; d != nil && dom != 0 {
		s.releaseLocked(d)
	}
}

func (s *Store) releaseLocked(d *domain) {
	d.dead = true
	delete(s.domains, d.id)
	for _, other := range s.domains {
		if other.target == d {
			other.target = nil
		}
	}
	for _, c := range s.clients {
		if c.dom == d {
			c.resetLocked()
			c.endLocked(hypercall.ErrNoDomain)
		}
	}
	if d.nodes > 0 {
		var owned []string
		for path, n := range s.nodes {
			if n.perms[0].dom == d {
				owned = append(owned, path)
			}
		}
		slices.Sort(owned) // an ancestor sorts before the nodes below it
		r := &request{s: s, dom: s.domains[0]}
		for _, path := range owned {
			switch n := s.nodes[path]; {
			case path == "/": // the root has to stay
				root := *n
				root.perms = []perm{{dom: r.dom}}
				r.save(path, &root)
			case n != nil:
				r.removeTree(path)
			}
		}
	}
	s.fireSpecialLocked(releaseDomain)
}
