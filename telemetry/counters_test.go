package telemetry

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write COUNTERS.md anew")

func page() []byte {
	var p bytes.Buffer
	p.WriteString(`# Counters

Made from the table in fields.go by ` + "`go test ./telemetry -run CountersPage -update`" + `.

Every field is there twice per queue: ` + "`rx_`" + ` counts frames this end hands to its local user, ` + "`tx_`" + `
frames its user gave it, at a frontend and at a backend alike. In OpenMetrics the families are called
` + "`barevif_rx_packets`" + ` (samples ` + "`barevif_rx_packets_total`" + `), histograms end in their unit. A frame that was
lost is counted by its reason and, with it, in the sum named there.

`)
	fmt.Fprintf(&p, "Layout version %d, hash `%#x`.\n\n", LayoutVersion, Layout())
	p.WriteString("| word | name | kind | unit | meaning | summed into |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, f := range Fields() {
		help := f.Help
		if f.Kind == KindHistogram {
			names := make([]string, f.Words())
			for i := range names {
				names[i] = f.Bucket(i)
			}
			help += ": " + strings.Join(names, ", ")
		}
		fmt.Fprintf(&p, "| %d | %s | %s | %s | %s | %s |\n", f.Word, f.Name, f.Kind, f.Unit, help, f.SumIn)
	}
	p.WriteString(`
Frames that are undelivered were lost by what the vif is joined to. Those received from the peer (rx) are
counted as received all the same: the other end sees no loss. Those that never reached the vif (tx) are in
no other counter. What a joint itself drops of the frames it is to send is in tx_errors, by reason.

A stall is seen by the slow tick, which comes once a second: one to two seconds after the peer's index
moved last, if calls waited or kept coming meanwhile that need more slots than are free. It is counted
once, with an event at its begin and one at its end, and has no consequence: no frame is kept for a peer.

The times in request_latency are sampled, so that the clock is not read for frames. About one request a second is timed:
at a frontend, for what it sends, from the publish of the request until the sender sees the response, if at
least half of that time is known to be the peer's; at a backend, both ways, from taking the requests of a
batch to the publish of their responses. A frontend's rx_request_latency stays empty.
`)
	p.WriteString("\nWord 0 of a block is gen_done, its last word gen_start; see the package documentation.\n")
	return p.Bytes()
}

func TestCountersPageIsUpToDate(t *testing.T) {
	const file = "COUNTERS.md"
	if *update {
		if err := os.WriteFile(file, page(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, page()) {
		t.Error("COUNTERS.md differs from the table; run go test -run CountersPage -update")
	}
}
