package netif

import (
	"slices"
	"strings"
)

// Names of nodes in xenstore, relative to the directory of one end of a vif
// (xen/include/public/io/netif.h). A flag is "1" or "0".

// Written by the toolstack when it makes the vif (tools/libs/light/libxl_nic.c,
// libxl_device.c).
const (
	KeyBackend       = "backend"        // in frontend: path of the backend's directory
	KeyBackendID     = "backend-id"     // in frontend: the backend's domid
	KeyFrontend      = "frontend"       // in backend: path of the frontend's directory
	KeyFrontendID    = "frontend-id"    // in backend: the frontend's domid
	KeyState         = "state"          // in both: XenbusState, written by the end itself
	KeyHandle        = "handle"         // in both: number of the vif
	KeyMAC           = "mac"            // in both: six hex bytes with colons
	KeyMTU           = "mtu"            // in both: bytes; absent means 1500
	KeyTrusted       = "trusted"        // in frontend: flag; absent means 1
	KeyOnline        = "online"         // in backend: 0 when the toolstack takes the vif away for good
	KeyScript        = "script"         // in backend: hotplug script
	KeyVifName       = "vifname"        // in backend: name of the host's interface
	KeyBridge        = "bridge"         // in backend
	KeyIP            = "ip"             // in backend: addresses, separated by spaces
	KeyGatewayDev    = "gatewaydev"     // in backend
	KeyForwardDev    = "forwarddev"     // in backend: of COLO
	KeyRate          = "rate"           // in backend: "bytes,microseconds", what the frontend may send
	KeyVLAN          = "vlan"           // in backend
	KeyType          = "type"           // in backend
	KeyHotplugStatus = "hotplug-status" // in backend: HotplugConnected once the host's interface is set up
	KeyHotplugError  = "hotplug-error"  // in backend: why the setup failed
	HotplugConnected = "connected"
	HotplugFailed    = "error"
)

// Written by the backend: its features. An absent key means 0 unless noted.
const (
	KeyFeatureSG               = "feature-sg"                // packets of several slots
	KeyFeatureGSOTCPv4         = "feature-gso-tcpv4"         // also written by the frontend
	KeyFeatureGSOTCPv6         = "feature-gso-tcpv6"         // also written by the frontend
	KeyFeatureGSOTCPv4Prefix   = "feature-gso-tcpv4-prefix"  // deprecated: see RxGSOPrefix
	KeyFeatureGSOTCPv6Prefix   = "feature-gso-tcpv6-prefix"  // deprecated
	KeyFeatureRxCopy           = "feature-rx-copy"           // the backend copies into the frontend's pages
	KeyFeatureRxFlip           = "feature-rx-flip"           // obsolete
	KeyFeatureNoCsumOffload    = "feature-no-csum-offload"   // IPv4: the backend does not accept partial checksums
	KeyFeatureIPv6CsumOffload  = "feature-ipv6-csum-offload" // IPv6: the backend accepts partial checksums
	KeyFeatureMulticastControl = "feature-multicast-control" // the backend accepts ExtraMcastAdd and ExtraMcastDel
	KeyFeatureDynamicMulticast = "feature-dynamic-multicast-control"
	KeyFeatureSplitChannels    = "feature-split-event-channels"
	KeyFeatureCtrlRing         = "feature-ctrl-ring"
	KeyFeatureXDPHeadroom      = "feature-xdp-headroom"   // Linux only
	KeyMaxQueues               = "multi-queue-max-queues" // absent means 1
	KeyCarrier                 = "carrier"                // absent means 1: the link is up
)

// Written by the frontend before it is Connected. With two or more queues the ring and
// channel keys are below KeyQueuePrefix and the queue's number.
const (
	KeyTxRingRef        = "tx-ring-ref"
	KeyRxRingRef        = "rx-ring-ref"
	KeyEventChannel     = "event-channel"    // one channel for both directions, or
	KeyEventChannelTx   = "event-channel-tx" // one for each
	KeyEventChannelRx   = "event-channel-rx"
	KeyNumQueues        = "multi-queue-num-queues"
	KeyQueuePrefix      = "queue-"
	KeyRequestRxCopy    = "request-rx-copy"           // Linux netback reads the other features only with it
	KeyFeatureRxNotify  = "feature-rx-notify"         // the frontend notifies after it posts rx requests
	KeyRequestMulticast = "request-multicast-control" // filter multicast by the groups that were added
	KeyCtrlRingRef      = "ctrl-ring-ref"
	KeyEventChannelCtrl = "event-channel-ctrl"
	KeyXDPHeadroom      = "xdp-headroom" // Linux only: bytes
)

// StaleKeys returns which of the keys of a frontend's directory were left by an earlier
// program or connection, and must go before another one publishes its own. Each removal is
// a round trip to xenstore, so keys that are missing are not among them.
func StaleKeys(there []string) (stale []string) {
	old := []string{
		KeyTxRingRef, KeyRxRingRef, KeyEventChannel, KeyEventChannelTx,
		KeyEventChannelRx, KeyNumQueues, KeyFeatureGSOTCPv4, KeyFeatureGSOTCPv6,
		KeyFeatureIPv6CsumOffload, KeyFeatureNoCsumOffload, KeyFeatureGSOTCPv4Prefix, KeyFeatureGSOTCPv6Prefix,
		KeyXDPHeadroom,
	}
	for _, key := range there { // an earlier program may have published more queues
		if slices.Contains(old, key) || strings.HasPrefix(key, KeyQueuePrefix) {
			stale = append(stale, key)
		}
	}
	return append(stale, RareKeys(there)...)
}

// RareKeys returns which of the keys of a frontend's directory change what a backend does
// for a frontend that does not know them. Most drivers neither write nor remove these, so
// a frontend removes them when it ends, too.
func RareKeys(there []string) (rare []string) {
	for _, key := range there {
		switch key {
		case KeyRequestMulticast, KeyCtrlRingRef, KeyEventChannelCtrl:
			rare = append(rare, key)
		}
	}
	return rare
}
