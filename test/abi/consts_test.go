package abi_test

import (
	"testing"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/xenbus"
	"barevif/xenbus/xenstore/wire"
)

func TestConstantsAreTheHeaders(t *testing.T) {
	consts := map[string]int64{
		"XEN_NETIF_NR_SLOTS_MIN": netif.SlotsMin,
		"XEN_NETIF_MAX_TX_SIZE":  netif.MaxTxSize,

		"NETTXF_csum_blank":     int64(netif.TxCsumBlank),
		"NETTXF_data_validated": int64(netif.TxDataValidated),
		"NETTXF_more_data":      int64(netif.TxMoreData),
		"NETTXF_extra_info":     int64(netif.TxExtraInfo),
		"NETRXF_data_validated": int64(netif.RxDataValidated),
		"NETRXF_csum_blank":     int64(netif.RxCsumBlank),
		"NETRXF_more_data":      int64(netif.RxMoreData),
		"NETRXF_extra_info":     int64(netif.RxExtraInfo),
		"NETRXF_gso_prefix":     int64(netif.RxGSOPrefix),

		"NETIF_RSP_DROPPED": int64(netif.Dropped),
		"NETIF_RSP_ERROR":   int64(netif.Error),
		"NETIF_RSP_OKAY":    int64(netif.Okay),
		"NETIF_RSP_NULL":    int64(netif.Null),

		"XEN_NETIF_EXTRA_TYPE_NONE":      int64(netif.ExtraNone),
		"XEN_NETIF_EXTRA_TYPE_GSO":       int64(netif.ExtraGSO),
		"XEN_NETIF_EXTRA_TYPE_MCAST_ADD": int64(netif.ExtraMcastAdd),
		"XEN_NETIF_EXTRA_TYPE_MCAST_DEL": int64(netif.ExtraMcastDel),
		"XEN_NETIF_EXTRA_TYPE_HASH":      int64(netif.ExtraHash),
		// One past the last: in Linux's header that is ExtraXDP, in Xen's nothing.
		"XEN_NETIF_EXTRA_TYPE_MAX":  int64(netif.ExtraXDP),
		"XEN_NETIF_EXTRA_FLAG_MORE": int64(netif.ExtraMore),
		"XEN_NETIF_GSO_TYPE_NONE":   int64(netif.GSONone),
		"XEN_NETIF_GSO_TYPE_TCPV4":  int64(netif.GSOTCPv4),
		"XEN_NETIF_GSO_TYPE_TCPV6":  int64(netif.GSOTCPv6),

		"XEN_NETIF_CTRL_TYPE_INVALID":               int64(netif.CtrlInvalid),
		"XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS":        int64(netif.CtrlGetHashFlags),
		"XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS":        int64(netif.CtrlSetHashFlags),
		"XEN_NETIF_CTRL_TYPE_SET_HASH_KEY":          int64(netif.CtrlSetHashKey),
		"XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE": int64(netif.CtrlGetHashMappingSize),
		"XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE": int64(netif.CtrlSetHashMappingSize),
		"XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING":      int64(netif.CtrlSetHashMapping),
		"XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM":    int64(netif.CtrlSetHashAlgorithm),
		"XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE": int64(netif.CtrlGetGrefMappingSize),
		"XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING":      int64(netif.CtrlAddGrefMapping),
		"XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING":      int64(netif.CtrlDelGrefMapping),
		"XEN_NETIF_CTRL_STATUS_SUCCESS":             int64(netif.CtrlSuccess),
		"XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED":       int64(netif.CtrlNotSupported),
		"XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER":   int64(netif.CtrlInvalidParameter),
		"XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW":     int64(netif.CtrlBufferOverflow),
		"_XEN_NETIF_CTRL_HASH_TYPE_IPV4":            int64(netif.HashIPv4),
		"_XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP":        int64(netif.HashIPv4TCP),
		"_XEN_NETIF_CTRL_HASH_TYPE_IPV6":            int64(netif.HashIPv6),
		"_XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP":        int64(netif.HashIPv6TCP),
		"XEN_NETIF_CTRL_HASH_TYPE_IPV4":             int64(netif.HashIPv4.Flag()),
		"XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP":         int64(netif.HashIPv4TCP.Flag()),
		"XEN_NETIF_CTRL_HASH_TYPE_IPV6":             int64(netif.HashIPv6.Flag()),
		"XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP":         int64(netif.HashIPv6TCP.Flag()),
		"XEN_NETIF_CTRL_HASH_ALGORITHM_NONE":        int64(netif.HashNone),
		"XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ":    int64(netif.HashToeplitz),
		"XEN_NETIF_CTRLF_GREF_readonly":             int64(netif.GrefReadOnly),

		"DOMID_SELF":              int64(hypercall.DomSelf),
		"GNTST_okay":              int64(hypercall.OK),
		"GNTST_general_error":     int64(hypercall.GeneralError),
		"GNTST_bad_domain":        int64(hypercall.BadDomain),
		"GNTST_bad_gntref":        int64(hypercall.BadGntref),
		"GNTST_bad_handle":        int64(hypercall.BadHandle),
		"GNTST_bad_virt_addr":     int64(hypercall.BadVirtAddr),
		"GNTST_bad_dev_addr":      int64(hypercall.BadDevAddr),
		"GNTST_no_device_space":   int64(hypercall.NoDeviceSpace),
		"GNTST_permission_denied": int64(hypercall.PermissionDeny),
		"GNTST_bad_page":          int64(hypercall.BadPage),
		"GNTST_bad_copy_arg":      int64(hypercall.BadCopyArg),
		"GNTST_address_too_big":   int64(hypercall.AddressTooBig),
		"GNTST_eagain":            int64(hypercall.TryAgain),
		"GNTST_no_space":          int64(hypercall.NoSpace),

		// The opcodes above DirectoryPart are younger than the headers.
		"XS_CONTROL":              int64(wire.Control),
		"XS_DIRECTORY":            int64(wire.Directory),
		"XS_READ":                 int64(wire.Read),
		"XS_GET_PERMS":            int64(wire.GetPerms),
		"XS_WATCH":                int64(wire.Watch),
		"XS_UNWATCH":              int64(wire.Unwatch),
		"XS_TRANSACTION_START":    int64(wire.TransactionStart),
		"XS_TRANSACTION_END":      int64(wire.TransactionEnd),
		"XS_INTRODUCE":            int64(wire.Introduce),
		"XS_RELEASE":              int64(wire.Release),
		"XS_GET_DOMAIN_PATH":      int64(wire.GetDomainPath),
		"XS_WRITE":                int64(wire.Write),
		"XS_MKDIR":                int64(wire.Mkdir),
		"XS_RM":                   int64(wire.Rm),
		"XS_SET_PERMS":            int64(wire.SetPerms),
		"XS_WATCH_EVENT":          int64(wire.WatchEvent),
		"XS_ERROR":                int64(wire.Error),
		"XS_IS_DOMAIN_INTRODUCED": int64(wire.IsDomainIntroduced),
		"XS_RESUME":               int64(wire.Resume),
		"XS_SET_TARGET":           int64(wire.SetTarget),
		"XS_RESET_WATCHES":        int64(wire.ResetWatches),
		"XS_DIRECTORY_PART":       int64(wire.DirectoryPart),
		"XENSTORE_PAYLOAD_MAX":    wire.MaxPayload,
		"XENSTORE_ABS_PATH_MAX":   wire.MaxAbsPath,
		"XENSTORE_REL_PATH_MAX":   wire.MaxRelPath,

		"XenbusStateUnknown":       int64(xenbus.Unknown),
		"XenbusStateInitialising":  int64(xenbus.Initialising),
		"XenbusStateInitWait":      int64(xenbus.InitWait),
		"XenbusStateInitialised":   int64(xenbus.Initialised),
		"XenbusStateConnected":     int64(xenbus.Connected),
		"XenbusStateClosing":       int64(xenbus.Closing),
		"XenbusStateClosed":        int64(xenbus.Closed),
		"XenbusStateReconfiguring": int64(xenbus.Reconfiguring),
		"XenbusStateReconfigured":  int64(xenbus.Reconfigured),

		// Numbers no exported name stands for.
		"GNTTAB_NR_RESERVED_ENTRIES":    8,
		"__HYPERVISOR_memory_op":        12,
		"__HYPERVISOR_xen_version":      17,
		"__HYPERVISOR_grant_table_op":   20,
		"__HYPERVISOR_sched_op":         29,
		"__HYPERVISOR_event_channel_op": 32,
		"__HYPERVISOR_hvm_op":           34,
		"EVTCHNOP_bind_interdomain":     0,
		"EVTCHNOP_close":                3,
		"EVTCHNOP_send":                 4,
		"EVTCHNOP_status":               5,
		"EVTCHNOP_alloc_unbound":        6,
		"EVTCHNOP_unmask":               9,
		"GNTTABOP_map_grant_ref":        0,
		"GNTTABOP_unmap_grant_ref":      1,
		"GNTTABOP_setup_table":          2,
		"GNTTABOP_copy":                 5,
		"GNTTABOP_query_size":           6,
	}
	c := readFacts(t).consts
	sameNames(t, "const", c, consts)
	for name, want := range c {
		if got, ok := consts[name]; ok && got != want {
			t.Errorf("%s is %d, want %d", name, got, want)
		}
	}
	if all := netif.HashIPv4.Flag() | netif.HashIPv4TCP.Flag() | netif.HashIPv6.Flag() | netif.HashIPv6TCP.Flag(); netif.HashFlagsAll != all {
		t.Errorf("HashFlagsAll is %#x, want %#x", netif.HashFlagsAll, all)
	}
}
