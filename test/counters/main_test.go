package counters

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/telemetry/bpf/bpftest"
	"barevif/xenbus/toolstack"
)

const (
	envOwner = "BAREVIF_TEST_OWNER"
	limit    = bpftest.Limit
)

func TestMain(m *testing.M) {
	if info := os.Getenv(envOwner); info != "" {
		os.Exit(owner(info))
	}
	os.Exit(bpftest.Main(m))
}

// Numbers no other test has, so that what is unpinned elsewhere on the machine is not
// taken for ours.
const (
	frontDom  = 31001
	backDom   = 31002
	frontName = "front-31001-31002-0"
	backName  = "back-31002-31001-0"
)

func newWire(t testing.TB, front, back pvnet.Config) *pvnettest.Wire {
	t.Helper()
	return pvnettest.New(t, toolstack.Vif{Front: frontDom, Back: backDom, MAC: [6]byte{0, 0x16, 0x3e, 0, 0, 1}}, front, back)
}

// A path is one direction of a queue of a wire, in the hands of this goroutine.
type path struct {
	tx     *pvnet.TX
	rx     *pvnet.RX
	frames []pvnet.Frame
}

func newPath(t testing.TB, from, to *pvnet.Device, queue, batch int) *path {
	t.Helper()
	tx, err := from.OwnTX(queue)
	if err != nil {
		t.Fatal(err)
	}
	rx, err := to.OwnRX(queue)
	if err != nil {
		t.Fatal(err)
	}
	rx.SetDeadline(time.Now().Add(10 * time.Minute))
	return &path{tx, rx, make([]pvnet.Frame, batch)}
}

// move sends a batch of frames of size bytes and receives them.
func (p *path) move(t testing.TB, size int) {
	n := p.tx.AllocSize(p.frames, size)
	if k, err := p.tx.Send(p.frames[:n]); k != len(p.frames) || err != nil {
		t.Fatalf("sent %d of %d: %v", k, len(p.frames), err)
	}
	for n > 0 {
		k, err := p.rx.Receive(p.frames[:n])
		if err != nil {
			t.Fatal(err)
		}
		if err := p.rx.Release(p.frames[:k]); err != nil {
			t.Fatal(err)
		}
		n -= k
	}
}

// owner is a process that counts n packets in a memfd or whatever it is allowed,
// says where, and ends with its standard input.
func owner(name string) int {
	var info telemetry.Info
	if err := json.Unmarshal([]byte(name), &info); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	set := telemetry.NewSet(1)
	set.Open(&bpf.Store{}, info)
	set.RX(0).Add(telemetry.Packets, 1<<53+1) // more than a float64 holds
	set.RX(0).Flush()
	kind, reason := set.Backend()
	fmt.Printf("%s: %s\n", kind, reason)
	io.Copy(io.Discard, os.Stdin)
	if err := set.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// startOwner starts one, with a command such as setpriv in front of it, and gives
// the kind of place it counts in.
func startOwner(t *testing.T, info telemetry.Info, front ...string) (p *bpftest.Process, kind string) {
	t.Helper()
	text, err := json.Marshal(info)
	if err != nil {
		t.Fatal(err)
	}
	p = bpftest.Start(t, envOwner+"="+string(text), front...)
	line, err := bufio.NewReader(p.Out).ReadString('\n')
	kind, _, ok := strings.Cut(line, ": ")
	if err != nil || !ok {
		t.Fatalf("the owner says %q, %v", line, err)
	}
	return p, kind
}

// command builds the command of this project where everybody may run it.
func command(t testing.TB) string {
	t.Helper()
	return bpftest.Public(t, "barevif", func(path string) error {
		cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, "barevif/tools/barevif")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build: %w\n%s", err, out)
		}
		return nil
	})
}
