package main

import (
	"context"
	"net"
	"slices"
	"time"

	"barevif/hypercall/xendev"
	"barevif/pvnet/inspect"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/tools/internal/stat"
	"barevif/tools/internal/users"
	"barevif/tools/xenhost"

	"github.com/spf13/cobra"
)

// completePatience bounds what a shell waits for when the user presses the tab key. A xenstore
// or a process that does not answer in time has nothing to offer.
const completePatience = time.Second

// offered makes a completion of names: those that are not among the arguments already.
func offered(names []string, already ...string) ([]string, cobra.ShellCompDirective) {
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool {
		return slices.Contains(already, n)
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeVifs offers for the flag --vif what xenstore has for the domain of these flags. The vifs of a Xen are
// offered without --xen too, except where the flags name an emulated host.
func (f *front) completeVifs(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completePatience)
	defer cancel()
	var ids []string
	if flags := cmd.Flags(); flags.Changed("emu") || flags.Changed("emu-user") || flags.Changed("dom") {
		ids, _ = f.domain.Vifs(ctx) // there is no place for an error between two words of a command line
	} else {
		ids = f.domain.Candidates(ctx, xendev.Config{})
	}
	var given []string
	if cmd.Flags().Changed("vif") {
		given = f.vifs
	}
	return offered(ids, given...)
}

// completeCounting offers the vifs that stat shows to this user.
func (s *statistics) completeCounting(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	w, err := stat.NewWatcher(s.root)
	if err != nil || s.prune {
		return offered(nil)
	}
	w.AllUsers = s.allUsers
	for _, name := range s.users {
		if uid, err := users.Lookup(name); err == nil {
			w.Users = append(w.Users, uid)
		}
	}
	var names []string
	look := w.Look()
	for i := range look.Devices {
		names = append(names, stat.Clean(look.Devices[i].Name))
	}
	return offered(names, args...)
}

// completeInspected offers the vifs that ring and dump can look into.
func (i *inspected) completeInspected(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completePatience)
	defer cancel()
	uids, err := i.UIDs()
	if err != nil {
		return offered(nil)
	}
	all, _ := inspect.List(ctx, i.Dir, uids...)
	var names []string
	for _, v := range all {
		if i.PID == 0 || v.PID == i.PID {
			names = append(names, stat.Clean(v.Name))
		}
	}
	return offered(names, args...)
}

// completeXen offers the frontends of this Xen domain to take and release: those that the
// kernel's driver has, or has not.
func completeXen(owned bool) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return offered(nil)
		}
		all, _ := xenhost.Vifs(xendev.Config{})
		var ids []string
		for _, v := range all {
			if id, ok := domain.FrontendID(v); ok && (v.Driver != "") == owned {
				ids = append(ids, id)
			}
		}
		return offered(ids)
	}
}

// completeInterfaces offers the interfaces of this machine.
func completeInterfaces(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	all, _ := net.Interfaces()
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	return offered(names)
}

// completeNothing keeps a shell from offering files where a flag takes something else.
func completeNothing(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return offered(nil)
}

// completes makes a shell call offer for the value of each of the flags.
func completes(cmd *cobra.Command, offer cobra.CompletionFunc, flags ...string) {
	for _, flag := range flags {
		cli.Completes(cmd, flag, offer)
	}
}
