package xenbus_test

import (
	"context"
	"testing"

	"barevif/xenbus"
)

func TestWaitErrorNamesKeysAndCause(t *testing.T) {
	for _, c := range []struct {
		cause error
		want  string
	}{
		{context.DeadlineExceeded, "xenbus device/vif/0: still without backend, backend-id: context deadline exceeded"},
		{nil, "xenbus device/vif/0: still without backend, backend-id"},
	} {
		err := &xenbus.WaitError{Dir: "device/vif/0", Missing: []string{"backend", "backend-id"}, Err: c.cause}
		if err.Error() != c.want {
			t.Errorf("%q, want %q", err, c.want)
		}
	}
}
