// Package toolstack makes and removes vifs in xenstore as libxl does
// (tools/libs/light/libxl_nic.c, libxl_device.c). It serves machines without xl, such as
// the emulated one, and backend types that xl does not know.
//
// It needs the Client of a privileged domain. The nodes it writes belong to the two
// domains of the vif, not to the caller.
package toolstack

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// A Vif describes a network device to be added or removed.
type Vif struct {
	Front, Back hypercall.DomID
	ID          uint32  // the handle, also its number among the frontend's vifs
	MAC         [6]byte // the frontend's
	MTU         int     // bytes; 0 means 1500 and writes no key
	Type        string  // of backend; "" means "vif"
	Untrusted   bool    // tells the frontend not to trust the backend
	Rate        string  // limit of what the guest may send, "bytes,microseconds"; "" writes no key

	// What the backend's network is to be, in the words of xl-network-configuration(5). An
	// empty one is not written. libxl writes every vif a script and a bridge, vif-bridge and
	// xenbr0 where it was told none.
	Script  string // path of the hotplug script; the kernel's netback does not serve a vif without one
	Bridge  string
	Name    string // vifname: of the backend's interface
	IP      string // addresses of the guest, separated by blanks
	Gateway string // gatewaydev: the interface whose address script vif-route takes

	// Room makes empty nodes for the keys that a barevif backend will write. They count
	// towards the quota of the backend's domain. But xenstored refuses a domain at its
	// quota only new nodes, and never refuses a privileged toolstack.
	Room bool
}

// room lists the keys of the nodes that Room makes.
var room = [...]string{
	"claim", xenbus.KeyReason, netif.KeyFeatureRxCopy, netif.KeyFeatureSG, netif.KeyFeatureSplitChannels,
	netif.KeyMaxQueues, netif.KeyFeatureNoCsumOffload, netif.KeyFeatureIPv6CsumOffload,
	netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6, netif.KeyFeatureMulticastControl, netif.KeyFeatureDynamicMulticast,
	netif.KeyFeatureCtrlRing,
}

func (v *Vif) backType() string {
	if v.Type == "" {
		return "vif"
	}
	return v.Type
}

// FrontDir returns the absolute path of the frontend's directory.
func (v *Vif) FrontDir() string {
	return fmt.Sprintf("/local/domain/%d/device/vif/%d", v.Front, v.ID)
}

// BackDir returns the absolute path of the backend's directory.
func (v *Vif) BackDir() string {
	return fmt.Sprintf("/local/domain/%d/backend/%s/%d/%d", v.Back, v.backType(), v.Front, v.ID)
}

// Home makes the home directory of domain dom, owned by dom, unless it exists.
func Home(ctx context.Context, c *xenstore.Client, dom hypercall.DomID) error {
	home := fmt.Sprintf("/local/domain/%d", dom)
	if err := c.Mkdir(ctx, home); err != nil {
		return err
	}
	if err := c.Write(ctx, home+"/domid", strconv.Itoa(int(dom))); err != nil {
		return err
	}
	owner := xenstore.Perm{Dom: dom, Access: xenstore.None}
	if err := c.SetPerms(ctx, home, owner); err != nil {
		return err
	}
	for _, dir := range []string{"device", "backend", "data", "error"} {
		if err := c.Mkdir(ctx, home+"/"+dir); err != nil {
			return err
		}
		if err := c.SetPerms(ctx, home+"/"+dir, owner); err != nil {
			return err
		}
	}
	return nil
}

// keys returns what the toolstack writes into both directories.
func (v Vif) keys() (front, back xenstore.Values) {
	mac := fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", v.MAC[0], v.MAC[1], v.MAC[2], v.MAC[3], v.MAC[4], v.MAC[5])
	front = xenstore.Values{
		netif.KeyBackend:   v.BackDir(),
		netif.KeyBackendID: strconv.Itoa(int(v.Back)),
		netif.KeyState:     "1",
		netif.KeyHandle:    strconv.Itoa(int(v.ID)),
		netif.KeyMAC:       mac,
		netif.KeyTrusted:   "1",
	}
	back = xenstore.Values{
		netif.KeyFrontend:      v.FrontDir(),
		netif.KeyFrontendID:    strconv.Itoa(int(v.Front)),
		netif.KeyOnline:        "1",
		netif.KeyState:         "1",
		netif.KeyHandle:        strconv.Itoa(int(v.ID)),
		netif.KeyMAC:           mac,
		netif.KeyType:          "vif",
		netif.KeyHotplugStatus: "",
	}
	if v.Untrusted {
		front[netif.KeyTrusted] = "0"
	}
	if v.MTU != 0 {
		front[netif.KeyMTU], back[netif.KeyMTU] = strconv.Itoa(v.MTU), strconv.Itoa(v.MTU)
	}
	if v.Room {
		for _, key := range room {
			back[key] = ""
		}
	}
	for key, value := range map[string]string{
		netif.KeyScript: v.Script, netif.KeyBridge: v.Bridge, netif.KeyVifName: v.Name,
		netif.KeyIP: v.IP, netif.KeyGatewayDev: v.Gateway, netif.KeyRate: v.Rate,
	} {
		if value != "" {
			back[key] = value
		}
	}
	return front, back
}

// Add makes the frontend's and the backend's directory in one transaction, both in state
// Initialising. It fails with ErrExists if either directory exists.
func Add(ctx context.Context, c *xenstore.Client, v Vif) error {
	front, back := v.keys()
	err := c.Transact(ctx, func(tx xenstore.Tx) error {
		if err := makeDir(tx, v.FrontDir(), front, v.Front, v.Back); err != nil {
			return err
		}
		if err := makeDir(tx, v.BackDir(), back, v.Back, v.Front); err != nil || v.MTU == 0 {
			return err
		}
		// The guest may read its mtu but not write it.
		return tx.SetPerms(v.FrontDir()+"/"+netif.KeyMTU,
			xenstore.Perm{Dom: v.Back, Access: xenstore.None}, xenstore.Perm{Dom: v.Front, Access: xenstore.ReadOnly})
	})
	if err != nil {
		return fmt.Errorf("add vif %d of domain %d: %w", v.ID, v.Front, err)
	}
	return nil
}

// makeDir makes a directory with keys, all of which owner owns and peer may read.
func makeDir(tx xenstore.Tx, dir string, keys xenstore.Values, owner, peer hypercall.DomID) error {
	if _, err := tx.Read(dir); err == nil {
		return fmt.Errorf("%s is there already: %w", dir, xenstore.ErrExists)
	} else if !errors.Is(err, xenstore.ErrNotFound) {
		return err
	}
	if err := parents(tx, dir, owner); err != nil {
		return err
	}
	perms := []xenstore.Perm{{Dom: owner, Access: xenstore.None}, {Dom: peer, Access: xenstore.ReadOnly}}
	if err := tx.Mkdir(dir); err != nil {
		return err
	}
	if err := tx.SetPerms(dir, perms...); err != nil {
		return err
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if err := tx.Write(dir+"/"+key, keys[key]); err != nil {
			return err
		}
		if err := tx.SetPerms(dir+"/"+key, perms...); err != nil {
			return err
		}
	}
	return nil
}

// parents makes the missing directories between a domain's home and path; owner owns
// them.
func parents(tx xenstore.Tx, path string, owner hypercall.DomID) error {
	parts := strings.Split(path, "/")
	for i := 5; i < len(parts); i++ { // "", local, domain, N, device, ...
		dir := strings.Join(parts[:i], "/")
		if _, err := tx.Read(dir); err == nil {
			continue
		}
		if err := tx.Mkdir(dir); err != nil {
			return err
		}
		if err := tx.SetPerms(dir, xenstore.Perm{Dom: owner, Access: xenstore.None}); err != nil {
			return err
		}
	}
	return nil
}

// Remove takes the vif away. It writes online 0 and state Closing for the backend, waits
// for state Closed until ctx ends, and then removes both directories, closed or not.
func Remove(ctx context.Context, c *xenstore.Client, v Vif) error {
	state := v.BackDir() + "/" + netif.KeyState
	w, err := c.Watch(ctx, state)
	if err != nil {
		return err
	}
	defer w.Close()
	err = c.Transact(ctx, func(tx xenstore.Tx) error {
		s, err := tx.Read(state)
		if err != nil {
			return err
		}
		if err := tx.Write(v.BackDir()+"/"+netif.KeyOnline, "0"); err != nil {
			return err
		}
		if s == "6" {
			return nil
		}
		return tx.Write(state, "5")
	})
	for err == nil {
		var s string
		if s, err = c.Read(ctx, state); err != nil || s == "6" {
			break
		}
		select {
		case <-w.C():
		case <-ctx.Done():
			err = fmt.Errorf("the backend is still in state %q: %w", s, context.Cause(ctx))
		}
	}
	if errors.Is(err, xenstore.ErrNotFound) { // the backend of a driver domain removes its own directory
		err = nil
	}
	for _, dir := range []string{v.FrontDir(), v.BackDir()} {
		if e := c.Remove(context.WithoutCancel(ctx), dir); e != nil && !errors.Is(e, xenstore.ErrNotFound) && err == nil {
			err = e
		}
	}
	if err != nil {
		return fmt.Errorf("remove vif %d of domain %d: %w", v.ID, v.Front, err)
	}
	return nil
}
