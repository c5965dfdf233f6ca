package hygiene_test

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// layers lists the packages, the lowest layer first. A package may import only from the rows
// above its own, in its tests too. A name that ends in "/..." stands for all packages below it,
// which may import each other. A package in the list may be missing from the tree, but every
// package of the tree must be in the list.
var layers = [...][]string{
	{"arena/shm", "telemetry/logtest"},
	{"arena"},
	{"hypercall"},
	{"hypercall/domaintest"},
	{"hypercall/anon", "hypercall/epoll", "hypercall/internal/backoff"},
	{"telemetry"},
	{"pvnet/ring", "pvnet/netif", "pvnet/packet", "pvnet/internal/loglimit"},
	{"pvnet/ctrl", "pvnet/toeplitz"},
	{"xenbus/internal/pause"},
	{"xenbus/xenstore/wire"},
	{"xenbus/xenstore/wire/wiretest"},
	{"xenbus/xenstore"},
	{"xenbus"},
	{"xenbus/toolstack"},
	{"hypercall/xendev/internal/ioctl"},
	{"hypercall/xendev/privcmd"},
	{"hypercall/xendev/xendevtest"},
	{"hypercall/xendev"},
	{"hypercall/emu/emutest"},
	{"hypercall/emu", "hypercall/userdir"},
	{"hypercall/anyxen"},
	{"telemetry/openmetrics"},
	{"telemetry/bpf/bpftest", "telemetry/bpf/refused"},
	{"telemetry/bpf"},
	{"xenbus/xenstore/server"},
	{"xenbus/xenstore/server/labtest"},
	{"xenbus/xenstore/storetest"},
	{"pvnet"},
	{"pvnet/pvnettest"},
	{"pvnet/steer"},
	{"pvnet/link", "pvnet/handover", "pvnet/forward"},
	{"pvnet/bridge"},
	{"pvnet/router"},
	{"pvnet/netstack/dhcp"},
	{"pvnet/netstack"},
	{"pvnet/inspect"},
	{"tools/..."},
	{"test/..."},
}

// portable packages know no operating system and no module but the standard
// library and each other.
var portable = [...]string{
	"arena/shm", "arena", "hypercall", "telemetry", "pvnet/ring", "pvnet/netif",
	"pvnet/packet", "pvnet/ctrl", "pvnet/toeplitz", "pvnet/router", "pvnet/internal/loglimit", "xenbus/internal/pause", "xenbus/xenstore/wire", "xenbus/xenstore", "xenbus", "pvnet", "pvnet/forward", "pvnet/bridge",
}

// layerOf returns the index of the row with dir, or -1. open reports whether a name with "/..."
// stands for it.
func layerOf(dir string) (n int, open bool) {
	for i, names := range layers {
		for _, name := range names {
			if name == dir {
				return i, false
			}
			if below, ok := strings.CutSuffix(name, "..."); ok && strings.HasPrefix(dir, below) {
				return i, true
			}
		}
	}
	return -1, false
}

// cutModule is the directory of one of our own packages.
func cutModule(imported string) (dir string, ours bool) {
	if imported == module {
		return ".", true
	}
	return strings.CutPrefix(imported, module+"/")
}

func badImports(files []file) (complaints []string) {
	unknown := map[string]bool{}
	for _, f := range files {
		if !f.isGo() || inTestdata(f.path) {
			continue
		}
		own, open := layerOf(f.dir())
		if own < 0 {
			if !unknown[f.dir()] {
				complaints = append(complaints, fmt.Sprintf("%s: the package is in no layer", f.dir()))
			}
			unknown[f.dir()] = true
			continue
		}
		for _, imported := range f.imports() {
			dir, ours := cutModule(imported)
			if !ours || dir == f.dir() && f.isTest() {
				continue
			}
			if forTests(dir) && !f.isTest() && !forTests(f.dir()) && !strings.HasPrefix(f.path, "test/") {
				complaints = append(complaints, fmt.Sprintf("%s imports %s, which is for tests", f.path, imported))
			}
			if at, _ := layerOf(dir); at < 0 || at > own || at == own && !open {
				complaints = append(complaints, fmt.Sprintf("%s imports %s, which is not above it", f.path, imported))
			}
		}
	}
	return complaints
}

// forTests reports whether a package is for tests alone: "bpftest".
func forTests(dir string) bool {
	return strings.HasSuffix(dir, "test") && path.Base(dir) != "test"
}

func inTestdata(name string) bool {
	return slices.Contains(strings.Split(path.Dir(name), "/"), "testdata")
}

func TestImportsPointUpTheLayers(t *testing.T) {
	reportComplaints(t, badImports(tree(t)))
}

func TestAnImportDownTheLayersIsFound(t *testing.T) {
	wantComplaints(t, badImports(sources(t,
		"arena/a.go", `package arena; import "barevif/arena/shm"`,
		"arena/a_test.go", `package arena_test; import "barevif/arena"`,
		"arena/b_test.go", `package arena_test; import "barevif/hypercall"`,
		"pvnet/ring/r.go", `package ring; import "barevif/pvnet/netif"`,
		"hypercall/emu/emu_test.go", `package emu_test; import "barevif/test/counters"`,
		"pvnet/d.go", `package pvnet; import ("barevif/hypercall"; "barevif/pvnet/pool")`,
		"pvnet/pool/p.go", `package pool`,
		"pvnet/pool/q.go", `package pool`,
		"main.go", `package main`,
		"tools/barevif/demo/d.go", `package demo; import "barevif/tools/barevif/host"`,
		"tools/barevif/host/h.go", `package host; import "barevif/test/peers"`,
		"test/peers/p.go", `package peers; import ("barevif/test/proto"; "barevif/tools/barevif/host")`,
		"test/peers/testdata/p.go", `package p; import "barevif/nowhere"`,
		"telemetry/bpf/b.go", `package bpf; import "barevif/telemetry/bpf/bpftest"`,
		"telemetry/bpf/b_test.go", `package bpf; import "barevif/telemetry/bpf/bpftest"`,
		"telemetry/bpf/bpftest/t.go", `package bpftest; import "barevif/telemetry"`,
		"test/peers/q.go", `package peers; import "barevif/telemetry/bpf/bpftest"`,
	)),
		"arena/b_test.go imports barevif/hypercall",
		"pvnet/ring/r.go imports barevif/pvnet/netif",
		"hypercall/emu/emu_test.go imports barevif/test/counters",
		"pvnet/d.go imports barevif/pvnet/pool",
		"pvnet/pool: the package is in no layer",
		".: the package is in no layer",
		"tools/barevif/host/h.go imports barevif/test/peers",
		"telemetry/bpf/b.go imports barevif/telemetry/bpf/bpftest, which is for tests",
	)
}

// unsafeName is a file that may import unsafe outside arena/shm.
var unsafeName = regexp.MustCompile(`_unsafe(_(linux|freebsd|darwin|openbsd|netbsd|windows))?(_test)?\.go$`)

func badUnsafe(files []file) (complaints []string) {
	for _, f := range files {
		if !f.isGo() {
			continue
		}
		for _, imported := range f.imports() {
			if imported == "C" {
				complaints = append(complaints, f.path+" uses cgo")
			}
			if imported == "unsafe" && f.dir() != "arena/shm" && !unsafeName.MatchString(path.Base(f.path)) {
				complaints = append(complaints, f.path+" imports unsafe")
			}
		}
	}
	return complaints
}

func TestUnsafeIsWhereItsNameSays(t *testing.T) {
	reportComplaints(t, badUnsafe(tree(t)))
}

func TestMisplacedUnsafeAndCgoAreFound(t *testing.T) {
	wantComplaints(t, badUnsafe(sources(t,
		"arena/shm/slots.go", `package shm; import "unsafe"`,
		"pvnet/layout_unsafe.go", `package pvnet; import "unsafe"`,
		"hypercall/emu/map_unsafe_linux.go", `package emu; import "unsafe"`,
		"pvnet/layout_unsafe_test.go", `package pvnet; import "unsafe"`,
		"arena/arena.go", "package arena; import `unsafe`",
		"arena/unsafely.go", `package arena; import _ "unsafe"`,
		"pvnet/a_test.go", `package pvnet; import u "unsafe"`,
		"pvnet/x_unsafe_more.go", `package pvnet; import "unsafe"`,
		"pvnet/c_unsafe.go", `package pvnet; import "C"`,
	)),
		"arena/arena.go imports unsafe",
		"arena/unsafely.go imports unsafe",
		"pvnet/a_test.go imports unsafe",
		"pvnet/x_unsafe_more.go imports unsafe",
		"pvnet/c_unsafe.go uses cgo",
	)
}
