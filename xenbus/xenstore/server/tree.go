package server

import (
	"slices"

	"barevif/xenbus/xenstore/wire"
)

// A node is immutable once it is in the tree, so transactions and readers share it.
// Store.nodes maps a path to the latest version.
type node struct {
	gen        uint64 // unique to this version of this node; never 0
	perms      []perm // never empty
	value      string
	children   []string // names in order of creation
	childBytes int      // bytes of the names, each with a NUL
}

// size returns the bytes that the node takes in C xenstored's data base: a header of 24,
// 8 per permission, the value and the names of the children.
func (n *node) size() int { return 24 + 8*len(n.perms) + len(n.value) + n.childBytes }

func (n *node) generation() uint64 {
	if n == nil {
		return 0
	}
	return n.gen
}

// withChild may append to the old slice in place: older versions keep their length and do
// not see the new child. A transaction clips the slice first, see [transaction.load].
func (n *node) withChild(name string) *node {
	c := *n
	c.children = append(n.children, name)
	c.childBytes += len(name) + 1
	return &c
}

func (n *node) withoutChild(name string) *node {
	c := *n
	i := slices.Index(n.children, name)
	if i < 0 {
		return &c // removeTree may meet a parent without the child
	}
	c.children = slices.Concat(n.children[:i], n.children[i+1:])
	c.childBytes -= len(name) + 1
	return &c
}

// putLocked makes n the node at path, or removes the node if n is nil, and updates the
// accounts of the owners.
func (s *Store) putLocked(path string, n *node) {
	if old := s.nodes[path]; old != nil {
		owner := old.perms[0].dom
		owner.nodes--
		owner.memory -= old.size() + len(path)
	}
	if n == nil {
		delete(s.nodes, path)
		return
	}
	owner := n.perms[0].dom
	owner.nodes++
	owner.memory += n.size() + len(path)
	s.nodes[path] = n
}

// A request is one operation of one domain, inside a transaction or not. Its methods run
// with Store.mu held.
type request struct {
	s   *Store
	dom *domain
	tx  *transaction // nil: the request works on the tree itself
	c   *client      // nil for the Store's own methods
	hdr wire.Header
	arg []byte // part of the connection's buffer: copied before it is kept
}

// load returns the node at path as this request sees it, nil if there is none.
func (r *request) load(path string) (*node, error) {
	if r.tx != nil {
		return r.tx.load(r, path)
	}
	return r.s.nodes[path], nil
}

// save makes n the node at path. No other goroutine may hold n yet.
func (r *request) save(path string, n *node) {
	r.s.gen++
	if n != nil {
		n.gen = r.s.gen
	}
	if r.tx != nil {
		r.tx.save(r.dom, path, n)
		return
	}
	r.s.putLocked(path, n)
}

// absolute completes a relative path. It leaves names of special events alone.
func (r *request) absolute(path string) string {
	if path != "" && (path[0] == '/' || path[0] == '@') {
		return path
	}
	return r.dom.home + "/" + path
}

// find returns the node at path if the domain has all the rights in want. A domain that
// has none of them on the closest ancestor gets EACCES: it may not even learn whether the
// node exists.
func (r *request) find(path string, want access) (*node, error) {
	if !validPath(path) {
		return nil, EINVAL
	}
	n, err := r.load(path)
	if err != nil {
		return nil, err
	}
	refused := ENOENT
	if n != nil {
		if r.dom.rights(n.perms)&want == want {
			return n, nil
		}
		refused = EACCES
	}
	for up := path; up != "/"; {
		up = parentOf(up)
		parent, err := r.load(up) // makes the transaction depend on this node
		if err != nil {
			return nil, err
		}
		if parent != nil {
			if r.dom.rights(parent.perms)&want == 0 {
				refused = EACCES
			}
			break
		}
	}
	return nil, refused
}

// cost returns the domain that pays for n at path, and the bytes that it pays in
// addition.
func (r *request) cost(path string, n *node) (*domain, int) {
	if r.tx != nil {
		return r.dom, n.size() - r.tx.charged(path)
	}
	grow := n.size()
	if old := r.s.nodes[path]; old != nil {
		grow -= old.size()
	} else {
		grow += len(path)
	}
	return n.perms[0].dom, grow
}

// check applies the quotas of node size and memory to nodes that are about to be written.
func (r *request) check(paths []string, nodes []*node) error {
	if r.dom.privileged {
		return nil
	}
	q := &r.s.cfg.Quota
	grown := make(map[*domain]int, 2)
	for i, n := range nodes {
		if n.size() >= q.NodeSize {
			return r.fail(ENOSPC)
		}
		d, bytes := r.cost(paths[i], n)
		grown[d] += bytes
	}
	for d, bytes := range grown {
		if !d.privileged && bytes > 0 && d.memory+bytes > q.Memory {
			return r.fail(ENOMEM)
		}
	}
	return nil
}

// fail makes the transaction's commit fail after one of its writes was refused.
func (r *request) fail(err error) error {
	if r.tx != nil {
		r.tx.failed = true
	}
	return err
}

// write sets the value of a node. It creates the node and its ancestors if they are
// missing.
func (r *request) write(path string, value []byte) error {
	n, err := r.find(path, canWrite)
	if err == ENOENT {
		return r.create(path, value)
	}
	if err != nil {
		return err
	}
	changed := *n
	changed.value = string(value)
	if err := r.check([]string{path}, []*node{&changed}); err != nil {
		return err
	}
	r.save(path, &changed)
	r.fire(path, &changed, n.perms, false)
	return nil
}

func (r *request) mkdir(path string) error {
	if _, err := r.find(path, canWrite); err != ENOENT {
		return err
	}
	return r.create(path, nil)
}

// create makes the node and its missing ancestors: all or none of them.
func (r *request) create(path string, value []byte) error {
	var paths []string // nodes to be made, from path upwards
	var top string
	var above *node
	for top = path; above == nil; {
		paths = append(paths, top)
		top = parentOf(top)
		var err error
		if above, err = r.load(top); err != nil {
			return err
		}
	}

	// A new node inherits permissions, but an unprivileged domain owns the nodes it
	// makes.
	perms := above.perms
	if !r.dom.privileged {
		perms = slices.Clone(perms)
		perms[0].dom = r.dom
	}
	nodes := make([]*node, len(paths))
	for i := range paths {
		nodes[i] = &node{perms: perms}
		if i == 0 {
			nodes[i].value = string(value)
		} else {
			nodes[i] = nodes[i].withChild(baseOf(paths[i-1]))
		}
	}
	if !r.dom.privileged {
		count := r.dom.nodes + len(paths)
		if r.tx != nil {
			count = r.dom.nodes + 1 // commit checks the other nodes
		}
		if count > r.s.cfg.Quota.Nodes {
			return ENOSPC
		}
	}
	nodes = append(nodes, above.withChild(baseOf(paths[len(paths)-1])))
	paths = append(paths, top)
	if err := r.check(paths, nodes); err != nil {
		return err
	}
	if r.tx != nil {
		r.tx.created = true
	}
	for i, p := range paths {
		r.save(p, nodes[i])
	}
	r.fire(path, nodes[0], nil, false)
	return nil
}

// remove removes the node and all nodes below it. A missing node is no error if its
// parent exists.
func (r *request) remove(path string) error {
	_, err := r.find(path, canWrite)
	if err == ENOENT && path != "/" {
		parent, lerr := r.load(parentOf(path))
		if lerr != nil {
			return lerr
		}
		if parent != nil {
			return nil
		}
	}
	if err != nil {
		return err
	}
	if path == "/" {
		return EINVAL
	}
	return r.removeTree(path)
}

// removeTree must not trust that children and parents match. A transaction sees each node
// as it was when first touched, so it may see another client's change in one node and not
// in another. Its commit will fail.
func (r *request) removeTree(path string) error {
	type visit struct {
		path string
		node *node
		next int // child to descend into
	}
	n, err := r.load(path)
	if err != nil {
		return r.fail(err)
	}
	var doomed []visit // children before parents
	for stack := []visit{{path: path, node: n}}; len(stack) > 0; {
		v := &stack[len(stack)-1]
		if v.next == len(v.node.children) {
			doomed = append(doomed, *v)
			stack = stack[:len(stack)-1]
			continue
		}
		child := join(v.path, v.node.children[v.next])
		v.next++
		n, err := r.load(child)
		if err != nil {
			return r.fail(err)
		}
		if n != nil {
			stack = append(stack, visit{path: child, node: n})
		}
	}
	up := parentOf(path)
	parent, err := r.load(up)
	if err != nil {
		return r.fail(err)
	}

	// Watches above path get one event, for the topmost node. All events are sent before
	// the nodes are removed, while their permissions can still be read.
	for _, v := range doomed {
		r.fire(v.path, v.node, nil, v.path != path)
	}
	for _, v := range doomed {
		r.save(v.path, nil)
	}
	if parent != nil {
		r.save(up, parent.withoutChild(baseOf(path)))
	}
	return nil
}

func (r *request) setPerms(path string, perms []perm) error {
	n, err := r.find(path, canWrite|isOwner)
	if err != nil {
		return err
	}
	if !r.dom.privileged && perms[0].dom != n.perms[0].dom {
		return EPERM
	}
	changed := *n
	changed.perms = perms
	if err := r.check([]string{path}, []*node{&changed}); err != nil {
		return err
	}
	r.save(path, &changed)
	r.fire(path, &changed, n.perms, false)
	return nil
}
