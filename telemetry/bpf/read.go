//go:build linux

package bpf

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"barevif/telemetry"
)

// KindMetrics is a source of which this process may read the text only.
const KindMetrics = "metrics"

// A Source is where counters of one device were found. Another process may have
// made it: what is read from it is checked, but need not be true.
type Source struct {
	Name string // of the device: telemetry.Info.Name
	Kind string // KindPins, KindMaps, KindMemfd or KindMetrics
	Path string // of the pins or of the memfd; "" for maps without pins
	ID   uint32 // of the info map, of maps without pins

	// UID is the user who made it, or -1 if that is not known. The kernel says it
	// of memfds and of directories of pins. Maps say it themselves, and are
	// believed where users without privilege can make none.
	UID int
}

// List finds the devices of this machine that this process may read: pins below
// root ("" means [DefaultRoot]), maps without pins if it is privileged, and
// memfds of processes it may look into. The error tells of what could not be
// searched; what was found is given with it.
func List(root string) ([]Source, error) {
	if root == "" {
		root = DefaultRoot
	}
	pins, err1 := listPins(root)
	maps, err2 := listMaps()
	memfds, err3 := listMemfds()
	return slices.Concat(pins, maps, memfds), errors.Join(err1, err2, err3)
}

func listPins(root string) ([]Source, error) {
	dirs, err := os.ReadDir(root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []Source
	for _, d := range dirs {
		dir := filepath.Join(root, d.Name())
		var st unix.Stat_t
		if !d.IsDir() || unix.Lstat(dir, &st) != nil {
			continue
		}
		src := Source{Name: str([]byte(d.Name())), Path: dir, UID: pinsOwner(&st)}
		if unix.Access(filepath.Join(dir, pinInfo), unix.R_OK) == nil {
			src.Kind = KindPins
		} else if unix.Access(filepath.Join(dir, pinMetrics), unix.R_OK) == nil {
			src.Kind = KindMetrics
		} else {
			continue
		}
		out = append(out, src)
	}
	return out, nil
}

// pinsOwner is who put the pins of a directory there. Where others may write it
// that can be anyone.
func pinsOwner(dir *unix.Stat_t) int {
	if dir.Mode&0o022 != 0 {
		return -1
	}
	return int(dir.Uid)
}

// enter opens the directory of src, if it is the one that was listed. What is below
// the path it gives stays that directory's, whatever becomes of its name.
func (src *Source) enter() (path string, leave func(), err error) {
	fd, err := unix.Open(src.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &fs.PathError{Op: "open", Path: src.Path, Err: err}
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && pinsOwner(&st) != src.UID {
		err = fmt.Errorf("%w: %s has another owner now", fs.ErrNotExist, src.Path)
	}
	if err != nil {
		unix.Close(fd)
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d", fd), func() { unix.Close(fd) }, nil
}

// onlyPrivileged reports whether making maps takes a privilege.
func onlyPrivileged() bool {
	b, err := os.ReadFile("/proc/sys/kernel/unprivileged_bpf_disabled")
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

func listMaps() ([]Source, error) {
	var out []Source
	believed := onlyPrivileged()
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.EPERM):
			return out, nil // no more, or not for us
		case err != nil:
			return out, err
		}
		id = next
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue // gone since
		}
		if rec, err := readInfo(m); err == nil && str(rec.Kind[:]) == KindMaps {
			src := Source{Name: str(rec.Vif[:]), Kind: KindMaps, ID: uint32(id), UID: -1}
			if believed {
				src.UID = int(rec.UID)
			}
			out = append(out, src)
		}
		m.Close()
	}
}

func listMemfds() ([]Source, error) {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil, err
	}
	var out []Source
	type file struct{ dev, ino uint64 }
	seen := map[file]bool{} // a reader has it open, too
	for _, l := range links {
		to, err := os.Readlink(l)
		if err != nil {
			continue // gone since, or not for us
		}
		name, ok := memfdName(to)
		if !ok {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(l, &st) != nil || seen[file{st.Dev, st.Ino}] {
			continue
		}
		seen[file{st.Dev, st.Ino}] = true
		out = append(out, Source{Name: name, Kind: KindMemfd, Path: l, UID: int(st.Uid)})
	}
	return out, nil
}

// memfdName is the device's name in where a link of /proc leads to.
func memfdName(to string) (name string, ok bool) {
	name, ok = strings.CutPrefix(to, "/memfd:"+memfdPrefix)
	return str([]byte(strings.TrimSuffix(name, " (deleted)"))), ok
}

// A Report is what a source says of its device at one time.
type Report struct {
	Source Source

	// Stats are totals since the mirror was made, or resumed, whatever the
	// device's own Reset did. Torn says that a block is not of one instant: its
	// owner was killed while it wrote.
	Stats telemetry.Stats
	Torn  bool

	// What follows is empty for a source of [KindMetrics].

	Info      telemetry.Info
	Status    telemetry.Status
	Reset     telemetry.Reset
	Events    []telemetry.Event // oldest first
	Kind      string            // of the mirror, and why it is not a better one
	Reason    string
	PID       int // of the owner, as it says itself
	Start     time.Time
	Heartbeat time.Time
	Age       time.Duration // since the heartbeat; more than a few seconds: the owner is stopped or dead
}

// A Reader reads one source again and again. It is not safe for concurrent use.
type Reader struct {
	src Source
	elements
}

// elements gives copies of the records of one kind of source. A copy is made
// upwards, so that its markers mean what they should.
type elements interface {
	info() (*infoRecord, error)
	counters(queue int) ([]byte, error)
	event(slot int) ([]byte, error)
	Close() error
}

// Open opens a source. The error is [ErrLayout] for counters of another version,
// fs.ErrPermission or fs.ErrNotExist.
func Open(src Source) (*Reader, error) {
	var e elements
	var err error
	switch src.Kind {
	case KindPins, KindIterator:
		var dir string
		var leave func()
		if dir, leave, err = src.enter(); err == nil {
			e, err = openPins(dir)
			leave()
		}
	case KindMaps:
		e, err = openMaps(src.ID)
	case KindMemfd:
		e, err = openMemfd(src)
	case KindMetrics:
		e, err = nil, nil
	default:
		err = fmt.Errorf("no source of kind %q", src.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("telemetry/bpf: open %s: %w", src.Name, err)
	}
	return &Reader{src, e}, nil
}

// Close lets go of the source.
func (r *Reader) Close() error {
	if r.elements == nil {
		return nil
	}
	return r.elements.Close()
}

// Read reads the device's counters and state.
func (r *Reader) Read() (*Report, error) {
	var rep *Report
	var err error
	if r.elements == nil {
		rep, err = readText(r.src)
	} else {
		rep, err = readElements(r.elements)
	}
	if err != nil {
		return nil, fmt.Errorf("telemetry/bpf: read %s: %w", r.src.Name, err)
	}
	rep.Source = r.src
	return rep, nil
}

// Stats reads the counters alone: many times faster than Read, so that two devices
// can be compared while they count.
func (r *Reader) Stats() (telemetry.Stats, error) {
	if r.elements == nil {
		rep, err := r.Read()
		if err != nil {
			return telemetry.Stats{}, err
		}
		return rep.Stats, nil
	}
	rec, err := r.info()
	if err != nil {
		return telemetry.Stats{}, fmt.Errorf("telemetry/bpf: read %s: %w", r.src.Name, err)
	}
	st, _, err := readStats(r.elements, rec)
	if err != nil {
		return telemetry.Stats{}, fmt.Errorf("telemetry/bpf: read %s: %w", r.src.Name, err)
	}
	return st, nil
}

// patience is how many times 2 ms a reader waits for the records of one device: one
// that is torn in every queue costs no more than one that is torn in one.
const patience = 100

// attempts repeats try until a record was found whole. Its owner writes for tens
// of nanoseconds, but may be off its processor for milliseconds in the middle of
// it, which a stopped or dead one is for ever. left is the patience that is left,
// nil if there is none.
func attempts(left *int, try func() (whole bool, err error)) (whole bool, err error) {
	const quick = 64
	for i := 0; ; i++ {
		if i >= quick {
			if left == nil || *left == 0 {
				return false, nil
			}
			*left--
			time.Sleep(2 * time.Millisecond)
		}
		if whole, err = try(); whole || err != nil {
			return whole, err
		}
	}
}

// aliveAge is how old a heartbeat may be that comes once a second.
const aliveAge = 3 * time.Second

func readElements(e elements) (*Report, error) {
	rec, err := e.info()
	if err != nil {
		return nil, err
	}
	rep := rec.report()
	if rep.Stats, rep.Torn, err = readStats(e, rec); err != nil {
		return nil, err
	}
	for slot := range eventSlots {
		b, err := e.event(slot)
		if err != nil {
			return nil, err
		}
		var ev eventRecord
		if err := decode(b, &ev); err != nil {
			return nil, err
		}
		if ev.Seq == 0 || ev.Seq != ev.Begun {
			continue // empty, or being written
		}
		rep.Events = append(rep.Events, telemetry.Event{
			Seq: ev.Seq, Time: time.Unix(0, int64(ev.Unix)), Kind: telemetry.EventKind(min(ev.Kind, 255)),
			Queue: int(ev.Queue), A: ev.A, B: ev.B,
		})
	}
	slices.SortFunc(rep.Events, func(a, b telemetry.Event) int {
		if a.Seq < b.Seq {
			return -1
		}
		return 1
	})
	return rep, nil
}

// readStats reads the counters of all queues.
func readStats(e elements, rec *infoRecord) (st telemetry.Stats, torn bool, err error) {
	queues := make([]telemetry.Queue, rec.Slots)
	var left *int
	if rec.age() < aliveAge {
		left = new(patience)
	}
	for q := range queues {
		words, mixed, err := readQueue(e, q, left)
		if err != nil {
			return telemetry.Stats{}, false, err
		}
		torn = torn || mixed
		queues[q].RX = telemetry.ValuesOf((*[telemetry.BlockWords]uint64)(words[:telemetry.BlockWords]))
		queues[q].TX = telemetry.ValuesOf((*[telemetry.BlockWords]uint64)(words[telemetry.BlockWords:]))
	}
	return telemetry.Sum(queues), torn, nil
}

// readQueue reads an element until both of its blocks were found whole, and
// gives the last copy if one never is.
func readQueue(e elements, q int, left *int) (words [queueWords]uint64, torn bool, err error) {
	const n = telemetry.BlockWords
	var have [2]bool
	whole, err := attempts(left, func() (bool, error) {
		b, err := e.counters(q)
		if err != nil {
			return false, err
		}
		var got [queueWords]uint64
		if err := decode(b, got[:]); err != nil {
			return false, err
		}
		for d := range have {
			if !have[d] {
				copy(words[d*n:(d+1)*n], got[d*n:])
				have[d] = got[d*n] == got[d*n+n-1]
			}
		}
		return have[0] && have[1], nil
	})
	return words, !whole, err
}

// age is the time since the heartbeat.
func (r *infoRecord) age() time.Duration { return time.Duration(bootTime() - r.Beat) }

func (r *infoRecord) report() *Report {
	rep := &Report{
		Info: telemetry.Info{
			Role: telemetry.Role(min(r.Role, 1)), Own: r.Own, Peer: r.Peer, Handle: r.Handle, Queues: int(r.Slots),
		},
		Status: telemetry.Status{
			State: telemetry.State(min(r.State, 255)), Up: r.Up != 0, MTU: r.MTU, Queues: r.Queues, Epoch: r.Epoch,
		},
		Reset: telemetry.Reset{
			Count: r.Reset.Count, RxPackets: r.Reset.RxPackets, RxBytes: r.Reset.RxBytes,
			TxPackets: r.Reset.TxPackets, TxBytes: r.Reset.TxBytes,
		},
		Kind: str(r.Kind[:]), Reason: str(r.Reason[:]), PID: int(int32(r.PID)),
		Start: time.Unix(0, int64(r.Start)), Heartbeat: time.Unix(0, int64(r.BeatUnix)),
		Age: r.age(),
	}
	if r.Reset.Count != 0 {
		rep.Reset.Time = time.Unix(0, int64(r.Reset.Unix))
	}
	for b := range telemetry.FeatureNames {
		if r.Features[b] != 0 {
			rep.Status.Features |= 1 << b
		}
	}
	for i, part := range strings.SplitN(str(r.MAC[:]), ":", len(rep.Status.MAC)) {
		v, err := strconv.ParseUint(part, 16, 8)
		if err != nil {
			break
		}
		rep.Status.MAC[i] = byte(v)
	}
	return rep
}

// mapElements are the records in three maps.
type mapElements struct{ infos, queues, events *ebpf.Map }

func openPins(dir string) (elements, error) {
	e := &mapElements{}
	for _, p := range [...]struct {
		name string
		to   **ebpf.Map
	}{{pinInfo, &e.infos}, {pinCounters, &e.queues}, {pinEvents, &e.events}} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, p.name), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			e.Close()
			return nil, fmt.Errorf("%s: %w", p.name, terse(err))
		}
		*p.to = m
	}
	return e.checked()
}

func openMaps(id uint32) (elements, error) {
	e := &mapElements{}
	var err error
	if e.infos, err = ebpf.NewMapFromID(ebpf.MapID(id)); err != nil {
		return nil, terse(err)
	}
	rec, err := e.info()
	if err == nil {
		e.queues, err = ebpf.NewMapFromID(ebpf.MapID(rec.Counters))
	}
	if err == nil {
		e.events, err = ebpf.NewMapFromID(ebpf.MapID(rec.Events))
	}
	if err != nil {
		e.Close()
		return nil, terse(err)
	}
	return e.checked()
}

// checked refuses maps that are not what the info record says.
func (e *mapElements) checked() (elements, error) {
	rec, err := e.info()
	if err == nil && !(isArray(e.queues, queueBytes, int(rec.Slots)) && isArray(e.events, eventBytes, eventSlots)) {
		err = fmt.Errorf("%w: maps of another size", ErrLayout)
	}
	if err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

func isArray(m *ebpf.Map, size, entries int) bool {
	return m.Type() == ebpf.Array && m.KeySize() == 4 && m.ValueSize() == uint32(size) && m.MaxEntries() == uint32(entries)
}

func readInfo(m *ebpf.Map) (*infoRecord, error) {
	if !isArray(m, infoBytes, 1) {
		return nil, fmt.Errorf("%w: info of another size", ErrLayout)
	}
	return wholeInfo(func() ([]byte, error) { return m.LookupBytes(uint32(0)) })
}

// wholeInfo gives the last copy if none was whole: each word is true by itself.
func wholeInfo(read func() ([]byte, error)) (*infoRecord, error) {
	rec := &infoRecord{}
	_, err := attempts(nil, func() (bool, error) {
		b, err := read()
		if err == nil {
			err = decode(b, rec)
		}
		if err == nil {
			err = rec.check()
		}
		return err == nil && rec.Done == rec.Begun, err
	})
	if err != nil {
		return nil, err
	}
	return rec, nil
}

func (e *mapElements) info() (*infoRecord, error)     { return readInfo(e.infos) }
func (e *mapElements) counters(q int) ([]byte, error) { return e.queues.LookupBytes(uint32(q)) }
func (e *mapElements) event(slot int) ([]byte, error) { return e.events.LookupBytes(uint32(slot)) }
func (e *mapElements) Close() error {
	var errs []error
	for _, m := range []*ebpf.Map{e.infos, e.queues, e.events} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}

// fileElements are the records in a memfd. They are read, not mapped, so that a
// file that shrinks is an error and not a fault.
type fileElements struct{ f *os.File }

func openMemfd(src Source) (elements, error) {
	// The link leads to whatever the other process has made of that descriptor by
	// now. O_PATH says what it is without opening it, which a device may notice.
	fd, err := unix.Open(src.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: src.Path, Err: err}
	}
	defer unix.Close(fd)
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: src.Path, Err: err}
	}
	to, err := os.Readlink(self)
	if err != nil {
		return nil, err
	}
	if name, ok := memfdName(to); !ok || name != src.Name || int(st.Uid) != src.UID || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%w: not the memfd of that name and owner", ErrLayout)
	}
	f, err := os.OpenFile(self, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	e := &fileElements{f}
	if seals, bad := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); bad != nil || seals&memfdSeals != memfdSeals {
		err = fmt.Errorf("%w: not a sealed memfd", ErrLayout)
	} else {
		_, err = e.info()
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return e, nil
}

func (e *fileElements) at(offset, n int) ([]byte, error) {
	b := make([]byte, n)
	if _, err := e.f.ReadAt(b, int64(offset)); err != nil {
		if err == io.EOF {
			err = fmt.Errorf("%w: the file is too short", ErrLayout)
		}
		return nil, err
	}
	return b, nil
}

func (e *fileElements) info() (*infoRecord, error) {
	return wholeInfo(func() ([]byte, error) { return e.at(0, infoBytes) })
}

func (e *fileElements) counters(q int) ([]byte, error) {
	return e.at(countersAt+q*queueBytes, queueBytes)
}
func (e *fileElements) event(slot int) ([]byte, error) {
	return e.at(eventsAt+slot*eventBytes, eventBytes)
}
func (e *fileElements) Close() error { return e.f.Close() }

// resume reads the totals a killed owner of the pins in dir left. None is no
// error.
func (m *mirror) resume(dir string) error {
	e, err := openPins(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("resume totals: %w", err)
	}
	defer e.Close()
	rec, err := e.info()
	if err != nil {
		return fmt.Errorf("resume totals: %w", err)
	}
	for q := range min(int(rec.Slots), len(m.base)/2) {
		words, torn, err := readQueue(e, q, nil)
		if err != nil {
			return fmt.Errorf("resume totals: %w", err)
		}
		for d := range 2 {
			block := words[d*telemetry.BlockWords : (d+1)*telemetry.BlockWords]
			if torn {
				mendSums(block)
			}
			m.base[2*q+d] = slices.Clone(block)
		}
	}
	m.info.Resumed = rec.Start
	return nil
}

// mendSums makes the sums of a block whose owner was killed while it wrote it
// agree with their parts.
func mendSums(block []uint64) {
	sums := map[string]uint64{}
	for _, f := range telemetry.Fields() {
		if f.SumIn != "" {
			sums[f.SumIn] += block[f.Word]
		}
	}
	for _, f := range telemetry.Fields() {
		if sum, ok := sums[f.Name]; ok {
			block[f.Word] = sum
		}
	}
}

// textLimit bounds what is read of a metrics file.
const textLimit = 16 << 20

// readText makes a report of what the iterator prints.
func readText(src Source) (*Report, error) {
	dir, leave, err := src.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	// A link in the directory could lead to a file that only this user may read,
	// lines of which an error would show.
	f, err := os.OpenFile(filepath.Join(dir, pinMetrics), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if uint32(st.Type) != unix.BPF_FS_MAGIC {
		return nil, fmt.Errorf("%w: the metrics are not in a BPF file system", ErrLayout)
	}
	queues, err := parseText(io.LimitReader(f, textLimit))
	if err != nil {
		return nil, err
	}
	return &Report{Stats: telemetry.Sum(queues)}, nil
}

// parseText reads counters back from the text of openmetrics.Write about one
// device.
func parseText(r io.Reader) ([]telemetry.Queue, error) {
	type place struct{ word, words int } // words > 1: a histogram
	places := map[string]place{}
	for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			at := place{int(d)*telemetry.BlockWords + f.Word, f.Words()}
			name := f.Metric(d)
			switch f.Kind {
			case telemetry.KindCounter:
				places[name+"_total"] = at
			case telemetry.KindGauge:
				places[name] = at
			case telemetry.KindHistogram:
				places[name+"_bucket"] = at
				places[name+"_sum"] = place{at.word + at.words - 1, 1}
			}
		}
	}
	var queues [][queueWords]uint64
	var before uint64 // the bucket above this one
	var of struct {   // the histogram that bucket is of
		name  string
		queue int
	}
	bucket := 0
	ended := false
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Bytes()
		if ended = bytes.Equal(line, []byte("# EOF")); ended {
			break
		}
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		name, rest, ok1 := strings.Cut(string(line), "{")
		_, rest, ok2 := strings.Cut(rest, `queue="`)
		queue, rest, ok3 := strings.Cut(rest, `"`)
		_, value, ok4 := strings.Cut(rest, "} ")
		q, err1 := strconv.Atoi(queue)
		v, err2 := strconv.ParseUint(value, 10, 64)
		if !ok1 || !ok2 || !ok3 || !ok4 || err1 != nil || err2 != nil || q < 0 || q >= maxQueues {
			return nil, fmt.Errorf("%w: %q", ErrLayout, str(line))
		}
		at, ok := places[name]
		if !ok {
			continue // a count, or a field of a later version
		}
		for len(queues) <= q {
			queues = append(queues, [queueWords]uint64{})
		}
		if at.words == 1 {
			queues[q][at.word] = v
			continue
		}
		if of.name != name || of.queue != q {
			of.name, of.queue = name, q
			bucket, before = 0, 0
		}
		if bucket >= at.words-1 {
			return nil, fmt.Errorf("%w: too many buckets in %s", ErrLayout, name)
		}
		if v < before {
			return nil, fmt.Errorf("%w: fewer in a higher bucket of %s", ErrLayout, name)
		}
		queues[q][at.word+bucket] = v - before
		bucket, before = bucket+1, v
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if !ended {
		return nil, fmt.Errorf("%w: the text has no end", ErrLayout)
	}
	out := make([]telemetry.Queue, len(queues))
	for q := range queues {
		out[q].RX = telemetry.ValuesOf((*[telemetry.BlockWords]uint64)(queues[q][:telemetry.BlockWords]))
		out[q].TX = telemetry.ValuesOf((*[telemetry.BlockWords]uint64)(queues[q][telemetry.BlockWords:]))
	}
	return out, nil
}
