package xenbus

import (
	"context"
	"errors"

	"barevif/xenbus/xenstore"
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
	return d.Publish(ctx, xenstore.Values{KeyReason: text[:min(len(text), mostReason)]})
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

// clear removes keys of our directory. A backend leaves one that is empty: a
// toolstack may have made it, so that it can be written whatever the quota, and to
// the frontend it says no more than one that is missing.
func (d *Device) clear(tx xenstore.Tx, keys ...string) error {
	paths := make([]string, len(keys))
	for i, key := range keys {
		paths[i] = d.dir + "/" + key
	}
	if d.role == Backend {
		values, errs := tx.ReadAll(paths...)
		said := paths[:0]
		for i, path := range paths {
			if !errors.Is(errs[i], xenstore.ErrNotFound) && (errs[i] != nil || values[i] != "") {
				said = append(said, path)
			}
		}
		paths = said
	}
	return tx.RemoveAll(paths...)
}
