package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"barevif/hypercall"
	"barevif/hypercall/anyxen"
	"barevif/hypercall/emu"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"

	"github.com/spf13/cobra"
)

func hostCommand(p *cli.Program) *cobra.Command {
	h := host{Program: p}
	cmd := &cobra.Command{
		Use:   "host",
		Short: "Run an emulated Xen that other processes join as domains",
		Long: `host is an emulated machine with a xenstore and a toolstack, until a signal ends it.

Other commands join it through a unix socket, each as one domain: "back" as the
driver domain, "serve" as a guest. Shared memory, grants and event channels are
real between the processes; the host hands them out and is asked nothing per frame.

A domain's vifs outlive the program in it: a "back" or "serve" that is started
again under the same number finds its vif and connects again.

The xenstore also listens at a socket of its own, so that Debian's xenstore-ls and
its kin (package xenstore-utils) look inside:

  XENSTORED_PATH=SOCKET xenstore-ls -f

Both sockets serve this user and root alone, whatever the umask is, and the others
join a host of their own user, of root, or of the user who became root by sudo.
It is a development machine, not a boundary: each of these can be any domain.`,
		Example: `  barevif host
  barevif host --vif front=1 --vif front=3,back=2,mtu=9000
  barevif host --vif front=1,bridge=xenbr0,vifname=web0
  barevif host --vif 'front=1,script=vif-route,ip=10.9.0.2 10.9.0.3,gatewaydev=eth0'
  barevif host --socket /tmp/xen/host.sock`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return h.run(cmd.Context()) },
	}
	cmd.Flags().StringVar(&h.socket, "socket", anyxen.Socket(os.Geteuid()), "`socket` to listen at")
	cmd.Flags().StringVar(&h.xenstore, "xenstore", "", "`socket` of the xenstore; default: xenstored.sock beside the other")
	cmd.Flags().StringArrayVar(&h.vifs, "vif", []string{"front=1,back=2"},
		"a `vif` to add: front=DOM[,back=DOM][,id=N][,mac=MAC][,mtu=BYTES][,rate=BYTES][,type=NAME], where rate is what the guest may send in a second, and as xl has them bridge, vifname, script, ip, gatewaydev; repeatable")
	return cmd
}

type host struct {
	*cli.Program
	socket, xenstore string
	vifs             []string

	joinedMu sync.Mutex               // domains come and go at any time
	joined   map[hypercall.DomID]bool // guarded by joinedMu
}

func (h *host) run(ctx context.Context) (err error) {
	var vifs []toolstack.Vif
	for _, s := range h.vifs {
		v, err := parseVif(s)
		if err != nil {
			return err
		}
		vifs = append(vifs, v)
	}
	if h.xenstore == "" {
		h.xenstore = domain.XenstoreSocket(h.socket)
	}
	for _, path := range []string{h.socket, h.xenstore} {
		if err := domain.PrivateDir(filepath.Dir(path)); err != nil {
			return err
		}
		if err := domain.FreePath(path); err != nil {
			return &cli.Advice{Err: err, Next: "use the host that runs there, end it, or choose another place with --socket"}
		}
	}
	h.joined = make(map[hypercall.DomID]bool)
	m, err := startMachine(ctx, machineConfig{listen: h.socket, opened: h.opened, died: h.died})
	if err != nil {
		return fmt.Errorf("start the host: %w", err)
	}
	defer m.shutdown()
	for _, v := range vifs {
		if err := m.add(ctx, v); err != nil {
			if errors.Is(err, xenstore.ErrExists) {
				return &cli.Advice{Err: err, Next: "give each --vif of one front an id of its own", Usage: true}
			}
			return err
		}
	}
	l, err := emu.ListenPrivate("unix", h.xenstore)
	if err != nil {
		return fmt.Errorf("listen for xenstore's clients: %w", err)
	}
	served := make(chan error, 1)
	go func() { served <- m.store.Serve(l) }()
	defer func() {
		l.Close()
		<-served
	}()

	h.Say("%s", h.welcome(vifs))
	<-ctx.Done()
	h.Say("\nending: every domain dies with the host")
	return nil
}

// welcome describes the host and its vifs, and the commands to run next.
func (h *host) welcome(vifs []toolstack.Vif) string {
	var b strings.Builder
	fmt.Fprintf(&b, "emulated Xen   %s\nxenstore       %s\n", h.socket, h.xenstore)
	emu := ""
	if h.socket != anyxen.Socket(os.Geteuid()) {
		emu = " --emu " + h.socket
	}
	var backs, fronts, pages []string
	addrs := make(map[string]string) // the flags for the vifs of each command, by its beginning
	count := make(map[hypercall.DomID]int)
	for _, v := range vifs {
		count[v.Front]++
	}
	for i, v := range vifs {
		fmt.Fprintf(&b, "vif %-10d frontend domain %d, backend domain %d, MAC %s\n",
			v.ID, v.Front, v.Back, net.HardwareAddr(v.MAC[:]))
		back := fmt.Sprintf("barevif back%s --dom %d", emu, v.Back)
		if v.Type != "" {
			back += " --type " + v.Type
		}
		if addrs[back] == "" {
			backs = append(backs, back)
		}
		addrs[back] += fmt.Sprintf(" --addr %d.%d=10.9.%d.1/24", v.Front, v.ID, i)
		front, own := fmt.Sprintf("barevif serve%s --dom %d", emu, v.Front), ""
		if addrs[front] == "" {
			fronts = append(fronts, front)
		}
		if count[v.Front] > 1 {
			own = fmt.Sprintf("%d=", v.ID)
		}
		addrs[front] += fmt.Sprintf(" --vif %d --addr %s10.9.%d.2/24", v.ID, own, i)
		pages = append(pages, fmt.Sprintf("curl http://10.9.%d.2/", i))
	}
	if len(vifs) > 0 {
		b.WriteString("\nnext, each in a terminal of its own, those with --addr DOM.ID=... as root:\n")
	}
	for _, back := range backs {
		fmt.Fprintf(&b, "  %s%s\n", back, addrs[back])
	}
	for _, front := range fronts {
		fmt.Fprintf(&b, "  %s%s\n", front, addrs[front])
	}
	for _, page := range pages {
		fmt.Fprintf(&b, "  %s\n", page)
	}
	fmt.Fprintf(&b, "\nlook inside:\n  XENSTORED_PATH=%s xenstore-ls -f\n", h.xenstore)
	return b.String()
}

func (h *host) opened(dom hypercall.DomID) {
	h.joinedMu.Lock()
	defer h.joinedMu.Unlock()
	if dom != 0 && !h.joined[dom] {
		h.joined[dom] = true
		h.Say("domain %d: a program runs in it", dom)
	}
}

func (h *host) died(dom hypercall.DomID) {
	h.joinedMu.Lock()
	defer h.joinedMu.Unlock()
	if h.joined[dom] {
		delete(h.joined, dom)
		h.Say("domain %d: its program has ended", dom)
	}
}

// perSecond is how many times in a second a vif with a limit gets credit.
const perSecond = 20

// parseVif parses the value of --vif, like front=1,back=2.
func parseVif(s string) (toolstack.Vif, error) {
	v := toolstack.Vif{Back: 2}
	mac, seen := false, make(map[string]bool)
	for field := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(field, "=")
		if !ok || seen[key] {
			return v, cli.BadValue("vif", s, "a list of KEY=VALUE, each key once")
		}
		seen[key] = true
		var err error
		switch key {
		case "front":
			v.Front, err = parseDom(value)
		case "back":
			v.Back, err = parseDom(value)
		case "id":
			var n uint64
			n, err = strconv.ParseUint(value, 10, 16)
			v.ID = uint32(n)
		case "mac":
			v.MAC, err = xenstore.ParseMAC(value)
			mac = true
			if v.MAC[0]&1 != 0 {
				return v, cli.BadValue("vif", s, "an address of one card: its first byte is odd")
			}
		case "mtu":
			var n uint64
			n, err = strconv.ParseUint(value, 10, 16)
			v.MTU = int(n)
			if err == nil && (n < 68 || n > 65521) {
				return v, cli.BadValue("vif", s, "an MTU from 68 to 65521 bytes")
			}
		case "rate":
			var n uint64
			n, err = strconv.ParseUint(value, 10, 48)
			if err == nil && n < perSecond {
				return v, cli.BadValue("vif", s, fmt.Sprintf("a rate of at least %d bytes/s", perSecond))
			}
			v.Rate = fmt.Sprintf("%d,%d", n/perSecond, 1000000/perSecond) // as xl does without an interval
		case "type":
			v.Type = value
			if !isDeviceType(value) {
				return v, cli.BadValue("vif", s, deviceType)
			}
		case "bridge":
			v.Bridge = value
		case "vifname":
			v.Name = value
		case "script":
			v.Script = value
		case "ip":
			v.IP = value
		case "gatewaydev":
			v.Gateway = value
		default:
			return v, cli.BadValue("vif", s, "of the keys front, back, id, mac, mtu, rate, type, bridge, vifname, script, ip, gatewaydev")
		}
		if err != nil {
			return v, cli.BadValue("vif", s, "a valid "+key)
		}
	}
	switch {
	case !seen["front"]:
		return v, cli.BadValue("vif", s, "complete: front is missing")
	case v.Front == v.Back:
		return v, cli.BadValue("vif", s, "between two domains")
	}
	if !mac {
		// Xen's prefix, then the domain and the number of the vif.
		v.MAC = [6]byte{0x00, 0x16, 0x3e, byte(v.Front >> 8), byte(v.Front), byte(v.ID)}
	}
	return v, nil
}

// parseDom parses the number of a domain in which a program can run.
func parseDom(s string) (hypercall.DomID, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err == nil && (n == 0 || n >= uint64(hypercall.DomSelf)) {
		err = fmt.Errorf("domain %s", s)
	}
	return hypercall.DomID(n), err
}
