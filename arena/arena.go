// Package arena divides preallocated memory into buffers and records which of them are
// held.
//
// An [Arena] never allocates after [New]. It has one owner, which gets and puts buffers
// by number and without locks. It hands out the most recently used buffers first, so that
// an arena of reserved memory ([NewReserved]) touches only as many pages as were in use
// at one time. The owner gives others a [Buffer]: a small comparable value with a
// generation, which any goroutine may release. A Buffer that was released, or that the
// owner took over, is stale: every method refuses it, and it never names another holder's
// memory.
//
// Buffers may be linked into a chain that is held, lent and released as one.
//
// The arena does not know Xen: the memory may be private, granted or mapped.
package arena

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"barevif/arena/shm"
)

var (
	// ErrStale is returned for a buffer that was released or taken over before.
	ErrStale = errors.New("arena: buffer was already released")

	// ErrShared is returned for a buffer with several holders where one is required.
	ErrShared = errors.New("arena: buffer is held more than once")

	// ErrForeign is returned for a buffer of another arena.
	ErrForeign = errors.New("arena: buffer belongs to another arena")
)

// none ends a chain.
const none = ^uint32(0)

// An Arena is memory divided into buffers of one size. The methods that take or return
// buffer numbers are the owner's: one goroutine at a time may call them.
type Arena struct {
	mem  []byte
	size uint32
	desc []desc
	free []uint32 // the owner's stack of free buffer numbers; only touched buffers

	touched  atomic.Uint32 // buffers with a lower number have been touched; written by the owner
	populate func(first, pages int)
	marked   atomic.Bool // see Buffer.Mark

	_        [64]byte      // the fields below are written by any goroutine
	returned atomic.Uint32 // head of the list of buffers that others released

	due  atomic.Uint32 // what other goroutines have to do after a release: dueRetire, dueWake
	mu   sync.Mutex    // guards free and done once retired
	done func()

	readOnly bool
	wake     atomic.Pointer[func()] // see WakeOnReturn
}

// A goroutine that is not the owner, and releases a buffer, has to do one of these.
const (
	dueRetire = 1 << iota // the arena is retired: its last buffer frees it
	dueWake               // the owner waits for a buffer
)

// A desc records who holds a buffer. Its plain fields belong to the holder.
type desc struct {
	state    atomic.Uint64 // generation in the upper half, holders in the lower
	next     uint32        // the next buffer of the chain, or of the return list
	off, len uint16        // bytes in use of a buffer linked behind another; of the first one, its note
}

// New divides mem into buffers of size bytes, a power of two from 64 to [shm.PageSize],
// so that no buffer crosses a page. It panics on another size. mem is lent until the
// function given to [Arena.Retire] runs.
func New(mem shm.Memory, size int) *Arena {
	if size < 64 || size > shm.PageSize || size&(size-1) != 0 {
		panic(fmt.Sprintf("arena: buffers of %d bytes", size))
	}
	b := mem.Bytes()
	n := len(b) / size
	a := &Arena{mem: b, size: uint32(size), desc: make([]desc, n), free: make([]uint32, 0, n)}
	a.returned.Store(none)
	for i := range a.desc {
		a.desc[i].state.Store(1<<32 | 1)
		a.desc[i].next = none
	}
	a.touch(n)
	return a
}

// Step is how many pages an arena of [NewReserved] touches at once.
const Step = 32

// NewReserved is [New] for memory that is only reserved, so that an idle device occupies
// little of it. The arena touches [Step] pages now, and further ones each time all
// touched buffers are in use: [Arena.Get] then calls populate, which makes the kernel
// back the pages with memory, before it hands out a buffer in them.
func NewReserved(mem shm.Memory, size int, populate func(first, pages int)) *Arena {
	a := New(mem, size)
	a.populate = populate
	a.free = a.free[:0]
	a.touched.Store(0)
	a.touch(1)
	return a
}

// NewReadOnly is [New] for mapped pages of another domain, which no holder of a buffer may
// write. At first the owner holds every buffer, as if [Arena.Get] had returned them all. It
// gives buffers away by number, and puts all of them back before [Arena.Retire]. No holder
// of such a buffer is [Buffer.Exclusive]. [Arena.WakeOnReturn] has wake called.
func NewReadOnly(mem shm.Memory, size int, wake func()) *Arena {
	a := New(mem, size)
	a.readOnly = true
	a.SetWake(wake)
	a.free = a.free[:0]
	return a
}

// touch puts at least n more buffers on the stack, in whole steps and as far as there are
// any. It does nothing if n is not positive. The new buffers go below those on the stack,
// which are warm in the cache.
func (a *Arena) touch(n int) {
	from := int(a.touched.Load())
	to := len(a.desc)
	if a.populate != nil {
		step := Step * shm.PageSize / int(a.size)
		to = min(to, (from+n+step-1)/step*step)
	}
	n = to - from
	if n <= 0 {
		return
	}
	if a.populate != nil {
		first, _ := a.Page(uint32(from))
		last, _ := a.Page(uint32(to - 1))
		a.populate(int(first), int(last-first)+1)
	}
	warm := len(a.free)
	a.free = a.free[:warm+n]
	copy(a.free[n:], a.free[:warm])
	for i := range a.free[:n] {
		a.free[i] = uint32(to - 1 - i) // Get gives the lowest numbers first
	}
	a.touched.Store(uint32(to))
}

// Touched returns how many buffers have been touched. Any goroutine may call it.
func (a *Arena) Touched() int { return int(a.touched.Load()) }

// Len returns the number of buffers.
func (a *Arena) Len() int { return len(a.desc) }

// Size returns the bytes of each buffer.
func (a *Arena) Size() int { return int(a.size) }

// Get moves free buffers to dst and returns how many. A short count means that the arena
// is exhausted for now.
func (a *Arena) Get(dst []uint32) int {
	if len(a.free) < len(dst) {
		a.collect()
		a.touch(len(dst) - len(a.free)) // only for those that collect did not bring back
	}
	n := min(len(dst), len(a.free))
	rest := len(a.free) - n
	copy(dst, a.free[rest:])
	a.free = a.free[:rest]
	return n
}

// Free returns how many buffers Get could give now.
func (a *Arena) Free() int {
	a.collect()
	return a.AtHand()
}

// AtHand returns how many buffers are on the owner's stack or not touched yet. It leaves out what
// others have released since the last Get or Free.
func (a *Arena) AtHand() int { return len(a.free) + len(a.desc) - int(a.touched.Load()) }

// Put gives back buffers that the owner holds by number: got and not handed out, or taken
// over.
func (a *Arena) Put(bufs ...uint32) {
	for _, i := range bufs {
		a.desc[i].next = none
		a.free = append(a.free, i)
	}
}

// PutOne is Put of one buffer that is not linked to another.
func (a *Arena) PutOne(i uint32) { a.free = append(a.free, i) }

// PutTaken is PutOne of a buffer that [Arena.TakeOne] took.
func (a *Arena) PutTaken(b Buffer) { a.PutOne(b.i) }

// PutChain gives back buffer i and the buffers linked behind it.
func (a *Arena) PutChain(i uint32) {
	for i != none {
		next := a.desc[i].next
		a.desc[i].next = none
		a.free = append(a.free, i)
		i = next
	}
}

// collect moves the buffers that others released to the owner's stack.
func (a *Arena) collect() {
	if a.returned.Load() == none {
		return
	}
	a.PutChain(a.returned.Swap(none))
}

// Bytes returns the memory of buffer i.
func (a *Arena) Bytes(i uint32) []byte {
	lo := uint(i) * uint(a.size)
	hi := lo + uint(a.size)
	return a.mem[lo:hi:hi]
}

// Page returns where buffer i lies: the page of the arena's memory, and the byte offset
// in it.
func (a *Arena) Page(i uint32) (page, off uint32) {
	at := i * a.size
	return at / shm.PageSize, at % shm.PageSize
}

// Buffer returns the handle under which the owner gives buffer i away. The owner no
// longer holds the buffer.
func (a *Arena) Buffer(i uint32) Buffer {
	return Buffer{a: a, i: i, gen: uint32(a.desc[i].state.Load() >> 32)}
}

// Take takes b and its chain over from its only holder and returns the number of b. The
// holder's handle is stale afterwards. The error is ErrStale, ErrShared or ErrForeign.
func (a *Arena) Take(b Buffer) (uint32, error) {
	if b.a != a {
		if b.a == nil {
			return 0, ErrStale
		}
		return 0, ErrForeign
	}
	d := &a.desc[b.i]
	old := uint64(b.gen)<<32 | 1
	if d.state.CompareAndSwap(old, old+1<<32) {
		return b.i, nil
	}
	if uint32(d.state.Load()>>32) == b.gen {
		return 0, ErrShared
	}
	return 0, ErrStale
}

// TakeOne is Take for the common case, a buffer of this arena with one holder. It costs
// one compare-and-swap. If it reports false nothing has changed, and [Arena.Take] tells
// why.
func (a *Arena) TakeOne(b Buffer) (i uint32, ok bool) {
	if b.a != a {
		return 0, false
	}
	old := uint64(b.gen)<<32 | 1
	return b.i, a.desc[b.i].state.CompareAndSwap(old, old+1<<32)
}

// Link makes next follow prev in a chain, with n bytes in use at off. The owner holds
// both; from now on next is released with the chain.
func (a *Arena) Link(prev, next uint32, off, n uint16) {
	a.desc[prev].next = next
	d := &a.desc[next]
	d.next, d.off, d.len = none, off, n
}

// Unlink cuts the chain behind buffer i and returns the buffer that followed, if ok. The
// owner holds both parts.
func (a *Arena) Unlink(i uint32) (next uint32, off, n uint16, ok bool) {
	d := &a.desc[i]
	if d.next == none {
		return 0, 0, 0, false
	}
	next, d.next = d.next, none
	return next, a.desc[next].off, a.desc[next].len, true
}

// Release drops one holder of b. The last holder's Release gives b and its chain back to
// the owner's stack. It is [Buffer.Release] without the return list, for the owner only.
func (a *Arena) Release(b Buffer) error {
	if b.a != a {
		return b.Release()
	}
	last, err := b.drop()
	if !last {
		return err
	}
	a.PutChain(b.i)
	return nil
}

// Retire ends the owner's use of the arena. done runs once, when every buffer is back: at
// once, or in the goroutine that releases the last one.
func (a *Arena) Retire(done func()) {
	a.mu.Lock()
	a.done = done
	a.mu.Unlock()
	a.due.Or(dueRetire)
	a.finishRetire()
}

// SetWake sets the function that wakes the owner: the next release by another goroutine calls
// it, once the owner has called [Arena.WakeOnReturn]. It replaces the wake of [NewReadOnly].
func (a *Arena) SetWake(wake func()) { a.wake.Store(&wake) }

// WakeOnReturn makes the next release by another goroutine call the wake of [NewReadOnly] or
// [Arena.SetWake], once. The owner then looks once more with [Arena.Get], since a buffer that
// came back before has woken nobody.
func (a *Arena) WakeOnReturn() { a.due.Or(dueWake) }

// Returned reports whether others have released buffers since the last Get or Free.
func (a *Arena) Returned() bool { return a.returned.Load() != none }

// finishRetire runs done if the arena is retired and every buffer is back.
func (a *Arena) finishRetire() {
	a.mu.Lock()
	a.collect()
	var done func()
	if a.AtHand() == len(a.desc) {
		done, a.done = a.done, nil
	}
	a.mu.Unlock()
	if done != nil {
		done()
	}
}

// A Buffer is the handle of one buffer that the owner gave away. It is comparable; the
// zero Buffer names none.
type Buffer struct {
	a      *Arena
	i, gen uint32
}

// Valid reports whether b is still held.
func (b Buffer) Valid() bool {
	return b.a != nil && uint32(b.a.desc[b.i].state.Load()>>32) == b.gen
}

// Of reports whether b belongs to a.
func (b Buffer) Of(a *Arena) bool { return b.a == a }

// Bytes returns the buffer's memory. It panics if b is stale, since another holder may
// have the memory.
func (b Buffer) Bytes() []byte {
	if !b.Valid() {
		panic(ErrStale)
	}
	return b.a.Bytes(b.i)
}

// Mark marks the arena of b, for good. It is for a property that few buffers ever have: its
// owner looks for it only where [Arena.Marked] says so. Any holder may call it.
func (b Buffer) Mark() {
	if !b.a.marked.Load() {
		b.a.marked.Store(true)
	}
}

// Marked reports whether any buffer was marked.
func (a *Arena) Marked() bool { return a.marked.Load() }

// SetNote keeps a number for b, the first buffer of its chain, for as long as b is held. The
// arena gives it no meaning. Only a holder that may write the buffer's bytes may call it.
func (b Buffer) SetNote(n uint32) {
	d := &b.a.desc[b.i]
	d.off, d.len = uint16(n), uint16(n>>16)
}

// Note returns the number of SetNote, and any number if there was none.
func (b Buffer) Note() uint32 {
	d := &b.a.desc[b.i]
	return uint32(d.off) | uint32(d.len)<<16
}

// Exclusive reports whether b has exactly one holder, who may write it: a buffer of
// [NewReadOnly] never has.
func (b Buffer) Exclusive() bool {
	return b.a != nil && b.a.desc[b.i].state.Load() == uint64(b.gen)<<32|1 && !b.a.readOnly
}

// ReadOnly reports whether b belongs to an arena of [NewReadOnly]: no holder may write it.
func (b Buffer) ReadOnly() bool { return b.a != nil && b.a.readOnly }

// Retain adds a holder, so that b must be released once more. The error is ErrStale.
func (b Buffer) Retain() error {
	if b.a == nil {
		return ErrStale
	}
	d := &b.a.desc[b.i]
	for {
		s := d.state.Load()
		if uint32(s>>32) != b.gen {
			return ErrStale
		}
		if d.state.CompareAndSwap(s, s+1) {
			return nil
		}
	}
}

// Release drops one holder of b; the last one's Release gives b and its chain back. Any
// goroutine may call it. The error is ErrStale.
func (b Buffer) Release() error {
	last, err := b.drop()
	if !last {
		return err
	}
	a := b.a
	tail := b.i
	for a.desc[tail].next != none {
		tail = a.desc[tail].next
	}
	for {
		head := a.returned.Load()
		a.desc[tail].next = head
		if a.returned.CompareAndSwap(head, b.i) {
			break
		}
	}
	if due := a.due.Load(); due != 0 { // either we see the bit, or who set it sees the buffer
		a.afterReturn(due)
	}
	return nil
}

// afterReturn wakes the owner, or frees the retired arena, after a buffer came back.
func (a *Arena) afterReturn(due uint32) {
	if due&dueWake != 0 && a.due.And(^uint32(dueWake))&dueWake != 0 {
		(*a.wake.Load())()
	}
	if due&dueRetire != 0 {
		a.finishRetire()
	}
}

// drop removes one holder and reports whether it was the last. Then the generation
// changes, so that all handles of b are stale.
func (b Buffer) drop() (last bool, err error) {
	if b.a == nil {
		return false, ErrStale
	}
	d := &b.a.desc[b.i]
	for {
		s := d.state.Load()
		if uint32(s>>32) != b.gen {
			return false, ErrStale
		}
		if uint32(s) == 1 {
			if d.state.CompareAndSwap(s, s+1<<32) {
				return true, nil
			}
		} else if d.state.CompareAndSwap(s, s-1) {
			return false, nil
		}
	}
}

// A Piece is one buffer of a chain: Len bytes at Off.
type Piece struct {
	i        uint32
	Off, Len uint16
}

// Next returns the buffer linked behind b, if any. It panics if b is stale.
func (b Buffer) Next() (p Piece, ok bool) {
	if !b.Valid() {
		panic(ErrStale)
	}
	return b.a.after(b.i)
}

// After returns the buffer linked behind p, if any.
func (b Buffer) After(p Piece) (Piece, bool) { return b.a.after(p.i) }

// PieceBytes returns the memory of p's whole buffer, of which Len bytes at Off are in
// use.
func (b Buffer) PieceBytes(p Piece) []byte { return b.a.Bytes(p.i) }

// Resize sets the bytes of p that are in use: n at off, inside the buffer. It panics if b
// is stale or has more than one holder.
func (b Buffer) Resize(p Piece, off, n uint16) {
	if !b.Exclusive() {
		if b.Valid() {
			panic(ErrShared)
		}
		panic(ErrStale)
	}
	d := &b.a.desc[p.i]
	d.off, d.len = off, n
}

// Size returns the bytes of each buffer of b's arena, 0 for the zero Buffer.
func (b Buffer) Size() int {
	if b.a == nil {
		return 0
	}
	return int(b.a.size)
}

func (a *Arena) after(i uint32) (Piece, bool) {
	n := a.desc[i].next
	if n == none {
		return Piece{}, false
	}
	return Piece{i: n, Off: a.desc[n].off, Len: a.desc[n].len}, true
}
