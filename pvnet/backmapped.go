package pvnet

import (
	"barevif/pvnet/netif"
	"barevif/telemetry"
)

// receiveMapped is receivePlain for frames whose pages are mapped: each is copied at once and
// answered at once, with no grant operation and no batch of them.
func (e *backRX) receiveMapped(frames []Frame, into bool) (n int, err error) {
	avail, err := e.ring.Poll()
	if err != nil {
		return 0, e.violation(err.Error())
	}
	limit := min(len(frames), len(e.batched))
	due := min(int(avail), limit)
	if !into {
		due = e.private.Get(e.got[:due])
		e.taken = due
	}
	t, table, private := tally{block: e.count}, e.table, e.private
	var r netif.TxRequest
	for n < due {
		e.ring.TakeTo(&r)
		f, s := &frames[n], table.find(r.Ref)
		var dst []byte
		if s.mem != nil && r.Plain() {
			if into {
				dst = f.refill(r.Size)
			} else {
				dst = f.buffer(private, e.got[n], r.Size)
			}
		}
		if dst == nil {
			e.haveNext, err = e.parseFrom(r, avail-uint32(n)-1)
			break
		}
		copy(dst, s.mem[r.Offset:])
		t.plain(len(dst), dst)
		if r.Flags&netif.TxDataValidated != 0 {
			f.csum = ChecksumVerified
			t.verified++
		}
		if n == 0 {
			e.begin()
		}
		e.ring.Put(netif.TxResponse{ID: r.ID})
		n++
	}
	if !into {
		e.private.Put(e.got[n:due]...)
		e.taken = n
	}
	return e.endMapped(&t, n, limit, n, err)
}

// receiveLending is receiveMapped for an engine that lends. It copies short frames. The
// responses come after the batch: they may have to wait for those of pages that are lent.
func (e *backRX) receiveLending(frames []Frame, into bool) (n int, err error) {
	avail, err := e.ring.Poll()
	if err != nil {
		return 0, e.violation(err.Error())
	}
	limit := min(len(frames), len(e.batched))
	due := min(int(avail), limit)
	have, used := 0, 0 // of e.got: buffers are taken when a frame needs one
	t := tally{block: e.count}
	var r netif.TxRequest
	for n < due {
		e.ring.TakeTo(&r)
		f, s := &frames[n], e.table.find(r.Ref)
		var b []byte
		switch {
		case s.mem == nil || !r.Plain():
		case into:
			if b = f.refill(r.Size); b != nil {
				copy(b, s.mem[r.Offset:])
			}
		case r.Size >= lendMin && e.mayLend(e.table.runs[s.run], uint32(s.page), 1):
			b = e.lendPlain(f, s, &r, n)
		default:
			if used == have {
				have += e.private.Get(e.got[have : have+due-n]) // those before are in frames, of which there are n
				e.taken = have
			}
			if used < have {
				b = f.buffer(e.private, e.got[used], r.Size)
				copy(b, s.mem[r.Offset:])
				used++
			}
		}
		if b == nil {
			e.haveNext, err = e.parseFrom(r, avail-uint32(n)-1)
			break
		}
		t.plain(int(r.Size), b)
		if r.Flags&netif.TxDataValidated != 0 {
			f.csum = ChecksumVerified
			t.verified++
		}
		if n == 0 {
			e.begin()
		}
		e.rsp[n] = netif.TxResponse{ID: r.ID}
		n++
		e.nrsp = n
	}
	e.private.Put(e.got[used:have]...)
	e.taken = used
	return e.endMapped(&t, n, limit, 0, err)
}

// lendPlain makes f the page of s, which request r names, the n-th of the batch. It returns
// the bytes.
func (e *backRX) lendPlain(f *Frame, s *grantSlot, r *netif.TxRequest, n int) []byte {
	run, page := e.table.runs[s.run], uint32(s.page)
	e.lend(run, page)
	e.of[n] = lentPage{run, page}
	f.single(run.arena.Buffer(page), r.Offset, r.Size)
	e.lentBytes += uint64(r.Size)
	e.lentFrames++
	return s.mem[r.Offset:]
}

// endMapped counts a batch of n frames, of limit at most, and publishes its responses, of
// which so many are in the ring already.
func (e *backRX) endMapped(t *tally, n, limit, put int, err error) (int, error) {
	if n == 0 && err == nil {
		return 0, nil
	}
	if n == limit {
		e.count.Add(telemetry.PollsFull, 1)
	}
	if e.lentFrames > 0 {
		e.count.Add(telemetry.LentPackets, e.lentFrames)
		e.lentFrames = 0
	}
	t.countCopied(e.lentBytes, e.ring.Unanswered(), e.private.Free())
	e.lentBytes = 0
	e.publish(put)
	return n, err
}
