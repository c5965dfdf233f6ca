package link

import "encoding/binary"

// A segmenter cuts a frame that is still to be segmented, as the kernel would have
// done for a card without the offload (net/ipv4/tcp_offload.c, udp_offload.c).
type segmenter struct {
	frame []byte // whole, in one piece
	head  [256]byte
	ip    int // where the IP header starts
	l4    int // where the TCP or UDP header starts
	size  int // of all headers
	step  int // bytes of payload per segment
	udp   bool
	at    int // payload bytes cut so far
	index int
}

// maxSegments bounds the work one frame makes: 64 KiB in pieces of 64 bytes.
const maxSegments = 1024

// init looks at the headers, or reports that the frame cannot be cut: it is not
// the kind of packet off says, or the headers do not hold together.
func (s *segmenter) init(frame []byte, off Offload) bool {
	*s = segmenter{frame: frame, step: int(off.GSOSize), udp: off.GSO == GSOUDP}
	ip, kind, ok := network(frame)
	if !ok {
		return false
	}
	var proto byte
	packet := frame[ip:]
	switch {
	case kind == 0x0800 && off.GSO != GSOTCP6 && len(packet) >= 20 && packet[0]>>4 == 4:
		s.l4, proto = ip+int(packet[0]&15)*4, packet[9]
		if s.l4 < ip+20 || binary.BigEndian.Uint16(packet[6:])&0x3fff != 0 { // a fragment
			return false
		}
	case kind == 0x86dd && off.GSO != GSOTCP4 && len(packet) >= 40 && packet[0]>>4 == 6:
		s.l4, proto = ip+40, packet[6]
		// Hop-by-hop and destination options. With a routing header the checksum is
		// about another destination.
		for (proto == 0 || proto == 60) && s.l4 <= len(s.head) && len(frame) >= s.l4+8 {
			proto, s.l4 = frame[s.l4], s.l4+8+int(frame[s.l4+1])*8
		}
	default:
		return false
	}
	s.ip = ip
	switch {
	case s.udp && proto == 17:
		s.size = s.l4 + 8
	case (off.GSO == GSOTCP4 || off.GSO == GSOTCP6) && proto == 6 && len(frame) >= s.l4+20:
		s.size = s.l4 + int(frame[s.l4+12]>>4)*4
		if s.size < s.l4+20 {
			return false
		}
	default:
		return false
	}
	payload := len(frame) - s.size
	return s.size <= len(s.head) && payload > 0 && s.step > 0 && payload <= s.step*maxSegments
}

// network finds the network header behind at most two VLAN tags, and its EtherType.
func network(frame []byte) (at int, kind uint16, ok bool) {
	for at = 12; at <= 20 && len(frame) >= at+2; at += 4 {
		kind = binary.BigEndian.Uint16(frame[at:])
		if kind != 0x8100 && kind != 0x88a8 {
			return at + 2, kind, true
		}
	}
	return 0, 0, false
}

// next gives the headers and the payload of the next segment, which are good until
// the call after, or reports that there are no more.
func (s *segmenter) next() (head, payload []byte, more bool) {
	rest := s.frame[s.size+s.at:]
	if len(rest) == 0 {
		return nil, nil, false
	}
	payload = rest[:min(s.step, len(rest))]
	head = s.head[:s.size]
	copy(head, s.frame)
	ip, l4 := head[s.ip:], head[s.l4:]
	length := s.size - s.l4 + len(payload)
	var sum uint64 // of the pseudo header
	if ip[0]>>4 == 4 {
		binary.BigEndian.PutUint16(ip[2:], uint16(s.l4-s.ip+length))
		id := binary.BigEndian.Uint16(ip[4:])
		binary.BigEndian.PutUint16(ip[4:], id+uint16(s.index))
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^fold(addSum(0, ip[:s.l4-s.ip])))
		sum = addSum(uint64(ip[9]), ip[12:20])
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(s.l4-s.ip-40+length))
		sum = addSum(6, ip[8:40])
		if s.udp {
			sum += 17 - 6
		}
	}
	sum += uint64(length)
	field := 6
	if s.udp {
		binary.BigEndian.PutUint16(l4[4:], uint16(length))
	} else {
		field = 16
		seq := binary.BigEndian.Uint32(l4[4:])
		binary.BigEndian.PutUint32(l4[4:], seq+uint32(s.at))
		if len(payload) < len(rest) {
			l4[13] &^= 0x09 // FIN and PSH are the last one's
		}
		if s.index > 0 {
			l4[13] &^= 0x80 // CWR is the first one's
		}
	}
	l4[field], l4[field+1] = 0, 0
	// The header has an even length, so the payload starts a word.
	v := ^fold(addSum(addSum(sum, l4), payload))
	if v == 0 && s.udp {
		v = 0xffff
	}
	binary.BigEndian.PutUint16(l4[field:], v)
	s.at += len(payload)
	s.index++
	return head, payload, true
}

// addSum adds b as big-endian 16-bit words, padded with zero.
func addSum(sum uint64, b []byte) uint64 {
	for len(b) >= 8 {
		v := binary.BigEndian.Uint64(b)
		sum += v>>32 + v&0xffffffff
		b = b[8:]
	}
	for len(b) >= 2 {
		sum += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	return sum
}

func fold(sum uint64) uint16 {
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}
