// Package users knows the users of this machine by their names, and which of them
// this process may take for itself.
package users

import (
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
)

// Name is a user for a reader: "nobody (65534)", or "uid 4321" without a name.
func Name(uid int) string {
	if uid < 0 {
		return "unknown"
	}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return fmt.Sprintf("%s (%d)", u.Username, uid)
	}
	return fmt.Sprintf("uid %d", uid)
}

// Lookup is the uid of a user given by name or number.
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

// Sudo is the user who became root by sudo, if this process is root.
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

// Own are the users whose things are this process's own: its user, and who became
// root by sudo.
func Own() []int {
	own := []int{os.Geteuid()}
	if uid, ok := Sudo(); ok {
		own = append(own, uid)
	}
	return slices.Clip(own)
}
