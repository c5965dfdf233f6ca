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

// MaxDatagram is the largest payload of UDP over IPv4, in bytes.
const MaxDatagram = 65535 - 20 - 8

// Which way a datagram goes. An answer is no question, so that two ends that answer
// do not keep each other busy.
const (
	asks    = 'q'
	answers = 'a'
)

// numbered is the size from which a datagram says which one it is: a way in 4
// bytes, its number, and the CRC-32C of all that is not the CRC.
const numbered = 12

// datagram makes the datagram of a way, a number and a size: every byte follows
// from them. One shorter than numbered is the same whatever its number.
func datagram(way byte, number uint32, size int) ([]byte, error) {
	at := int64(number) << 16 // no two have bytes of the Blob in common
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
	table := crc32.MakeTable(crc32.Castagnoli) // the package's own, made once
	sum := crc32.Update(crc32.Checksum(b[:8], table), table, b[numbered:])
	binary.BigEndian.PutUint32(b[8:], sum)
	return b, nil
}

// check says which datagram of a way b is, or what is wrong with it.
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

// Answer answers the datagrams of [Ask] until c fails or is closed, and gives that
// error. A datagram gets an answer of its size, or none if it is not whole.
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
		// One that cannot be sent is lost, as any datagram may be.
		if _, err := c.WriteTo(b, from); errors.Is(err, net.ErrClosed) {
			return err
		}
	}
}

// A Tally is what became of datagrams.
type Tally struct {
	Asked    int
	Answered int
	Bytes    int   // of payload in the answers
	Wrong    int   // neither a whole answer nor one that was waited for
	What     error // about the first of those
}

// Lost is how many were not answered.
func (t *Tally) Lost() int { return t.Asked - t.Answered }

// How much is on its way at once: at most window datagrams, and room bytes, which
// the buffer of a socket holds.
const (
	window = 16
	room   = 64 << 10
)

// Ask sends a datagram of each of the sizes through c, a UDP socket connected to one
// that has [Answer], and compares what comes back byte by byte. It sends some, waits
// until each is answered or none has been for as long as patience, and goes on.
//
// Its error is ctx's cause, within patience of its end, or c's.
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

// A question is a datagram that wants an answer. The number is 0 in those that do
// not say it.
type question struct {
	number uint32
	size   int
}

type asker struct {
	Tally
	c        net.Conn
	open     map[question]int // how many such wait; those given up too, which may be late
	waiting  int              // how many were just sent
	patience time.Duration
	buf      [MaxDatagram]byte
}

// send asks some of sizes, and says how many.
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

// receive waits for as many answers as questions were sent, as long as some come.
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
