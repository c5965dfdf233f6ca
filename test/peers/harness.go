package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The kinds of measurement.
const (
	stream   = "stream"    // frames in one direction, as fast as possible
	pingpong = "ping-pong" // one frame in each direction
	counters = "counters"  // frames with mirrored counters against frames without
)

// Sizes of frames in bytes. The largest is the limit of a TAP device (MTU 65521) and of a
// request of netif.h (16 bits).
const (
	sizeSmall = 64
	sizeMTU   = 1500
	sizeGSO   = 65520
)

// A peer is one way to move frames between two parties on one machine.
type peer interface {
	// setup joins two parties for frames of j.size bytes. Its error says what the machine
	// lacks for that.
	setup(j *job) (link, error)
}

// A setupFunc is a peer.
type setupFunc func(*job) (link, error)

func (f setupFunc) setup(j *job) (link, error) { return f(j) }

// A link joins two parties. It is a streamer, a pinger, or both.
type link interface {
	close() error
}

// A streamer sends in one goroutine and receives in another, until the job is stopped. Both
// count their frames in the job.
type streamer interface {
	link
	send(j *job) error
	receive(j *job) error
}

// A pinger makes len(rtt) round trips in one goroutine, and answers in another until the job
// is stopped.
type pinger interface {
	link
	ping(j *job, rtt []int64) error
	echo(j *job) error
}

// An interrupter has calls that block. interrupt makes the pending calls return. It is called
// from another goroutine, repeatedly until the parties have ended.
type interrupter interface {
	interrupt()
}

// A forked link has its receiving party in another process.
type forked interface {
	pid() int
}

// A notifier counts the notifications that the parties in this process sent.
type notifier interface {
	notifies() uint64
}

// A board is the memory that the parties of a job share. It is in a page of its own, which a
// child process maps, too. Each counter has a cache line of its own.
type board struct {
	stop          atomic.Uint32
	ready         atomic.Uint32 // the child is connected
	_             [120]byte
	sent          atomic.Uint64
	_             [120]byte
	rcvd          atomic.Uint64
	_             [120]byte
	childNotifies atomic.Uint64 // notifications sent by the child
}

// A job is one measurement of one row.
type job struct {
	*board
	size   int
	ping   bool
	verify bool   // every frame is different, and the receiver compares it
	free   bool   // neither party is pinned
	cpus   [2]int // of the two parties
	warm   uint64 // number of frames after which all memory of the link was used
	tmp    string // for sockets
	mem    *memory
}

func (b *bench) newJob(r *row, size int) (*job, error) {
	mem, err := newMemory("peers-board", os.Getpagesize())
	if err != nil {
		return nil, err
	}
	return &job{board: at[board](mem.b, 0), size: size, ping: r.kind == pingpong, verify: b.verify,
		free: r.free, cpus: b.cpus, warm: buffers, tmp: b.tmp, mem: mem}, nil
}

// buffers is how many private pages a receiving half of a vif has by default. No other link
// has more buffers. The first use of each page is a page fault.
const buffers = 512

func (j *job) stopped() bool { return j.stop.Load() != 0 }

func (j *job) close() { j.mem.close() }

// limitBatch limits a batch for frames of the job's size: a ring of 256 slots holds 15 of the
// longest.
func (j *job) limitBatch(batch int) int {
	if j.size > 4096 {
		return min(batch, 8)
	}
	return batch
}

// A tally counts frames and adds to a shared counter only now and then.
type tally struct {
	to *atomic.Uint64
	n  uint64
}

func (t *tally) add(n int) {
	if t.n += uint64(n); t.n >= 32 {
		t.flush()
	}
}

func (t *tally) flush() {
	t.to.Add(t.n)
	t.n = 0
}

// header is the offset of a frame's number in bytes, behind the addresses and the type.
const header = 14

// A source makes the frames to send: always the same frame, or, if the job verifies, numbered
// frames.
type source struct {
	frame  []byte
	verify bool
	seq    uint64
}

func (j *job) source() *source {
	s := &source{frame: make([]byte, j.size), verify: j.verify}
	for i := range s.frame {
		s.frame[i] = byte(i)
	}
	copy(s.frame, macB[:])
	copy(s.frame[6:], macA[:])
	binary.BigEndian.PutUint16(s.frame[12:], etherType)
	return s
}

// next returns the next frame to send. The following call overwrites it.
func (s *source) next() []byte {
	if s.verify {
		binary.NativeEndian.PutUint64(s.frame[header:], s.seq)
		s.seq++
	}
	return s.frame
}

// A batchSource makes the frames of one call. They are all the same frame unless the job
// verifies.
type batchSource struct {
	sources []*source
	frames  [][]byte
	seq     uint64
}

func (j *job) batchSource(n int) *batchSource {
	b := &batchSource{sources: []*source{j.source()}, frames: make([][]byte, n)}
	for j.verify && len(b.sources) < n {
		b.sources = append(b.sources, j.source())
	}
	b.next()
	b.seq = 0
	return b
}

func (b *batchSource) next() [][]byte {
	for i := range b.frames {
		src := b.sources[i%len(b.sources)]
		src.seq = b.seq
		b.frames[i] = src.next()
		b.seq++
	}
	return b.frames
}

// A sink takes the frames that arrive, and compares them if the job verifies.
type sink struct {
	frame []byte // buffer for receivers that copy
	want  source
}

func (j *job) sink() *sink {
	return &sink{frame: make([]byte, j.size), want: *j.source()}
}

// check is called with each frame that arrives, in order.
func (s *sink) check(frame []byte) error {
	if !s.want.verify {
		return nil
	}
	seq := s.want.seq
	if want := s.want.next(); !slices.Equal(frame, want) {
		return fmt.Errorf("frame %d arrived with %d bytes that differ from the %d sent", seq, len(frame), len(want))
	}
	return nil
}

// pin pins the calling goroutine, of the first party (0) or the second (1), to that party's
// CPU, unless the row leaves goroutines free.
func (j *job) pin(party int) {
	if !j.free {
		pin(j.cpus[party])
	}
}

// pin locks the calling goroutine to a thread on one CPU. The thread ends with the
// goroutine.
func pin(cpu int) {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	// The process may use this CPU, so the call fails only if that has changed since. The
	// line round trip of the run then shows it.
	_ = unix.SchedSetaffinity(0, &set)
}

var private atomic.Uint32

// spinPause is for loops that poll a shared word. It does not touch the word for some 10 ns, so
// that the other side can write it.
func spinPause() {
	for range 16 {
		private.Load()
	}
}

const (
	warmUp    = 25 * time.Millisecond
	hangLimit = 10 * time.Second
)

// errHung is the error for a party that did not end. The party still spins or blocks, so all
// later measurements would be wrong.
var errHung = errors.New("does not end")

// A bench measures rows.
type bench struct {
	cpus   [2]int // of the sender and the receiver
	window time.Duration
	tmp    string
	verify bool // the receivers compare the frames that arrive
}

// run measures one row once. The error says why it could not be measured.
func (b *bench) run(r *row, size int) (run Run, err error) {
	run = Run{Row: r.name, Bytes: size, Kind: r.kind}
	if run.Line, err = lineRoundTrip(b.cpus, 3000); err != nil {
		return run, err
	}
	if r.kind == counters {
		run.Ns, run.Noise, err = b.counters(size)
		return run, err
	}
	j, err := b.newJob(r, size)
	if err != nil {
		return run, err
	}
	l, err := r.peer.setup(j)
	if err != nil {
		j.close()
		return run, err
	}
	if r.kind == stream {
		err = b.stream(j, l.(streamer), &run)
	} else {
		err = b.pingpong(j, l.(pinger), &run)
	}
	if errors.Is(err, errHung) {
		return run, err // do not close: the hung party still uses the link and the board
	}
	defer j.close()
	var notifies uint64
	if n, ok := l.(notifier); ok {
		notifies = n.notifies()
	}
	err = errors.Join(err, l.close())
	notifies += j.childNotifies.Load() // the child's count; the child has ended
	if run.Kind == stream {
		run.Notifies = float64(notifies) / float64(max(j.sent.Load(), 1))
	}
	return run, err
}

// parties runs two functions, each in a goroutine. wait waits until both have ended and
// returns their errors. If stop is true it makes them end.
func parties(j *job, l link, first, second func() error) (wait func(stop bool) error) {
	errs := make(chan error, 2)
	for i, f := range []func() error{first, second} {
		go func() {
			j.pin(i)
			errs <- f()
		}()
	}
	ended := 0
	var all error
	return func(stop bool) error {
		limit := time.After(hangLimit)
		for ended < 2 {
			if stop {
				j.stop.Store(1)
				if i, ok := l.(interrupter); ok {
					i.interrupt()
				}
			}
			select {
			case err := <-errs:
				ended++
				all = errors.Join(all, err)
				stop = true // one party has ended, so end the other
			case <-time.After(20 * time.Millisecond):
			case <-limit:
				return errors.Join(all, errHung)
			}
		}
		return all
	}
}

func (b *bench) stream(j *job, l streamer, run *Run) error {
	wait := parties(j, l, func() error { return l.send(j) }, func() error { return l.receive(j) })
	time.Sleep(warmUp)
	for start := time.Now(); j.rcvd.Load() < j.warm && time.Since(start) < hangLimit/2; {
		time.Sleep(time.Millisecond)
	}
	var m0, m1 runtime.MemStats
	start := sampleCPU(l)
	runtime.ReadMemStats(&m0) // innermost: the rest of this allocates
	s0, r0, t0 := j.sent.Load(), j.rcvd.Load(), time.Now()
	var rcvd uint64
	for rcvd == 0 && time.Since(t0) < hangLimit/2 {
		time.Sleep(b.window)
		rcvd = j.rcvd.Load() - r0
	}
	sent, took := j.sent.Load()-s0, time.Since(t0)
	runtime.ReadMemStats(&m1)
	cpus, others := start.since(l)
	if err := wait(true); err != nil {
		return err
	}
	if rcvd == 0 {
		return errors.New("no frame arrived")
	}
	n := float64(rcvd)
	run.Others = others
	run.Ns = float64(took.Nanoseconds()) / n
	run.CPU = cpus * run.Ns
	run.Allocs = float64(m1.Mallocs-m0.Mallocs) / n
	run.Lost = max(0, 1-n/float64(max(sent, 1)))
	return nil
}

// roundTrips is how many round trips one measurement makes: enough for a 99th percentile, and few
// enough that round trips with two wake-ups of 100 us take a third of a second in total.
const roundTrips = 1500

func (b *bench) pingpong(j *job, l pinger, run *Run) error {
	rtt := make([]int64, roundTrips)
	var m0, m1 runtime.MemStats
	wait := parties(j, l, func() error {
		if err := l.ping(j, rtt[:roundTrips/10]); err != nil {
			return err
		}
		start := sampleCPU(l)
		runtime.ReadMemStats(&m0)
		err := l.ping(j, rtt)
		runtime.ReadMemStats(&m1)
		_, run.Others = start.since(l)
		return err
	}, func() error { return l.echo(j) })
	if err := wait(false); err != nil {
		return err
	}
	slices.Sort(rtt)
	if rtt[0] == 0 {
		return errors.New("not every round trip was made")
	}
	run.Ns, run.P99 = float64(rtt[roundTrips/2]), float64(rtt[roundTrips*99/100])
	run.Allocs = float64(m1.Mallocs-m0.Mallocs) / roundTrips
	return nil
}

var epoch = time.Now()

// nano returns the time of a monotonic clock in nanoseconds.
func nano() int64 { return int64(time.Since(epoch)) }
