//go:build linux

// Grants prints how many pages a domain has granted, to which domain each, and whether they
// are mapped. It reads the domain's grant table, so it runs in the control domain:
//
//	grants DOMID
//
// The debug key g of Xen shows only the grants that are mapped.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"

	"barevif/hypercall"
	"barevif/hypercall/xendev/privcmd"
)

const frameSize = 4096 // of a grant table, in bytes

// struct grant_entry_v1 of xen/include/public/grant_table.h: flags, the domain that may use
// the grant, the frame.
const (
	entrySize = 8
	typeMask  = 3 // GTF_type_mask; 0 is an unused entry
	readOnly  = 1 << 2
	reading   = 1 << 3 // the grant is mapped
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "grants:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: grants DOMID")
	}
	n, err := strconv.ParseUint(args[0], 10, 16)
	if err != nil {
		return err
	}
	dom := hypercall.DomID(n)
	xen, err := privcmd.Open("/dev/xen")
	if err != nil {
		return err
	}
	defer xen.Close()
	size, err := xen.GrantTable(dom)
	if err != nil {
		return err
	}
	table, err := mapTable(dom, size.Frames)
	if err != nil {
		return err
	}
	count := map[string]int{}
	for e := range slices.Chunk(table, entrySize) {
		flags := binary.NativeEndian.Uint16(e)
		if flags&typeMask == 0 {
			continue
		}
		what := fmt.Sprintf("granted to %d", binary.NativeEndian.Uint16(e[2:]))
		if flags&readOnly != 0 {
			what += ", to read"
		}
		if flags&reading != 0 {
			what += ", mapped"
		}
		count[what]++
	}
	for _, what := range slices.Sorted(maps.Keys(count)) {
		fmt.Printf("%d pages %s\n", count[what], what)
	}
	return nil
}
