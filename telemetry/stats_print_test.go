package telemetry

import (
	"fmt"
	"testing"
)

func TestStatsPrint(t *testing.T) {
	var words [BlockWords]uint64
	words[Packets], words[Bytes] = 3, 300
	q := Queue{RX: ValuesOf(&words)}
	words[droppedSum], words[errorsSum] = 1, 2
	q.TX = ValuesOf(&words)
	want := "rx: 3 packets, 300 bytes; tx: 3 packets, 300 bytes, 1 dropped, 2 errors"
	if got := fmt.Sprint(Sum([]Queue{q})); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if n, b := Sum([]Queue{q, q}).RX.Packets(), Sum([]Queue{q, q}).RX.Bytes(); n != 6 || b != 600 {
		t.Errorf("%d packets, %d bytes", n, b)
	}
}
