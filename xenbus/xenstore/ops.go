package xenstore

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

// at returns a Tx for requests outside any transaction.
func (c *Client) at(ctx context.Context) Tx { return Tx{c: c, ctx: ctx} }

// Read is [Tx.Read] outside a transaction.
func (c *Client) Read(ctx context.Context, path string) (string, error) { return c.at(ctx).Read(path) }

// Write is [Tx.Write] outside a transaction.
func (c *Client) Write(ctx context.Context, path, value string) error {
	return c.at(ctx).Write(path, value)
}

// Mkdir is [Tx.Mkdir] outside a transaction.
func (c *Client) Mkdir(ctx context.Context, path string) error { return c.at(ctx).Mkdir(path) }

// Remove is [Tx.Remove] outside a transaction.
func (c *Client) Remove(ctx context.Context, path string) error { return c.at(ctx).Remove(path) }

// Directory is [Tx.Directory] outside a transaction.
func (c *Client) Directory(ctx context.Context, path string) ([]string, error) {
	return c.at(ctx).Directory(path)
}

// Perms is [Tx.Perms] outside a transaction.
func (c *Client) Perms(ctx context.Context, path string) ([]Perm, error) {
	return c.at(ctx).Perms(path)
}

// SetPerms is [Tx.SetPerms] outside a transaction.
func (c *Client) SetPerms(ctx context.Context, path string, perms ...Perm) error {
	return c.at(ctx).SetPerms(path, perms...)
}

// ReadAll is [Tx.ReadAll] outside a transaction: the values may be of different moments.
func (c *Client) ReadAll(ctx context.Context, paths ...string) (values []string, errs []error) {
	return c.at(ctx).ReadAll(paths...)
}

// ReadKeys is [Tx.ReadKeys] outside a transaction: the values may be of different moments.
func (c *Client) ReadKeys(ctx context.Context, dir string, keys ...string) (Values, error) {
	return c.at(ctx).ReadKeys(dir, keys...)
}

// Introduce makes xenstored serve a domain: frame is the frame of its ring page, port the
// event channel it made for xenstored. Only a privileged domain may call it.
func (c *Client) Introduce(ctx context.Context, dom hypercall.DomID, frame uint64, port hypercall.PortID) error {
	return c.tell(ctx, wire.Introduce, domArg(dom), strconv.FormatUint(frame, 10), strconv.FormatUint(uint64(port), 10))
}

// Release makes xenstored drop a domain.
func (c *Client) Release(ctx context.Context, dom hypercall.DomID) error {
	return c.tell(ctx, wire.Release, domArg(dom))
}

// SetTarget gives dom the rights of target, as a device model needs.
func (c *Client) SetTarget(ctx context.Context, dom, target hypercall.DomID) error {
	return c.tell(ctx, wire.SetTarget, domArg(dom), domArg(target))
}

// GetDomainPath returns the home directory of a domain, which need not exist.
func (c *Client) GetDomainPath(ctx context.Context, dom hypercall.DomID) (string, error) {
	reply, err := c.query(ctx, wire.GetDomainPath, domArg(dom))
	if err == nil && !ValidPath(reply) {
		return "", &ProtocolError{fmt.Sprintf("the domain path %q", Clip(reply))}
	}
	return reply, err
}

// IsIntroduced reports whether xenstored knows the domain.
func (c *Client) IsIntroduced(ctx context.Context, dom hypercall.DomID) (bool, error) {
	reply, err := c.query(ctx, wire.IsDomainIntroduced, domArg(dom))
	if err == nil && reply != "T" && reply != "F" {
		return false, &ProtocolError{fmt.Sprintf("%q for yes or no", Clip(reply))}
	}
	return reply == "T", err
}

// ResetWatches makes xenstored drop all watches and transactions of this connection. It
// waits until no transaction of the Client is open. The Client then sets its own watches
// again.
func (c *Client) ResetWatches(ctx context.Context) error {
	select {
	case c.trans <- struct{}{}: // no transaction of ours is open while we hold it
		defer func() { <-c.trans }()
	case <-ctx.Done():
		return fmt.Errorf("xenstore %s: %w", opName(wire.ResetWatches), context.Cause(ctx))
	}
	r := &request{op: wire.ResetWatches, parts: []string{"\x00"}}
	r.settled = func() {
		if r.err != nil {
			return
		}
		for _, w := range c.watches {
			if w.set {
				c.queue = append(c.queue, w.renewLocked(r.sentOn))
			}
		}
		c.kick()
	}
	_, err := c.do(ctx, r)
	return err
}

// tell sends a request that changes something and that xenstored answers with OK.
func (c *Client) tell(ctx context.Context, op wire.Op, args ...string) error {
	_, err := c.do(ctx, &request{op: op, path: strings.Join(args, " "), parts: terminated(args)})
	return err
}

// query sends a request that changes nothing.
func (c *Client) query(ctx context.Context, op wire.Op, args ...string) (string, error) {
	reply, err := c.do(ctx, &request{op: op, path: strings.Join(args, " "), parts: terminated(args), again: true})
	return strings.TrimSuffix(reply, "\x00"), err
}

func terminated(args []string) []string {
	var parts []string
	for _, a := range args {
		parts = append(parts, a, "\x00")
	}
	return parts
}

func domArg(dom hypercall.DomID) string { return strconv.FormatUint(uint64(dom), 10) }
