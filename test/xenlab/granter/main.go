//go:build linux

// Granter provides the grants and the event channel of a frontend, for tests that write the
// rest of a frontend into xenstore themselves:
//
//	granter DOMID
//
// It grants two ring pages and one read-only page to that domain, opens an event channel for
// it, and prints the numbers. It keeps them until SIGTERM.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"barevif/hypercall"
	"barevif/hypercall/xendev"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "granter:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if len(os.Args) != 2 {
		return errors.New("usage: granter DOMAIN")
	}
	n, err := strconv.ParseUint(os.Args[1], 10, 16)
	if err != nil {
		return err
	}
	peer := hypercall.DomID(n)
	dom, err := xendev.Open(xendev.Config{})
	if err != nil {
		return err
	}
	rings, err := dom.Share(peer, 2, hypercall.ReadWrite)
	if err != nil {
		return err
	}
	page, err := dom.Share(peer, 1, hypercall.ReadOnly)
	if err != nil {
		return err
	}
	w, err := dom.Waiter()
	if err != nil {
		return err
	}
	port, err := w.Unbound(peer)
	if err != nil {
		return err
	}
	fmt.Printf("tx=%d rx=%d readonly=%d port=%d\n", rings.Refs[0], rings.Refs[1], page.Refs[0], port.ID())
	<-ctx.Done()
	return errors.Join(w.Close(), page.End(), rings.End(), dom.Close())
}
