package telemetry

import (
	"math/bits"
	"sync/atomic"
)

// A Block is the counters of one direction of one queue. It has one owner: no
// method may be called by two goroutines at once. Readers use [Set.Snapshot].
//
// Counting is plain arithmetic on private words. [Block.Publish] shows the
// changed ones to readers.
type Block struct {
	_ [128]byte // blocks never share a line, wherever the allocator puts them

	// Written and read by the owner only.
	words [BlockWords]uint64
	dirty [BlockWords / 64]uint64 // words changed since the last Publish
	gen   uint64
	seen  *sink // what was published to last

	_ [128]byte

	// Written by the owner, read by anyone.
	public [BlockWords]atomic.Uint64
	sink   atomic.Pointer[sink] // written by Set only

	_ [128]byte
}

// sink is where a block is mirrored outside the heap.
type sink struct {
	words []uint64           // BlockWords of them
	base  [BlockWords]uint64 // totals of an earlier process that the mirror continues
}

// Add adds n to c.
func (b *Block) Add(c Counter, n uint64) {
	b.words[c&(BlockWords-1)] += n
	b.dirty[c>>6&1] |= 1 << (c & 63)
}

// Drop counts n frames lost for reason r, and with it rx_dropped or rx_errors
// (tx_... in a transmit block). There is no other way to count a lost frame, so
// that the reasons always add up to those two.
func (b *Block) Drop(r Reason, n uint64) {
	b.Add(Counter(r), n)
	if r < firstError {
		b.Add(droppedSum, n)
	} else {
		b.Add(errorsSum, n)
	}
}

// Set sets g to v.
func (b *Block) Set(g Gauge, v uint64) {
	b.words[g&(BlockWords-1)] = v
	b.dirty[g>>6&1] |= 1 << (g & 63)
}

// Max raises g to v if it is lower.
func (b *Block) Max(g Gauge, v uint64) {
	if b.words[g&(BlockWords-1)] < v {
		b.Set(g, v)
	}
}

// Observe counts v in the bucket of h it belongs to.
func (b *Block) Observe(h Hist, v uint64) {
	s := &shapes[h]
	i := min(bits.Len64((max(v, 1)-1)>>s.shift), int(s.last))
	b.Add(Counter(int(s.word)+i), 1)
	b.Add(Counter(s.word+s.last+1), v)
}

// Publish shows readers what changed since the last Publish: call it every 32
// frames and before every park. It neither allocates nor blocks, makes no system
// call and costs a few nanoseconds when nothing changed.
func (b *Block) Publish() {
	if b.dirty[0]|b.dirty[1] == 0 && b.sink.Load() == b.seen {
		return
	}
	b.gen++
	b.public[wordStart].Store(b.gen) // before sink is loaded: Set.detach waits on it
	s := b.sink.Load()
	if s != b.seen {
		b.seen = s
		b.dirty = allDirty
	}
	if s != nil {
		atomic.StoreUint64(&s.words[wordStart], b.gen)
	}
	for i, d := range b.dirty {
		for ; d != 0; d &= d - 1 {
			w := (i*64 + bits.TrailingZeros64(d)) & (BlockWords - 1)
			v := b.words[w]
			b.public[w].Store(v)
			if s != nil {
				atomic.StoreUint64(&s.words[w], v+s.base[w])
			}
		}
	}
	b.dirty = [BlockWords / 64]uint64{}
	if s != nil {
		atomic.StoreUint64(&s.words[wordDone], b.gen)
	}
	b.public[wordDone].Store(b.gen)
}

// allDirty is every word but the two markers.
var allDirty = [BlockWords / 64]uint64{^uint64(1), ^uint64(0) >> 1}

// Refresh publishes every word, changed or not, and gives the number of words of
// the mirror that were not as the last Publish left them: somebody else wrote
// there. They are put right and counted in mirror_healed. Call it on the slow
// tick, as the owner.
func (b *Block) Refresh() (healed int) {
	if s := b.seen; s != nil && s == b.sink.Load() {
		for w := range s.words {
			if atomic.LoadUint64(&s.words[w]) != b.public[w].Load()+s.base[w] {
				healed++
			}
		}
	}
	if healed > 0 {
		b.Add(MirrorHealed, uint64(healed))
	}
	b.dirty = allDirty
	b.Publish()
	return healed
}

// read copies the public words and reports whether they belong together: the
// markers are read in the order opposite to that in which Publish writes them.
func (b *Block) read(to *[BlockWords]uint64) bool {
	done := b.public[wordDone].Load()
	for w := 1; w < wordStart; w++ {
		to[w] = b.public[w].Load()
	}
	return b.public[wordStart].Load() == done
}
