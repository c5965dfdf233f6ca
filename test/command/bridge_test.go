//go:build linux

package command_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func (s *site) bridge(args ...string) *process {
	s.t.Helper()
	p := start(s.t, nil, s.bin, append([]string{"bridge", "-v", "--emu", s.socket}, args...)...)
	p.await("serves vifs of type", 1)
	return p
}

// A bridgeStatus is what "barevif bridge status --json" says of a bridge.
type bridgeStatus struct {
	Bridge string
	PID    int
	Domain int
	Ports  []struct {
		Port                    string
		Up, Isolated            bool
		MTU                     int
		Guard                   []string
		Received, Flooded, Sent uint64
		Dropped, Lost           map[string]uint64
	}
	Stations []struct {
		MAC, Port string
		Guarded   bool
	}
}

// ports returns the names of the ports.
func (s bridgeStatus) ports() (names []string) {
	for _, p := range s.Ports {
		names = append(names, p.Port)
	}
	return names
}

// askBridge asks the process of a bridge for its status.
func askBridge(t *testing.T, p *process, name string) (s bridgeStatus) {
	t.Helper()
	text := stdout(t, barevif(t), "bridge", "status", "--json", "--pid", fmt.Sprint(p.cmd.Process.Pid), name)
	var all []bridgeStatus
	if err := json.Unmarshal([]byte(text), &all); err != nil || len(all) != 1 || all[0].PID != p.cmd.Process.Pid || all[0].Bridge != name {
		t.Fatalf("%v: %s", err, text)
	}
	return all[0]
}

// A bridge switches between guests and this kernel, which has a TAP on it: TCP of kernels at both
// ends, of a guest's at one. Guests come, go, and come back, and so does the bridge.
func TestABridgeBetweenGuestsAndThisKernel(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		t.Skip("nsenter is not installed: ", err)
	}
	s := newSite(t, "--vif", "front=1", "--vif", "front=3,mac=00:16:3e:03:03:03")
	uplink := []string{"--uplink", "tap:lan0", "--addr", "10.9.0.1/24"}
	b := s.bridge(uplink...)
	wants(t, b.text(), "uplink tap:lan0: on bridge xenbr0, the kernel has it as lan0, 10.9.0.1/24")
	g := s.serve("--addr", "10.9.0.2/24", "--check", "7007")
	other := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, s.bin, "attach", "--emu", s.socket, "--dom", "3", "--tap", "card0", "--addr", "10.9.0.3/24")
	other.await("the kernel has it as card0", 1)
	b.await("connected to domain", 2)
	wants(t, b.text(), "vif 3.0: on bridge xenbr0, from 00:16:3e:03:03:03 alone, MTU 1500")
	check(t, "10.9.0.2")
	ping(t, "10.9.0.3")
	there := fmt.Sprintf("--net=/proc/%d/ns/net", other.cmd.Process.Pid) // from guest to guest
	wants(t, start(t, nil, nsenter, there, checkProgram(t), "--sizes", "1-1472:97,4000,65507", "10.9.0.2").exit(0), " 0 lost, 0 wrong")

	st := askBridge(t, b, "xenbr0")
	if got := st.ports(); !slices.Equal(got, []string{"1.0", "3.0", "tap:lan0"}) || st.Domain != 2 {
		t.Errorf("%+v", st)
	}
	for _, p := range st.Ports {
		if !p.Up || p.Received == 0 || p.Sent == 0 || p.MTU != 1500 {
			t.Errorf("%+v", p)
		}
	}
	card, err := net.InterfaceByName("lan0")
	if err != nil {
		t.Fatal(err)
	}
	behind := make(map[string]string)
	for _, station := range st.Stations {
		behind[station.MAC] = station.Port
		if station.Guarded != (station.Port != "tap:lan0") {
			t.Errorf("%+v", station)
		}
	}
	if behind["00:16:3e:00:01:00"] != "1.0" || behind["00:16:3e:03:03:03"] != "3.0" || behind[card.HardwareAddr.String()] != "tap:lan0" {
		t.Errorf("%v", behind)
	}
	wants(t, start(t, nil, s.bin, "bridge", "status").exit(0), "bridge xenbr0 in domain 2, process ", "tap:lan0", "00:16:3e:03:03:03", "guarded")
	wants(t, start(t, nil, s.bin, "bridge", "status", "dmz").exit(1), `no bridge "dmz" runs`, `"xenbr0"`)
	wants(t, start(t, nil, s.bin, "__complete", "bridge", "status", "").exit(0), "xenbr0\n:4\n")
	wants(t, start(t, nil, s.bin, "ring", "vif1.0").exit(0), "backend in domain 2 of vif 0, frontend in domain 1")

	t.Log("a vif is taken away, and given anew")
	c := s.tools()
	v := toolstack.Vif{Front: 3, Back: 2}
	if err := toolstack.Remove(t.Context(), c, v); err != nil {
		t.Fatal(err)
	}
	b.await("vif 3.0: gone; ", 1)
	other.signal(syscall.SIGKILL)
	<-other.done
	if got := askBridge(t, b, "xenbr0").ports(); !slices.Equal(got, []string{"1.0", "tap:lan0"}) {
		t.Errorf("%v", got)
	}
	check(t, "10.9.0.2")
	v.MAC = [6]byte{0x00, 0x16, 0x3e, 3, 3, 4}
	if err := toolstack.Add(t.Context(), c, v); err != nil {
		t.Fatal(err)
	}
	b.await("vif 3.0: on bridge xenbr0, from 00:16:3e:03:03:04 alone", 1)
	s.serve("--dom", "3", "--addr", "10.9.0.4/24")
	check(t, "10.9.0.4")

	t.Log("the MTU of the TAP is changed")
	iface(t, "lan0", func(l netlink.Link) error { return netlink.LinkSetMTU(l, 9000) })
	b.await("uplink tap:lan0: its MTU is now 9000", 1)
	check(t, "10.9.0.2")

	t.Log("the TAP is removed")
	iface(t, "lan0", netlink.LinkDel)
	b.await("uplink tap:lan0: on bridge xenbr0 again", 1)
	check(t, "10.9.0.2")
	if again, err := net.InterfaceByName("lan0"); err != nil || slices.Equal(again.HardwareAddr, card.HardwareAddr) != hasMachineID() {
		t.Errorf("lan0 has %v again, and had %v: %v", again, card.HardwareAddr, err)
	}

	t.Log("the bridge pauses, and goes on")
	b.signal(syscall.SIGUSR1)
	b.exit(0)
	b = s.bridge(uplink...)
	check(t, "10.9.0.2")
	if strings.Contains(g.text(), "vif 0: down: the other end is Closing") {
		t.Error("the guest's vif was closed")
	}

	t.Log("the bridge is replaced, and its TAP is made again")
	next := s.bridge(append([]string{"--take-over"}, uplink...)...)
	next.await("uplink tap:lan0: on bridge xenbr0, the kernel has it as lan0, 10.9.0.1/24", 1)
	wants(t, b.exit(0), "vif 1.0: handed over; ", "vif 3.0: handed over; ", "uplink tap:lan0: gone; ")
	if strings.Contains(b.text(), "left something behind") {
		t.Error("a page is granted or mapped, or a channel is open")
	}
	b = next
	check(t, "10.9.0.2")
	check(t, "10.9.0.4")

	t.Log("the bridge is killed, and comes back")
	b.signal(syscall.SIGKILL)
	<-b.done
	b = s.bridge(uplink...)
	check(t, "10.9.0.2")
	check(t, "10.9.0.4")

	t.Log("the bridge ends")
	b.signal(syscall.SIGTERM)
	wants(t, b.exit(0), "vif 1.0: gone; ", "vif 3.0: gone; ", "uplink tap:lan0: gone; ")
	none(t, "lan0")
	if strings.Contains(b.text(), "left something behind") {
		t.Error("a page is granted or mapped, or a channel is open")
	}
	g.await("vif 0: down", 1)
	key(t, c, toolstack.Vif{Front: 1, Back: 2}, "state", "6")
}

// hasMachineID reports whether this machine has a name that stays.
func hasMachineID() bool {
	id, err := os.ReadFile("/etc/machine-id")
	return err == nil && len(id) > 0
}

// private returns a place for the sockets of a process that shows its vifs.
func (s *site) private() string { return filepath.Join(filepath.Dir(s.socket), "run") }

// A guest is a raw end of a vif, in this process.
type guest struct {
	*pvnet.Device
	t   *testing.T
	got chan []byte // copies of what it receives
}

// asGuest is domain dom of the site, with its vif 0.
func (s *site) asGuest(dom hypercall.DomID) *guest {
	s.t.Helper()
	d, err := emu.Join(s.t.Context(), s.socket, dom)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(d.Destroy)
	ctx, cancel := context.WithTimeout(s.t.Context(), limit)
	defer cancel()
	dev, err := pvnet.Connect(ctx, d, "0", pvnet.Config{})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.listening(dev)
}

func (s *site) listening(dev *pvnet.Device) *guest {
	g := &guest{Device: dev, t: s.t, got: make(chan []byte, 1024)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		dev.Listen(ctx, func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			select {
			case g.got <- b:
			case <-ctx.Done():
			}
		})
	}()
	s.t.Cleanup(func() { cancel(); <-done; dev.Disconnect() })
	return g
}

// send sends a frame with a number.
func (g *guest) send(to, from pvnet.MAC, number int) {
	g.t.Helper()
	f := append(append(to[:], from[:]...), 0x88, 0xb5)
	if _, err := g.Write(binary.BigEndian.AppendUint32(f, uint32(number))); err != nil {
		g.t.Fatal(err)
	}
}

// next returns the number of the next frame that a guest receives.
func (g *guest) next() int {
	g.t.Helper()
	for {
		select {
		case b := <-g.got:
			if n, ok := numberOf(b); ok { // else the kernel of somebody's TAP says hello
				return n
			}
		case <-time.After(limit):
			g.t.Fatal("no frame came")
		}
	}
}

// numberOf returns the number of a frame that a guest has sent.
func numberOf(b []byte) (number int, ok bool) {
	if len(b) < 18 || b[12] != 0x88 || b[13] != 0xb5 {
		return 0, false
	}
	return int(binary.BigEndian.Uint32(b[14:])), true
}

// Tenants are held to their addresses and kept apart, and reach what is behind the uplink, which is
// a vif of the bridge's own domain. Without root, and without a TAP.
func TestABridgeKeepsTenantsApart(t *testing.T) {
	s := newSite(t, "--vif", "front=1", "--vif", "front=3", "--vif", "front=5", "--vif", "front=2,back=4")
	world, err := emu.Join(t.Context(), s.socket, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer world.Destroy()
	serving, stop := context.WithCancel(t.Context())
	backs, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	b := s.bridge("--uplink", "vif:0", "--isolated=1.0", "--isolated=3.*", "--no-guard=5.0", "--inspect", s.private())
	b.await("domain 2 serves vifs", 1) // the uplink is not there yet
	go func() {
		served <- pvnet.Serve(serving, world, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) { backs <- d })
	}()
	defer func() { stop(); <-served }()
	var up *guest
	select {
	case dev := <-backs:
		up = s.listening(dev)
	case <-time.After(limit):
		t.Fatal("no uplink")
	}
	b.await("uplink vif:0: connected, backend in domain 4", 1)
	one, three, five := s.asGuest(1), s.asGuest(3), s.asGuest(5)
	b.await("connected to domain", 3)
	everybody := pvnet.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

	one.send(everybody, three.MAC(), 1) // another's address
	one.send(three.MAC(), one.MAC(), 2) // an isolated vif
	one.send(everybody, one.MAC(), 3)
	if n, m := up.next(), five.next(); n != 3 || m != 3 {
		t.Errorf("frames %d and %d came", n, m)
	}
	three.send(everybody, three.MAC(), 4)
	up.next()
	five.next()
	up.send(three.MAC(), pvnet.MAC{2, 9}, 5)
	if n := three.next(); n != 5 {
		t.Errorf("frame %d came", n)
	}
	five.send(one.MAC(), pvnet.MAC{2, 5, 5}, 6) // from an address of its own choice
	if n := one.next(); n != 6 {
		t.Errorf("frame %d came", n)
	}
	up.send(one.MAC(), three.MAC(), 7) // a guarded address, from the uplink
	up.send(one.MAC(), pvnet.MAC{2, 9}, 8)
	if n := one.next(); n != 8 {
		t.Errorf("frame %d came", n)
	}
	text := stdout(t, s.bin, "bridge", "status", "--json", "--inspect", s.private())
	var all []bridgeStatus
	if err := json.Unmarshal([]byte(text), &all); err != nil || len(all) != 1 {
		t.Fatalf("%v: %s", err, text)
	}
	for _, p := range all[0].Ports {
		want := map[string]uint64{"1.0": 1, "vif:0": 1}[p.Port]
		if p.Dropped["spoofed"] != want || p.Isolated != (p.Port == "1.0" || p.Port == "3.0") || len(p.Guard) == 0 != (p.Port == "5.0" || p.Port == "vif:0") {
			t.Errorf("%+v", p)
		}
		if p.Port == "1.0" && p.Dropped["isolated"] != 1 {
			t.Errorf("%+v", p)
		}
	}
	t.Log("the bridge is replaced: its guests notice nothing, and the uplink connects again")
	flags := []string{"bridge", "-v", "--emu", s.socket, "--uplink", "vif:0", "--isolated=1.0", "--isolated=3.*", "--no-guard=5.0", "--inspect", s.private(), "--take-over"}
	next := start(t, nil, s.bin, flags...)
	next.await("uplink vif:0: connected, backend in domain 4", 1)
	wants(t, next.text(), "3 vifs taken over from")
	wants(t, b.exit(0), "vif 1.0: handed over; 3 frames from the frontend, 2 not passed on (1 from another's address, 1 for an isolated vif)", "uplink vif:0: gone; ")
	b = next
	for lost := 0; ; lost++ { // the uplink's backend may say later that it is connected
		up.send(three.MAC(), pvnet.MAC{2, 9}, 100+lost)
		select {
		case f := <-three.got:
			if n, ok := numberOf(f); !ok || n < 100 {
				t.Errorf("frame %d came", n)
			}
		case <-time.After(time.Second):
			if lost == 60 {
				t.Fatal("no frame comes from the uplink")
			}
			continue
		}
		break
	}
	one.send(three.MAC(), one.MAC(), 9) // an isolated vif, as before
	one.send(everybody, one.MAC(), 10)
	if n, m := up.next(), five.next(); n != 10 || m != 10 {
		t.Errorf("frames %d and %d came", n, m)
	}
	b.signal(syscall.SIGTERM)
	wants(t, b.exit(0), "vif 1.0: gone; 2 frames from the frontend, 1 not passed on (1 for an isolated vif)", "uplink vif:0: gone; ")
}

// What the toolstack says of a vif is honoured, or the vif does not connect and the toolstack can
// read which key is in the way. A key that has no effect is named.
func TestABridgeAndTheToolstacksKeys(t *testing.T) {
	s := newSite(t, "--vif", "front=1,bridge=xenbr0", "--vif", "front=1,id=1,script=/etc/xen/scripts/vif-nat",
		"--vif", "front=1,id=2,script=vif-route", "--vif", "front=1,id=3,mac=00:16:3e:00:01:00",
		"--vif", "front=1,id=4,bridge=lan,script=vif-barevif,vifname=web0,ip=10.9.0.2,gatewaydev=eth0", "--vif", "front=1,id=5", "--vif", "front=7,bridge=lan")
	c := s.tools()
	vif := func(id uint32) toolstack.Vif { return toolstack.Vif{Front: 1, Back: 2, ID: id} }
	write := func(id uint32, key, value string) {
		t.Helper()
		if err := c.Write(t.Context(), dirOf(vif(id))+"/"+key, value); err != nil {
			t.Fatal(err)
		}
	}
	write(5, "mac", "moon")
	b := s.bridge("--name", "lan", "--vif", "1.*")
	key(t, c, vif(0), "hotplug-error", "bridge=xenbr0: this is the bridge lan; ")
	key(t, c, vif(1), "hotplug-error", "script=/etc/xen/scripts/vif-nat: bridge runs no scripts")
	key(t, c, vif(2), "hotplug-error", "script=vif-route: bridge runs no scripts")
	key(t, c, vif(4), "hotplug-status", "connected")
	key(t, c, vif(5), "hotplug-error", "mac: there is no usable one")
	wants(t, b.text(), "key=vifname value=web0", "key=ip value=10.9.0.2", "key=gatewaydev value=eth0", "--name xenbr0 --vif 1.0")

	t.Log("keys are corrected")
	for _, id := range []uint32{0, 1, 2} {
		write(id, "bridge", "lan")
		write(id, "script", "vif-barevif")
	}
	write(5, "mac", "00:16:3e:00:01:05")
	for _, id := range []uint32{1, 2, 5} {
		key(t, c, vif(id), "hotplug-status", "connected")
	}
	// Two of one address: whichever was first has it.
	soon(t, func() error {
		status := make(map[string]string)
		for _, id := range []uint32{0, 3} {
			got, err := c.Read(t.Context(), dirOf(vif(id))+"/hotplug-status")
			if err != nil {
				return err
			}
			why, _ := c.Read(t.Context(), dirOf(vif(id))+"/hotplug-error")
			status[got] = why
		}
		if !strings.Contains(status["error"], "mac=00:16:3e:00:01:00: another vif of this bridge has it") {
			return fmt.Errorf("of two vifs of one address: %q", status)
		}
		if _, ok := status["connected"]; !ok {
			return errors.New("neither is connected")
		}
		return nil
	})
	write(4, "vlan", "7") // it is connected, and stays so
	key(t, c, vif(4), "hotplug-status", "connected")

	t.Log("another bridge has the other vif")
	other := toolstack.Vif{Front: 7, Back: 2}
	key(t, c, other, "hotplug-status", "")
	key(t, c, other, "state", "1")
	b.signal(syscall.SIGTERM)
	b.exit(0)
	b = s.bridge("--name", "lan", "--vif", "7.0", "--vif", "8.*")
	key(t, c, other, "hotplug-status", "connected")
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

func TestABridgeEndsWithItsHost(t *testing.T) {
	s := newSite(t)
	b := s.bridge("--log", "json")
	s.host.signal(syscall.SIGTERM)
	s.host.exit(0)
	b.exit(1)
	eachLineIsJSON(t, b, "the emulated host has ended, and this domain with it")
}
