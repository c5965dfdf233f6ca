package pvnet

import (
	"context"
	"errors"
	"fmt"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/telemetry"
)

// A grantClient is the frontend's part of static grants: it names the pages of a
// connection's queues to the backend, which maps them if it can. It never removes them one
// by one: the backend unmaps all of them before it closes.
type grantClient struct {
	d       *Device
	c       *conn
	list    []byte // the list page; written in fill of a call only
	listRef hypercall.GrantRef
	added   []bool // by queue: a program that served the connection has mapped them; in tell only, of which one runs at a time
}

// tell adds the pages of every queue, each time the link comes up: another program may have
// the rings since, which has mapped nothing. Frames move without it, so a backend that
// refuses, or does not answer, is no error of the connection.
func (g *grantClient) tell(ctx context.Context, call grantCall) {
	ctx, cancel := context.WithTimeout(ctx, ctrlTimeout)
	defer cancel()
	for i := range g.added {
		pages, err := g.add(ctx, call, i)
		switch {
		case g.added[i] && errors.Is(err, errAddRefused):
			continue // the link was down, and the same program still has them
		case errors.Is(err, ErrLinkDown) || ctx.Err() == context.Canceled:
			return
		case err != nil:
			g.d.log.Warn("no static grants", "vif", g.d.id, "queue", i, "err", err)
			return
		case pages == 0:
			g.d.log.Debug("the backend has no static grants", "vif", g.d.id, "queue", i)
			return
		}
		g.added[i] = true
		g.d.log.Debug("static grants", "vif", g.d.id, "queue", i, "pages", pages)
	}
	g.d.agree(telemetry.FeatureStaticGrants)
}

var errAddRefused = errors.New("the backend does not map the pages")

// A grantCall is [ctrlClient.callWith].
type grantCall func(ctx context.Context, typ netif.CtrlType, fill func() [3]uint32) (netif.CtrlStatus, uint32, error)

// add adds as many pages of a queue as the backend can map, those to send first, and
// returns how many they are: 0 if the backend has no static grants.
func (g *grantClient) add(ctx context.Context, call grantCall, queue int) (pages int, err error) {
	status, most, err := call(ctx, netif.CtrlGetGrefMappingSize, func() [3]uint32 { return [3]uint32{uint32(queue)} })
	if err != nil || status == netif.CtrlNotSupported {
		return 0, err
	}
	if status != netif.CtrlSuccess {
		return 0, fmt.Errorf("the backend answers %v to %v", status, netif.CtrlGetGrefMappingSize)
	}
	refs := g.refs(queue)
	refs = refs[:min(len(refs), int(min(most, netif.GrefListMax)))]
	if len(refs) == 0 {
		return 0, nil
	}
	status, _, err = call(ctx, netif.CtrlAddGrefMapping, func() [3]uint32 {
		copy(g.list, putGrefs(nil, refs))
		return [3]uint32{uint32(queue), uint32(g.listRef), uint32(len(refs))}
	})
	if err == nil && status != netif.CtrlSuccess {
		err = fmt.Errorf("%w: it answers %v to %v of %d pages", errAddRefused, status, netif.CtrlAddGrefMapping, len(refs))
	}
	return len(refs), err
}

// refs returns the entries of a queue's pages: those to send, which the backend may map
// read-only, and those to receive into.
func (g *grantClient) refs(queue int) (list []netif.GrefEntry) {
	tx, rx := g.c.queues[queue].tx.(*frontTX), g.c.queues[queue].rx.(*frontRX)
	for _, ref := range tx.refs {
		list = append(list, netif.GrefEntry{Ref: ref, Flags: netif.GrefReadOnly})
	}
	for _, ref := range rx.refs {
		list = append(list, netif.GrefEntry{Ref: ref})
	}
	return list
}
