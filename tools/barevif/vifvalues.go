package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"barevif/tools/cli"
)

// vifValues are the values of a flag of a command with several vifs: VALUE, or ID=VALUE for the
// vif ID alone. An ID=VALUE wins over a VALUE.
type vifValues struct {
	flag  string
	given []string

	what, add string // what the ids are, and how one is added; "": vifs, "--vif "
}

// of returns the value of each vif of ids that has one. one says that a VALUE is for one vif
// only, such as an address: then it needs an ID if there are several vifs.
func (v *vifValues) of(ids []string, one func(value string) bool) (map[string]string, error) {
	what, add := cmp.Or(v.what, "vif"), cmp.Or(v.add, "--vif ")
	out, own := make(map[string]string), make(map[string]bool)
	for _, s := range v.given {
		id, value, named := strings.Cut(s, "=")
		if !named {
			continue
		}
		if !slices.Contains(ids, id) {
			return nil, &cli.Advice{
				Err:  fmt.Errorf("--%s %q: there is no %s %q here, only %s", v.flag, s, what, id, strings.Join(cli.Quoted(ids), ", ")),
				Next: "add it with " + add + id + ", or name one of those", Usage: true,
			}
		}
		if own[id] {
			return nil, cli.BadValue(v.flag, s, "the only one of that "+what)
		}
		out[id], own[id] = value, true
	}
	common := 0
	for _, s := range v.given {
		if strings.Contains(s, "=") {
			continue
		}
		if common++; common > 1 {
			return nil, cli.BadValue(v.flag, s, "the only one; say whose it is: "+ids[0]+"="+s)
		}
		if len(ids) > 1 && one(s) {
			return nil, &cli.Advice{
				Err:  fmt.Errorf("--%s %q: one for %d %ss", v.flag, s, len(ids), what),
				Next: fmt.Sprintf("say whose it is, and what the others have: --%s %s=%s", v.flag, ids[0], s), Usage: true,
			}
		}
		for _, id := range ids {
			if !own[id] {
				out[id] = s
			}
		}
	}
	return out, nil
}
