// Package wire is the framing of the xenstore protocol (docs/misc/xenstore.txt
// and xen/include/public/io/xs_wire.h): a 16-byte header and at most 4096 bytes.
package wire

import (
	"encoding/binary"
	"errors"
	"io"
)

// An Op is the type of a message (enum xsd_sockmsg_type).
type Op uint32

const (
	Control            Op = 0
	Directory          Op = 1
	Read               Op = 2
	GetPerms           Op = 3
	Watch              Op = 4
	Unwatch            Op = 5
	TransactionStart   Op = 6
	TransactionEnd     Op = 7
	Introduce          Op = 8
	Release            Op = 9
	GetDomainPath      Op = 10
	Write              Op = 11
	Mkdir              Op = 12
	Rm                 Op = 13
	SetPerms           Op = 14
	WatchEvent         Op = 15
	Error              Op = 16
	IsDomainIntroduced Op = 17
	Resume             Op = 18
	SetTarget          Op = 19
	ResetWatches       Op = 21
	DirectoryPart      Op = 22
	GetFeature         Op = 23
	SetFeature         Op = 24
	GetQuota           Op = 25
	SetQuota           Op = 26
)

const (
	// HeaderSize is sizeof(struct xsd_sockmsg).
	HeaderSize = 16
	// MaxPayload is XENSTORE_PAYLOAD_MAX; a daemon drops a connection that
	// sends more.
	MaxPayload = 4096
	// MaxAbsPath and MaxRelPath are XENSTORE_ABS_PATH_MAX and _REL_PATH_MAX.
	MaxAbsPath = 3072
	MaxRelPath = 2048
)

// A Header precedes every message (struct xsd_sockmsg).
type Header struct {
	Op    Op
	ReqID uint32
	TxID  uint32
	Len   uint32 // bytes of payload that follow
}

// ErrTooLong is a message whose payload is over [MaxPayload]. The stream cannot
// be used any further.
var ErrTooLong = errors.New("xenstore message longer than 4096 bytes")

// Append encodes the message to b. The payload is the parts, one after the
// other; h.Len is ignored.
func Append(b []byte, h Header, parts ...string) ([]byte, error) {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if n > MaxPayload {
		return b, ErrTooLong
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(h.Op))
	b = binary.LittleEndian.AppendUint32(b, h.ReqID)
	b = binary.LittleEndian.AppendUint32(b, h.TxID)
	b = binary.LittleEndian.AppendUint32(b, uint32(n))
	for _, p := range parts {
		b = append(b, p...)
	}
	return b, nil
}

// ReadMessage reads one message from r. Its payload is a slice of buf, which must
// hold [HeaderSize]+[MaxPayload] bytes; the length a peer claims is checked
// before it is used.
func ReadMessage(r io.Reader, buf []byte) (Header, []byte, error) {
	if _, err := io.ReadFull(r, buf[:HeaderSize]); err != nil {
		return Header{}, nil, err
	}
	h := Header{
		Op:    Op(binary.LittleEndian.Uint32(buf)),
		ReqID: binary.LittleEndian.Uint32(buf[4:]),
		TxID:  binary.LittleEndian.Uint32(buf[8:]),
		Len:   binary.LittleEndian.Uint32(buf[12:]),
	}
	if h.Len > MaxPayload {
		return h, nil, ErrTooLong
	}
	p := buf[HeaderSize : HeaderSize+h.Len]
	if _, err := io.ReadFull(r, p); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return h, nil, err
	}
	return h, p, nil
}
