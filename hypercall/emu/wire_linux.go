package emu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
)

// Host and domain communicate over a SOCK_SEQPACKET socket. One packet is one request or
// its reply; descriptors accompany the reply, and there is one request at a time. Both
// ends are the same build of this package.

const (
	wireVersion = 3
	maxPacket   = 192 << 10 // below the default SO_SNDBUF of 208 KiB
	maxFDs      = 2
	maxWireRefs = 8192 // in one request or reply: the run of each takes 20 bytes
)

type opcode uint8

const (
	opJoin opcode = iota + 1
	opKeepPages
	opDropPages
	opShare
	opEndShare
	opMap
	opUnmap
	opAttach
	opLookup
	opWaiter
	opCloseWaiter
	opUnbound
	opBind
	opClosePort
	opFarEnd
	opStore
	opCloseStore
	opOffer
	opWithdraw
	opAdoptShare
	opAdoptWaiter
	opForget
	opLeave
)

// A request is followed by refs.
type request struct {
	Op     opcode
	Access hypercall.Access
	Refuse bool
	Beside bool // of opJoin: also if the domain lives
	Peer   hypercall.DomID
	N      uint32 // pages, port, ref, number of shares, index or protocol version
	Gen    uint32
	ID     uint64
}

// A reply is followed by NRefs refs, NRuns runs and, for an error without a code, its
// text.
type reply struct {
	Code         wireCode
	Access       hypercall.Access
	Peer         hypercall.DomID // of an adopted share
	Grant        grantError
	Slot         uint32
	Port, Gen    uint32
	Grants       uint32 // size of a grant table
	Ports        uint32 // size of an event table
	ID           uint64
	NRefs, NRuns uint32
}

// A grantError is a hypercall.GrantError of fixed size.
type grantError struct {
	Copy   bool // else map
	Dom    hypercall.DomID
	Ref    hypercall.GrantRef
	Status hypercall.Status
}

type wireCode uint8

const (
	wireOK wireCode = iota
	wireText
	wireGrant
	wireFirst // code of the first error in wireErrors
)

// wireErrors returns the errors that keep their identity.
func wireErrors() []error {
	return []error{
		hypercall.ErrNoGrants, hypercall.ErrInUse, hypercall.ErrNoPort, hypercall.ErrNoPorts,
		hypercall.ErrNoDomain, ErrDomainExists, ErrTooManyDomains, errDead, errClosed, errNoStore,
		errNoPages, errNoWaiter, hypercall.ErrNoOffer, errOffered,
	}
}

func (r *reply) setError(err error) (text string) {
	var ge *hypercall.GrantError
	if errors.As(err, &ge) {
		r.Code = wireGrant
		r.Grant = grantError{ge.Op == "copy", ge.Dom, ge.Ref, ge.Status}
		return ""
	}
	if i := slices.IndexFunc(wireErrors(), func(e error) bool { return errors.Is(err, e) }); i >= 0 {
		r.Code = wireFirst + wireCode(i)
		return ""
	}
	r.Code = wireText
	return err.Error()
}

func (r *reply) error(text []byte) error {
	known := wireErrors()
	switch {
	case r.Code == wireOK:
		return nil
	case r.Code == wireGrant:
		e := &hypercall.GrantError{Op: "map", Dom: r.Grant.Dom, Ref: r.Grant.Ref, Status: r.Grant.Status}
		if r.Grant.Copy {
			e.Op = "copy"
		}
		return e
	case r.Code >= wireFirst && int(r.Code-wireFirst) < len(known):
		return known[r.Code-wireFirst]
	}
	return fmt.Errorf("emu: the host: %s", text)
}

// A packet is the result of one read.
type packet struct {
	data []byte
	fds  []int
}

// closeFDs closes the descriptors that nobody took.
func (p *packet) closeFDs() {
	for _, fd := range p.fds {
		unix.Close(fd)
	}
	p.fds = nil
}

// takeFD gives the next descriptor to the caller.
func (p *packet) takeFD() (int, error) {
	if len(p.fds) == 0 {
		return -1, errors.New("emu: the host sent no descriptor")
	}
	fd := p.fds[0]
	p.fds = p.fds[1:]
	return fd, nil
}

// readPacket reads into buf, which must have room for the largest packet. Package net
// sets MSG_CMSG_CLOEXEC.
func readPacket(c *net.UnixConn, buf []byte) (packet, error) {
	oob := make([]byte, unix.CmsgSpace(maxFDs*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return packet{}, err
	}
	p := packet{data: buf[:n]}
	if oobn > 0 {
		if p.fds, err = parseFDs(oob[:oobn]); err != nil {
			return packet{}, err
		}
	}
	if n == 0 || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		p.closeFDs()
		if n == 0 {
			return packet{}, io.EOF
		}
		return packet{}, errors.New("emu: a packet is too long")
	}
	return p, nil
}

func parseFDs(oob []byte) ([]int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("emu: control message: %w", err)
	}
	var fds []int
	for i := range msgs {
		if got, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds, nil
}

func writePacket(c *net.UnixConn, data []byte, fds []int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := c.WriteMsgUnix(data, oob, nil)
	return err
}

func encode(parts ...any) ([]byte, error) {
	var b []byte
	var err error
	for _, p := range parts {
		if b, err = binary.Append(b, binary.NativeEndian, p); err != nil {
			return nil, fmt.Errorf("emu: encode: %w", err)
		}
	}
	if len(b) > maxPacket {
		return nil, errors.New("emu: too many refs for one call")
	}
	return b, nil
}

// decode fills v and returns the bytes after it.
func decode(b []byte, v any) ([]byte, error) {
	n, err := binary.Decode(b, binary.NativeEndian, v)
	if err != nil {
		return nil, fmt.Errorf("emu: decode: %w", err)
	}
	return b[n:], nil
}

// fdOf returns a duplicate descriptor of the file. File.Fd would make the file blocking,
// and an eventfd shares that state with the other processes.
func fdOf(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, dupErr := -1, error(nil)
	if err := rc.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return -1, err
	}
	return fd, dupErr
}
