package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"

	"barevif/pvnet"
	"barevif/pvnet/inspect"
	"barevif/tools/cli"
	"barevif/tools/internal/looking"
	"barevif/tools/internal/stat"

	"github.com/spf13/cobra"
)

// inspectFlag is the flag that selects who may look into the vifs of a command.
type inspectFlag struct{ looking.Flag }

func (i *inspectFlag) register(cmd *cobra.Command) {
	i.Register(cmd, `where "barevif ring" and "barevif dump" of this user and root find its vifs`)
}

// listen opens the socket, and returns the option for a device's config.
func (i *inspectFlag) listen(log *slog.Logger) (in pvnet.Inspector, end func(), err error) {
	s, end, err := i.Listen(log)
	if s == nil { // an Inspector that is none has to be nil itself
		return nil, end, err
	}
	return s, end, err
}

// inspected selects vifs of other processes.
type inspected struct {
	*cli.Program
	looking.Finder
}

func (i *inspected) register(cmd *cobra.Command) { i.Register(cmd, "vifs", "that has the vif") }

// find returns the vifs that names mean, as in stat, all if there are no names.
func (i *inspected) find(ctx context.Context, names []string) ([]inspect.Vif, error) {
	for _, n := range names {
		if _, err := path.Match(n, ""); err != nil {
			return nil, &cli.Advice{Err: fmt.Errorf("%q: %w", n, err), Next: `a name as "barevif ring" shows it, or a pattern such as 'front-*'`, Usage: true}
		}
	}
	uids, err := i.UIDs()
	if err != nil {
		return nil, err
	}
	all, err := inspect.List(ctx, i.Dir, uids...)
	if err != nil {
		i.Note("%s", stat.Clean(strings.ReplaceAll(err.Error(), "\n", "; ")))
	}
	var found []inspect.Vif
	for _, v := range all {
		if i.PID != 0 && v.PID != i.PID {
			continue
		}
		if len(names) == 0 || slices.ContainsFunc(names, func(n string) bool { return stat.Named(n, v.Name) }) {
			found = append(found, v)
		}
	}
	slices.SortFunc(found, func(a, b inspect.Vif) int {
		return cmp.Or(stat.CompareNames(a.Name, b.Name), cmp.Compare(a.PID, b.PID))
	})
	if len(found) > 0 {
		return found, nil
	}
	next := `"barevif back", "serve" and "attach" of this user or root show theirs, unless they run with --inspect off; a program of your own needs pvnet/inspect`
	if len(all) > 0 {
		var there []string
		for _, v := range all {
			there = append(there, stat.Clean(v.Name))
		}
		next = "the vifs that can be looked into here are " + strings.Join(cli.Quoted(there), ", ")
	}
	what := "vif of this user or root"
	if len(names) > 0 {
		what = strings.Join(cli.Quoted(names), ", ")
	}
	return nil, &cli.Advice{Err: fmt.Errorf("no %s can be looked into: no process shows it", what), Next: next}
}

// one returns the only vif that name means.
func (i *inspected) one(ctx context.Context, name string) (*inspect.Vif, error) {
	found, err := i.find(ctx, []string{name})
	if err != nil {
		return nil, err
	}
	if len(found) == 1 {
		return &found[0], nil
	}
	var there []string
	same := true
	for _, v := range found {
		there = append(there, fmt.Sprintf("%s of process %d", stat.Clean(v.Name), v.PID))
		same = same && v.Name == found[0].Name
	}
	next := "name one of them: " + strings.Join(there, ", ")
	if same {
		next = "choose one with --pid: " + strings.Join(there, ", ")
	}
	return nil, &cli.Advice{Err: fmt.Errorf("%q is %d vifs", name, len(found)), Next: next}
}
