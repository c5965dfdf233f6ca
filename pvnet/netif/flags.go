package netif

import (
	"strconv"
	"strings"
)

// TxFlags are the flags of a [TxRequest]: NETTXF_*. The two lowest bits are swapped with
// respect to [RxFlags].
type TxFlags uint16

const (
	TxCsumBlank     TxFlags = 1 // partial checksum: the field holds only the sum of the pseudo-header
	TxDataValidated TxFlags = 2 // the data has been validated against its checksum
	TxMoreData      TxFlags = 4 // the next request continues the packet
	TxExtraInfo     TxFlags = 8 // an Extra follows
)

// RxFlags are the flags of an [RxResponse]: NETRXF_*. The two lowest bits are swapped
// with respect to [TxFlags].
type RxFlags uint16

const (
	RxDataValidated RxFlags = 1
	RxCsumBlank     RxFlags = 2
	RxMoreData      RxFlags = 4
	RxExtraInfo     RxFlags = 8
	RxGSOPrefix     RxFlags = 16 // deprecated: the response carries a segment size and no data
)

// shared are the flags with the same bit in both directions.
const shared = uint16(TxMoreData | TxExtraInfo)

// Rx returns f as a backend writes it to the next frontend. It drops bits that mean
// nothing there.
func (f TxFlags) Rx() RxFlags { return RxFlags(swap(uint16(f))) }

// Tx returns f as a frontend writes it to the next backend. It drops bits that mean
// nothing there, such as [RxGSOPrefix].
func (f RxFlags) Tx() TxFlags { return TxFlags(swap(uint16(f))) }

func swap(f uint16) uint16 { return f&shared | f&1<<1 | f&2>>1 }

// Has reports whether every flag of g is set.
func (f TxFlags) Has(g TxFlags) bool { return f&g == g }

// Has reports whether every flag of g is set.
func (f RxFlags) Has(g RxFlags) bool { return f&g == g }

func (f TxFlags) String() string {
	return flagString(uint16(f), "csum-blank", "data-validated", "more-data", "extra-info")
}

func (f RxFlags) String() string {
	return flagString(uint16(f), "data-validated", "csum-blank", "more-data", "extra-info", "gso-prefix")
}

// flagString joins the names of the set bits. Bits without a name follow as one number.
func flagString(f uint16, names ...string) string {
	if f == 0 {
		return "0"
	}
	var set []string
	for bit, name := range names {
		if f&(1<<bit) != 0 {
			set = append(set, name)
		}
	}
	if rest := f >> len(names) << len(names); rest != 0 {
		set = append(set, "0x"+strconv.FormatUint(uint64(rest), 16))
	}
	return strings.Join(set, "|")
}
