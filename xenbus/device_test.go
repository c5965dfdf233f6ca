package xenbus_test

import (
	"context"
	"strings"
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

func TestIdsOfClaims(t *testing.T) {
	id := strings.Repeat("0a9f", 8)
	for s, want := range map[string]bool{
		id: true, id + ":1": true, id + ":4294967295": true,
		"": false, "-": false, id[1:]: false, id + "0": false, id[1:] + "A": false, id[1:] + " ": false, id[1:] + ":": false,
		id + ":": false, id + ":x": false, id + ":-1": false, id + ":12345678901": false, id + ":1:2": false, id + " 0": false,
	} {
		err := (&xenbus.ClaimState{Claim: s, Mark: "feature-sg"}).Check()
		if (err == nil) != want || err != nil && !strings.Contains(err.Error(), "the id of a claim") {
			t.Errorf("%q: %v", s, err)
		}
	}
}
