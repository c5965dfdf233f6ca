package server

import (
	"strings"

	"barevif/xenbus/xenstore/wire"
)

// The names of the two events that concern no node.
const (
	introduceDomain = "@introduceDomain"
	releaseDomain   = "@releaseDomain"
)

type watch struct {
	path   string // absolute
	prefix string // removed from event paths, for a watch with a relative path
	token  string
}

// pathFor returns path, which is within w.path, as the owner of the watch spells it.
func (w *watch) pathFor(path string) string {
	if w.prefix == "" {
		return path
	}
	return strings.TrimPrefix(path[len(w.prefix):], "/")
}

func (r *request) watch(path, token string) (*watch, error) {
	w := &watch{path: path, token: token}
	if strings.HasPrefix(path, "@") {
		if len(path) > maxPath {
			return nil, EINVAL
		}
	} else {
		if !strings.HasPrefix(path, "/") {
			w.prefix = r.dom.home
		}
		w.path = r.absolute(path)
		if !validPath(w.path) {
			return nil, EINVAL
		}
	}
	if r.c.findWatch(w.path, token) >= 0 {
		return nil, EEXIST
	}
	if q := &r.s.cfg.Quota; !r.dom.privileged {
		// "more than" as in do_watch: the domain gets one more than its quota.
		if r.dom.watches > q.Watches {
			return nil, E2BIG
		}
		if r.dom.memory+w.cost() > q.Memory {
			return nil, ENOMEM
		}
	}
	r.c.watches = append(r.c.watches, w)
	r.s.watched[w.path]++
	r.s.stats.Watches++
	r.dom.watches++
	r.dom.memory += w.cost()
	return w, nil
}

func (w *watch) cost() int { return len(w.path) + len(w.token) }

func (c *client) findWatch(path, token string) int {
	for i, w := range c.watches {
		if w.path == path && w.token == token {
			return i
		}
	}
	return -1
}

// forgetWatchLocked updates the accounts for a watch that leaves c.watches.
func (c *client) forgetWatchLocked(w *watch) {
	if c.s.watched[w.path]--; c.s.watched[w.path] == 0 {
		delete(c.s.watched, w.path)
	}
	c.s.stats.Watches--
	c.dom.watches--
	c.dom.memory -= w.cost()
}

// fire tells the watches that the node at path is now n and had the permissions before
// (nil: it had those of n). An exact event goes to watches of this very path only.
//
// The watcher's domain must be allowed to read the node, as it is or was, or its parent
// (XSA-115).
func (r *request) fire(path string, n *node, before []perm, exact bool) {
	if r.tx != nil {
		r.tx.fire(path, exact)
		return
	}
	s := r.s
	if exact && s.watched[path] == 0 {
		return
	}
	var parent *node
	if path != "/" {
		parent = s.nodes[parentOf(path)]
	}
	for _, c := range s.clients {
		if len(c.watches) == 0 || !c.mayHear(n, parent, before) {
			continue
		}
		for _, w := range c.watches {
			if w.path == path || !exact && within(path, w.path) {
				c.eventLocked(w.pathFor(path), w.token, r)
			}
		}
	}
}

func (c *client) mayHear(n, parent *node, before []perm) bool {
	if before != nil && c.dom.rights(before)&canRead != 0 {
		return true
	}
	if n == nil {
		return false // for this client the node was made and removed in one transaction
	}
	return c.dom.rights(n.perms)&canRead != 0 || parent != nil && c.dom.rights(parent.perms)&canRead != 0
}

func (s *Store) fireSpecialLocked(name string) {
	if s.watched[name] == 0 {
		return
	}
	perms := s.special[name]
	for _, c := range s.clients {
		if c.dom.rights(perms)&canRead == 0 {
			continue
		}
		for _, w := range c.watches {
			if w.path == name {
				c.eventLocked(name, w.token, nil)
			}
		}
	}
}

// eventLocked queues an event, unless the same event is waiting already.
func (c *client) eventLocked(path, token string, cause *request) {
	if c.err != nil {
		return
	}
	payload := path + "\x00" + token + "\x00"
	if len(payload) > wire.MaxPayload {
		c.s.stats.EventsTooLong++
		return
	}
	special := path[:min(1, len(path))] == "@"
	if !special {
		if _, waiting := c.waiting[payload]; waiting {
			c.s.stats.EventsMerged++
			return
		}
		c.waiting[payload] = struct{}{}
	}
	c.s.stats.Events++
	c.queueLocked(message{hdr: wire.Header{Op: wire.WatchEvent}, payload: payload, event: !special})
	c.checkBacklogLocked(cause)
}
