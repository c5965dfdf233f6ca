package pvnet

import (
	"fmt"
	"strconv"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/xenbus/xenstore"
)

// minMTU is the smallest MTU: every link must carry 68 bytes (RFC 791).
const minMTU = 68

// mtuOf returns the MTU in the values of the vif's directory dir: 1500 if there is none,
// and instead if it is unusable.
func (d *Device) mtuOf(own xenstore.Values, dir string, instead int) int {
	mtu, err := own.Uint(netif.KeyMTU, MaxFrame, 1500)
	if err == nil && mtu < minMTU {
		err = &xenstore.ValueError{Path: netif.KeyMTU, Value: own[netif.KeyMTU], Want: fmt.Sprintf("a number from %d to %d", minMTU, MaxFrame)}
	}
	d.complain(dir, netif.KeyMTU, own, err, fmt.Sprintf("it stays %d", instead))
	if err != nil {
		return instead
	}
	return int(mtu)
}

// complain logs why the value of a key in directory dir cannot be used, and what counts
// instead: once for each value, however often it is read. A nil err forgets the last one.
func (d *Device) complain(dir, key string, v xenstore.Values, err error, instead string) {
	said, again := d.complaints[key]
	if err == nil {
		delete(d.complaints, key)
		return
	}
	if again && said == v[key] {
		return
	}
	if d.complaints == nil {
		d.complaints = make(map[string]string)
	}
	d.complaints[key] = v[key]
	d.log.Warn("unusable value in xenstore", "vif", d.id, "key", dir+"/"+key, "value", xenstore.Clip(v[key]), "instead", instead, "err", err)
}

// queuePrefix returns the directory of the xenstore keys of queue i of n. A single queue
// has its keys beside the others.
func queuePrefix(i, n int) string {
	if n == 1 {
		return ""
	}
	return netif.KeyQueuePrefix + strconv.Itoa(i) + "/"
}

// parseQueues reads the keys of n queues. No grant may be two rings, and no event channel
// of two queues.
func parseQueues(v xenstore.Values, n int) ([]queueKeys, error) {
	keys := make([]queueKeys, n)
	refs, ports := make(map[hypercall.GrantRef]bool), make(map[hypercall.PortID]int)
	for i := range keys {
		k, err := parseKeys(v, queuePrefix(i, n))
		if err != nil {
			return nil, err
		}
		for _, ref := range []hypercall.GrantRef{k.txRing, k.rxRing} {
			if refs[ref] {
				return nil, fmt.Errorf("grant %d is said to be two rings", ref)
			}
			refs[ref] = true
		}
		for _, port := range []hypercall.PortID{k.txPort, k.rxPort} {
			if q, used := ports[port]; used && q != i {
				return nil, fmt.Errorf("event channel %d is said to be of two queues", port)
			}
			ports[port] = i
		}
		keys[i] = k
	}
	return keys, nil
}

// parseKeys reads the keys of one queue: two event channels, or one for both directions.
func parseKeys(v xenstore.Values, prefix string) (k queueKeys, err error) {
	number := func(key string) uint32 {
		n, e := nameIn(v, prefix+key)
		if e != nil && err == nil {
			err = e
		}
		return n
	}
	k.txRing = hypercall.GrantRef(number(netif.KeyTxRingRef))
	k.rxRing = hypercall.GrantRef(number(netif.KeyRxRingRef))
	if v.Has(prefix + netif.KeyEventChannelTx) {
		k.txPort = hypercall.PortID(number(netif.KeyEventChannelTx))
		k.rxPort = hypercall.PortID(number(netif.KeyEventChannelRx))
	} else {
		k.txPort = hypercall.PortID(number(netif.KeyEventChannel))
		k.rxPort = k.txPort
	}
	return k, err
}

// nameIn returns the number of a grant or an event channel under key. It refuses 0, which
// names neither.
func nameIn(v xenstore.Values, key string) (uint32, error) {
	n, err := v.Uint(key, 1<<32-1, 0)
	if err == nil && n == 0 {
		err = fmt.Errorf("%s is missing", key)
	}
	return uint32(n), err
}

// offloadKeys are the keys with which an end says which offloads it takes.
var offloadKeys = [...]string{netif.KeyFeatureNoCsumOffload, netif.KeyFeatureIPv6CsumOffload,

	netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6}

// offeredOffloads returns the offloads that the other end offers in its xenstore values. An
// unreadable value counts as no offer. GSO frames have several slots and a partial
// checksum, so GSO counts as offered only if the other end takes both, as in Linux's
// netdev_fix_features.
func offeredOffloads(v xenstore.Values, scatter bool) (o offloads) {
	says := func(key string) bool {
		on, err := v.Bool(key, false)
		return on && err == nil
	}
	if denied, err := v.Bool(netif.KeyFeatureNoCsumOffload, false); !denied && err == nil {
		o |= takesCsum4
	}
	if says(netif.KeyFeatureIPv6CsumOffload) {
		o |= takesCsum6
	}
	if scatter && o&takesCsum4 != 0 && says(netif.KeyFeatureGSOTCPv4) {
		o |= takesGSO4
	}
	if scatter && o&takesCsum6 != 0 && says(netif.KeyFeatureGSOTCPv6) {
		o |= takesGSO6
	}
	return o
}

// offloadValues returns the xenstore values with which this end offers its offloads. That it takes partial
// checksums of IPv4 is assumed without a key.
func offloadValues(takes bool) xenstore.Values {
	if !takes {
		return xenstore.Values{netif.KeyFeatureNoCsumOffload: "1"}
	}
	return xenstore.Values{
		netif.KeyFeatureIPv6CsumOffload: "1",
		netif.KeyFeatureGSOTCPv4:        "1",
		netif.KeyFeatureGSOTCPv6:        "1",
	}
}
