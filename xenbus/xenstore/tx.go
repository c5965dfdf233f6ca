package xenstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"barevif/xenbus/internal/pause"
	"barevif/xenbus/xenstore/wire"
)

const (
	maxAttempts  = 100     // runs of one transaction
	maxRestarts  = 16      // restarts of one listing whose directory changes meanwhile
	maxDirectory = 1 << 20 // bytes of names in one directory
)

// A Tx is a transaction, valid inside the function given to [Client.Transact]. Its
// methods block as the Client's do, and end with the context given to Transact.
type Tx struct {
	c     *Client
	ctx   context.Context
	id    uint32 // 0: no transaction
	epoch uint64
}

// Transact runs fn in a transaction and commits it if fn returns nil. On a conflict with
// another transaction, or a lost connection, it runs fn again: up to 100 times with
// growing pauses, and then fails with a [*ConflictError]. So fn must have no other
// effects. It must also tolerate that an earlier run was committed, which happens when
// the connection breaks during the commit. Unless an error is [ErrUnanswered] nothing was
// committed.
//
// A Client runs one transaction at a time: two would conflict with each other, and
// xenstored lets a domain open few. fn must not call Transact.
func (c *Client) Transact(ctx context.Context, fn func(Tx) error) error {
	unanswered := false
	err := c.attempts(ctx, fn, &unanswered)
	if err != nil && unanswered {
		return fmt.Errorf("%w (%w)", err, ErrUnanswered)
	}
	return err
}

// attempts sets unanswered if the commit of an attempt may have happened.
func (c *Client) attempts(ctx context.Context, fn func(Tx) error, unanswered *bool) error {
	delay := time.Millisecond
	for n := 1; ; n++ {
		err := c.attempt(ctx, fn, unanswered)
		if !errors.Is(err, ErrAgain) {
			return err
		}
		if n == maxAttempts {
			return &ConflictError{n, err}
		}
		c.mu.Lock()
		c.stats.Conflicts++
		c.mu.Unlock()
		if err := pause.Wait(ctx, pause.Jitter(delay)); err != nil {
			return fmt.Errorf("xenstore transaction: %w", err)
		}
		delay = min(2*delay, 64*time.Millisecond)
	}
}

// attempt runs fn once. It gives c.trans back between attempts, so that a peer that keeps
// one transaction in conflict does not delay the others.
func (c *Client) attempt(ctx context.Context, fn func(Tx) error, unanswered *bool) error {
	select {
	case c.trans <- struct{}{}:
		defer func() { <-c.trans }()
	case <-ctx.Done():
		return fmt.Errorf("xenstore transaction: %w", context.Cause(ctx))
	}
	start := &request{op: wire.TransactionStart, parts: []string{"\x00"}, again: true}
	start.settled = func() { // ends a transaction whose start nobody waits for any more
		if id, err := parseID(start.reply); start.gone && start.err == nil && err == nil {
			_ = c.postLocked(endRequest(id, start.sentOn, false))
		}
	}
	reply, err := c.do(ctx, start)
	if err != nil {
		return err
	}
	id, err := parseID(reply)
	if err != nil {
		return err
	}
	tx := Tx{c, ctx, id, start.sentOn}
	ended := false
	defer func() {
		if !ended { // nobody waits for the answer
			_ = c.post(endRequest(id, tx.epoch, false))
		}
	}()
	if err := fn(tx); err != nil {
		return err
	}
	commit := endRequest(id, tx.epoch, true)
	_, err = c.do(ctx, commit)
	var refused *Error
	ended = err == nil || errors.As(err, &refused)
	if err != nil && (!ended || err == commit.lost) && c.wasSent(commit) {
		*unanswered = true
	}
	if errors.Is(err, ErrNotFound) { // a reset or a restart of the server dropped the transaction
		return &Error{Op: opName(wire.TransactionEnd), Code: ErrAgain}
	}
	return err
}

// wasSent reports whether r has been given to the connection.
func (c *Client) wasSent(r *request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return r.tries > 0
}

func endRequest(id uint32, epoch uint64, commit bool) *request {
	verdict := "F\x00"
	if commit {
		verdict = "T\x00"
	}
	return &request{op: wire.TransactionEnd, tx: id, parts: []string{verdict}, epoch: epoch,
		lost: &Error{Op: opName(wire.TransactionEnd), Code: ErrAgain}, done: make(chan struct{})}
}

func parseID(reply string) (uint32, error) {
	id, err := ParseUint(strings.TrimSuffix(reply, "\x00"), 1<<32-1)
	if err != nil || id == 0 {
		return 0, &ProtocolError{fmt.Sprintf("a transaction with id %q", Clip(reply))}
	}
	return uint32(id), nil
}

// ask sends one request about path, inside t if t is a transaction.
func (t Tx) ask(op wire.Op, again bool, path string, parts ...string) (string, error) {
	if err := checkPath(op, path); err != nil {
		return "", err
	}
	return t.c.do(t.ctx, t.request(op, again, path, parts...))
}

func checkPath(op wire.Op, path string) error {
	if !ValidPath(path) {
		return &Error{Op: opName(op), Path: Clip(path), Code: ErrInvalid}
	}
	return nil
}

func (t Tx) request(op wire.Op, again bool, path string, parts ...string) *request {
	r := &request{op: op, tx: t.id, path: path, parts: parts, again: again && t.id == 0, epoch: t.epoch}
	if t.id != 0 {
		r.lost = &Error{Op: opName(op), Path: path, Code: ErrAgain}
	}
	return r
}

// ReadAll is Read of several nodes, with the requests in flight together as far as
// Config.Pipeline allows. Each node has its own error.
func (t Tx) ReadAll(paths ...string) (values []string, errs []error) {
	return t.all(wire.Read, true, paths, nil)
}

// ReadKeys reads several keys of one directory, as ReadAll does. The result omits missing
// keys.
func (t Tx) ReadKeys(dir string, keys ...string) (Values, error) {
	paths := make([]string, len(keys))
	for i, key := range keys {
		paths[i] = dir + "/" + key
	}
	v := make(Values, len(keys))
	values, errs := t.ReadAll(paths...)
	for i, key := range keys {
		switch {
		case errs[i] == nil:
			v[key] = values[i]
		case !errors.Is(errs[i], ErrNotFound):
			return nil, errs[i]
		}
	}
	return v, nil
}

// WriteAll is Write of several nodes, with a value for each path. It returns the first
// error.
func (t Tx) WriteAll(paths, values []string) error {
	_, errs := t.all(wire.Write, false, paths, values)
	return first(errs)
}

// RemoveAll is Remove of several nodes. A missing node is no error.
func (t Tx) RemoveAll(paths ...string) error {
	_, errs := t.all(wire.Rm, false, paths, nil)
	return first(slices.DeleteFunc(errs, func(err error) bool { return errors.Is(err, ErrNotFound) }))
}

// first returns the first error that is not nil.
func first(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// all sends a request of type op for each path, with the value of the same index if
// values is not nil.
func (t Tx) all(op wire.Op, again bool, paths, values []string) (replies []string, errs []error) {
	rs := make([]*request, len(paths))
	for i, path := range paths {
		if err := checkPath(op, path); err != nil { // the caller's mistake: send none of the requests
			errs = make([]error, len(paths))
			for i := range errs {
				errs[i] = err
			}
			return make([]string, len(paths)), errs
		}
		rs[i] = t.request(op, again, path, path, "\x00")
		if values != nil {
			rs[i].parts = append(rs[i].parts, values[i])
		}
	}
	return t.c.together(t.ctx, rs)
}

// Read returns the value of a node, any bytes. A node made by Mkdir has the value "".
func (t Tx) Read(path string) (string, error) {
	return t.ask(wire.Read, true, path, path, "\x00")
}

// Write sets the value of a node. It makes the node and its parents if they are missing.
func (t Tx) Write(path, value string) error {
	_, err := t.ask(wire.Write, false, path, path, "\x00", value)
	return err
}

// Mkdir makes a node with an empty value, and its parents. It leaves an existing node as
// it is.
func (t Tx) Mkdir(path string) error {
	_, err := t.ask(wire.Mkdir, false, path, path, "\x00")
	return err
}

// Remove removes a node and all nodes below it. A missing node is no error if its parent
// exists; else the error is ErrNotFound.
func (t Tx) Remove(path string) error {
	_, err := t.ask(wire.Rm, false, path, path, "\x00")
	return err
}

// Perms returns the permissions of a node. The first entry names the owner and the Access
// of every domain without an entry; the others are for one domain each.
func (t Tx) Perms(path string) ([]Perm, error) {
	reply, err := t.ask(wire.GetPerms, true, path, path, "\x00")
	if err != nil {
		return nil, err
	}
	return parsePerms(reply)
}

// SetPerms sets the permissions of a node; the first names the owner. xenstored
// answers ErrNotFound for a domain it does not know.
func (t Tx) SetPerms(path string, perms ...Perm) error {
	parts := []string{path, "\x00"}
	for _, p := range perms {
		parts = append(parts, p.String(), "\x00")
	}
	_, err := t.ask(wire.SetPerms, false, path, parts...)
	return err
}

// Directory lists the names of a node's children. It fetches a listing that is too long
// for one message in parts, and begins again if the directory changes meanwhile. A
// listing over 1 MiB gives ErrTooBig.
func (t Tx) Directory(path string) ([]string, error) {
	reply, err := t.ask(wire.Directory, true, path, path, "\x00")
	if errors.Is(err, ErrTooBig) {
		return t.directoryParts(path)
	}
	if err != nil || reply == "" {
		return nil, err
	}
	return names(reply)
}

// directoryParts joins the parts before it splits them into names: a part may end inside
// a name.
func (t Tx) directoryParts(path string) ([]string, error) {
	var list strings.Builder
	generation := ""
	for restarts := 0; ; {
		reply, err := t.ask(wire.DirectoryPart, true, path, path, "\x00", fmt.Sprint(list.Len()), "\x00")
		if err != nil {
			return nil, err
		}
		gen, part, ok := strings.Cut(reply, "\x00")
		if !ok || part == "" {
			return nil, &ProtocolError{"a part of a directory that holds nothing"}
		}
		if list.Len() > 0 && gen != generation {
			if restarts++; restarts == maxRestarts {
				return nil, &Error{Op: opName(wire.Directory), Path: path, Code: ErrAgain}
			}
			list.Reset()
			continue
		}
		generation = gen
		list.WriteString(part)
		if all := list.String(); all == "\x00" {
			return nil, nil
		} else if strings.HasSuffix(all, "\x00\x00") { // an empty name ends the listing
			return names(all[:len(all)-1])
		}
		if list.Len() > maxDirectory {
			return nil, &Error{Op: opName(wire.Directory), Path: path, Code: ErrTooBig}
		}
	}
}

// names splits a list of names that each end in NUL.
func names(list string) ([]string, error) {
	all := strings.Split(strings.TrimSuffix(list, "\x00"), "\x00")
	for _, name := range all {
		if !ValidName(name) {
			return nil, &ProtocolError{fmt.Sprintf("a directory with the name %q", Clip(name))}
		}
	}
	return all, nil
}
