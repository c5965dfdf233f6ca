package netif

// Names of nodes in xenstore, relative to the directory of one end of a vif
// (xen/include/public/io/netif.h). A flag is "1" or "0".

// Written by the toolstack when it makes the vif (tools/libs/light/libxl_nic.c,
// libxl_device.c).
const (
	KeyBackend       = "backend"        // in front: path of the backend's directory
	KeyBackendID     = "backend-id"     // in front: domid
	KeyFrontend      = "frontend"       // in back: path of the frontend's directory
	KeyFrontendID    = "frontend-id"    // in back: domid
	KeyState         = "state"          // in both: XenbusState, written by its own end
	KeyHandle        = "handle"         // in both: number of the vif
	KeyMAC           = "mac"            // in both: six hex bytes with colons
	KeyMTU           = "mtu"            // in both: bytes; absent means 1500
	KeyTrusted       = "trusted"        // in front: flag; absent means 1
	KeyOnline        = "online"         // in back: 0 when the vif is to go for good
	KeyScript        = "script"         // in back: hotplug script
	KeyVifName       = "vifname"        // in back: name of the host's interface
	KeyBridge        = "bridge"         // in back
	KeyIP            = "ip"             // in back: addresses, with spaces between
	KeyGatewayDev    = "gatewaydev"     // in back
	KeyRate          = "rate"           // in back: "bytes,microseconds"
	KeyVLAN          = "vlan"           // in back
	KeyType          = "type"           // in back
	KeyHotplugStatus = "hotplug-status" // in back: HotplugConnected once the host's side is there
	KeyHotplugError  = "hotplug-error"  // in back: why it is not
	HotplugConnected = "connected"
	HotplugFailed    = "error"
)

// Written by the backend: what it is able to do. Absent means 0, unless said
// otherwise.
const (
	KeyFeatureSG               = "feature-sg"                // packets of many slots
	KeyFeatureGSOTCPv4         = "feature-gso-tcpv4"         // also written by the frontend
	KeyFeatureGSOTCPv6         = "feature-gso-tcpv6"         // also written by the frontend
	KeyFeatureGSOTCPv4Prefix   = "feature-gso-tcpv4-prefix"  // deprecated: see RxGSOPrefix
	KeyFeatureGSOTCPv6Prefix   = "feature-gso-tcpv6-prefix"  // deprecated
	KeyFeatureRxCopy           = "feature-rx-copy"           // fills the frontend's pages
	KeyFeatureRxFlip           = "feature-rx-flip"           // obsolete
	KeyFeatureNoCsumOffload    = "feature-no-csum-offload"   // IPv4: blank checksums are not welcome
	KeyFeatureIPv6CsumOffload  = "feature-ipv6-csum-offload" // IPv6: blank checksums are
	KeyFeatureMulticastControl = "feature-multicast-control" // takes ExtraMcastAdd and ExtraMcastDel
	KeyFeatureDynamicMulticast = "feature-dynamic-multicast-control"
	KeyFeatureSplitChannels    = "feature-split-event-channels"
	KeyFeatureCtrlRing         = "feature-ctrl-ring"
	KeyFeatureXDPHeadroom      = "feature-xdp-headroom"   // Linux only
	KeyMaxQueues               = "multi-queue-max-queues" // absent means 1
	KeyCarrier                 = "carrier"                // absent means 1: the link is up
)

// Written by the frontend before it is Connected. With two queues or more the
// ring and channel keys are below KeyQueuePrefix and the queue's number.
const (
	KeyTxRingRef        = "tx-ring-ref"
	KeyRxRingRef        = "rx-ring-ref"
	KeyEventChannel     = "event-channel"    // one for both directions, or
	KeyEventChannelTx   = "event-channel-tx" // one each
	KeyEventChannelRx   = "event-channel-rx"
	KeyNumQueues        = "multi-queue-num-queues"
	KeyQueuePrefix      = "queue-"
	KeyRequestRxCopy    = "request-rx-copy"           // Linux reads no other feature without it
	KeyFeatureRxNotify  = "feature-rx-notify"         // fires the channel after posting rx requests
	KeyRequestMulticast = "request-multicast-control" // filter by the groups added
	KeyCtrlRingRef      = "ctrl-ring-ref"
	KeyEventChannelCtrl = "event-channel-ctrl"
	KeyXDPHeadroom      = "xdp-headroom" // Linux only: bytes
)
