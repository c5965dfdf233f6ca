//go:build linux

package main

import (
	_ "embed"
	"fmt"
	"strconv"
	"strings"
)

// equivalent lists mutants without an effect, each with the reason. An entry has three
// lines, with an empty line between entries:
//
//	file function kind [#nth]
//	what is mutated -> what it becomes
//	the reason
//
// The first two lines are those of a survivor in the report. Lines that begin with # are
// comments.
//
//go:embed equivalent.txt
var equivalent string

// parseKnown parses the list. It returns the reasons by mutant.
func parseKnown(text string) (map[key]string, error) {
	known := make(map[key]string)
	var entry []string
	flush := func(line int) error {
		if len(entry) == 0 {
			return nil
		}
		e := entry
		entry = nil
		if len(e) != 3 {
			return fmt.Errorf("equivalent.txt:%d: the entry that ends here has %d lines, not 3", line, len(e))
		}
		head := strings.Fields(e[0])
		from, to, found := strings.Cut(e[1], " -> ")
		if len(head) < 3 || len(head) > 4 || !found {
			return fmt.Errorf("equivalent.txt:%d: want \"file function kind\", then \"from -> to\", not %q, %q", line, e[0], e[1])
		}
		k := key{File: head[0], Func: head[1], Kind: head[2], From: from, To: to}
		if len(head) == 4 {
			nth, err := strconv.Atoi(strings.TrimPrefix(head[3], "#"))
			if err != nil || nth < 2 {
				return fmt.Errorf("equivalent.txt:%d: %q is not #2 or more", line, head[3])
			}
			k.Nth = nth - 1
		}
		if _, ok := known[k]; ok {
			return fmt.Errorf("equivalent.txt:%d: %v is there twice", line, k)
		}
		known[k] = e[2]
		return nil
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "#"):
		case line != "":
			entry = append(entry, line)
		default:
			if err := flush(n); err != nil {
				return nil, err
			}
		}
	}
	return known, flush(n)
}

// staleEntries returns the entries that name no existing mutant.
func staleEntries(known map[key]string, all []*mutant) []key {
	there := make(map[key]bool, len(all))
	for _, m := range all {
		there[m.key] = true
	}
	var gone []key
	for k := range known {
		if !there[k] {
			gone = append(gone, k)
		}
	}
	return gone
}
