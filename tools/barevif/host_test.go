package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
	"barevif/xenbus/toolstack"

	"golang.org/x/sys/unix"
)

func TestVifsAreReadStrictly(t *testing.T) {
	for s, want := range map[string]toolstack.Vif{
		"front=1": {Front: 1, Back: 2, MAC: [6]byte{0, 0x16, 0x3e, 0, 1, 0}},
		"front=300,back=7,id=65535,mtu=9000,type=barevif": {
			Front: 300, Back: 7, ID: 65535, MTU: 9000, Type: "barevif", MAC: [6]byte{0, 0x16, 0x3e, 1, 44, 255},
		},
		"front=1,bridge=br0,vifname=web0,script=vif-route,ip=10.0.0.1 10.0.0.2,gatewaydev=eth0": {
			Front: 1, Back: 2, MAC: [6]byte{0, 0x16, 0x3e, 0, 1, 0},
			Bridge: "br0", Name: "web0", Script: "vif-route", IP: "10.0.0.1 10.0.0.2", Gateway: "eth0",
		},
		"front=1,rate=1048576":          {Front: 1, Back: 2, Rate: "52428,50000", MAC: [6]byte{0, 0x16, 0x3e, 0, 1, 0}},
		"mac=02:00:00:00:00:01,front=1": {Front: 1, Back: 2, MAC: [6]byte{2, 0, 0, 0, 0, 1}},
	} {
		if got, err := parseVif(s); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
	for s, says := range map[string]string{
		"":                              "KEY=VALUE",
		"1":                             "KEY=VALUE",
		"front":                         "KEY=VALUE",
		"front=1,front=3":               "each key once",
		"back=2":                        "front is missing",
		"front=2":                       "between two domains",
		"front=0":                       "valid front",
		"front=-1":                      "valid front",
		"front=32752":                   "valid front",
		"front=1,back=x":                "valid back",
		"front=1,id=65536":              "valid id",
		"front=1,id=../../0":            "valid id",
		"front=1,mac=1":                 "valid mac",
		"front=1,mac=01:00:00:00:00:00": "odd",
		"front=1,mtu=67":                "MTU",
		"front=1,mtu=65522":             "MTU",
		"front=1,mtu=x":                 "valid mtu",
		"front=1,rate=19":               "at least 20",
		"front=1,rate=1MB":              "valid rate",
		"front=1,type=":                 "backend type",
		"front=1,type=a/b":              "backend type",
		"front=1,colour=red":            "of the keys",
	} {
		_, err := parseVif(s)
		var a *cli.Advice
		if !errors.As(err, &a) || !a.Usage || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %q", s, err, says)
		}
	}
}

// A client at the xenstore's socket is domain 0. So only this user may use the socket,
// whatever the umask is.
func TestHostsSocketsArePrivate(t *testing.T) {
	for _, mask := range []int{0, 0o077} {
		dir := clitest.TempDir(t)
		old := unix.Umask(mask)
		ctx, cancel := context.WithCancel(t.Context())
		r, w := io.Pipe()
		ended := make(chan int, 1)
		go func() {
			ended <- cli.Run(ctx, rootCommand, []string{"host"}, w, io.Discard)
			w.Close()
		}()
		for lines := bufio.NewScanner(r); lines.Scan() && !strings.HasPrefix(lines.Text(), "look inside"); {
		}
		unix.Umask(old)
		go io.Copy(io.Discard, r)
		place := filepath.Join(dir, fmt.Sprintf("barevif-%d", os.Geteuid()))
		for _, name := range []string{"host.sock", "xenstored.sock"} {
			if st, err := os.Lstat(filepath.Join(place, name)); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("umask %#o: %s: %v, %v", mask, name, st, err)
			}
		}
		c, err := net.Dial("unix", filepath.Join(place, "xenstored.sock"))
		if err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		cancel()
		if code := <-ended; code != cli.ExitOK {
			t.Errorf("exit %d", code)
		}
		if err := os.RemoveAll(place); err != nil {
			t.Error(err)
		}
	}
}
