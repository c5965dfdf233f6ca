package main

import (
	"encoding/json"
	"fmt"
	"go/parser"
	"go/token"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"barevif/pvnet/router"
)

// locksTaken returns how many mutexes the packages of countedPackages have taken. It is nil but in
// the build that lockCountingBuild describes.
var locksTaken func() uint64

// countedPackages are on the way of a frame through the router.
var countedPackages = []string{"arena", "pvnet", "pvnet/forward", "pvnet/router", "tools/vifrouter"}

// countingPackage stands for sync in them. It is in the overlay alone.
const countingPackage = `package locks

import (
	"sync"
	"sync/atomic"
)

var taken atomic.Uint64

func Taken() uint64 { return taken.Load() }

type Mutex struct{ mu sync.Mutex }

func (m *Mutex) Lock()         { taken.Add(1); m.mu.Lock() }
func (m *Mutex) TryLock() bool { taken.Add(1); return m.mu.TryLock() }
func (m *Mutex) Unlock()       { m.mu.Unlock() }

type RWMutex struct{ mu sync.RWMutex }

func (m *RWMutex) Lock()          { taken.Add(1); m.mu.Lock() }
func (m *RWMutex) TryLock() bool  { taken.Add(1); return m.mu.TryLock() }
func (m *RWMutex) Unlock()        { m.mu.Unlock() }
func (m *RWMutex) RLock()         { taken.Add(1); m.mu.RLock() }
func (m *RWMutex) TryRLock() bool { taken.Add(1); return m.mu.TryRLock() }
func (m *RWMutex) RUnlock()       { m.mu.RUnlock() }

type (
	Cond      = sync.Cond
	Locker    = sync.Locker
	Map       = sync.Map
	Once      = sync.Once
	Pool      = sync.Pool
	WaitGroup = sync.WaitGroup
)

var (
	NewCond  = sync.NewCond
	OnceFunc = sync.OnceFunc
)

func OnceValue[T any](f func() T) func() T                 { return sync.OnceValue(f) }
func OnceValues[T, U any](f func() (T, U)) func() (T, U) { return sync.OnceValues(f) }
`

// countingHook gives locksTaken a function.
const countingHook = `package main

import "barevif/locks"

func init() { locksTaken = locks.Taken }
`

// lockCountingBuild writes an overlay under which countedPackages count the mutexes that they take:
// they import a package of that name for sync. It returns the overlay's path.
func lockCountingBuild(t *testing.T, root string) string {
	t.Helper()
	dir := t.TempDir()
	replace := map[string]string{}
	add := func(at, text string) {
		file := filepath.Join(dir, fmt.Sprint(len(replace), ".go"))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		replace[filepath.Join(root, at)] = file
	}
	add("locks/locks.go", countingPackage)
	add("tools/vifrouter/counting_test.go", countingHook)
	for _, pkg := range countedPackages {
		files, err := filepath.Glob(filepath.Join(root, pkg, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		counted := 0
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			set := token.NewFileSet()
			parsed, err := parser.ParseFile(set, file, text, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range parsed.Imports {
				if i.Path.Value == `"sync"` && i.Name == nil {
					at := set.Position(i.Pos()).Offset
					add(filepath.Join(pkg, filepath.Base(file)), string(text[:at])+`sync "barevif/locks"`+string(text[at+len(`"sync"`):]))
					counted++
				}
			}
		}
		if counted == 0 {
			t.Errorf("no file of %s imports sync: it does not belong to countedPackages", pkg)
		}
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, list, 0o600); err != nil {
		t.Fatal(err)
	}
	return overlay
}

// The plane takes a fixed number of mutexes for a batch, however many frames are in it: those that its
// comment names. What counts them is a build of the same sources with another package for sync, in
// which this test runs again. Whatever the core decides takes its one; a frame of the router's own, which
// answers one, is written by itself and costs its queue's.
func TestABatchTakesNoLockPerFrame(t *testing.T) {
	if locksTaken == nil {
		tool, err := exec.LookPath("go")
		if err != nil {
			t.Skip("needs the go command, which builds the program that counts:", err)
		}
		root, err := filepath.Abs("../..")
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(tool, "test", "-count=1", "-vet=off", "-run=^"+t.Name()+"$", "-v", "-overlay="+lockCountingBuild(t, root), "./tools/vifrouter")
		cmd.Dir = root
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()+"/") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	r := newRig(t)
	batch := func(b []byte, n int) [][]byte { return slices.Repeat([][]byte{b}, n) }
	small := r.datagram(rigAddr(1), 22)
	alone := r.datagram(netip.MustParseAddr("10.2.0.1"), 22) // nobody listens there
	for _, c := range []struct {
		name string
		want uint64 // locks of a batch
		move func(n int)
	}{
		// The core's, and the queue's before and after it sends.
		{"forwarded", 3, func(n int) { r.move(batch(small, n)...); r.gets(1, n) }},
		{"dropped", 1, func(n int) { r.move(batch(r.datagram(netip.MustParseAddr("127.0.0.1"), 22), n)...) }},
		{"decided", 1, func(n int) {
			var packets []router.Packet
			for i := range n { // of each verdict
				b := [][]byte{small, r.request(), ttl(slices.Clone(small), 1), r.datagram(rigAddr(1), 1400), alone}[i%5]
				b = slices.Clone(b)
				packets = append(packets, router.Packet{In: 1, Head: b, Total: len(b)})
			}
			r.core.Process(r.now, packets)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.TB = t
			least := func(n int) uint64 {
				c.move(n) // makes what is made once
				most := ^uint64(0)
				for range 20 { // what runs beside the test takes locks now and then
					before := locksTaken()
					c.move(n)
					most = min(most, locksTaken()-before)
				}
				return most
			}
			if one, many := least(1), least(32); one != c.want || many != c.want {
				t.Errorf("a batch of one frame takes %d locks, one of 32 takes %d; want %d", one, many, c.want)
			}
		})
	}
}
