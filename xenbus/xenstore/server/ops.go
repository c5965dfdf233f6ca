package server

import (
	"bytes"
	"strconv"
	"strings"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

const okay = "OK\x00"

// run carries out a request from a connection. It queues the reply, or returns an Errno.
func (r *request) run() error {
	switch r.hdr.Op {
	case wire.Control, wire.Introduce, wire.Release, wire.IsDomainIntroduced, wire.Resume, wire.SetTarget:
		if !r.dom.privileged {
			return EACCES
		}
	case wire.Watch, wire.Unwatch: // the transaction id is ignored
		return r.runWatch()
	case wire.Directory, wire.Read, wire.GetPerms, wire.TransactionStart, wire.TransactionEnd,
		wire.GetDomainPath, wire.Write, wire.Mkdir, wire.Rm, wire.SetPerms, wire.ResetWatches,
		wire.DirectoryPart:
	default:
		return ENOSYS
	}
	if r.hdr.TxID != 0 {
		if r.tx = r.c.txs[r.hdr.TxID]; r.tx == nil {
			return ENOENT
		}
	}
	switch r.hdr.Op {
	case wire.Directory, wire.Read, wire.GetPerms:
		return r.runRead()
	case wire.DirectoryPart:
		return r.runDirectoryPart()
	case wire.Write, wire.Mkdir, wire.Rm, wire.SetPerms:
		return r.runChange()
	case wire.TransactionStart, wire.TransactionEnd:
		return r.runTransaction()
	case wire.ResetWatches:
		r.c.resetLocked()
		return r.reply(r.hdr.Op, okay)
	case wire.Control:
		return EINVAL // no control command is implemented
	}
	return r.runDomain()
}

func (r *request) reply(op wire.Op, payload string) error {
	if len(payload) > wire.MaxPayload {
		return E2BIG
	}
	r.c.replies++
	r.c.queueLocked(message{hdr: wire.Header{Op: op, ReqID: r.hdr.ReqID, TxID: r.hdr.TxID}, payload: payload})
	return nil
}

// oneArg returns the only argument: the payload without its final NUL.
func (r *request) oneArg() (string, error) {
	if i := bytes.IndexByte(r.arg, 0); i < 0 || i != len(r.arg)-1 {
		return "", EINVAL
	}
	return string(r.arg[:len(r.arg)-1]), nil
}

// args returns the strings of the payload. It ignores bytes after the last NUL.
func (r *request) args() []string {
	i := bytes.LastIndexByte(r.arg, 0)
	if i < 0 {
		return nil
	}
	return strings.Split(string(r.arg[:i]), "\x00")
}

func (r *request) runRead() error {
	path, err := r.oneArg()
	if err != nil {
		return err
	}
	n, err := r.find(r.absolute(path), canRead)
	if err != nil {
		return err
	}
	switch r.hdr.Op {
	case wire.Read:
		return r.reply(r.hdr.Op, n.value)
	case wire.Directory:
		if n.childBytes > wire.MaxPayload {
			return E2BIG
		}
		return r.reply(r.hdr.Op, joinNUL(n.children))
	}
	entries := make([]string, len(n.perms))
	for i, p := range n.perms {
		entries[i] = p.String()
	}
	return r.reply(r.hdr.Op, joinNUL(entries))
}

// joinNUL ends each string with a NUL and joins them.
func joinNUL(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return strings.Join(list, "\x00") + "\x00"
}

// runDirectoryPart replies with as many whole names as fit, from a byte offset on, and
// with an empty name after the last.
func (r *request) runDirectoryPart() error {
	if bytes.Count(r.arg, []byte{0}) != 2 {
		return EINVAL
	}
	args := r.args()
	n, err := r.find(r.absolute(args[0]), canRead)
	if err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString(strconv.FormatUint(n.gen, 10))
	b.WriteByte(0)
	skip := int(uint32(atoi(args[1])))
	room := wire.MaxPayload - b.Len() - 1
	end := true
	for _, name := range n.children {
		if skip > len(name) {
			skip -= len(name) + 1
			continue
		}
		name = name[skip:]
		skip = 0
		if len(name) >= room {
			end = false
			break
		}
		room -= len(name) + 1
		b.WriteString(name)
		b.WriteByte(0)
	}
	if end {
		b.WriteByte(0)
	}
	return r.reply(r.hdr.Op, b.String())
}

func (r *request) runChange() error {
	if r.hdr.Op == wire.SetPerms {
		return r.runSetPerms()
	}
	var err error
	if r.hdr.Op == wire.Write {
		path, value, ok := bytes.Cut(r.arg, []byte{0})
		if !ok {
			return EINVAL
		}
		err = r.write(r.absolute(string(path)), value)
	} else {
		var path string
		if path, err = r.oneArg(); err != nil {
			return err
		}
		if r.hdr.Op == wire.Mkdir {
			err = r.mkdir(r.absolute(path))
		} else {
			err = r.remove(r.absolute(path))
		}
	}
	if err != nil {
		return err
	}
	return r.changed()
}

// changed acknowledges a change and charges the domain for it. A change in a transaction
// is charged at the commit.
func (r *request) changed() error {
	if r.tx == nil {
		r.dom.debitLocked(r.s)
	}
	return r.reply(r.hdr.Op, okay)
}

func (r *request) runSetPerms() error {
	args := r.args()
	if len(args) < 2 {
		return EINVAL
	}
	if !r.dom.privileged && len(args)-1 > r.s.cfg.Quota.Perms {
		return ENOSPC
	}
	perms, err := r.s.parsePermsLocked(args[1:])
	if err != nil {
		return err
	}
	if strings.HasPrefix(args[0], "@") {
		old, ok := r.s.special[args[0]]
		if !ok {
			return EINVAL
		}
		if r.dom.rights(old)&(canWrite|isOwner) != canWrite|isOwner {
			return EACCES
		}
		r.s.special[args[0]] = perms
	} else if err := r.setPerms(r.absolute(args[0]), perms); err != nil {
		return err
	}
	return r.changed()
}

func (r *request) runWatch() error {
	args := r.args()
	if len(args) != 2 {
		return EINVAL
	}
	path, token := args[0], args[1]
	if r.hdr.Op == wire.Unwatch {
		i := r.c.findWatch(r.absolute(path), token)
		if i < 0 {
			return ENOENT
		}
		r.c.forgetWatchLocked(r.c.watches[i])
		r.c.watches = append(r.c.watches[:i], r.c.watches[i+1:]...)
		return r.reply(r.hdr.Op, okay)
	}
	w, err := r.watch(path, token)
	if err != nil {
		return err
	}
	err = r.reply(r.hdr.Op, okay)
	r.c.eventLocked(w.pathFor(w.path), token, nil)
	return err
}

func (r *request) runTransaction() error {
	if r.hdr.Op == wire.TransactionStart {
		t, err := r.start()
		if err != nil {
			return err
		}
		return r.reply(r.hdr.Op, strconv.FormatUint(uint64(t.id), 10)+"\x00")
	}
	arg, err := r.oneArg()
	if err != nil || arg != "T" && arg != "F" {
		return EINVAL
	}
	t := r.tx
	if t == nil {
		return ENOENT
	}
	if arg == "T" {
		err = r.commit(t)
	}
	r.c.endTxLocked(t)
	if err != nil {
		return err
	}
	if arg == "T" {
		return r.changed()
	}
	return r.reply(r.hdr.Op, okay)
}

// runDomain handles the operations about domains. run has refused unprivileged domains
// all but GetDomainPath.
func (r *request) runDomain() error {
	if r.hdr.Op == wire.Introduce || r.hdr.Op == wire.SetTarget {
		return r.runTwoDomains()
	}
	arg, err := r.oneArg()
	if err != nil {
		return err
	}
	id := uint32(atoi(arg))
	switch r.hdr.Op {
	case wire.GetDomainPath:
		return r.reply(r.hdr.Op, homeOf(id)+"\x00")
	case wire.IsDomainIntroduced:
		answer := "F\x00"
		if _, ok := r.s.known(id); ok || id == uint32(hypercall.DomSelf) {
			answer = "T\x00"
		}
		return r.reply(r.hdr.Op, answer)
	}
	if id == 0 {
		return EINVAL
	}
	d, ok := r.s.known(id)
	if !ok {
		return ENOENT
	}
	if r.hdr.Op == wire.Release {
		r.s.releaseLocked(d)
	}
	return r.reply(r.hdr.Op, okay) // Resume does nothing: no domain is ever suspended here
}

func (r *request) runTwoDomains() error {
	args := r.args()
	if r.hdr.Op == wire.SetTarget {
		if len(args) < 2 {
			return EINVAL
		}
		d, ok1 := r.s.known(uint32(atoi(args[0])))
		target, ok2 := r.s.known(uint32(atoi(args[1])))
		if !ok1 || !ok2 {
			return ENOENT
		}
		d.target = target
		return r.reply(r.hdr.Op, okay)
	}
	if len(args) < 3 || atoi(args[2]) <= 0 {
		return EINVAL
	}
	id := uint32(atoi(args[0]))
	if id >= firstReserved {
		return EINVAL
	}
	if d, ok := r.s.known(id); ok {
		// A domain that is introduced again has restarted.
		for _, c := range r.s.clients {
			if c.dom == d && c != r.c {
				c.resetLocked()
			}
		}
	}
	r.s.introduceLocked(hypercall.DomID(id))
	return r.reply(r.hdr.Op, okay)
}

// firstReserved is DOMID_FIRST_RESERVED of xen/include/public/xen.h.
const firstReserved = 0x7FF0

func (s *Store) known(id uint32) (*domain, bool) {
	if id >= firstReserved {
		return nil, false
	}
	d, ok := s.domains[hypercall.DomID(id)]
	return d, ok
}

// atoi works as in C: it ignores bytes after the digits. A number that is too large gives
// the largest int32, where C leaves the result undefined.
func atoi(s string) int32 {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	i := 0
	if i < len(s) && (s[i] == '-' || s[i] == '+') {
		i++
	}
	for i < len(s) && '0' <= s[i] && s[i] <= '9' {
		i++
	}
	n, _ := strconv.ParseInt(s[:i], 10, 32)
	return int32(n)
}
