package pvnet

import "barevif/telemetry"

// A tally sums up the frames of a batch, so that they are counted once. Frames of equal
// size in a row are a run, which is added when the size changes.
type tally struct {
	block                                       *telemetry.Block
	size, run                                   uint64 // bytes of each frame of the run, and the number of frames
	frames, bytes, slots, multi, broad, chained uint64
	partial, gso, verified                      uint64
}

// plain counts a frame of one slot. head has at least its first 6 bytes. Most frames of a
// batch are like the one before, and these it counts without a call.
func (t *tally) plain(size int, head []byte) {
	if uint64(size) != t.size || head[0]&1 != 0 {
		t.other(uint64(size), head)
	}
	t.run++
}

// other is the part of plain for a frame of another size than the one before, or to a group.
func (t *tally) other(size uint64, head []byte) {
	if size != t.size {
		t.settle()
		t.size = size
	}
	if head[0]&1 != 0 {
		t.group(head)
	}
}

// settle adds the present run and ends it.
func (t *tally) settle() {
	if t.run == 0 {
		return
	}
	t.block.ObserveN(telemetry.FrameSize, t.size, t.run)
	t.frames += t.run
	t.slots += t.run
	t.bytes += t.run * t.size
	t.run = 0
}

// group counts a frame to a multicast or broadcast address.
func (t *tally) group(head []byte) {
	if [6]byte(head[:6]) == ([6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}) {
		t.broad++
	} else {
		t.multi++
	}
}

// sent is add for a frame that is sent: it counts its offloads too.
func (t *tally) sent(f *Frame, slots int, head []byte) {
	if f.csum == ChecksumPartial {
		t.partial++
		if f.gso.Size != 0 {
			t.gso++
		}
	}
	t.add(f, slots, head)
}

// add counts f, which takes that many slots and begins with head.
func (t *tally) add(f *Frame, slots int, head []byte) {
	if slots == 1 {
		t.plain(int(f.total), head)
		return
	}
	t.block.Observe(telemetry.FrameSize, uint64(f.total))
	t.frames++
	t.bytes += uint64(f.total)
	t.slots += uint64(slots)
	t.chained++
	if head[0]&1 != 0 {
		t.group(head)
	}
}

// countCopied is count for a batch of which all bytes but uncopied were copied.
func (t *tally) countCopied(uncopied uint64, used uint32, buffers int) {
	t.settle()
	t.block.Add(telemetry.CopiedBytes, t.bytes-uncopied)
	t.count(used, buffers)
}

// count adds the batch to the block. used is how many slots of the ring are in use now,
// buffers how many buffers are free.
func (t *tally) count(used uint32, buffers int) {
	t.settle()
	b := t.block
	b.Set(telemetry.RingUsed, uint64(used))
	b.Max(telemetry.RingUsedMax, uint64(used))
	b.Observe(telemetry.RingOccupancy, uint64(used))
	b.Set(telemetry.BuffersFree, uint64(buffers))
	if t.frames == 0 {
		return
	}
	b.Add(telemetry.Packets, t.frames)
	b.Add(telemetry.Bytes, t.bytes)
	b.Add(telemetry.Slots, t.slots)
	if t.multi|t.broad|t.chained != 0 {
		b.Add(telemetry.Multicast, t.multi)
		b.Add(telemetry.Broadcast, t.broad)
		b.Add(telemetry.ChainedPackets, t.chained)
	}
	if t.partial != 0 {
		b.Add(telemetry.CsumPartial, t.partial)
		b.Add(telemetry.GSOPackets, t.gso)
	}
	if t.verified != 0 {
		b.Add(telemetry.CsumVerified, t.verified)
	}
	b.Observe(telemetry.BatchSize, t.frames)
}
