// Package looking is pvnet/inspect for commands: the flag by which a command lets others look
// into its process, and those by which a command finds the processes to look into.
package looking

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"barevif/pvnet/inspect"
	"barevif/tools/cli"
	"barevif/tools/internal/stat"
	"barevif/tools/internal/users"

	"github.com/spf13/cobra"
)

// A Flag is the flag that selects who may look into the process of a command.
type Flag struct{ where string }

// Register adds the flag to cmd. what is what it selects: `where "barevif ring" … find its vifs`.
func (f *Flag) Register(cmd *cobra.Command, what string) {
	cmd.Flags().StringVar(&f.where, "inspect", "auto", what+`: "auto", the user's `+"`place`"+` for sockets; a directory; "off", nowhere`)
}

// Listen opens the socket; end closes it. The server is nil where nobody may look, or no place
// can be had for the socket, which is no reason not to run unless the place was named.
func (f *Flag) Listen(log *slog.Logger) (s *inspect.Server, end func(), err error) {
	cfg := inspect.Config{Logger: log}
	switch f.where {
	case "off":
		return nil, func() {}, nil
	case "auto":
	case "":
		return nil, nil, cli.BadValue("inspect", "", `"auto", "off" or a directory`)
	default:
		cfg.Dir = f.where
	}
	s, err = inspect.Listen(cfg)
	if err != nil && cfg.Dir != "" {
		return nil, nil, &cli.Advice{Err: fmt.Errorf("--inspect: %w", err), Next: "name a directory that is this user's alone (mode 0700), or whose parent this user may write"}
	}
	if err != nil {
		log.Warn("nobody can look into this process; --inspect DIR is another place for its socket", "err", err)
		return nil, func() {}, nil
	}
	return s, func() { s.Close() }, nil
}

// A Finder has the flags that select processes.
type Finder struct {
	Dir   string   // "": the users' places
	Users []string // beside the usual ones
	PID   int      // 0: any
}

// Register adds the flags to cmd. what is what they select: "vifs".
func (f *Finder) Register(cmd *cobra.Command, what, one string) {
	flags := cmd.Flags()
	flags.StringArrayVar(&f.Users, "user", nil, "find "+what+" of this `user` too, by name or number, beside one's own and root's; repeatable")
	flags.StringVar(&f.Dir, "inspect", "", "`directory` that the process was given with --inspect; default: the users' places")
	flags.IntVar(&f.PID, "pid", 0, "the `process` "+one+"; 0: any")
}

// UIDs returns the users whose processes are looked into.
func (f *Finder) UIDs() ([]int, error) {
	if f.PID < 0 {
		return nil, cli.BadValue("pid", strconv.Itoa(f.PID), "the number of a process")
	}
	uids := append(users.Own(), 0)
	if uid, ok := stat.Keeper(); ok {
		uids = append(uids, uid)
	}
	for _, name := range f.Users {
		uid, err := users.Lookup(name)
		if err != nil {
			return nil, cli.BadValue("user", name, "a user of this machine")
		}
		uids = append(uids, uid)
	}
	if f.Dir != "" {
		// Who names a directory means its owner.
		if st, err := os.Stat(f.Dir); err != nil {
			return nil, &cli.Advice{Err: fmt.Errorf("--inspect: %w", err), Next: "name the directory that the process was given", Usage: errors.Is(err, fs.ErrNotExist)}
		} else if uid, ok := users.Of(st); ok {
			return []int{uid}, nil
		}
	}
	slices.Sort(uids)
	return slices.Compact(uids), nil
}

// OwnerOf returns the owner of a directory that only root can have made, since nobody else may
// write where it is: a service's RuntimeDirectory. ok is false for any other.
func OwnerOf(dir string) (uid int, ok bool) {
	st, err := os.Lstat(dir)
	if err != nil || !st.IsDir() {
		return 0, false
	}
	above, err := os.Lstat(filepath.Dir(filepath.Clean(dir)))
	if err != nil || above.Mode().Perm()&0o022 != 0 {
		return 0, false
	}
	if sys, is := above.Sys().(*syscall.Stat_t); !is || sys.Uid != 0 {
		return 0, false
	}
	return users.Of(st)
}

// Print writes the states of processes to out: as one JSON array, or as text, for which write is
// called with each, and an empty line is between two.
func Print[T any](out io.Writer, asJSON bool, all []T, write func(*strings.Builder, *T)) error {
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(all)
	}
	var b strings.Builder
	for i := range all {
		if i > 0 {
			b.WriteByte('\n')
		}
		write(&b, &all[i])
	}
	_, err := io.WriteString(out, b.String())
	return err
}
