//go:build ignore

/*
 * Prints what Xen's public headers say of the records and numbers barevif uses,
 * one fact a line, for the Go tests beside it to hold the Go side to. Debian has
 * the headers in libxen-dev.
 *
 *   record NAME SIZE             a C struct, bytes
 *   field RECORD NAME OFF SIZE   one of its fields, bytes
 *   bytes NAME HEX               memory of a filled record, as the test fills it
 *   ring NAME STRIDE ENTRIES     a ring in one page
 *   slot RING INDEX OFF          where the macros of ring.h find a slot
 *   page RING HEX                the header of a page SHARED_RING_INIT has set up
 *   const NAME VALUE
 *
 *   gcc -Wall -Werror -o golden golden.c && ./golden > testdata/golden.txt
 */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <xen/xen-compat.h>
/* Without a version, guests get event_channel_op and others under old numbers. */
#undef __XEN_INTERFACE_VERSION__
#define __XEN_INTERFACE_VERSION__ __XEN_LATEST_INTERFACE_VERSION__

#include <xen/xen.h>
#include <xen/event_channel.h>
#include <xen/grant_table.h>
#include <xen/io/netif.h>
#include <xen/io/ring.h>
#include <xen/io/xenbus.h>
#include <xen/io/xs_wire.h>

#define PAGE 4096

#define RECORD(name, type) printf("record " name " %zu\n", sizeof(type))
#define FIELD(name, type, f) \
	printf("field " name " " #f " %zu %zu\n", offsetof(type, f), sizeof(((type *)0)->f))
#define CONST(c) printf("const " #c " %lld\n", (long long)(c))

static void hex(const char *kind, const char *name, const void *mem, size_t n)
{
	const unsigned char *b = mem;

	printf("%s %s ", kind, name);
	for (size_t i = 0; i < n; i++)
		printf("%02x", b[i]);
	printf("\n");
}

static void records(void)
{
	RECORD("tx_request", struct netif_tx_request);
	FIELD("tx_request", struct netif_tx_request, gref);
	FIELD("tx_request", struct netif_tx_request, offset);
	FIELD("tx_request", struct netif_tx_request, flags);
	FIELD("tx_request", struct netif_tx_request, id);
	FIELD("tx_request", struct netif_tx_request, size);

	RECORD("tx_response", struct netif_tx_response);
	FIELD("tx_response", struct netif_tx_response, id);
	FIELD("tx_response", struct netif_tx_response, status);

	RECORD("rx_request", struct netif_rx_request);
	FIELD("rx_request", struct netif_rx_request, id);
	FIELD("rx_request", struct netif_rx_request, pad);
	FIELD("rx_request", struct netif_rx_request, gref);

	RECORD("rx_response", struct netif_rx_response);
	FIELD("rx_response", struct netif_rx_response, id);
	FIELD("rx_response", struct netif_rx_response, offset);
	FIELD("rx_response", struct netif_rx_response, flags);
	FIELD("rx_response", struct netif_rx_response, status);

	RECORD("extra", struct netif_extra_info);
	FIELD("extra", struct netif_extra_info, type);
	FIELD("extra", struct netif_extra_info, flags);
	FIELD("extra", struct netif_extra_info, u);
	FIELD("extra", struct netif_extra_info, u.gso.size);
	FIELD("extra", struct netif_extra_info, u.gso.type);
	FIELD("extra", struct netif_extra_info, u.gso.features);
	FIELD("extra", struct netif_extra_info, u.mcast.addr);
	FIELD("extra", struct netif_extra_info, u.hash.type);
	FIELD("extra", struct netif_extra_info, u.hash.algorithm);
	FIELD("extra", struct netif_extra_info, u.hash.value);

	RECORD("ctrl_request", struct xen_netif_ctrl_request);
	FIELD("ctrl_request", struct xen_netif_ctrl_request, id);
	FIELD("ctrl_request", struct xen_netif_ctrl_request, type);
	FIELD("ctrl_request", struct xen_netif_ctrl_request, data);

	RECORD("ctrl_response", struct xen_netif_ctrl_response);
	FIELD("ctrl_response", struct xen_netif_ctrl_response, id);
	FIELD("ctrl_response", struct xen_netif_ctrl_response, type);
	FIELD("ctrl_response", struct xen_netif_ctrl_response, status);
	FIELD("ctrl_response", struct xen_netif_ctrl_response, data);

	RECORD("gref", struct xen_netif_gref);
	FIELD("gref", struct xen_netif_gref, ref);
	FIELD("gref", struct xen_netif_gref, flags);
	FIELD("gref", struct xen_netif_gref, status);

	RECORD("xsd_sockmsg", struct xsd_sockmsg);
	FIELD("xsd_sockmsg", struct xsd_sockmsg, type);
	FIELD("xsd_sockmsg", struct xsd_sockmsg, req_id);
	FIELD("xsd_sockmsg", struct xsd_sockmsg, tx_id);
	FIELD("xsd_sockmsg", struct xsd_sockmsg, len);
}

/* An extra in the slot of each ring that may carry one, padding cleared. */
static void extra(const char *what, struct netif_extra_info e)
{
	union netif_tx_sring_entry tx;
	union netif_rx_sring_entry rx;
	char name[64];

	memset(&tx, 0, sizeof(tx));
	memset(&rx, 0, sizeof(rx));
	memcpy(&tx, &e, sizeof(e));
	memcpy(&rx, &e, sizeof(e));
	snprintf(name, sizeof(name), "extra_%s_tx", what);
	hex("bytes", name, &tx, sizeof(tx));
	snprintf(name, sizeof(name), "extra_%s_rx", what);
	hex("bytes", name, &rx, sizeof(rx));
}

static void samples(void)
{
	struct netif_tx_request txq;
	struct netif_tx_response txs;
	struct netif_rx_request rxq;
	struct netif_rx_response rxs, rxe;
	struct netif_extra_info gso4, gso6, add, del, hash, bare;
	struct xen_netif_ctrl_request cq;
	struct xen_netif_ctrl_response cs;
	struct xen_netif_gref gref;
	struct { struct xsd_sockmsg h; char body[6]; } msg;

	memset(&txq, 0, sizeof(txq));
	txq.gref = 0x81a2b3c4;
	txq.offset = 0x0d1e;
	txq.flags = NETTXF_csum_blank | NETTXF_extra_info | 0x5000;
	txq.id = 0xf1e2;
	txq.size = 0xd3c4;
	hex("bytes", "tx_request", &txq, sizeof(txq));

	memset(&txs, 0, sizeof(txs));
	txs.id = 0xf1e2;
	txs.status = NETIF_RSP_DROPPED;
	hex("bytes", "tx_response", &txs, sizeof(txs));

	memset(&rxq, 0, sizeof(rxq));
	rxq.id = 0x91a2;
	rxq.pad = 0xb3c4;
	rxq.gref = 0xd5e6f708;
	hex("bytes", "rx_request", &rxq, sizeof(rxq));

	memset(&rxs, 0, sizeof(rxs));
	rxs.id = 0x91a2;
	rxs.offset = 0x0b3c;
	rxs.flags = NETRXF_csum_blank | NETRXF_more_data | 0x6000;
	rxs.status = 0x0f71;
	hex("bytes", "rx_response", &rxs, sizeof(rxs));

	rxe = rxs;
	rxe.flags = NETRXF_data_validated | NETRXF_gso_prefix;
	rxe.status = GNTST_bad_copy_arg; /* what Linux's netback writes */
	hex("bytes", "rx_response_error", &rxe, sizeof(rxe));

	memset(&gso4, 0, sizeof(gso4));
	gso4.type = XEN_NETIF_EXTRA_TYPE_GSO;
	gso4.flags = XEN_NETIF_EXTRA_FLAG_MORE;
	gso4.u.gso.size = 0x85b4;
	gso4.u.gso.type = XEN_NETIF_GSO_TYPE_TCPV4;
	gso4.u.gso.features = 0x9a7b;
	extra("gso_tcpv4_more", gso4);

	gso6 = gso4;
	gso6.flags = 0;
	gso6.u.gso.type = XEN_NETIF_GSO_TYPE_TCPV6;
	extra("gso_tcpv6", gso6);

	memset(&add, 0, sizeof(add));
	add.type = XEN_NETIF_EXTRA_TYPE_MCAST_ADD;
	memcpy(add.u.mcast.addr, "\x01\x80\xc2\xd3\xe4\xf5", 6);
	extra("mcast_add", add);

	del = add;
	del.type = XEN_NETIF_EXTRA_TYPE_MCAST_DEL;
	extra("mcast_del", del);

	memset(&hash, 0, sizeof(hash));
	hash.type = XEN_NETIF_EXTRA_TYPE_HASH;
	hash.u.hash.type = _XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP;
	hash.u.hash.algorithm = XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ;
	/* netif.h: the least significant octet first */
	memcpy(hash.u.hash.value, "\xd8\xc7\xb6\xa5", 4);
	extra("hash", hash);

	memset(&bare, 0xff, sizeof(bare));
	extra("ones", bare);

	memset(&cq, 0, sizeof(cq));
	cq.id = 0xa1b2;
	cq.type = XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING;
	cq.data[0] = 0x81828384;
	cq.data[1] = 0x91929394;
	cq.data[2] = 0xa1a2a3a4;
	hex("bytes", "ctrl_request", &cq, sizeof(cq));

	memset(&cs, 0, sizeof(cs));
	cs.id = 0xa1b2;
	cs.type = XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE;
	cs.status = XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW;
	cs.data = 0xb1b2b3b4;
	hex("bytes", "ctrl_response", &cs, sizeof(cs));

	memset(&gref, 0, sizeof(gref));
	gref.ref = 0xc1c2c3c4;
	gref.flags = XEN_NETIF_CTRLF_GREF_readonly | 0x7000;
	gref.status = XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER;
	hex("bytes", "gref", &gref, sizeof(gref));

	memset(&msg, 0, sizeof(msg));
	msg.h.type = XS_DIRECTORY_PART;
	msg.h.req_id = 0x81828384;
	msg.h.tx_id = 0x91929394;
	msg.h.len = sizeof(msg.body);
	memcpy(msg.body, "/vm\0000", sizeof(msg.body)); /* "/vm", NUL, "0", NUL */
	hex("bytes", "xsd_sockmsg", &msg, sizeof(msg.h) + sizeof(msg.body));
}

#define RING(name, tag)                                                        \
	do {                                                                   \
		static _Alignas(PAGE) union { struct tag##_sring s; uint8_t b[PAGE]; } p; \
		struct tag##_front_ring r;                                     \
		memset(&p, 0xee, sizeof(p));                                   \
		SHARED_RING_INIT(&p.s);                                        \
		FRONT_RING_INIT(&r, &p.s, PAGE);                               \
		printf("ring " name " %zu %u\n", sizeof(p.s.ring[0]), RING_SIZE(&r)); \
		FIELD(name "_ring", struct tag##_sring, req_prod);             \
		FIELD(name "_ring", struct tag##_sring, req_event);            \
		FIELD(name "_ring", struct tag##_sring, rsp_prod);             \
		FIELD(name "_ring", struct tag##_sring, rsp_event);            \
		hex("page", name, &p, offsetof(struct tag##_sring, ring));     \
		uint32_t at[] = { 0, 1, RING_SIZE(&r) - 1, RING_SIZE(&r),      \
				  0xfffffffe, 0xffffffff };                    \
		for (size_t i = 0; i < sizeof(at) / sizeof(at[0]); i++)        \
			printf("slot " name " %u %td\n", at[i],                \
			       (uint8_t *)RING_GET_REQUEST(&r, at[i]) - p.b);  \
	} while (0)

static void consts(void)
{
	CONST(XEN_NETIF_NR_SLOTS_MIN);
	CONST(XEN_NETIF_MAX_TX_SIZE);

	CONST(NETTXF_csum_blank);
	CONST(NETTXF_data_validated);
	CONST(NETTXF_more_data);
	CONST(NETTXF_extra_info);
	CONST(NETRXF_data_validated);
	CONST(NETRXF_csum_blank);
	CONST(NETRXF_more_data);
	CONST(NETRXF_extra_info);
	CONST(NETRXF_gso_prefix);

	CONST(NETIF_RSP_DROPPED);
	CONST(NETIF_RSP_ERROR);
	CONST(NETIF_RSP_OKAY);
	CONST(NETIF_RSP_NULL);

	CONST(XEN_NETIF_EXTRA_TYPE_NONE);
	CONST(XEN_NETIF_EXTRA_TYPE_GSO);
	CONST(XEN_NETIF_EXTRA_TYPE_MCAST_ADD);
	CONST(XEN_NETIF_EXTRA_TYPE_MCAST_DEL);
	CONST(XEN_NETIF_EXTRA_TYPE_HASH);
	CONST(XEN_NETIF_EXTRA_TYPE_MAX);
	CONST(XEN_NETIF_EXTRA_FLAG_MORE);
	CONST(XEN_NETIF_GSO_TYPE_NONE);
	CONST(XEN_NETIF_GSO_TYPE_TCPV4);
	CONST(XEN_NETIF_GSO_TYPE_TCPV6);

	CONST(XEN_NETIF_CTRL_TYPE_INVALID);
	CONST(XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS);
	CONST(XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS);
	CONST(XEN_NETIF_CTRL_TYPE_SET_HASH_KEY);
	CONST(XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE);
	CONST(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE);
	CONST(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING);
	CONST(XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM);
	CONST(XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE);
	CONST(XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING);
	CONST(XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING);
	CONST(XEN_NETIF_CTRL_STATUS_SUCCESS);
	CONST(XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED);
	CONST(XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER);
	CONST(XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW);
	CONST(_XEN_NETIF_CTRL_HASH_TYPE_IPV4);
	CONST(_XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP);
	CONST(_XEN_NETIF_CTRL_HASH_TYPE_IPV6);
	CONST(_XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP);
	CONST(XEN_NETIF_CTRL_HASH_TYPE_IPV4);
	CONST(XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP);
	CONST(XEN_NETIF_CTRL_HASH_TYPE_IPV6);
	CONST(XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP);
	CONST(XEN_NETIF_CTRL_HASH_ALGORITHM_NONE);
	CONST(XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ);
	CONST(XEN_NETIF_CTRLF_GREF_readonly);

	CONST(DOMID_SELF);
	CONST(GNTTAB_NR_RESERVED_ENTRIES);
	CONST(GNTST_okay);
	CONST(GNTST_general_error);
	CONST(GNTST_bad_domain);
	CONST(GNTST_bad_gntref);
	CONST(GNTST_bad_handle);
	CONST(GNTST_bad_virt_addr);
	CONST(GNTST_bad_dev_addr);
	CONST(GNTST_no_device_space);
	CONST(GNTST_permission_denied);
	CONST(GNTST_bad_page);
	CONST(GNTST_bad_copy_arg);
	CONST(GNTST_address_too_big);
	CONST(GNTST_eagain);
	CONST(GNTST_no_space);

	CONST(XenbusStateUnknown);
	CONST(XenbusStateInitialising);
	CONST(XenbusStateInitWait);
	CONST(XenbusStateInitialised);
	CONST(XenbusStateConnected);
	CONST(XenbusStateClosing);
	CONST(XenbusStateClosed);
	CONST(XenbusStateReconfiguring);
	CONST(XenbusStateReconfigured);

	CONST(XS_CONTROL);
	CONST(XS_DIRECTORY);
	CONST(XS_READ);
	CONST(XS_GET_PERMS);
	CONST(XS_WATCH);
	CONST(XS_UNWATCH);
	CONST(XS_TRANSACTION_START);
	CONST(XS_TRANSACTION_END);
	CONST(XS_INTRODUCE);
	CONST(XS_RELEASE);
	CONST(XS_GET_DOMAIN_PATH);
	CONST(XS_WRITE);
	CONST(XS_MKDIR);
	CONST(XS_RM);
	CONST(XS_SET_PERMS);
	CONST(XS_WATCH_EVENT);
	CONST(XS_ERROR);
	CONST(XS_IS_DOMAIN_INTRODUCED);
	CONST(XS_RESUME);
	CONST(XS_SET_TARGET);
	CONST(XS_RESET_WATCHES);
	CONST(XS_DIRECTORY_PART);
	CONST(XENSTORE_PAYLOAD_MAX);
	CONST(XENSTORE_ABS_PATH_MAX);
	CONST(XENSTORE_REL_PATH_MAX);

	CONST(__HYPERVISOR_memory_op);
	CONST(__HYPERVISOR_xen_version);
	CONST(__HYPERVISOR_grant_table_op);
	CONST(__HYPERVISOR_sched_op);
	CONST(__HYPERVISOR_event_channel_op);
	CONST(__HYPERVISOR_hvm_op);
	CONST(EVTCHNOP_bind_interdomain);
	CONST(EVTCHNOP_close);
	CONST(EVTCHNOP_send);
	CONST(EVTCHNOP_status);
	CONST(EVTCHNOP_alloc_unbound);
	CONST(EVTCHNOP_unmask);
	CONST(GNTTABOP_map_grant_ref);
	CONST(GNTTABOP_unmap_grant_ref);
	CONST(GNTTABOP_setup_table);
	CONST(GNTTABOP_copy);
	CONST(GNTTABOP_query_size);
}

int main(void)
{
	records();
	samples();
	RING("tx", netif_tx);
	RING("rx", netif_rx);
	RING("ctrl", xen_netif_ctrl);
	consts();
	return ferror(stdout) || fflush(stdout);
}
