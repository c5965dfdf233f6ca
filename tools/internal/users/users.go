// Package users names the users of this machine, and tells which of them own things that
// this process may use as its own.
package users

import (
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"slices"
	"strconv"
	"syscall"
)

// Name returns a user's name and uid, "nobody (65534)", or "uid 4321" for a user without
// a name.
func Name(uid int) string {
	if uid < 0 {
		return "unknown"
	}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return fmt.Sprintf("%s (%d)", u.Username, uid)
	}
	return fmt.Sprintf("uid %d", uid)
}

// Lookup returns the uid of a user given by name or number.
func Lookup(s string) (int, error) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil && n < 1<<32-1 {
		return int(n), nil
	}
	u, err := user.Lookup(s)
	if err != nil {
		return -1, err
	}
	return strconv.Atoi(u.Uid)
}

// Sudo returns the user who became root by sudo, if this process is root.
func Sudo() (uid int, ok bool) {
	if os.Geteuid() != 0 {
		return 0, false
	}
	n, err := strconv.ParseUint(os.Getenv("SUDO_UID"), 10, 32)
	if err != nil || n == 0 || n == 1<<32-1 {
		return 0, false
	}
	return int(n), true
}

// Of returns the owner of a file.
func Of(st fs.FileInfo) (uid int, ok bool) {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return int(sys.Uid), true
}

// Own returns the users whose things count as this process's own: its user, and the user
// who became root by sudo.
func Own() []int {
	own := []int{os.Geteuid()}
	if uid, ok := Sudo(); ok {
		own = append(own, uid)
	}
	return slices.Clip(own)
}
