package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/telemetry/logtest"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/tools/vifrouter/config"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server/labtest"

	"github.com/spf13/cobra"
)

// A commanded is "vifrouter run --store data/vifrouter" in a domain of an emulated machine, and the
// toolstack beside it.
type commanded struct {
	*testing.T
	lab  *labtest.Lab
	own  *emu.Domain
	dir  string // of --inspect
	home string // of its keys, as dom0 has it
	said logtest.Log
	run  *run
	end  func() error // ends it, once, and returns its error

	failed bool // its error is looked at by the test
}

// newCommanded prepares one; start starts it.
func newCommanded(t *testing.T) *commanded {
	t.Helper()
	// The first Notify of a process begins a goroutine that stays, which the lab would take for a leak.
	hups := make(chan os.Signal, 1)
	signal.Notify(hups, syscall.SIGHUP)
	signal.Stop(hups)
	c := &commanded{T: t, lab: labtest.New(t, emu.Config{}), dir: filepath.Join(emutest.SocketDir(t), "look")}
	c.own = c.lab.Domain(routerDom)
	c.lab.Domain(worldDom)
	c.lab.Add(toolstack.Vif{Front: routerDom, Back: worldDom})
	c.home = fmt.Sprintf("/local/domain/%d/data/vifrouter", routerDom)
	c.run = &run{Program: &cli.Program{Stdout: &c.said, Stderr: &c.said}, store: "data/vifrouter"}
	flags := &cobra.Command{}
	c.run.look.Register(flags, "what")
	if err := flags.ParseFlags([]string{"--inspect", c.dir}); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *commanded) start() {
	c.Helper()
	cfg, err := c.run.configuration()
	if err != nil {
		c.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.run.route(ctx, &domain.Domain{Domain: c.own}, cfg) }()
	c.end = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	c.Cleanup(func() {
		if err := c.end(); err != nil && !c.failed {
			c.Error(err)
		}
		if c.Failed() {
			c.Logf("it said:\n%s", &c.said)
		}
	})
}

// comes waits until what is so.
func (c *commanded) comes(what string, ok func() bool) {
	c.Helper()
	if err := labtest.Comes(func() error {
		if !ok() {
			return fmt.Errorf("never: %s", what)
		}
		return nil
	}); err != nil {
		c.Fatal(err)
	}
}

func (c *commanded) says(text string) {
	c.Helper()
	c.comes("it says "+text, func() bool { return strings.Contains(c.said.String(), text) })
}

// hand writes pairs of keys and values, in a transaction, as xenstore-write does.
func (c *commanded) hand(pairs ...string) {
	c.Helper()
	if err := c.lab.Tools.Transact(c.Context(), func(tx xenstore.Tx) error {
		for i := 0; i < len(pairs); i += 2 {
			if err := tx.Write(c.home+"/"+pairs[i], pairs[i+1]); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		c.Fatal(err)
	}
}

// answers waits until the answer to what was handed begins with want, and returns it.
func (c *commanded) answers(want string) (answer string) {
	c.Helper()
	c.comes("the answer "+want, func() bool {
		var err error
		answer, err = c.lab.Tools.Read(c.Context(), c.home+"/result")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.Fatal(err)
		}
		return strings.HasPrefix(answer, want)
	})
	return answer
}

// state returns what the router says of its configuration.
func (c *commanded) state() configState {
	c.Helper()
	var all []shown
	code, out, errs := command.Run(c.T, "status", "--json", "--inspect", c.dir)
	if err := json.Unmarshal([]byte(out), &all); code != 0 || err != nil || len(all) != 1 {
		c.Fatalf("exit %d, %v\n%s%s", code, err, out, errs)
	}
	return all[0].Config
}

const handedSource = "xenstore:data/vifrouter/config"

func TestRouterWaitsForItsConfigurationAndFollowsIt(t *testing.T) {
	c := newCommanded(t)
	c.start()
	c.says("waits for a configuration: write it to data/vifrouter/config")
	c.hand("config", "uplink vif 0\nuplink ipv4 dhcp\nuplinks\nnetwork\n")
	if a := c.answers("refused: " + handedSource + ":3: "); !strings.Contains(a, "; "+handedSource+":4: ") || strings.Contains(a, "\n") {
		t.Errorf("the answer is %q", a)
	}
	c.hand("config", " \n") // nothing
	c.hand("config", standard)
	c.answers("taken: 1 networks, 1 guests, 1 rules, 0 forwards")
	c.says("routes between 1 networks and vif 0")

	// In pieces, which are cut anywhere, and numbered.
	longer := standard + strings.Repeat("# remark\n", 20) + "drop from office to uplink proto udp port 99\n"
	pairs := []string{"result", "asked", "config", longer[:7]}
	for i, rest := 1, longer[7:]; rest != ""; i++ {
		n := min(50, len(rest))
		pairs, rest = append(pairs, fmt.Sprintf("config/%d", i), rest[:n]), rest[n:]
	}
	if len(pairs) < 2*12 {
		t.Fatal("too few pieces to be in the wrong order")
	}
	c.hand(pairs...)
	c.answers("taken: 1 networks, 1 guests, 2 rules")
	if s := c.state(); s.File != handedSource || s.Taken != 1 || s.Refused != 0 || s.Error != "" {
		t.Errorf("%+v", s)
	}

	// The same once more has an answer, too.
	c.hand("result", "asked")
	c.hand("config", longer[:7])
	c.answers("taken: 1 networks, 1 guests, 2 rules")

	// What cannot be had leaves what is there; a key that goes does, too.
	if err := c.lab.Tools.Remove(t.Context(), c.home+"/config"); err != nil {
		t.Fatal(err)
	}
	c.hand("result", "asked", "config", strings.Replace(standard, "vif 0", "vif 1", 1))
	c.answers(`refused: a reload cannot change ["uplink vif"]`)
	if s := c.state(); s.Refused != 1 || !strings.Contains(s.Error, "a reload cannot change") {
		t.Errorf("%+v", s)
	}
	c.hand("result", "asked", "config", "", "config/x", standard)
	c.answers("refused: " + handedSource + `: the piece "x": name the pieces data/vifrouter/config/1, data/vifrouter/config/2`)
	if err := c.lab.Tools.Remove(t.Context(), c.home+"/config"); err != nil {
		t.Fatal(err)
	}
	many := []string{"result", "asked", "config", ""}
	for i := range mostPieces + 1 {
		many = append(many, fmt.Sprintf("config/%d", i), "#\n")
	}
	c.hand(many...)
	c.answers("refused: " + handedSource + ": 257 pieces, and at most 256")
	if err := c.lab.Tools.Remove(t.Context(), c.home+"/config"); err != nil {
		t.Fatal(err)
	}
	c.hand("result", "asked", "config", strings.Repeat("\x00\xff wrong\n", 200))
	// Not the answer to the many pieces, which may come again: each of them fires the watch.
	if a := c.answers("refused: " + handedSource + ":1: "); len(a) > mostResult+len("…") || !strings.HasSuffix(a, "…") {
		t.Errorf("an answer of %d bytes: %q", len(a), a)
	}
	if err := c.lab.Tools.Remove(t.Context(), c.home+"/config"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	c.says("there is no configuration to read again")
	c.hand("result", "asked", "config", standard)
	c.answers("taken: 1 networks")
}

func TestWhatIsHandedCountsBeforeTheFile(t *testing.T) {
	c := newCommanded(t)
	c.run.file = filepath.Join(t.TempDir(), "router.conf")
	if err := os.WriteFile(c.run.file, []byte(standard), 0o600); err != nil {
		t.Fatal(err)
	}
	c.hand("config", "wrong\n")
	c.start()
	c.says("routes between 1 networks")
	c.answers("refused: " + handedSource + ":")
	if s := c.state(); s.File != c.run.file {
		t.Errorf("%+v", s)
	}
	c.hand("result", "asked", "config", standard+"drop from office to uplink proto udp\n")
	c.answers("taken: 1 networks, 1 guests, 2 rules")
	read := func() bool { return c.state().File == c.run.file }
	if read() {
		t.Error("the file is said to be in use")
	}
	if err := c.lab.Tools.Remove(t.Context(), c.home+"/config"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	c.comes("the file is in use again", read)
}

func TestWhatIsHandedBeforeTheStartIsUsed(t *testing.T) {
	c := newCommanded(t)
	c.hand("config", standard)
	c.start()
	c.says("routes between 1 networks")
	c.answers("taken: 1 networks")
	if s := c.state(); s.File != handedSource || s.Taken != 0 {
		t.Errorf("%+v", s)
	}
	if strings.Contains(c.said.String(), "waits") {
		t.Error("it has waited")
	}
}

// What cannot be used after all is answered thus, and not before the router has tried.
func TestWhatIsHandedAndCannotBeUsedIsRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := newCommanded(t)
	c.hand("config", standard+"metrics machine "+l.Addr().String()+"\n")
	c.start()
	if a := c.answers("refused: "); !strings.Contains(a, "another program listens at") {
		t.Errorf("the answer is %q", a)
	}
	if err := c.end(); err == nil || !strings.Contains(err.Error(), "another program listens at") {
		t.Errorf("it ends with %v", err)
	}
	c.failed = true
}

func TestRouterThatWaitsEnds(t *testing.T) {
	c := newCommanded(t)
	c.start()
	c.says("waits for a configuration")
	if err := c.end(); err != nil {
		t.Error(err)
	}
	gone := make(chan struct{})
	close(gone)
	h, err := openHanded(t.Context(), c.lab.Domain(firstDom), c.run.store, c.run.Log())
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	if cfg, _, err := c.run.begin(t.Context(), &domain.Domain{Domain: c.lab.Dom0, Gone: gone}, h, nil); cfg != nil || !errors.Is(err, domain.ErrHostGone) {
		t.Errorf("%v, %v", cfg, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	<-ctx.Done()
	if _, err := openHanded(ctx, c.lab.Dom0, c.run.store, c.run.Log()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestPlaceOfTheConfigurationIsTheDomainsOwn(t *testing.T) {
	for _, dir := range []string{"vifrouter", "data", "data/", "data//x", "/local/domain/3/data/vifrouter", "device/vif/0", "data/a b"} {
		command.Fails(t, cli.ExitUsage, []string{"run", "--store", dir}, "--store", "a directory below data")
	}
	if err := checkStore("data/vifrouter"); err != nil {
		t.Error(err)
	}
	command.Fails(t, cli.ExitUsage, []string{"run"}, "FILE is missing")
	if cfg, err := (&run{}).configuration(); cfg != nil || err != nil {
		t.Errorf("%v, %v", cfg, err)
	}
	var wrong config.Errors
	if _, err := (&run{lines: []string{"x"}}).configuration(); !errors.As(err, &wrong) {
		t.Errorf("%v", err)
	}
}
