// Package raw is a hand-written frontend and backend: ring pages, grants, event channels
// and xenstore keys, without an engine that would prevent them from writing what no
// correct peer writes.
//
// It shares no code with pvnet, pvnet/ring or pvnet/netif: it repeats the layouts of
// xen/include/public/io/ring.h and netif.h. It refuses nothing. The caller that opens a
// [Front] or [Back] owns and closes it. Neither is safe for concurrent use, except that
// any goroutine may write a [Ring].
package raw

// Offsets of the indices of a ring page, and of its first slot.
const (
	ReqProd  = 0
	ReqEvent = 4
	RspProd  = 8
	RspEvent = 12
	Slots    = 64
	Size     = 256 // slots of a tx or rx ring
	CtrlSize = 128 // slots of a control ring
)

// A Ring is a ring page.
type Ring struct {
	page   []byte
	stride int
}

// TxRing, RxRing and CtrlRing view a page of 4096 bytes.
func TxRing(page []byte) Ring   { return Ring{page, 12} }
func RxRing(page []byte) Ring   { return Ring{page, 8} }
func CtrlRing(page []byte) Ring { return Ring{page, 16} }

// Load returns the word at byte off of the page; Store sets it.
func (r Ring) Load(off int) uint32     { return word(r.page, off).Load() }
func (r Ring) Store(off int, v uint32) { word(r.page, off).Store(v) }

// Bytes returns the page.
func (r Ring) Bytes() []byte { return r.page }

func (r Ring) at(i uint32) int {
	if r.stride == 16 {
		i %= CtrlSize
	}
	return Slots + int(i%Size)*r.stride
}

// Put writes the first words of slot i.
func (r Ring) Put(i uint32, words ...uint32) {
	for k, w := range words {
		r.Store(r.at(i)+4*k, w)
	}
}

// Get returns the words of slot i; for an rx slot the third word is 0.
func (r Ring) Get(i uint32) (w [3]uint32) {
	for k := range r.stride / 4 {
		w[k] = r.Load(r.at(i) + 4*k)
	}
	return w
}

// Flags. Bits 0 and 1 are swapped between the rings.
const (
	TxBlank, TxValidated, TxMore, TxExtra = 1, 2, 4, 8
	RxValidated, RxBlank, RxMore, RxExtra = 1, 2, 4, 8
)

// Statuses of responses.
const (
	Dropped = -2
	Error   = -1
	Okay    = 0
	Null    = 1
)

// A TxReq is a request on the tx ring.
type TxReq struct {
	Ref                     uint32
	Offset, Flags, ID, Size uint16
}

// Words returns the request as it is in its slot.
func (r TxReq) Words() [3]uint32 {
	return [3]uint32{r.Ref, pair(r.Offset, r.Flags), pair(r.ID, r.Size)}
}

// TxReqOf returns the request in the words of a slot.
func TxReqOf(w [3]uint32) TxReq {
	return TxReq{w[0], uint16(w[1]), uint16(w[1] >> 16), uint16(w[2]), uint16(w[2] >> 16)}
}

// A TxRsp is a response on the tx ring.
type TxRsp struct {
	ID     uint16
	Status int16
}

// Word returns the response as it is in its slot.
func (r TxRsp) Word() uint32 { return pair(r.ID, uint16(r.Status)) }

// An RxRsp is a response on the rx ring.
type RxRsp struct {
	ID, Offset, Flags uint16
	Status            int16
}

// Words returns the response as it is in its slot.
func (r RxRsp) Words() [2]uint32 {
	return [2]uint32{pair(r.ID, r.Offset), pair(r.Flags, uint16(r.Status))}
}

// RxRspOf returns the response in the words of a slot.
func RxRspOf(w [3]uint32) RxRsp {
	return RxRsp{uint16(w[0]), uint16(w[0] >> 16), uint16(w[1]), int16(w[1] >> 16)}
}

// An Extra is an extra info record, which takes a slot of either ring.
type Extra struct {
	Type, Flags uint8 // flag 1: another one follows
	Body        [6]byte
}

// Words returns the record as it is in its slot.
func (x Extra) Words() [3]uint32 {
	b := x.Body
	return [3]uint32{
		uint32(x.Type) | uint32(x.Flags)<<8 | uint32(b[0])<<16 | uint32(b[1])<<24,
		uint32(b[2]) | uint32(b[3])<<8 | uint32(b[4])<<16 | uint32(b[5])<<24,
		0,
	}
}

// GSO returns the extra that asks for segments of size bytes; kind 1 is TCPv4.
func GSO(size uint16, kind uint8) Extra {
	return Extra{Type: 1, Body: [6]byte{byte(size), byte(size >> 8), kind}}
}

func pair(lo, hi uint16) uint32 { return uint32(lo) | uint32(hi)<<16 }
