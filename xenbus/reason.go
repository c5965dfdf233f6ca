package xenbus

import (
	"context"
	"errors"
	"unicode/utf8"

	"barevif/xenbus/xenstore"
)

// KeyReason is the key under which a backend publishes why it does not connect. The
// frontend may read it, unlike the note that Fail writes.
const KeyReason = "error"

// mostReason bounds a reason, in bytes. xenstored allows 2048 for a node with its name
// and permissions.
const mostReason = 512

// Reason returns as much of a text as may be published as a reason: its first 512 bytes, without the beginning
// of a character that does not fit whole. Tools print what they read there, and often refuse half a character.
func Reason(text string) string {
	if len(text) <= mostReason {
		return text
	}
	for n := mostReason; n > mostReason-utf8.UTFMax; n-- {
		if utf8.RuneStart(text[n]) {
			return text[:n]
		}
	}
	return text[:mostReason] // it is no UTF-8
}

// Tell publishes why we do not connect, where the other end can read it. Removing the key
// with Publish, or setting it to "", takes the reason back.
func (d *Device) Tell(ctx context.Context, why error) error {
	return d.Publish(ctx, xenstore.Values{KeyReason: Reason(why.Error())})
}

// PeerReason returns the other end's published reason for not connecting, "" if there is
// none. The text is the peer's: quote it.
func (d *Device) PeerReason(ctx context.Context) string {
	text, err := d.ReadPeer(ctx, KeyReason)
	if err != nil {
		return ""
	}
	return Reason(text)
}

// clear removes keys of our directory. A backend leaves a node that is empty: the
// toolstack may have made it so that the backend can write it at its quota. To the
// frontend an empty node means the same as a missing one.
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
