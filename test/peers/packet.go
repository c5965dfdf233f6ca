package main

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// packetPeer is a packet socket at each end of a veth pair.
func (n *network) packetPeer(batch int) peer {
	return setupFunc(func(*job) (link, error) {
		a, b, err := n.packetSockets()
		if err != nil {
			return nil, err
		}
		return &fdLink{a: a, b: b, batch: batch, lossy: true, end: func() { unix.Close(a); unix.Close(b) }}, nil
	})
}

func (n *network) packetSockets() (a, b int, err error) {
	if n.err != nil {
		return -1, -1, n.err
	}
	if a, err = packetSocket(vethA); err != nil {
		return -1, -1, err
	}
	if b, err = packetSocket(vethB); err != nil {
		unix.Close(a)
		return -1, -1, err
	}
	return a, b, nil
}

func packetSocket(device string) (fd int, err error) {
	const protocol = etherType>>8 | etherType&0xff<<8 // in network order
	if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol); err != nil {
		return -1, &missing{"a packet socket", "it needs CAP_NET_RAW in its network namespace", err}
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	index, err := ifIndex(device)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: index}); err != nil {
		return -1, fmt.Errorf("bind to %s: %w", device, err)
	}
	// These options make the socket faster or lose less. They fail on an older kernel, or
	// for a user who may not force buffers, and the socket works all the same.
	_ = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2<<20)
	return fd, setTimeouts(fd)
}

// A ringLink has packet sockets with mapped rings: TPACKET_V2 to send, 32 frames per call,
// and TPACKET_V3 to receive, in blocks.
type ringLink struct {
	a, b     int
	out, in  []byte
	outFrame int // size of a frame of out, in bytes
}

// A frame of out begins with struct tpacket2_hdr, whose first words are the status and the
// length. The data follows. A block of in begins with struct tpacket_block_desc, whose header
// is at offset 8.
const (
	frameLength   = 4
	frameData     = 32 // TPACKET2_HDRLEN - sizeof(struct sockaddr_ll)
	blockHeader   = 8
	blockBytes    = 1 << 19
	blocks        = 16
	retireMillis  = 2
	outFrameBytes = 1 << 20 // total size of the frames of out
)

func (n *network) ringPeer(j *job) (link, error) {
	a, b, err := n.packetSockets()
	if err != nil {
		return nil, err
	}
	l := &ringLink{a: a, b: b, outFrame: 2048}
	for l.outFrame < j.size+frameData {
		l.outFrame *= 2
	}
	frames := max(outFrameBytes/l.outFrame, 64)
	block := max(l.outFrame, 1<<16)
	err = errors.Join(
		unix.SetsockoptInt(a, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V2),
		unix.SetsockoptTpacketReq(a, unix.SOL_PACKET, unix.PACKET_TX_RING, &unix.TpacketReq{Block_size: uint32(block),
			Block_nr: uint32(frames * l.outFrame / block), Frame_size: uint32(l.outFrame), Frame_nr: uint32(frames)}),
		unix.SetsockoptInt(b, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V3),
		unix.SetsockoptTpacketReq3(b, unix.SOL_PACKET, unix.PACKET_RX_RING, &unix.TpacketReq3{Block_size: blockBytes,
			Block_nr: blocks, Frame_size: 2048, Frame_nr: blockBytes / 2048 * blocks, Retire_blk_tov: retireMillis}))
	if err != nil {
		l.close()
		return nil, &missing{"rings of a packet socket", "they need a kernel with TPACKET_V3", err}
	}
	if l.out, err = mapMemory(a, frames*l.outFrame); err == nil {
		l.in, err = mapMemory(b, blockBytes*blocks)
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *ringLink) close() error {
	for _, b := range [][]byte{l.out, l.in} {
		if b != nil {
			unix.Munmap(b)
		}
	}
	unix.Close(l.a)
	unix.Close(l.b)
	return nil
}

func (l *ringLink) send(j *job) error {
	src, sent := j.source(), tally{to: &j.sent}
	for next := 0; !j.stopped(); {
		n := 0
		for ; n < 32; n++ {
			frame := l.out[next : next+l.outFrame]
			status := at[atomic.Uint32](frame, 0)
			if s := status.Load(); s == unix.TP_STATUS_WRONG_FORMAT {
				return errors.New("the kernel refused the format of a frame")
			} else if s != unix.TP_STATUS_AVAILABLE {
				break
			}
			*at[uint32](frame, frameLength) = uint32(j.size)
			copy(frame[frameData:], src.next())
			status.Store(unix.TP_STATUS_SEND_REQUEST)
			next = (next + l.outFrame) % len(l.out)
		}
		if err := unix.Send(l.a, nil, unix.MSG_DONTWAIT); err != nil && !shouldRetry(err) {
			return fmt.Errorf("send: %w", err)
		}
		sent.add(n)
	}
	return nil
}

func (l *ringLink) receive(j *job) error {
	s, rcvd := j.sink(), tally{to: &j.rcvd}
	poll := []unix.PollFd{{Fd: int32(l.b), Events: unix.POLLIN}}
	for next := 0; !j.stopped(); {
		block := l.in[next : next+blockBytes]
		header := at[unix.TpacketHdrV1](block, blockHeader)
		status := at[atomic.Uint32](block, blockHeader)
		if status.Load()&unix.TP_STATUS_USER == 0 {
			if _, err := unix.Poll(poll, 20); err != nil && err != unix.EINTR {
				return fmt.Errorf("poll: %w", err)
			}
			continue
		}
		off := int(header.Offset_to_first_pkt)
		for range header.Num_pkts {
			p := at[unix.Tpacket3Hdr](block, off)
			copy(s.frame, block[off+int(p.Mac):][:p.Snaplen])
			off += int(p.Next_offset)
		}
		rcvd.add(int(header.Num_pkts))
		status.Store(unix.TP_STATUS_KERNEL)
		next = (next + blockBytes) % len(l.in)
	}
	return nil
}
