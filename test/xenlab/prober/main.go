//go:build linux

// Prober is a frontend that asks its backend for something and checks what it receives:
//
//	prober hash QUEUES      the backend hashes what it sends
//	prober multicast        the backend filters multicast
//	prober send INTERFACE   no frontend: sends what "prober multicast" wants, until it is killed
//
// A frontend takes vif 0, says "connected" when frames may come, and ends when all is checked.
//
// The hash goes through tables, each until enough frames came: one that spreads flows, one
// that leads all to the last queue, and none at all. Frames of flows other than TCP's have a
// hash of their addresses.
//
// The multicast filter goes through lists of groups. Frames to groups that are not listed are
// sent all the time too, and in turn with broadcasts, which always come: so the broadcasts tell
// how many of the others were held back.
package main

import (
	"errors"
	"fmt"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "prober:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "hash":
			return hash(args[1:])
		case "multicast":
			return multicast(args[1:])
		case "send":
			return send(args[1:])
		}
	}
	return errors.New("usage: prober hash QUEUES | prober multicast | prober send INTERFACE")
}
