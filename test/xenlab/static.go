//go:build linux

package xenlab

import "strings"

// staticRounds is how often each way is measured.
const staticRounds = 2

const (
	copiedWay = "grant copies"
	staticWay = "static grants"
)

// staticGrants moves the same frames between a frontend and a backend of ours in two guests,
// in turns with grant copies and with pages that stay mapped. It notes the ratios and asserts
// none, because rates on an emulated CPU vary.
func staticGrants(t *T) {
	t.loadNetback(false)
	driver, back := t.createDriverDomain("10.89.3.1") // xl waits for a backend
	b := &bench{T: t, guest: t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{Backend: "driver"}}})}
	back.Terminate()
	sizes := [...]string{"106", "1514"}
	for range staticRounds {
		for _, size := range sizes {
			for _, way := range [...]string{copiedWay, staticWay} {
				b.between(b.guest, driver, size, way, "from the guest", "--back")
				b.between(driver, b.guest, size, way, "to the guest", "")
			}
		}
	}
	all := []byte(strings.Join(b.lines, "\n") + "\n")
	b.Save("static.jsonl", all)
	t.Dom0().Put("/tmp/static.jsonl", all, 0o644)
	b.Save("static.txt", t.Dom0().Run(benchProgram, "table", "/tmp/static.jsonl").Stdout)
	for _, dir := range [...]string{"from the guest", "to the guest"} {
		for _, size := range sizes {
			what := dir + ", " + size + " B"
			static, copied := b.rate(what, staticWay), b.rate(what, copiedWay)
			t.Note("%s: %.0f frames a second, by grant copies %.0f (%.2f)", what, static, copied, static/copied)
		}
	}
}

// between measures the frames that arrive from one end of the vif at the other. back is
// "--back" if the receiver is the backend.
func (b *bench) between(from, to *Domain, size, way, dir, back string) {
	flags := func(piece, back string, more ...string) []string {
		f := append([]string{benchProgram, piece, "--xen"}, more...)
		if back != "" {
			f = append(f, back)
		}
		if way == staticWay {
			f = append(f, "--static-grants")
		}
		return f
	}
	other := "--back"
	if back != "" {
		other = ""
	}
	r := to.Start(flags("recv", back, "--way", way, "--what", dir+", "+size+" B", secs())...)
	s := from.Start(flags("send", other, "--secs", "50", "--size", size)...)
	if line := b.add(r.Succeed()); back != "" && (way == staticWay) != (line.GrantOps == 0) {
		b.Fatalf("%s, %s: %d grant operations for %d frames", way, dir, line.GrantOps, line.Frames)
	}
	b.end(s)
}
