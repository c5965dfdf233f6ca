package xenbus

import (
	"strings"

	"barevif/xenbus/xenstore"
)

// AdoptConnected makes a frontend ours that another process of this domain has connected, and
// leaves to us: mark is its [ClaimState].Mark. A frontend has no claim, so the caller has an
// agreement with that process; both must not use the device at once. It writes nothing. The
// error is a [*xenstore.ValueError] for a mark that no Device has left.
func (d *Device) AdoptConnected(mark string) error {
	if err := CheckMark(mark); err != nil {
		return err
	}
	d.mu.Lock()
	d.wrote, d.mark = Connected, mark
	d.mu.Unlock()
	d.requestRead()
	return nil
}

// CheckMark refuses a [ClaimState].Mark that no Device has left, with a [*xenstore.ValueError].
func CheckMark(mark string) error {
	if mark != "" && (!xenstore.ValidName(mark) || strings.Contains(mark, "/")) {
		return &xenstore.ValueError{Path: "mark", Value: xenstore.Clip(mark), Want: "a key"}
	}
	return nil
}
