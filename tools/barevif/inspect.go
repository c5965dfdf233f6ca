package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"barevif/pvnet"
	"barevif/pvnet/inspect"
	"barevif/tools/cli"
	"barevif/tools/internal/stat"
	"barevif/tools/internal/users"

	"github.com/spf13/cobra"
)

// inspectFlag is the flag that selects who may look into the vifs of a command.
type inspectFlag struct{ where string }

func (i *inspectFlag) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&i.where, "inspect", "auto",
		`where "barevif ring" and "barevif dump" of this user and root find its vifs: "auto", the user's `+"`place`"+` for sockets; a directory; "off", nowhere`)
}

// listen opens the socket, and returns the option for a device's config. A place that cannot
// be had is no reason not to run, unless it was named.
func (i *inspectFlag) listen(log *slog.Logger) (in pvnet.Inspector, end func(), err error) {
	cfg := inspect.Config{Logger: log}
	switch i.where {
	case "off":
		return nil, func() {}, nil
	case "auto":
	case "":
		return nil, nil, cli.BadValue("inspect", "", `"auto", "off" or a directory`)
	default:
		cfg.Dir = i.where
	}
	s, err := inspect.Listen(cfg)
	if err != nil && cfg.Dir != "" {
		return nil, nil, &cli.Advice{Err: fmt.Errorf("--inspect: %w", err), Next: "name a directory that is this user's alone (mode 0700), or whose parent this user may write"}
	}
	if err != nil {
		log.Warn("nobody can look into the vifs of this process", "err", err)
		return nil, func() {}, nil
	}
	return s, func() { s.Close() }, nil
}

// inspected selects vifs of other processes.
type inspected struct {
	*cli.Program
	dir   string
	users []string
	pid   int
}

func (i *inspected) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&i.users, "user", nil, "find vifs of this `user` too, by name or number, beside one's own and root's; repeatable")
	f.StringVar(&i.dir, "inspect", "", "`directory` that the process was given with --inspect; default: the users' places")
	f.IntVar(&i.pid, "pid", 0, "the `process` that has the vif; 0: any")
}

// find returns the vifs that names mean, as in stat, all if there are no names.
func (i *inspected) find(ctx context.Context, names []string) ([]inspect.Vif, error) {
	for _, n := range names {
		if _, err := path.Match(n, ""); err != nil {
			return nil, &cli.Advice{Err: fmt.Errorf("%q: %w", n, err), Next: `a name as "barevif ring" shows it, or a pattern such as 'front-*'`, Usage: true}
		}
	}
	if i.pid < 0 {
		return nil, cli.BadValue("pid", strconv.Itoa(i.pid), "the number of a process")
	}
	uids, err := i.uids()
	if err != nil {
		return nil, err
	}
	all, err := inspect.List(ctx, i.dir, uids...)
	if err != nil {
		i.Note("%s", stat.Clean(strings.ReplaceAll(err.Error(), "\n", "; ")))
	}
	var found []inspect.Vif
	for _, v := range all {
		if i.pid != 0 && v.PID != i.pid {
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

// uids returns the users whose vifs are looked into.
func (i *inspected) uids() ([]int, error) {
	uids := append(users.Own(), 0)
	if uid, ok := stat.Keeper(); ok {
		uids = append(uids, uid)
	}
	for _, name := range i.users {
		uid, err := users.Lookup(name)
		if err != nil {
			return nil, cli.BadValue("user", name, "a user of this machine")
		}
		uids = append(uids, uid)
	}
	if i.dir != "" {
		// Who names a directory means its owner.
		if st, err := os.Stat(i.dir); err != nil {
			return nil, &cli.Advice{Err: fmt.Errorf("--inspect: %w", err), Next: "name the directory that the process was given", Usage: errors.Is(err, fs.ErrNotExist)}
		} else if uid, ok := users.Of(st); ok {
			return []int{uid}, nil
		}
	}
	slices.Sort(uids)
	return slices.Compact(uids), nil
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
