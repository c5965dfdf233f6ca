package abi_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"barevif/pvnet/netif"
)

// keys is every name of netif's keys.go, with its constant.
func keys(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../../pvnet/netif/keys.go", nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Key") {
			return true
		}
		name, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		if other, dup := all[name]; dup {
			t.Errorf("%s and %s are both %q", other, spec.Names[0], name)
		}
		all[name] = spec.Names[0].Name
		return true
	})
	if all[netif.KeyTxRingRef] != "KeyTxRingRef" {
		t.Fatal("keys.go was not understood")
	}
	return all
}

func TestKeysAreLegalNodeNames(t *testing.T) {
	legal := regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
	for name, constant := range keys(t) {
		if !legal.MatchString(name) {
			t.Errorf("%s is %q", constant, name)
		}
	}
}

func TestEveryKeyTheHeaderSpeaksOfHasAName(t *testing.T) {
	const header = "/usr/include/xen/io/netif.h"
	text, err := os.ReadFile(header)
	if os.IsNotExist(err) {
		t.Skip("Xen's public headers are not installed (Debian: libxen-dev): no ", header)
	}
	if err != nil {
		t.Fatal(err)
	}
	all := keys(t)
	// A name in quotes, or the last part of an example's path.
	spoken := regexp.MustCompile(`["']((?:feature|request|multi-queue|event-channel)[a-z0-9-]*)["']|/([a-z]+(?:-[a-z0-9]+)+) += |/(carrier)\b|"(trusted)"`)
	n := 0
	for _, m := range spoken.FindAllStringSubmatch(string(text), -1) {
		name := strings.Join(m[1:], "")
		if strings.HasPrefix(name, netif.KeyQueuePrefix) {
			name = netif.KeyQueuePrefix
		}
		if all[name] == "" {
			t.Errorf("%q has no constant", name)
		}
		n++
	}
	if n < 20 {
		t.Errorf("only %d names found in %s", n, header)
	}
}
