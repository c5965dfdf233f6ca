package telemetry

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// A Block is the counters of one direction of one queue. It has one owner: no two
// goroutines may call its methods at once. Readers use [Set.Snapshot].
//
// Counting changes private words by plain arithmetic. [Block.Publish] and [Block.Flush]
// show the changed words to readers.
type Block struct {
	_ [128]byte // no two blocks share a cache line, wherever the allocator puts them

	// Used by the owner only.
	words [BlockWords]uint64
	dirty [BlockWords / 64]uint64 // a bit for each word that changed since it was published

	_ [128]byte

	// mu is held while public is copied. While frames move the owner only tries to lock
	// it, so that a reader never delays the owner.
	mu     sync.Mutex
	public [BlockWords]uint64 // guarded by mu
	gen    uint64             // guarded by mu: generation of the latest publish to sink
	sink   *sink              // guarded by mu

	_ [128]byte
}

// A sink is the mirror of a block outside the heap. The owner writes its words with the
// block's lock held; only other processes read them.
type sink struct {
	words *[BlockWords]uint64
	base  [BlockWords]uint64 // totals of an earlier process from which the mirror continues
}

// Add adds n to c.
func (b *Block) Add(c Counter, n uint64) {
	b.words[c&(BlockWords-1)] += n
	b.dirty[c>>6&1] |= 1 << (c & 63)
}

// Drop counts n frames lost for reason r, and adds them to rx_dropped or rx_errors
// (tx_... in a transmit block). It is the only way to count a lost frame, so the reasons
// always add up to these two.
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

// Observe is ObserveN for one value.
func (b *Block) Observe(h Hist, v uint64) { b.ObserveN(h, v, 1) }

// ObserveN counts n times the value v, in its bucket of h.
func (b *Block) ObserveN(h Hist, v, n uint64) {
	s := &shapes[h]
	i := s.word + uint8(min(bits.Len64((max(v, 1)-1)>>s.shift), int(s.last)))
	b.words[i&(BlockWords-1)] += n
	b.dirty[i>>6&1] |= 1 << (i & 63)
	b.words[s.sum&(BlockWords-1)] += v * n
	b.dirty[s.sum>>6&1] |= 1 << (s.sum & 63)
}

// Publish shows readers the changed words; call it every 32 frames. It never waits: while
// a reader copies, the change stays for the next Publish or Flush. It does not allocate
// and makes no system call.
func (b *Block) Publish() {
	if b.dirty[0]|b.dirty[1] == 0 || !b.mu.TryLock() {
		return
	}
	b.publishLocked()
	b.mu.Unlock()
}

// Flush is Publish for an owner that is about to park, perhaps for long: it waits until a
// reader has finished its copy of one kilobyte.
func (b *Block) Flush() {
	if b.dirty[0]|b.dirty[1] == 0 {
		return
	}
	b.mu.Lock()
	b.publishLocked()
	b.mu.Unlock()
}

// Refresh publishes every word, changed or not. It first counts the words of the mirror
// that another process has changed, adds them to mirror_healed and returns the number.
// Call it on the slow tick.
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

// allDirty has a bit for every word but the two markers.
var allDirty = [BlockWords / 64]uint64{^uint64(1), ^uint64(0) >> 1}

// publishLocked stores the start marker first and the done marker last. They are the last
// and the first word: a reader that copies the block upwards and finds them equal has the
// words of one instant.
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

// attach mirrors the block to s from now on; with a nil s it ends mirroring.
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

// read copies the words as last published.
func (b *Block) read(to *[BlockWords]uint64) {
	b.mu.Lock()
	*to = b.public
	b.mu.Unlock()
}
