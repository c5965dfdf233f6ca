/* counters */
#ifndef __VMLINUX_H__
#define __VMLINUX_H__

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute push (__attribute__((preserve_access_index)), apply_to = record)
#endif

typedef __u32 queue;

struct barevif_frame_size {
	__u64 le_64;
	__u64 le_128;
	__u64 le_256;
	__u64 le_512;
	__u64 le_1024;
	__u64 le_2048;
	__u64 le_4096;
	__u64 le_8192;
	__u64 le_16384;
	__u64 le_32768;
	__u64 le_65536;
	__u64 inf;
	__u64 sum;
};

struct barevif_batch_size {
	__u64 le_1;
	__u64 le_2;
	__u64 le_4;
	__u64 le_8;
	__u64 le_16;
	__u64 le_32;
	__u64 le_64;
	__u64 le_128;
	__u64 le_256;
	__u64 inf;
	__u64 sum;
};

struct barevif_ring_occupancy {
	__u64 le_1;
	__u64 le_2;
	__u64 le_4;
	__u64 le_8;
	__u64 le_16;
	__u64 le_32;
	__u64 le_64;
	__u64 le_128;
	__u64 le_256;
	__u64 inf;
	__u64 sum;
};

struct barevif_wakeup_latency {
	__u64 le_1024;
	__u64 le_2048;
	__u64 le_4096;
	__u64 le_8192;
	__u64 le_16384;
	__u64 le_32768;
	__u64 le_65536;
	__u64 le_131072;
	__u64 le_262144;
	__u64 le_524288;
	__u64 le_1048576;
	__u64 le_2097152;
	__u64 le_4194304;
	__u64 inf;
	__u64 sum;
};

struct barevif_request_latency {
	__u64 le_1024;
	__u64 le_2048;
	__u64 le_4096;
	__u64 le_8192;
	__u64 le_16384;
	__u64 le_32768;
	__u64 le_65536;
	__u64 le_131072;
	__u64 le_262144;
	__u64 le_524288;
	__u64 le_1048576;
	__u64 le_2097152;
	__u64 le_4194304;
	__u64 inf;
	__u64 sum;
};

struct barevif_frame_size___2 {
	__u64 le_64;
	__u64 le_128;
	__u64 le_256;
	__u64 le_512;
	__u64 le_1024;
	__u64 le_2048;
	__u64 le_4096;
	__u64 le_8192;
	__u64 le_16384;
	__u64 le_32768;
	__u64 le_65536;
	__u64 inf;
	__u64 sum;
};

struct barevif_batch_size___2 {
	__u64 le_1;
	__u64 le_2;
	__u64 le_4;
	__u64 le_8;
	__u64 le_16;
	__u64 le_32;
	__u64 le_64;
	__u64 le_128;
	__u64 le_256;
	__u64 inf;
	__u64 sum;
};

struct barevif_ring_occupancy___2 {
	__u64 le_1;
	__u64 le_2;
	__u64 le_4;
	__u64 le_8;
	__u64 le_16;
	__u64 le_32;
	__u64 le_64;
	__u64 le_128;
	__u64 le_256;
	__u64 inf;
	__u64 sum;
};

struct barevif_wakeup_latency___2 {
	__u64 le_1024;
	__u64 le_2048;
	__u64 le_4096;
	__u64 le_8192;
	__u64 le_16384;
	__u64 le_32768;
	__u64 le_65536;
	__u64 le_131072;
	__u64 le_262144;
	__u64 le_524288;
	__u64 le_1048576;
	__u64 le_2097152;
	__u64 le_4194304;
	__u64 inf;
	__u64 sum;
};

struct barevif_request_latency___2 {
	__u64 le_1024;
	__u64 le_2048;
	__u64 le_4096;
	__u64 le_8192;
	__u64 le_16384;
	__u64 le_32768;
	__u64 le_65536;
	__u64 le_131072;
	__u64 le_262144;
	__u64 le_524288;
	__u64 le_1048576;
	__u64 le_2097152;
	__u64 le_4194304;
	__u64 inf;
	__u64 sum;
};

struct barevif_queue {
	__u64 rx_gen_done;
	__u64 rx_packets;
	__u64 rx_bytes;
	__u64 rx_errors;
	__u64 rx_dropped;
	__u64 rx_multicast;
	__u64 rx_broadcast;
	__u64 rx_slots;
	__u64 rx_chained_packets;
	__u64 rx_extra_infos;
	__u64 rx_gso_packets;
	__u64 rx_gso_checksum_fixup;
	__u64 rx_csum_partial;
	__u64 rx_csum_verified;
	__u64 rx_copied_bytes;
	__u64 rx_lent_packets;
	__u64 rx_alloc_failed;
	__u64 rx_ring_full;
	__u64 rx_polls;
	__u64 rx_polls_full;
	__u64 rx_parks;
	__u64 rx_events;
	__u64 rx_events_spurious;
	__u64 rx_notifies_sent;
	__u64 rx_notifies_spared;
	__u64 rx_rescued_wakeups;
	__u64 rx_stalls;
	__u64 rx_violations;
	__u64 rx_grant_ops;
	__u64 rx_grant_batches;
	__u64 rx_grant_errors;
	__u64 rx_pages_quarantined;
	__u64 rx_mirror_healed;
	__u64 rx_drop_no_buffer;
	__u64 rx_drop_no_slot;
	__u64 rx_drop_link_down;
	__u64 rx_drop_disconnected;
	__u64 rx_drop_stalled;
	__u64 rx_drop_filter;
	__u64 rx_drop_too_long;
	__u64 rx_drop_too_short;
	__u64 rx_drop_bad_chain;
	__u64 rx_drop_bad_gref;
	__u64 rx_drop_bad_offset;
	__u64 rx_drop_bad_extra;
	__u64 rx_drop_bad_gso;
	__u64 rx_drop_bad_csum;
	__u64 rx_drop_bad_id;
	__u64 rx_drop_backend_error;
	__u64 rx_ring_size;
	__u64 rx_ring_used;
	__u64 rx_ring_used_max;
	__u64 rx_buffers_free;
	struct barevif_frame_size rx_frame_size;
	struct barevif_batch_size rx_batch_size;
	struct barevif_ring_occupancy rx_ring_occupancy;
	struct barevif_wakeup_latency rx_wakeup_latency;
	struct barevif_request_latency rx_request_latency;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	__u64 rx_gen_start;
	__u64 tx_gen_done;
	__u64 tx_packets;
	__u64 tx_bytes;
	__u64 tx_errors;
	__u64 tx_dropped;
	__u64 tx_multicast;
	__u64 tx_broadcast;
	__u64 tx_slots;
	__u64 tx_chained_packets;
	__u64 tx_extra_infos;
	__u64 tx_gso_packets;
	__u64 tx_gso_checksum_fixup;
	__u64 tx_csum_partial;
	__u64 tx_csum_verified;
	__u64 tx_copied_bytes;
	__u64 tx_lent_packets;
	__u64 tx_alloc_failed;
	__u64 tx_ring_full;
	__u64 tx_polls;
	__u64 tx_polls_full;
	__u64 tx_parks;
	__u64 tx_events;
	__u64 tx_events_spurious;
	__u64 tx_notifies_sent;
	__u64 tx_notifies_spared;
	__u64 tx_rescued_wakeups;
	__u64 tx_stalls;
	__u64 tx_violations;
	__u64 tx_grant_ops;
	__u64 tx_grant_batches;
	__u64 tx_grant_errors;
	__u64 tx_pages_quarantined;
	__u64 tx_mirror_healed;
	__u64 tx_drop_no_buffer;
	__u64 tx_drop_no_slot;
	__u64 tx_drop_link_down;
	__u64 tx_drop_disconnected;
	__u64 tx_drop_stalled;
	__u64 tx_drop_filter;
	__u64 tx_drop_too_long;
	__u64 tx_drop_too_short;
	__u64 tx_drop_bad_chain;
	__u64 tx_drop_bad_gref;
	__u64 tx_drop_bad_offset;
	__u64 tx_drop_bad_extra;
	__u64 tx_drop_bad_gso;
	__u64 tx_drop_bad_csum;
	__u64 tx_drop_bad_id;
	__u64 tx_drop_backend_error;
	__u64 tx_ring_size;
	__u64 tx_ring_used;
	__u64 tx_ring_used_max;
	__u64 tx_buffers_free;
	struct barevif_frame_size___2 tx_frame_size;
	struct barevif_batch_size___2 tx_batch_size;
	struct barevif_ring_occupancy___2 tx_ring_occupancy;
	struct barevif_wakeup_latency___2 tx_wakeup_latency;
	struct barevif_request_latency___2 tx_request_latency;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	long: 64;
	__u64 tx_gen_start;
};

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute pop
#endif

#endif /* __VMLINUX_H__ */

/* info */
#ifndef __VMLINUX_H__
#define __VMLINUX_H__

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute push (__attribute__((preserve_access_index)), apply_to = record)
#endif

typedef __u32 device;

enum barevif_role {
	front = 0,
	back = 1,
};

enum xenbus_state {
	XenbusStateUnknown = 0,
	XenbusStateInitialising = 1,
	XenbusStateInitWait = 2,
	XenbusStateInitialised = 3,
	XenbusStateConnected = 4,
	XenbusStateClosing = 5,
	XenbusStateClosed = 6,
	XenbusStateReconfiguring = 7,
	XenbusStateReconfigured = 8,
};

struct barevif_features {
	bool csum;
	bool csum6;
	bool gso4;
	bool gso6;
	bool scatter;
	bool rx_copy;
	bool multicast_control;
	bool control_ring;
	bool static_grants;
	bool split_events;
	bool lend_rx;
	bool trusted;
};

struct barevif_reset {
	__u64 count;
	__u64 unix_ns;
	__u64 rx_packets;
	__u64 rx_bytes;
	__u64 tx_packets;
	__u64 tx_bytes;
};

struct barevif_info {
	__u64 gen_done;
	char magic[8];
	__u32 layout_version;
	__u32 queue_slots;
	__u64 layout_hash;
	char vif[32];
	char mac[24];
	char backend[24];
	char backend_reason[256];
	enum barevif_role role;
	enum xenbus_state state;
	__u16 own_domid;
	__u16 peer_domid;
	__u32 handle;
	__u32 mtu;
	__u32 queues;
	__u64 epoch;
	bool up;
	struct barevif_features features;
	__u32 owner_pid;
	__u32 owner_uid;
	__u32 counters_map_id;
	__u32 events_map_id;
	__u64 start_unix_ns;
	__u64 heartbeat_boot_ns;
	__u64 heartbeat_unix_ns;
	__u64 resumed_start_unix_ns;
	struct barevif_reset reset;
	__u64 gen_start;
};

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute pop
#endif

#endif /* __VMLINUX_H__ */

/* events */
#ifndef __VMLINUX_H__
#define __VMLINUX_H__

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute push (__attribute__((preserve_access_index)), apply_to = record)
#endif

typedef __u32 slot;

enum barevif_event {
	none = 0,
	state = 1,
	violation = 2,
	stall = 3,
	rescued_wakeup = 4,
	tamper = 5,
	reset = 6,
	reconnect = 7,
};

struct barevif_event_record {
	__u64 seq;
	__u64 unix_ns;
	enum barevif_event kind;
	__s32 queue;
	__u64 a;
	__u64 b;
	long: 64;
	long: 64;
	__u64 seq_start;
};

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute pop
#endif

#endif /* __VMLINUX_H__ */

/* fields */
#ifndef __VMLINUX_H__
#define __VMLINUX_H__

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute push (__attribute__((preserve_access_index)), apply_to = record)
#endif

typedef __u32 field;

enum barevif_metric_kind {
	counter = 0,
	gauge = 1,
	histogram = 2,
};

enum barevif_bool {
	no = 0,
	yes = 1,
};

struct barevif_field {
	__u32 offset;
	enum barevif_metric_kind kind;
	__u32 buckets;
	enum barevif_bool unit_line;
	char name[32];
	char metric[64];
	char unit[16];
	char help[112];
	char le[16][16];
};

#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute pop
#endif

#endif /* __VMLINUX_H__ */

