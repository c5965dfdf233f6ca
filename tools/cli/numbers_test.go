package cli

import "testing"

func TestNumbersAreReadable(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1 000", 281413759: "281 413 759"} {
		if got := Grouped(n); got != want {
			t.Errorf("%d: %q", n, got)
		}
	}
	for n, want := range map[uint64]string{0: "0 bytes", 1023: "1023 bytes", 1024: "1 KiB", 1536: "1.5 KiB", 1 << 40: "1 TiB", 5 << 50: "5120 TiB"} {
		if got := BinarySize(n); got != want {
			t.Errorf("%d: %q", n, got)
		}
	}
}
