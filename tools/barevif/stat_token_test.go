package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"barevif/tools/cli"
	"barevif/tools/cli/clitest"

	"golang.org/x/sys/unix"
)

func TestTokenFilesAreMadeAndGuarded(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "token")
	for _, mask := range []int{0, 0o077} {
		old := unix.Umask(mask)
		token, err := tokenFrom(path)
		unix.Umask(old)
		if err != nil || len(token) < leastToken {
			t.Fatalf("%q, %v", token, err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("umask %#o: mode %v, %v", mask, st.Mode(), err)
		}
		if again, err := tokenFrom(path); err != nil || again != token {
			t.Errorf("read again it is %q, %v, not %q", again, err, token)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for text, says := range map[string]string{
		"0123456789abcdef":               "",
		"  0123456789abcdef\r\n\n":       "", // an editor's
		"0123456789abcde\n":              "not one word",
		"":                               "not one word",
		"two words 0123456789abcdef":     "not one word",
		"0123456789abcdef\x00":           "not one word",
		strings.Repeat("x", mostToken):   "",
		strings.Repeat("x", mostToken+1): "not one word",
		strings.Repeat(" ", 1000) + "0123456789abcdef": "not one word",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := tokenFrom(path)
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%.40q: %v", text, err)
		}
	}
	if err := os.WriteFile(path, []byte("0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[os.FileMode]bool{0o400: true, 0o600: true, 0o640: true, 0o440: true, 0o644: false, 0o604: false, 0o660: false, 0o602: false, 0o601: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		var a *cli.Advice
		if _, err := tokenFrom(path); (err == nil) != ok || err != nil && (!errors.As(err, &a) || !strings.Contains(a.Next, "chmod")) {
			t.Errorf("mode %#o: %v", mode, err)
		}
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{fifo, dir, filepath.Join(dir, "none", "token")} {
		if _, err := tokenFrom(bad); err == nil {
			t.Errorf("%s was taken for a token", bad)
		}
	}
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, clitest.Stranger, clitest.Stranger)); err != nil {
			t.Fatal(err)
		}
		if _, err := tokenFrom(path); err == nil || !strings.Contains(err.Error(), "nobody (65534), who would know the token") {
			t.Errorf("a token that another user knows: %v", err)
		}
	}
}

// web starts stat --http and returns the lines it prints, by their first word.
func web(t *testing.T, args []string) (lines map[string]string, stderr func() string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	var errs strings.Builder
	ended := make(chan int, 1)
	go func() {
		ended <- cli.Run(ctx, rootCommand, args, w, &errs)
		w.Close()
	}()
	stop := func() string {
		cancel()
		if code, ok := <-ended; ok && code != cli.ExitOK {
			t.Errorf("exit %d, %s", code, &errs)
		}
		close(ended)
		return errs.String()
	}
	lines = map[string]string{}
	for s := bufio.NewScanner(r); s.Scan(); {
		word, rest, _ := strings.Cut(s.Text(), " ")
		lines[word] = strings.TrimSpace(rest)
		if word == "a" {
			break
		}
	}
	return lines, stop
}

func status(t *testing.T, url, token string) int {
	t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestHTTPAsksForATokenUnlessToldOtherwise(t *testing.T) {
	_, args := counting(t, 61024)
	file := filepath.Join(t.TempDir(), "token")
	// The address of this machine by IPv6, or by IPv4 on one without.
	here := "[::1]:0"
	if l, err := net.Listen("tcp", here); err == nil {
		l.Close()
	} else {
		here = "127.0.0.1:0"
	}
	for _, c := range []struct {
		args []string
		open bool
	}{{nil, false}, {[]string{"--token-file", file}, false}, {[]string{"--no-token"}, true}} {
		lines, stop := web(t, append(append(args, "--http", here), c.args...))
		token := lines["token"]
		if len(c.args) == 2 {
			if token != "in "+file || !strings.HasSuffix(lines["page"], "/#token=TOKEN") {
				t.Errorf("it says %v", lines)
			}
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			token = strings.TrimSpace(string(b))
		} else if !strings.HasSuffix(lines["page"], "/"+map[bool]string{true: "", false: "#token=" + token}[c.open]) {
			t.Errorf("it says %v", lines)
		}
		for _, url := range []string{lines["metrics"], lines["JSON"]} {
			if got := status(t, url, token); got != 200 {
				t.Errorf("%v: %s with the token: %d", c.args, url, got)
			}
			if got := status(t, url, ""); got != map[bool]int{true: 200, false: 401}[c.open] {
				t.Errorf("%v: %s without a token: %d", c.args, url, got)
			}
		}
		if says := strings.Contains(stop(), "every user of this machine can read this"); says != c.open {
			t.Errorf("%v: it warns: %v", c.args, says)
		}
	}
}
