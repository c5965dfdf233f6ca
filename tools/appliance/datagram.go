package appliance

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"time"
)

// DatagramPort is the default UDP port of the answering end.
const DatagramPort = 7007

// MaxDatagram is the largest payload of UDP over IPv4, in bytes.
const MaxDatagram = 65535 - 20 - 8

// The way of a datagram. Answers and questions differ, so that two ends that run Answer
// do not answer each other without end.
const (
	asks    = 'q'
	answers = 'a'
)

// numbered is the size from which a datagram carries its number: the way in 4 bytes, the
// number, and the CRC-32C of all the other bytes.
const numbered = 12

// datagram makes the datagram of a way, a number and a size, which determine every byte.
// One shorter than numbered does not depend on the number.
func datagram(way byte, number uint32, size int) ([]byte, error) {
	at := int64(number) << 16 // datagrams of different numbers share no bytes of the keystream
	if size < numbered {
		at = int64(size)
	}
	s, err := keystream(at)
	if err != nil {
		return nil, err
	}
	b := make([]byte, size)
	s.XORKeyStream(b, b)
	if size < numbered {
		if size > 0 {
			b[0] = way
		}
		return b, nil
	}
	copy(b, []byte{'b', 'v', 'f', way})
	binary.BigEndian.PutUint32(b[4:], number)
	table := crc32.MakeTable(crc32.Castagnoli) // crc32 caches this table
	sum := crc32.Update(crc32.Checksum(b[:8], table), table, b[numbered:])
	binary.BigEndian.PutUint32(b[8:], sum)
	return b, nil
}

// check returns the number of b, a datagram of the given way, or an error that says where
// b is wrong.
func check(b []byte, way byte) (number uint32, err error) {
	if len(b) >= numbered {
		number = binary.BigEndian.Uint32(b[4:])
	}
	want, err := datagram(way, number, len(b))
	if err != nil {
		return 0, err
	}
	for i := range want {
		if b[i] != want[i] {
			return 0, fmt.Errorf("a datagram of %d bytes, perhaps number %d, is wrong from byte %d on: %#x, not %#x", len(b), number, i, b[i], want[i])
		}
	}
	return number, nil
}

// Answer answers the datagrams of [Ask] until c fails or is closed, and returns that
// error. An answer has the size of its question. A datagram that is not whole gets none.
func Answer(c net.PacketConn) error {
	buf := make([]byte, MaxDatagram)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		number, err := check(buf[:n], asks)
		if err != nil {
			continue
		}
		b, err := datagram(answers, number, n)
		if err != nil {
			return err
		}
		// An answer that cannot be sent is lost, as any datagram may be.
		if _, err := c.WriteTo(b, from); errors.Is(err, net.ErrClosed) {
			return err
		}
	}
}

// A Tally counts the datagrams of an Ask.
type Tally struct {
	Asked    int
	Answered int
	Bytes    int   // payload bytes of the answers
	Wrong    int   // datagrams that were no whole answer, or an answer to no open question
	What     error // what was wrong with the first of those
}

// Lost returns how many questions had no answer.
func (t *Tally) Lost() int { return t.Asked - t.Answered }

// Limits of the questions in flight: window datagrams, and room bytes, which fit the
// buffer of a socket.
const (
	window = 16
	room   = 64 << 10
)

// Ask sends a datagram of each size through c, a UDP socket connected to one that runs
// [Answer], and compares the answers byte by byte. It sends a group, waits until each is
// answered or no good answer has come for patience, and goes on.
//
// The error is ctx's cause, at most patience after the end of ctx, or an error of c.
func Ask(ctx context.Context, c net.Conn, sizes []int, patience time.Duration) (Tally, error) {
	a := asker{c: c, open: map[question]int{}, patience: patience}
	for rest := sizes; len(rest) > 0; {
		n, err := a.send(rest)
		if err != nil {
			return a.Tally, err
		}
		rest = rest[n:]
		if err := a.receive(); err != nil {
			return a.Tally, err
		}
		if ctx.Err() != nil {
			return a.Tally, context.Cause(ctx)
		}
	}
	return a.Tally, nil
}

// A question identifies a datagram that waits for an answer. The number is 0 for
// datagrams that do not carry one.
type question struct {
	number uint32
	size   int
}

type asker struct {
	Tally
	c        net.Conn
	open     map[question]int // number of open questions; those given up stay, since an answer may come late
	waiting  int              // open questions of the last group
	patience time.Duration
	buf      [MaxDatagram]byte
}

// send sends the questions of the first n sizes.
func (a *asker) send(sizes []int) (n int, err error) {
	for bytes := 0; n < len(sizes) && n < window && (n == 0 || bytes+sizes[n] <= room); n++ {
		b, err := datagram(asks, uint32(a.Asked), sizes[n])
		if err != nil {
			return n, err
		}
		if _, err := a.c.Write(b); err != nil {
			return n, err
		}
		q := question{size: sizes[n]}
		if q.size >= numbered {
			q.number = uint32(a.Asked)
		}
		a.open[q]++
		a.Asked++
		bytes += sizes[n]
	}
	a.waiting = n
	return n, nil
}

// receive waits for as many answers as questions were sent, until none comes for
// patience.
func (a *asker) receive() error {
	good := true
	for a.waiting > 0 {
		if good {
			if err := a.c.SetReadDeadline(time.Now().Add(a.patience)); err != nil {
				return err
			}
		}
		n, err := a.c.Read(a.buf[:])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		number, err := check(a.buf[:n], answers)
		q := question{number, n}
		if err == nil && a.open[q] == 0 {
			err = fmt.Errorf("an answer of %d bytes, number %d, that was not waited for", n, number)
		}
		if good = err == nil; !good {
			if a.Wrong++; a.Wrong == 1 {
				a.What = err
			}
			continue
		}
		a.open[q]--
		a.waiting--
		a.Answered++
		a.Bytes += n
	}
	return nil
}
