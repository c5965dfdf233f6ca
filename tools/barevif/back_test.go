package main

import (
	"errors"
	"strings"
	"testing"

	"barevif/pvnet/link"

	"golang.org/x/sys/unix"
)

func TestALinkRefusedSaysWhatWouldHelp(t *testing.T) {
	const chmod = "chmod 0666 /dev/net/tun"
	for _, c := range []struct {
		err  link.OpenError
		want string
	}{
		{link.OpenError{Step: "open /dev/net/tun", Err: unix.EACCES, Next: "let this user open it (" + chmod + ")"}, chmod},
		{link.OpenError{Step: "TUNSETIFF", Err: unix.EPERM, Next: "run with CAP_NET_ADMIN"}, "setcap cap_net_admin"},
	} {
		a, ok := errors.AsType[*advice](linkRefused(&c.err))
		if !ok || !a.refused || !strings.Contains(a.next, c.want) || strings.Contains(a.Error(), c.err.Next) {
			t.Errorf("%v: %+v", c.err.Err, a)
		}
	}
}
