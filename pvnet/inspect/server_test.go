//go:build linux

package inspect

import (
	"bufio"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"barevif/hypercall/emu/emutest"
)

// Close ends the wait for a request also of a client that has connected just before, and is about to be
// served: what its server does next takes nothing back of what Close has done.
func TestCloseEndsAClientThatIsAboutToBeServed(t *testing.T) {
	dir := emutest.SocketDir(t)
	s, err := Listen(Config{Dir: filepath.Join(dir, "run")})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s.mu.Lock()
	s.conns[c] = true // as accept does before it starts serve
	s.mu.Unlock()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	// If serve waits for a request as long as for any, it reads this one.
	if _, err := io.WriteString(client, "{\"op\":\"list\"}\n"); err != nil {
		t.Fatal(err)
	}
	s.serve(c)
	client.SetReadDeadline(time.Now().Add(time.Minute))
	if line, err := bufio.NewReader(client).ReadString('\n'); err != nil || !strings.Contains(line, "timeout") {
		t.Errorf("the client is answered %q, %v", line, err)
	}
}
