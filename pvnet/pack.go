package pvnet

import "barevif/arena/shm"

// A packer lays the parts of a frame out in pages: the slots of a frame that a backend
// receives in its own pages, or the pieces of one that it sends in the frontend's. A part
// that crosses from one page to the next costs two grant copies, and a call of the
// hypervisor does a number of copies, not of bytes, at a time. So the packer leaves a page
// that a part does not fit, as long as there are pages enough for the rest.
type packer struct {
	sizes [maxFrameBuffers]uint16 // bytes in each page
	last  int                     // number of the present page
	most  int                     // number of pages there may be
	room  uint32                  // bytes that the present page can still take
	least uint16                  // bytes that a page has before it is left; MaxHeaders in the first, 1 in others
	left  uint32                  // bytes of the frame that are still to come
}

// begin begins a frame of total bytes in at most so many pages, which suffice for it. The
// first has room for so many bytes, and gets least or the whole frame.
func (p *packer) begin(total uint32, pages int, room uint32, least uint16) {
	*p = packer{most: pages, room: room, least: least, left: total}
}

// add lays out the next n bytes of the frame, which lie together elsewhere.
func (p *packer) add(n uint32) {
	if n > p.room && p.sizes[p.last] >= p.least && p.left <= uint32(p.most-p.last-1)*shm.PageSize {
		p.turn()
	}
	p.left -= n
	for n > 0 {
		if p.room == 0 {
			p.turn()
		}
		k := min(n, p.room)
		p.sizes[p.last] += uint16(k)
		p.room -= k
		n -= k
	}
}

// place lays f out in pages of the peer: at most one more than it needs, and no more than every
// frontend takes.
func (p *packer) place(f *Frame) {
	p.begin(f.total, min(f.pages()+1, maxFrameBuffers), shm.PageSize, 1)
	if f.total > shm.PageSize {
		p.add(min(uint32(f.n), p.left))
		for b, ok := f.buf.Next(); ok; b, ok = f.buf.After(b) {
			p.add(min(uint32(b.Len), p.left))
		}
	}
	p.add(p.left) // nothing, unless another copy of the Frame was cut
}

func (p *packer) turn() { p.last, p.room, p.least = p.last+1, shm.PageSize, 1 }

// pages returns how many pages the frame takes.
func (p *packer) pages() int { return p.last + 1 }
