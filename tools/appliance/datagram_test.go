package appliance

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// between returns a socket for Ask. Its datagrams are passed to answer, with the address
// for the answer.
func between(t *testing.T, answer func(c net.PacketConn, b []byte, from net.Addr)) net.Conn {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, MaxDatagram)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			answer(server, buf[:n], from)
		}
	}()
	t.Cleanup(func() { server.Close(); <-ended })
	return dial(t, server.LocalAddr())
}

func dial(t *testing.T, to net.Addr) net.Conn {
	t.Helper()
	c, err := net.Dial("udp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// reply returns the datagram that Answer would send.
func reply(t *testing.T, b []byte) []byte {
	number, err := check(b, asks)
	if err != nil {
		t.Error(err)
	}
	r, err := datagram(answers, number, len(b))
	if err != nil {
		t.Error(err)
	}
	return r
}

func TestEveryDatagramIsAnsweredWhole(t *testing.T) {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- Answer(server) }()
	sizes := []int{0, MaxDatagram, 12, 11, 1, 1, 1472}
	bytes := 0
	for n := range 1472 {
		sizes = append(sizes, n)
	}
	for _, n := range sizes {
		bytes += n
	}
	got, err := Ask(t.Context(), dial(t, server.LocalAddr()), sizes, 10*time.Second)
	if want := (Tally{Asked: len(sizes), Answered: len(sizes), Bytes: bytes}); got != want || err != nil {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	server.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestADatagramThatIsNotWholeIsNoticed(t *testing.T) {
	for _, size := range []int{1, 5, 11, 12, 13, 100, 1472} {
		for _, way := range []byte{asks, answers} {
			good, err := datagram(way, 7, size)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := check(good, way); err != nil {
				t.Errorf("%d bytes: %v", size, err)
			}
			if _, err := check(good, asks+answers-way); err == nil {
				t.Errorf("%d bytes are a datagram both ways", size)
			}
			for i := range good {
				bad := slices.Clone(good)
				bad[i] ^= 0x10
				if _, err := check(bad, way); err == nil {
					t.Errorf("%d bytes, byte %d wrong: not noticed", size, i)
				}
			}
			if _, err := check(good[:size-1], way); err == nil && size > 1 {
				t.Errorf("%d bytes, one cut off: not noticed", size)
			}
			if _, err := check(append(slices.Clone(good), 0), way); err == nil {
				t.Errorf("%d bytes, one added: not noticed", size)
			}
		}
	}
}

func TestAnswersAreTallied(t *testing.T) {
	var held []byte
	var cases sync.WaitGroup
	for name, c := range map[string]struct {
		answer                func(c net.PacketConn, b []byte, from net.Addr)
		answered, lost, wrong int
		what                  string
	}{
		"none": {answer: func(net.PacketConn, []byte, net.Addr) {}, lost: 3},
		"twice": {answer: func(c net.PacketConn, b []byte, from net.Addr) {
			r := reply(t, b)
			c.WriteTo(r, from)
			c.WriteTo(r, from)
		}, answered: 3, wrong: 2, what: "not waited for"}, // the second answer to the last one comes too late to count
		"spoilt": {answer: func(c net.PacketConn, b []byte, from net.Addr) {
			r := reply(t, b)
			r[len(r)-1]++
			c.WriteTo(r, from)
		}, lost: 3, wrong: 3, what: "of 50000 bytes"},
		"echoed": {answer: func(c net.PacketConn, b []byte, from net.Addr) { c.WriteTo(b, from) }, lost: 3, wrong: 3, what: "from byte 3 on"},
		"late": {answer: func(c net.PacketConn, b []byte, from net.Addr) {
			if held != nil {
				c.WriteTo(held, from)
			}
			held = reply(t, b)
		}, answered: 2, lost: 1},
	} {
		conn := between(t, c.answer)
		cases.Go(func() { // most of the time is spent waiting for what is lost
			patience := time.Minute
			if c.lost > 0 {
				patience = 2 * time.Second // a slow machine's answers still come in time to count
			}
			// Too large for two of them to be in flight together.
			got, err := Ask(t.Context(), conn, []int{50000, 50001, 50002}, patience)
			if err != nil || got.Asked != 3 || got.Answered != c.answered || got.Lost() != c.lost || got.Wrong != c.wrong {
				t.Errorf("%s: %+v, %v", name, got, err)
			}
			if c.what == "" && got.What != nil || c.what != "" && (got.What == nil || !strings.Contains(got.What.Error(), c.what)) {
				t.Errorf("%s: %v, want %q", name, got.What, c.what)
			}
		})
	}
	cases.Wait()
}

func TestAskEnds(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("cause")
	c := between(t, func(server net.PacketConn, b []byte, from net.Addr) {
		cancel(cause)
		server.WriteTo(reply(t, b), from)
	})
	if got, err := Ask(ctx, c, []int{50000, 50000}, time.Minute); !errors.Is(err, cause) || got.Asked != 1 || got.Answered != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	// Where nothing answers, it ends once its patience does.
	c = between(t, func(net.PacketConn, []byte, net.Addr) {})
	if got, err := Ask(ctx, c, []int{50000, 50000}, 100*time.Millisecond); !errors.Is(err, cause) || got.Asked != 1 || got.Lost() != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	c.Close()
	if _, err := Ask(t.Context(), c, []int{1}, time.Second); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// Only questions get an answer: a server cannot be made to answer itself, or to send more
// than it received.
func TestOnlyQuestionsAreAnswered(t *testing.T) {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go Answer(server)
	c := dial(t, server.LocalAddr())
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	for _, b := range [][]byte{[]byte("x"), make([]byte, 100)} {
		c.Write(b)
	}
	own, err := datagram(answers, 3, 200)
	if err != nil {
		t.Fatal(err)
	}
	c.Write(own)
	last, err := datagram(asks, 4, 300)
	if err != nil {
		t.Fatal(err)
	}
	c.Write(last)
	buf := make([]byte, 1000)
	n, err := c.Read(buf)
	if err != nil || n != 300 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if number, err := check(buf[:n], answers); number != 4 || err != nil {
		t.Error(number, err)
	}
}
