package pvnet

import (
	"log/slog"

	"barevif/telemetry"
)

// Logger returns the device's rate-limited logger, which writes to Config.Logger; never
// nil. It is for programs that connect the device to something else. Do not log single
// frames.
func (d *Device) Logger() *slog.Logger { return d.log }

// CountDropped counts n frames that the owner should have sent and dropped itself, for
// reason r. While the link is down it counts nothing and returns [ErrLinkDown]; after the
// end of the device, the error that ended it. [ErrBusy].
func (tx *TX) CountDropped(r telemetry.Reason, n uint64) error {
	return tx.note(func(b *telemetry.Block) { b.Drop(r, n) })
}

// CountUndelivered counts n frames that the owner should have sent but never got, since
// they were lost on the way to it. It returns the errors of CountDropped.
func (tx *TX) CountUndelivered(n uint64) error { return tx.undelivered(n) }

// CountUndelivered counts n frames that the owner received and could not pass on. They
// also stay counted as received. It returns the errors of [TX.CountDropped].
func (rx *RX) CountUndelivered(n uint64) error { return rx.undelivered(n) }

func (h *half) undelivered(n uint64) error {
	return h.note(func(b *telemetry.Block) { b.Add(telemetry.Undelivered, n) })
}

// note runs f on the counters inside the gate. The next publish shows the result.
func (h *half) note(f func(*telemetry.Block)) error {
	if err := h.enter(); err != nil {
		return err
	}
	f(h.count)
	h.gate.leave()
	return nil
}
