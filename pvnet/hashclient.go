package pvnet

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"barevif/arena/shm"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
	"barevif/telemetry"
)

// A HashConfig asks the backend of a frontend to hash the frames that it sends us, to choose
// their queues by the hash, and to tell it ([Frame.Hash]). The hash is Toeplitz's, which
// network cards use for receive-side scaling.
type HashConfig struct {
	// Types are the hashes to compute. A frame gets the most specific one that applies; if
	// none does, its hash counts as 0 and it has no [Frame.Hash]. nil: all types.
	Types []HashType

	// Key is the key, of at most 40 bytes: the limit of Linux's netback. Bytes that it lacks
	// are 0. nil: a random key, made once for the device, so that nobody can choose flows
	// that all meet in one queue.
	Key []byte

	// Table has the queue for each value of the hash mod its length. A number counts modulo
	// the queues of the connection ([Device.Active]). Linux's netback takes up to 128
	// entries; more than 1024 fit no request. nil: the queue is the hash mod the number of
	// queues.
	Table []int
}

// ErrNoHash is returned by SetHash if the backend does not hash frames for us: it has no
// control ring, or does not support the algorithm, or the connection has one queue. It is
// [errors.ErrUnsupported].
var ErrNoHash error = &errorOf{"pvnet: the backend does not hash received frames", errors.ErrUnsupported}

// hashTableMax is how many entries of a table fit the page of one request.
const hashTableMax = shm.PageSize / 4

func (c *HashConfig) check() error {
	if c == nil {
		return nil
	}
	if n := len(c.Key); n > toeplitz.MaxKey {
		return fmt.Errorf("HashConfig.Key has %d bytes, at most %d count", n, toeplitz.MaxKey)
	}
	if n := len(c.Table); n > hashTableMax {
		return fmt.Errorf("HashConfig.Table has %d entries, more than %d", n, hashTableMax)
	}
	for i, q := range c.Table {
		if q < 0 {
			return fmt.Errorf("HashConfig.Table[%d] is %d", i, q)
		}
	}
	for _, t := range c.Types {
		if t > HashIPv6TCP {
			return fmt.Errorf("HashConfig.Types has %v", t)
		}
	}
	return nil
}

func (c *HashConfig) equal(o *HashConfig) bool {
	if c == nil || o == nil {
		return c == o
	}
	return slices.Equal(c.Types, o.Types) && (c.Types == nil) == (o.Types == nil) &&
		slices.Equal(c.Key, o.Key) && (c.Key == nil) == (o.Key == nil) && slices.Equal(c.Table, o.Table)
}

func (c *HashConfig) clone() *HashConfig {
	if c == nil {
		return nil
	}
	return &HashConfig{slices.Clone(c.Types), slices.Clone(c.Key), slices.Clone(c.Table)}
}

// flags returns the types as the control ring has them.
func (c *HashConfig) flags() (f uint32) {
	if c.Types == nil {
		return netif.HashFlagsAll
	}
	for _, t := range c.Types {
		f |= t.Flag()
	}
	return f
}

// A hashClient is the frontend's part of the hash. It lives as long as its Device.
type hashClient struct {
	turn   chan struct{} // one token: whoever holds it uses what follows
	want   *HashConfig   // nil: none
	random []byte        // the key for those that have none; nil until it is needed
	said   bool          // it was logged that the backend does not do it
	told   *ctrlClient   // the connection for which the rest holds
	has    *HashConfig   // what the backend of told has; nil: we do not know, or none
}

func newHashClient(want *HashConfig) *hashClient {
	h := &hashClient{turn: make(chan struct{}, 1), want: want.clone()}
	h.turn <- struct{}{}
	return h
}

// SetHash replaces [Config.Hash]: the backend is told now, while frames move, and again with
// each later connection. nil ends the hashing. Without a connection SetHash only stores
// c and returns nil. Frames that are under way keep the hash and the queue they have.
//
// It waits for the backend until ctx ends, and at most 5 s for
// each request. The errors are those of ctx, [ErrNoHash], one that says what the backend
// refused, such as a table that is too long for it, [ErrDisconnected], and
// [errors.ErrUnsupported] for a backend's device. After an error the backend may have a
// part of c, and c is still what later connections ask for.
func (d *Device) SetHash(ctx context.Context, c *HashConfig) error {
	if err := d.endError(); err != nil {
		return err
	}
	if d.role != telemetry.Frontend {
		return &UnknownError{"set the hash of a backend's device, which its frontend does", errors.ErrUnsupported}
	}
	if err := c.check(); err != nil {
		return fmt.Errorf("pvnet: %w", err)
	}
	h := d.hash
	select {
	case <-h.turn:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { h.turn <- struct{}{} }()
	if err := d.endError(); err != nil {
		return err
	}
	h.want = c.clone()
	client := d.ctrl.Load() // also there without a carrier, while the link is down
	if client == nil && d.link.Load() != linkUp {
		return nil
	}
	if client == nil || client.queues < 2 {
		if c == nil {
			return nil
		}
		return ErrNoHash
	}
	err := h.apply(ctx, client)
	if errors.Is(err, ErrLinkDown) {
		return nil // the next connection asks for it
	}
	return err
}

// tellHash tells the backend of a new connection what Config.Hash and SetHash ask for. The
// device works without an answer.
func (d *Device) tellHash(ctx context.Context, client *ctrlClient) {
	h := d.hash
	select {
	case <-h.turn:
	case <-ctx.Done():
		return
	}
	defer func() { h.turn <- struct{}{} }()
	if !client.kept {
		h.has = nil // its rings are new, or its program is
	}
	client.kept = false
	err := h.apply(ctx, client)
	if err != nil && ctx.Err() == nil && h.want != nil && !h.said {
		h.said = true
		d.log.Warn("the backend does not hash received frames as asked for", "vif", d.id, "err", err)
	}
}

// noCtrlForHash logs, once, that the connection needs a control ring for the hash that is
// asked for, and why it has none.
func (d *Device) noCtrlForHash(offered bool, queues int) {
	h := d.hash
	<-h.turn // nobody waits for a backend: there is no connection
	if h.want != nil && !h.said {
		h.said = true
		d.log.Warn("received frames are not hashed", "vif", d.id, "queues", queues, "key", netif.KeyFeatureCtrlRing, "offered", offered)
	}
	h.turn <- struct{}{}
}

// apply tells the backend what it does not have yet: algorithm, key, types, size of the
// table and the table, in the order that Linux's netback needs. The caller holds the turn.
func (h *hashClient) apply(ctx context.Context, client *ctrlClient) error {
	if h.told != client {
		h.told, h.has = client, nil
	}
	d, want, had := client.d, h.want, h.has
	h.has = nil // until all of it is told
	ask := func(typ netif.CtrlType, fill func() [3]uint32) error {
		c, cancel := context.WithTimeout(ctx, ctrlTimeout)
		defer cancel()
		status, _, err := client.callWith(c, typ, fill)
		switch {
		case err != nil:
			return err
		case status == netif.CtrlNotSupported:
			return fmt.Errorf("%w: %v is %v", ErrNoHash, typ, status)
		case status != netif.CtrlSuccess:
			return fmt.Errorf("pvnet: the backend refuses %v: %v", typ, status)
		}
		return nil
	}
	word := func(n uint32) func() [3]uint32 { return func() [3]uint32 { return [3]uint32{n} } }
	if want == nil {
		err := ask(netif.CtrlSetHashAlgorithm, word(uint32(netif.HashNone)))
		d.setFeature(telemetry.FeatureHash, false)
		return err
	}
	key := want.Key
	if key == nil {
		if h.random == nil {
			h.random = make([]byte, toeplitz.MaxKey)
			rand.Read(h.random)
		}
		key = h.random
	}
	size := uint32(len(want.Table))
	for _, step := range []struct {
		due bool
		typ netif.CtrlType
		arg func() [3]uint32
	}{
		{had == nil, netif.CtrlSetHashAlgorithm, word(uint32(netif.HashToeplitz))},
		{had == nil || !slices.Equal(had.Key, key), netif.CtrlSetHashKey, func() [3]uint32 {
			copy(client.args, key)
			return [3]uint32{uint32(client.ref), uint32(len(key))}
		}},
		{had == nil || had.flags() != want.flags(), netif.CtrlSetHashFlags, word(want.flags())},
		// A size that is set clears the table, so a table of the same size is only overwritten.
		{had == nil || len(had.Table) != len(want.Table), netif.CtrlSetHashMappingSize, word(size)},
		{size > 0, netif.CtrlSetHashMapping, func() [3]uint32 {
			for i, q := range want.Table {
				binary.LittleEndian.PutUint32(client.args[4*i:], uint32(q%max(1, client.queues)))
			}
			return [3]uint32{uint32(client.ref), size, 0}
		}},
	} {
		if step.due {
			if err := ask(step.typ, step.arg); err != nil {
				d.setFeature(telemetry.FeatureHash, false)
				return err
			}
		}
	}
	h.has = want.clone()
	h.has.Key = slices.Clone(key)
	d.setFeature(telemetry.FeatureHash, true)
	return nil
}
