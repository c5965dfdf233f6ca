package pvnet

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"barevif/hypercall/emu"
	"barevif/telemetry"
)

func TestOwnersCountWhatTheyLose(t *testing.T) {
	var log bytes.Buffer
	p := join(t, emu.Config{}, plain, Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for _, d := range []*Device{p.front, p.back} {
		d.Logger().Warn("said by an owner")
		tx, rx := d.tx[0], d.rx[0]
		count := func(want error) {
			t.Helper()
			for _, err := range []error{tx.CountDropped(telemetry.DropTooLong, 3), tx.CountUndelivered(4), rx.CountUndelivered(5)} {
				if err != want {
					t.Errorf("%v, want %v", err, want)
				}
			}
		}
		if n := testing.AllocsPerRun(1, func() { count(nil) }); n != 0 {
			t.Errorf("%v allocations", n)
		}
		st := d.Stats()
		if st.TX.Lost(telemetry.DropTooLong) != 6 || st.TX.Errors() != 6 || st.TX.Get(telemetry.Undelivered) != 8 ||
			st.RX.Get(telemetry.Undelivered) != 10 || st.RX.Errors()+st.RX.Dropped() != 0 {
			t.Errorf("%+v", st)
		}
		tx.gate.enter()
		if err := tx.CountUndelivered(1); err != ErrBusy {
			t.Errorf("inside another call: %v", err)
		}
		tx.gate.leave()
	}
	p.disconnect()
	for _, d := range []*Device{p.front, p.back} {
		before := d.Stats()
		if err := d.tx[0].CountUndelivered(1); err != ErrDisconnected {
			t.Errorf("once it has ended: %v", err)
		}
		if after := d.Stats(); after.TX != before.TX {
			t.Error("counted all the same")
		}
	}
	if n := strings.Count(log.String(), "said by an owner"); n != 2 {
		t.Errorf("%d lines", n)
	}
}
