package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"barevif/tools/cli"
	"barevif/tools/internal/users"

	"golang.org/x/sys/unix"
)

// Bounds of a token's length in bytes. A shorter one can be guessed; a longer text is not a
// token file.
const (
	leastToken = 16
	mostToken  = 256
)

// tokenFrom reads the token from a file. If the file does not exist, it makes the file with
// a new token.
func tokenFrom(path string) (string, error) {
	token := rand.Text()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = io.WriteString(f, token+"\n")
		if err = errors.Join(err, f.Close()); err != nil {
			return "", errors.Join(err, os.Remove(path))
		}
		return token, nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return "", &cli.Advice{Err: fmt.Errorf("make the file of the token: %w", err), Next: "name another with --token-file"}
	}
	// O_NONBLOCK, because path may be a FIFO, which must not block.
	f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", &cli.Advice{Err: fmt.Errorf("read the token: %w", err), Next: "let this user read it, or name another with --token-file"}
	}
	defer f.Close()
	if err := secretFile(f); err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, mostToken+2))
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	token = strings.TrimSpace(string(b))
	bad := strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' })
	if bad || len(token) < leastToken || len(token) > mostToken {
		return "", &cli.Advice{
			Err:  fmt.Errorf("the token in %s is not one word of %d to %d letters, digits and signs", path, leastToken, mostToken),
			Next: "remove the file: a new one is made",
		}
	}
	return token, nil
}

// secretFile refuses a token file that other users may read or write. Its group may read it,
// because a scraper has to.
func secretFile(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	mode := st.Mode()
	switch sys, ok := st.Sys().(*syscall.Stat_t); {
	case !mode.IsRegular():
		return &cli.Advice{Err: fmt.Errorf("%s is not a file", f.Name()), Next: "name another with --token-file"}
	case ok && sys.Uid != 0 && int(sys.Uid) != os.Geteuid():
		return &cli.Advice{Err: fmt.Errorf("%s belongs to user %s, who would know the token", f.Name(), users.Name(int(sys.Uid))),
			Next: "name a file of your own, or root's, with --token-file"}
	case mode.Perm()&0o027 != 0:
		return &cli.Advice{Err: fmt.Errorf("others may read or write %s (mode %#o)", f.Name(), mode.Perm()),
			Next: "chmod 0600, or 0640 for the group of who scrapes, and change the token if it was read"}
	}
	return nil
}
