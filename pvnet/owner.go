package pvnet

import (
	"log/slog"

	"barevif/telemetry"
)

// Logger is where the device logs: Config.Logger, rate-limited; never nil.
// It is for programs that join the device to something else, and not for frames.
func (d *Device) Logger() *slog.Logger { return d.log }

// CountDropped counts n frames that the owner was to send and dropped itself, for
// the reason r. While the link is down nothing is counted: [ErrLinkDown], or the
// error that ended the device.
func (tx *TX) CountDropped(r telemetry.Reason, n uint64) error {
	return tx.note(func(b *telemetry.Block) { b.Drop(r, n) })
}

// CountUndelivered counts n frames that the owner was to send, and that were lost
// before it had them. Errors are those of CountDropped.
func (tx *TX) CountUndelivered(n uint64) error { return tx.undelivered(n) }

// CountUndelivered counts n frames that the owner received, and then could not pass
// on. They stay counted as received. Errors are those of [TX.CountDropped].
func (rx *RX) CountUndelivered(n uint64) error { return rx.undelivered(n) }

func (h *half) undelivered(n uint64) error {
	return h.note(func(b *telemetry.Block) { b.Add(telemetry.Undelivered, n) })
}

// note has f count. Readers see it with the next publish.
func (h *half) note(f func(*telemetry.Block)) error {
	if err := h.enter(); err != nil {
		return err
	}
	f(h.count)
	h.gate.leave()
	return nil
}
