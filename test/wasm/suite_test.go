package wasm_test

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"barevif/hypercall/domaintest"
)

// root is the module of the product.
const root = "../.."

// onThreads reports whether a case of the suite of domains blocks a thread. There is one
// thread, and it runs everything.
func onThreads(name string) bool {
	return strings.HasPrefix(name, "Threads/") || strings.HasPrefix(name, "GroupOnThread/")
}

// The conformance suite of hypercall.Domain passes on a domain that takes nothing of an
// operating system. Every case of the suite is accounted for.
func TestDomains(t *testing.T) {
	t.Parallel() // a machine has one thread
	const suites = "^Test(Suite|Handover)"
	program := build(t, root, "./hypercall/emu", "test", "-c")
	r := runTests(t, program, suites, "")
	all := slices.DeleteFunc(list(t, program), func(name string) bool { return !regexp.MustCompile(suites).MatchString(name) })
	if len(all) != 5 {
		t.Errorf("the suites are %q", all)
	}
	r.ranAll(t, all, func(name string) bool {
		return name == "TestSuiteOnMappedMemory" // memfds are Linux's
	})
	cases := domaintest.Cases()
	if len(cases) < 80 || !slices.Contains(cases, "PingPong") || !slices.Contains(cases, "Threads/GroupOnThread/LosesNoEvent") {
		t.Errorf("the suite has only the cases %q", cases)
	}
	for _, suite := range []string{"TestSuiteOnTheHeap", "TestSuiteWithOneDomain", "TestSuiteWithoutSystem"} {
		var names []string
		for _, c := range cases {
			names = append(names, suite+"/"+c)
		}
		r.ranAll(t, names, func(name string) bool { return onThreads(strings.TrimPrefix(name, suite+"/")) })
		for ran := range r.verdicts {
			if below, ok := strings.CutPrefix(ran, suite+"/"); ok && !slices.ContainsFunc(cases, func(c string) bool {
				return c == below || strings.HasPrefix(c, below+"/")
			}) {
				t.Errorf("%s is in no list", ran)
			}
		}
	}
}

// A device, both its ends and what they are made of work with one thread and no system, against
// hostile peers too. Fuzz targets are left out: their seeds are in files.
func TestPackages(t *testing.T) {
	for _, p := range packages {
		t.Run(strings.TrimPrefix(p.path, "./"), func(t *testing.T) {
			t.Parallel() // a machine has one thread
			program := build(t, root, p.path, "test", "-c")
			leave := "^Fuzz"
			for name := range p.left {
				leave += "|^" + name + "$"
			}
			r := runTests(t, program, p.match, leave)
			match, left := regexp.MustCompile(p.match), regexp.MustCompile(leave)
			all := list(t, program)
			r.ranAll(t, slices.DeleteFunc(slices.Clone(all), func(name string) bool {
				return !match.MatchString(name) || left.MatchString(name)
			}), func(name string) bool { return slices.Contains(p.skipped, name) })
			for _, name := range slices.Concat(p.skipped, slices.Collect(maps.Keys(p.left))) {
				if !slices.Contains(all, name) {
					t.Errorf("there is no test %s that could be left out", name)
				}
			}
		})
	}
}

// What a test that is left out needs.
const files = "files: it reads the tree, or runs the go command"

// What the device is tried with: frames of every size and kind, every way to wait, pollers, faults,
// and the other end's death, return and replacement. Its other tests ask nothing else of a
// system, but they take a machine with one thread a quarter of an hour.
const ofTheDevice = "^Test(FramesOf|EveryWayToWait|ChecksumsLeft|AHolderOf|DeadlineEnds|WriteBatch|TheDeviceSurvives|HandoverLoses|" +
	"HotUnplug|DisconnectWakes|ConnectAnd|ASecondConnect|ReceivedFramesAre|AFaultOf|AFaultIs|OtherPanics|Calls|PollerSays|PollerMembers|" +
	"AVifIsHandedOver|MappedFramesTake|FramesLeftIn)"

// Peers that lie about indices, identifiers, sizes, chains and offsets, in both directions.
const ofHostilePeers = "^TestT0(1|2|5|7|9)|^TestT1(0|2)"

var packages = []struct {
	path    string
	match   string            // only these tests; empty: all
	left    map[string]string // tests that are not run, each with what it needs
	skipped []string          // tests that skip because there is no system
}{
	{path: "./arena/shm", left: map[string]string{"TestSharedMemoryIsLoadedInOneFunction": files}, skipped: []string{"TestTheDebugBuildPasses"}},
	{path: "./arena"},
	{path: "./hypercall/domaintest"},
	{path: "./hypercall/internal/backoff"},
	{path: "./telemetry", left: map[string]string{"TestCountingIsInlined": files, "TestCountersPageIsUpToDate": files}},
	{path: "./pvnet/ring"},
	{path: "./pvnet/netif"},
	{path: "./pvnet/ctrl"},
	{path: "./pvnet/toeplitz"},
	{path: "./xenbus/xenstore/wire"},
	{path: "./xenbus/xenstore"},
	{path: "./pvnet", match: ofTheDevice},
	{path: "./test/hostile", match: ofHostilePeers},
}
