package telemetry

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// A Block is the counters of one direction of one queue. It has one owner: no
// method may be called by two goroutines at once. Readers use [Set.Snapshot].
//
// Counting is plain arithmetic on private words. [Block.Publish] and
// [Block.Flush] show the changed ones to readers.
type Block struct {
	_ [128]byte // blocks never share a line, wherever the allocator puts them

	// The owner's alone.
	words [BlockWords]uint64
	dirty [BlockWords / 64]uint64 // a bit per word that changed and is not yet public

	_ [128]byte

	// mu is held for the time of a copy. The owner only tries it while frames
	// move, so a reader never holds them up.
	mu     sync.Mutex
	public [BlockWords]uint64 // guarded by mu
	gen    uint64             // guarded by mu: of the latest publish to sink
	sink   *sink              // guarded by mu

	_ [128]byte
}

// sink is where a block is mirrored outside the heap. Its words are written
// under the block's lock and read by other processes only.
type sink struct {
	words *[BlockWords]uint64
	base  [BlockWords]uint64 // totals of an earlier process that the mirror continues
}

// Add adds n to c.
func (b *Block) Add(c Counter, n uint64) {
	b.words[c&(BlockWords-1)] += n
	b.dirty[c>>6&1] |= 1 << (c & 63)
}

// Drop counts n frames lost for reason r, and with it rx_dropped or rx_errors
// (tx_... in a transmit block). There is no other way to count a lost frame, so
// the reasons always add up to those two.
func (b *Block) Drop(r Reason, n uint64) {
	b.Add(r.sum(), n)
	b.words[r&(BlockWords-1)] += n
	b.dirty[r>>6&1] |= 1 << (r & 63)
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

// Observe is ObserveN of one value.
func (b *Block) Observe(h Hist, v uint64) { b.ObserveN(h, v, 1) }

// ObserveN counts n values v in the bucket of h they belong to.
func (b *Block) ObserveN(h Hist, v, n uint64) {
	s := &shapes[h]
	i := s.word + uint8(min(bits.Len64((max(v, 1)-1)>>s.shift), int(s.last)))
	b.words[i&(BlockWords-1)] += n
	b.dirty[i>>6&1] |= 1 << (i & 63)
	b.words[s.sum&(BlockWords-1)] += v * n
	b.dirty[s.sum>>6&1] |= 1 << (s.sum & 63)
}

// Publish shows readers what changed: call it every 32 frames. It never waits:
// when a reader is copying just now, the next Publish or Flush shows what this
// one would have. It does not allocate and makes no system call.
func (b *Block) Publish() {
	if b.dirty[0]|b.dirty[1] == 0 || !b.mu.TryLock() {
		return
	}
	b.publishLocked()
	b.mu.Unlock()
}

// Flush is Publish for an owner about to park, who may be gone for long: it
// waits for a reader to finish its copy of one kilobyte.
func (b *Block) Flush() {
	if b.dirty[0]|b.dirty[1] == 0 {
		return
	}
	b.mu.Lock()
	b.publishLocked()
	b.mu.Unlock()
}

// Refresh publishes every word, changed or not, and gives the number of words of
// the mirror that were not as they were left: somebody else wrote there. They
// are put right and counted in mirror_healed. Call it on the slow tick.
func (b *Block) Refresh() (healed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.sink; s != nil {
		for w := 1; w < wordStart; w++ {
			if atomic.LoadUint64(&s.words[w]) != b.public[w]+s.base[w] {
				healed++
			}
		}
		if atomic.LoadUint64(&s.words[wordStart]) != b.gen || atomic.LoadUint64(&s.words[wordDone]) != b.gen {
			healed++
		}
	}
	b.Add(MirrorHealed, uint64(healed))
	b.dirty = allDirty
	b.publishLocked()
	return healed
}

// allDirty is every word but the two markers.
var allDirty = [BlockWords / 64]uint64{^uint64(1), ^uint64(0) >> 1}

// publishLocked stores the start marker first and the done marker last. They are
// the last and the first word, so that whoever copies the block upwards and
// finds them equal has words of one instant.
func (b *Block) publishLocked() {
	s := b.sink
	if s == nil {
		for i, d := range b.dirty {
			for ; d != 0; d &= d - 1 {
				w := (i*64 + bits.TrailingZeros64(d)) & (BlockWords - 1)
				b.public[w] = b.words[w]
			}
		}
		b.dirty = [BlockWords / 64]uint64{}
		return
	}
	b.gen++
	put(&s.words[wordStart], b.gen)
	for i, d := range b.dirty {
		for ; d != 0; d &= d - 1 {
			w := (i*64 + bits.TrailingZeros64(d)) & (BlockWords - 1)
			v := b.words[w]
			b.public[w] = v
			put(&s.words[w], v+s.base[w])
		}
	}
	b.dirty = [BlockWords / 64]uint64{}
	put(&s.words[wordDone], b.gen)
}

// attach mirrors the block to s from now on, or nowhere if s is nil.
func (b *Block) attach(s *sink) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sink = s
	if s == nil {
		return
	}
	b.gen++
	put(&s.words[wordStart], b.gen)
	for w := 1; w < wordStart; w++ {
		put(&s.words[w], b.public[w]+s.base[w])
	}
	put(&s.words[wordDone], b.gen)
}

// read copies what was published last.
func (b *Block) read(to *[BlockWords]uint64) {
	b.mu.Lock()
	*to = b.public
	b.mu.Unlock()
}
