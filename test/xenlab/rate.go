package xenlab

import (
	"fmt"

	"barevif/pvnet/netif"
)

// ourBackRate gives a guest a vif with a limit, which xl writes, and measures what Linux
// netfront sends: under that limit, under one that is written while it sends, and
// without any.
func ourBackRate(t *T) {
	t.loadNetback(false)
	p := t.startBackend(t.Dom0(), "10.89.0.1")
	guest := t.Create(Guest{Name: "domU", Type: PV})
	t.Attach(guest, VIF{More: "rate=1MB/s@50ms"})
	t.startNetfront(guest, "10.89.0.2")
	t.Ping(guest, "10.89.0.1", 1472, 20)
	key := guest.Backend(t.Dom0(), 0) + "/" + netif.KeyRate
	t.requireRate(guest, key)
	t.Dom0().Run("xenstore-write", key, "20000,50000")
	p.Await(`rate limit.*400000 bytes/s`)
	t.requireRate(guest, key)
	t.Dom0().Run("xenstore-write", key, "as much as you like")
	p.Await(`the limit stays as it was: 400000 bytes/s`)
	t.Dom0().Run("xenstore-rm", key)
	p.Await(`rate limit.*limit=none`)
	if free := t.iperf(guest, t.Dom0(), "10.89.0.1", 3); free < 12 {
		t.Fatalf("without a limit the guest sends %.1f Mbit/s, with one it sent 8", free)
	}
	// The limit is not for what the guest receives.
	t.Dom0().Run("xenstore-write", key, "20000,50000")
	p.Await(`rate limit.*400000 bytes/s`)
	t.Fetch(guest, t.Dom0(), "10.89.0.1", 3<<20)
	t.Destroy(guest)
	p.Terminate()
}

// requireRate requires that a guest sends what the key of its vif allows it. iperf counts the
// payload of TCP: 1448 of the 1514 bytes of a frame of the MTU's size, and nearly all bytes of a
// GSO frame, whose headers the limit counts once, as netback does. So the payload alone must not
// exceed the limit, by more than the credit that may accumulate for a long frame and what iperf's
// clock is off; and what it is on the wire at most must come near the limit: a tenth may be lost
// to a guest that is slow to begin.
func (t *T) requireRate(guest *Domain, key string) {
	const seconds = 8
	var bytes, usec float64
	text := t.Dom0().Sh("xenstore-read %s", key)
	if _, err := fmt.Sscanf(text, "%f,%f", &bytes, &usec); err != nil {
		t.Fatalf("%s is %q: %w", key, text, err)
	}
	limit := bytes / usec * 8
	most := (limit + rateBurst*8/1e6/seconds) * 1.02
	payload := t.iperf(guest, t.Dom0(), "10.89.0.1", seconds)
	wire := payload * 1514 / 1448
	t.Note("limit %.2f Mbit/s, payload %.2f, on the wire at most %.2f", limit, payload, wire)
	if wire < 0.9*limit || payload > most {
		t.Fatalf("the guest sends %.2f Mbit/s of payload, its limit is %.2f", payload, limit)
	}
}

// rateBurst is how many bytes of credit may accumulate for a frame that waits, as in netback.
const rateBurst = 128 << 10
