//go:build linux

package main

import "time"

const module = "barevif"

// A suite is the arguments of go test for a mutant.
type suite struct {
	pkg   string        // "./arena"
	run   string        // -run, empty for all
	tags  string        // -tags
	limit time.Duration // time after which its tests count as hung; 0 means two minutes
}

func (s suite) String() string {
	name := s.pkg
	if s.tags != "" {
		name += " -tags " + s.tags
	}
	if s.run != "" {
		name += " -run " + s.run
	}
	return name
}

func (s suite) timeout() time.Duration {
	if s.limit == 0 {
		return 2 * time.Minute
	}
	return s.limit
}

// A plan is a package whose checks are mutated, and the suites that have to notice,
// cheapest first. Suites that need another program (Debian's xenstored, bpftool) are not
// among them: a check has to be tested wherever go test runs.
type plan struct {
	dir    string
	suites []suite
}

var (
	hostile = suite{pkg: "./test/hostile", limit: 3 * time.Minute}
	engines = suite{pkg: "./pvnet"}
)

// plans lists the packages, cheapest first. A package may be missing from the tree.
var plans = []plan{
	{"arena/shm", []suite{{pkg: "./arena/shm"}, {pkg: "./arena/shm", tags: "shmdebug"}}},
	{"arena", []suite{{pkg: "./arena"}}},
	{"pvnet/ring", []suite{{pkg: "./pvnet/ring"}}},
	{"pvnet/netif", []suite{{pkg: "./pvnet/netif"}, {pkg: "./test/abi"}}},
	{"pvnet/packet", []suite{{pkg: "./pvnet/packet"}, engines, hostile}},
	{"pvnet/router", []suite{{pkg: "./pvnet/router"}}},
	{"xenbus/xenstore/wire", []suite{{pkg: "./xenbus/xenstore/wire"}, {pkg: "./xenbus/xenstore"}, {pkg: "./xenbus/xenstore/server"}}},
	{"telemetry", []suite{{pkg: "./telemetry"}}},
	{"telemetry/openmetrics", []suite{{pkg: "./telemetry/openmetrics"}}},
	{"telemetry/bpf", []suite{{pkg: "./telemetry/bpf"}}},
	{"xenbus/xenstore/server", []suite{
		{pkg: "./test/embeddedstore", run: "TestAnswersLikeXenstored417|TestMalformedRequests"},
		{pkg: "./xenbus/xenstore/server"},
		{pkg: "./xenbus/xenstore/storetest"},
	}},
	{"xenbus/xenstore", []suite{{pkg: "./xenbus/xenstore"}, {pkg: "./xenbus/xenstore/storetest"}, engines}},
	{"xenbus", []suite{{pkg: "./xenbus"}, {pkg: "./xenbus/xenstore/storetest"}, engines}},
	{"hypercall/emu", []suite{{pkg: "./hypercall/emu", limit: 3 * time.Minute}, {pkg: "./test/processes"}}},
	{"hypercall/xendev/privcmd", []suite{{pkg: "./hypercall/xendev/privcmd"}, {pkg: "./hypercall/xendev"}}},
	{"hypercall/xendev", []suite{{pkg: "./hypercall/xendev"}, {pkg: "./tools/xenhost"}}},
	{"tools/xenhost", []suite{{pkg: "./tools/xenhost"}}},
	{"pvnet", []suite{engines, hostile, {pkg: "./test/counters", run: "Balance|Queues"}}},
	{"pvnet/link", []suite{{pkg: "./pvnet/link"}}},
	{"pvnet/netstack/dhcp", []suite{{pkg: "./pvnet/netstack/dhcp"}}},
	{"pvnet/netstack", []suite{{pkg: "./pvnet/netstack"}}},
}
