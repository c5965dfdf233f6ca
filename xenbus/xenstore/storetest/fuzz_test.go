package storetest

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
)

// FuzzKeys writes arbitrary values, in any order, to nodes that a device's two ends read,
// while both ends open, connect and close. A script consists of lines: a letter, which
// selects a node, and its value; "!" removes the node.
func FuzzKeys(f *testing.F) {
	const frontDir, backDir = "/local/domain/7/device/vif/0", "/local/domain/0/backend/vif/7/0"
	nodes := map[byte]string{
		'b': frontDir + "/backend", 'i': frontDir + "/backend-id", 's': frontDir + "/state", 'F': frontDir,
		'f': backDir + "/frontend", 'd': backDir + "/frontend-id", 'S': backDir + "/state", 'B': backDir,
		'o': backDir + "/online", 'h': backDir + "/hotplug-status", 'c': backDir + "/claim", 'x': backDir + "/claim/challenge",
		'C': frontDir + "/claim", 'L': "/local", 'v': "/local/domain/0/backend/vif",
	}
	whole := "b" + backDir + "\ni0\ns1\nf" + frontDir + "\nd7\nS1\no1\n"
	for _, script := range []string{
		whole + "hconnected\ns4\ns5\ns6\n",
		whole + "S2\nS4\nS5\nS6\no0\nB!\nF!\n" + whole,
		whole + "c1 2\nxme\nc!\nB!\n" + whole,
		"i18446744073709551616\n" + whole + "s1e3\nS 4\nL!\n",
		"b/local/domain/0/backend/vif/8/0\ni-1\nf/local\nd8\n",
		whole + "v!\nvx\n" + whole,
	} {
		f.Add(script)
	}
	run := func(t *testing.T, script string) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		s := server.New(server.Config{})
		defer s.Close()
		s.Introduce(7)
		for _, path := range []string{"/local/domain/7/device", "/local/domain/0/backend"} {
			if err := errors.Join(s.Mkdir(path), s.SetPerms(path, "n7")); err != nil {
				t.Fatal(err)
			}
		}
		client := func(dom hypercall.DomID) *xenstore.Client {
			c, err := xenstore.Dial(ctx, func(context.Context) (io.ReadWriteCloser, error) {
				ours, theirs := net.Pipe()
				go s.ServeConn(theirs, dom)
				return ours, nil
			}, xenstore.Config{})
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		front, back := client(7), client(0)
		defer front.Close()
		defer back.Close()
		var ends sync.WaitGroup
		for _, open := range []func() (*xenbus.Device, error){
			func() (*xenbus.Device, error) { return xenbus.OpenFrontend(ctx, front, "vif", "0") },
			func() (*xenbus.Device, error) { return xenbus.OpenBackend(ctx, back, "vif", 7, "0") },
		} {
			ends.Go(func() {
				for ctx.Err() == nil {
					if d, err := open(); err == nil {
						live(ctx, d)
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
		ends.Go(func() {
			b, err := xenbus.WatchBackends(ctx, back, "vif")
			for err == nil {
				_, err = b.Next(ctx)
			}
		})
		for line := range strings.Lines(script) {
			line = strings.TrimSuffix(line, "\n")
			if line == "" || nodes[line[0]] == "" {
				continue
			}
			if line[1:] == "!" {
				s.Remove(nodes[line[0]])
			} else {
				s.Write(nodes[line[0]], line[1:])
			}
			time.Sleep(2 * time.Millisecond) // on the bubble's clock: until all goroutines are idle
		}
		cancel()
		ends.Wait()
	}
	f.Fuzz(func(t *testing.T, script string) {
		if len(script) > 1000 {
			return
		}
		synctest.Test(t, func(t *testing.T) { run(t, script) })
	})
}

// live drives a device until it has finished or ctx ends.
func live(ctx context.Context, d *xenbus.Device) {
	defer d.Close(context.Background())
	f := xenbus.Facts{}
	claim, cancel := context.WithTimeout(ctx, 5*time.Millisecond)
	d.Claim(claim, time.Millisecond)
	cancel()
	for {
		ch, err := d.Await(ctx, func(xenbus.Change) bool { return true })
		if err != nil {
			return
		}
		f.Change = ch
		step := xenbus.Next(d.Role(), f)
		switch step.Do {
		case xenbus.Connect:
			f.Attached = f.Generation
		case xenbus.Release:
			f.Attached = 0
		case xenbus.Finish:
			return
		}
		if step.State != xenbus.Unknown && d.SetState(ctx, step.State) != nil && ctx.Err() != nil {
			return
		}
	}
}
