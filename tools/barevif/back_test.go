package main

import (
	"errors"
	"strings"
	"testing"

	"barevif/pvnet/link"
	"barevif/tools/cli"

	"golang.org/x/sys/unix"
)

func TestALinkRefusedSaysWhatWouldHelp(t *testing.T) {
	const (
		node   = "open /dev/net/tun"
		chmod  = "chmod 0666 /dev/net/tun"
		setcap = "setcap cap_net_admin"
		demo   = `"barevif demo"`
	)
	for _, c := range []struct {
		err  link.OpenError
		want []string
	}{
		{link.OpenError{Step: node, Err: unix.EACCES, Next: "let this user open it"}, []string{chmod, setcap, demo}},
		{link.OpenError{Step: node, Err: unix.EPERM, Next: "let this user open it"}, []string{chmod, setcap, demo}},
		{link.OpenError{Step: "TUNSETIFF", Err: unix.EPERM, Next: "run with CAP_NET_ADMIN"}, []string{setcap, demo}},
		{link.OpenError{Step: node, Err: unix.ENOENT, Next: "modprobe tun"}, []string{"modprobe tun", demo}},
		{link.OpenError{Step: node, Err: unix.ENODEV, Next: "modprobe tun"}, []string{"modprobe tun", demo}},
		{link.OpenError{Step: node, Err: unix.ENXIO, Next: "modprobe tun"}, []string{"modprobe tun", demo}},
	} {
		a, ok := errors.AsType[*cli.Advice](linkRefused(&c.err))
		if !ok || !a.Refused || a.Error() == c.err.Error() {
			t.Errorf("%v: %+v", c.err.Err, a)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(a.Next, want) {
				t.Errorf("%v at %s: next is %q, without %q", c.err.Err, c.err.Step, a.Next, want)
			}
		}
	}
	if a, _ := errors.AsType[*cli.Advice](linkRefused(&link.OpenError{Step: "bind", Err: unix.ENODEV, Next: "none"})); a == nil || a.Refused {
		t.Errorf("no such card: %+v", a)
	}
}
