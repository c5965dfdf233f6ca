package xenbus

import (
	"context"
	"errors"
)

// KeyReason is the key of a backend's directory under which it says why it does not
// connect. The frontend may read it, unlike what Fail writes.
const KeyReason = "error"

// mostReason bounds a reason in bytes. A node has room for 2048 with all that
// belongs to it.
const mostReason = 512

// Tell says why we do not connect where the other end can read it. Publish without
// it, or with "", takes it back.
func (d *Device) Tell(ctx context.Context, why error) error {
	text := why.Error()
	return d.Publish(ctx, Values{KeyReason: text[:min(len(text), mostReason)]})
}

// PeerReason is what the other end says of why it does not connect, "" if nothing.
// Its text is the peer's: quote it.
func (d *Device) PeerReason(ctx context.Context) string {
	text, err := d.ReadPeer(ctx, KeyReason)
	if err != nil {
		return ""
	}
	return text[:min(len(text), mostReason)]
}

// clear removes a key of our directory. A backend leaves one that is empty: a
// toolstack may have made it, so that it can be written whatever the quota, and to
// the frontend it says no more than one that is missing.
func (d *Device) clear(tx Tx, key string) error {
	if d.role == Backend {
		value, err := tx.Read(d.dir + "/" + key)
		if errors.Is(err, ErrNotFound) || err == nil && value == "" {
			return nil
		}
	}
	if err := tx.Remove(d.dir + "/" + key); err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	return nil
}
