package hostile

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/test/hostile/raw"
)

// A script is a hostile peer: operations of 8 bytes each. Byte 0 selects the operation,
// the other bytes are its arguments.
//
//	0-99    put a slot: 2 low bytes of a word, flags, size or status
//	100-139 put an extra: type, flags, body
//	140-179 publish what was put
//	180-199 publish more or less than was put
//	200-219 write any word of the ring page
//	220-239 take answers, as a correct peer does
//	240-255 rewrite a slot that was put before
type script []byte

// ops yields the operations; an incomplete one at the end does not count.
func (s script) ops(yield func(op [8]byte) bool) {
	for ; len(s) >= 8; s = s[8:] {
		if !yield([8]byte(s)) {
			return
		}
	}
}

func encodeScript(ops ...[]byte) (s []byte) {
	for _, op := range ops {
		var b [8]byte
		copy(b[:], op)
		s = append(s, b[:]...)
	}
	return s
}

// addSeeds are one script per row of attacks.
func addSeeds(f *testing.F) {
	put := func(flags byte, size uint16, offset uint16) []byte {
		return []byte{0, 1, flags, byte(size), byte(size >> 8), byte(offset), byte(offset >> 8)}
	}
	publish := []byte{140}
	chain := func(n int, size uint16) (ops [][]byte) {
		for i := range n {
			flags := byte(raw.TxMore)
			if i == n-1 {
				flags = 0
			}
			ops = append(ops, put(flags, size, 0))
		}
		return append(ops, publish)
	}
	for _, s := range [][][]byte{
		{put(0, 60, 0), publish, {220}}, // a correct frame
		{{180, 1, 1}},                   // T01
		{put(0, 60, 0), publish, {180, 255, 255}, {180, 255, 0}},                    // T02
		{put(0, 60, 0), {240, 0, 7}, publish},                                       // T03
		{{200, 8, 0, 9}, {200, 0, 0, 0, 1}},                                         // T04
		chain(2, 60), chain(19, 100), chain(20, 100), chain(22, 0), chain(24, 4096), // T06, T07
		{put(0, 4096, 1), publish}, {put(0, 65535, 0), publish}, {put(0, 13, 0), publish}, // T09
		{put(8, 60, 0), {100, 0, 0}, publish}, {put(8, 60, 0), {100, 1, 1, 0, 0, 1}, {100, 1, 0, 255, 255, 2}, publish}, // T10
		{put(8, 0, 0), {100, 2, 0, 1, 0, 94}, publish}, {put(8, 60, 0), publish}, {put(1, 60, 0), publish},
	} {
		f.Add(encodeScript(s...))
	}
}

// FuzzTxParse runs a frontend's script against our backend's parser. The device lives or
// ends with a PeerError, and all resources come back.
func FuzzTxParse(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 8*600 {
			return
		}
		l := newLab(t, emu.Config{Mapped: true})
		l.serve(pvnet.ServeConfig{Config: pvnet.Config{Buffers: 64, Offload: len(in)%32 >= 16}})
		g := l.attackBackend()
		for op := range script(in).ops {
			a, b := binary.LittleEndian.Uint16(op[3:]), binary.LittleEndian.Uint16(op[5:])
			switch c := op[0]; {
			case c < 100:
				r := g.Req(int(op[1]), b, a, uint16(op[2])|uint16(op[7])<<8)
				g.Put(r.Words())
			case c < 140:
				g.Put(raw.Extra{Type: op[1], Flags: op[2], Body: [6]byte(append(op[3:8:8], c))}.Words())
			case c < 180:
				g.Push()
			case c < 200:
				g.Tx.Store(raw.ReqProd, g.TxProd+uint32(int32(int16(binary.LittleEndian.Uint16(op[1:])))))
				g.TxPort.Notify()
			case c < 220:
				g.Tx.Store(int(op[1])%1024*4, binary.LittleEndian.Uint32(op[3:]))
			case c < 240:
				g.Answers(1, time.Now().Add(200*time.Microsecond))
			default:
				g.Tx.Put(g.TxProd-uint32(op[1]), binary.LittleEndian.Uint32(op[2:]), uint32(a)<<8|uint32(op[7]))
			}
		}
		g.Push()
		g.Answers(1, time.Now().Add(200*time.Microsecond))
		g.disconnect()
		if n := l.log.count(slog.LevelError); n > 1 {
			t.Errorf("%d lines\n%s", n, l.log)
		}
	})
}

// FuzzRxParse runs a backend's script against our frontend's parsers of both rings.
func FuzzRxParse(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 8*600 {
			return
		}
		l := newLab(t, emu.Config{Mapped: true})
		drv := l.attackFrontend(pvnet.Config{Buffers: 64, LendRx: len(in)%16 == 8, Offload: len(in)%32 >= 16})
		for op := range script(in).ops {
			a, b := binary.LittleEndian.Uint16(op[3:]), binary.LittleEndian.Uint16(op[5:])
			switch c := op[0]; {
			case c < 100:
				drv.PutRx(raw.RxRsp{ID: uint16(drv.RxProd), Offset: b, Flags: uint16(op[2]), Status: int16(a)}.Words())
			case c < 140:
				w := raw.Extra{Type: op[1], Flags: op[2], Body: [6]byte(append(op[3:8:8], c))}.Words()
				drv.PutRx([2]uint32{w[0], w[1]})
			case c < 180:
				drv.PushRx()
			case c < 200:
				drv.Rx.Store(raw.RspProd, drv.RxProd+uint32(int32(int16(binary.LittleEndian.Uint16(op[1:])))))
				drv.RxPort.Notify()
			case c < 220:
				r := drv.Rx
				if op[7]&1 != 0 {
					r = drv.Tx
				}
				r.Store(int(op[1])%1024*4, binary.LittleEndian.Uint32(op[3:]))
			case c < 240:
				// A frame of the frontend, answered correctly or not.
				drv.dev.SetWriteDeadline(time.Now().Add(200 * time.Microsecond))
				_, err := drv.dev.Write(pattern(14+int(a)%9000, 0))
				if errors.Is(err, pvnet.ErrDisconnected) {
					break
				}
				drv.Answer(raw.TxRsp{ID: b % 512, Status: int16(op[2])})
			default:
				drv.Rx.Put(drv.RxProd-uint32(op[1]), binary.LittleEndian.Uint32(op[2:]), uint32(a)<<8|uint32(op[7]))
			}
		}
		drv.PushRx()
		drv.dev.SetWriteDeadline(time.Now().Add(200 * time.Microsecond))
		drv.dev.Write(pattern(60, 0))
		go drv.dev.Disconnect()
		drv.awaitFrontend("5")
		drv.finishClose()
		if n := l.log.count(slog.LevelError); n > 1 {
			t.Errorf("%d lines\n%s", n, l.log)
		}
	})
}
