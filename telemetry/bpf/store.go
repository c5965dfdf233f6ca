//go:build linux

package bpf

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"barevif/telemetry"
)

// Kinds of mirror, best first.
const (
	KindIterator = "bpf+pins+iterator" // named maps, and a file to cat
	KindPins     = "bpf+pins"          // named maps
	KindMaps     = "bpf"               // maps that only a privileged process finds
	KindMemfd    = "memfd"             // a sealed file
)

// Store is a [telemetry.Store]. The zero Store works. It is safe for concurrent use once
// its fields no longer change.
type Store struct {
	// Root is the directory for pins, in a mounted BPF file system: "" means
	// [DefaultRoot]. Open makes it if its parent exists; it never mounts anything.
	Root string

	// Group may read the pins besides their owner: 0 means no group.
	Group int

	// Public lets every user read the metrics file. By default they may not: how much a
	// device carries, and when, can reveal what it carries.
	Public bool

	// Resume makes the mirror continue the totals of a killed process that left its pins.
	// It does not change Stats.
	Resume bool
}

var _ telemetry.Store = (*Store)(nil)

// Open makes the best mirror that this process may make. It fails if it cannot make even
// a memfd, or for more than 1024 queues. It takes milliseconds.
func (s *Store) Open(info telemetry.Info) (telemetry.Mirror, error) {
	if info.Queues < 1 || info.Queues > maxQueues {
		return nil, fmt.Errorf("telemetry/bpf: %d queues, want 1 to %d", info.Queues, maxQueues)
	}
	m := &mirror{name: info.Name(), base: make([][]uint64, 2*info.Queues)}
	m.info = infoRecord{
		Version: telemetry.LayoutVersion, Layout: telemetry.Layout(), Slots: uint32(info.Queues),
		Role: uint32(info.Role), Own: info.Own, Peer: info.Peer, Handle: info.Handle,
		PID: uint32(os.Getpid()), UID: uint32(os.Geteuid()), Start: uint64(time.Now().UnixNano()),
	}
	copy(m.info.Magic[:], infoMagic)
	set(m.info.Vif[:], m.name)

	err := m.makeMaps(info.Queues)
	if err == nil {
		m.kind = KindMaps
		if err = m.pin(s); err == nil {
			m.kind = KindPins
			if err = m.pinMetrics(s, info.Queues); err == nil {
				m.kind = KindIterator
			}
		}
		if !m.named {
			err = errors.Join(err, errors.New("the kernel did not take the names of the counters"))
		}
		err = errors.Join(err, m.unresumed)
	} else if e := m.makeMemfd(info.Queues); e != nil {
		return nil, fmt.Errorf("telemetry/bpf: %w", errors.Join(err, e))
	} else {
		m.kind = KindMemfd
	}
	if err != nil {
		m.reason = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	set(m.info.Kind[:], m.kind)
	set(m.info.Reason[:], m.reason)
	m.Update(telemetry.Status{}, telemetry.Reset{})
	return m, nil
}

// A mirror holds the counters of one device, in maps or in a memfd.
type mirror struct {
	name         string
	kind, reason string
	named        bool  // the kernel accepted the names of the maps' members
	unresumed    error // why the mirror does not continue earlier totals

	counters, infos, events region
	base                    [][]uint64 // per block: totals from which it continues, or nil

	maps    []*ebpf.Map // counters, info, events; and fields once pinned
	pins    *pinDir     // or nil
	metrics interface{ Close() error }
	file    *os.File // the memfd, or nil

	info  infoRecord
	kept  [eventSlots][]byte // the expected contents of events
	ended bool
}

// suffix distinguishes the maps of different devices: a map's name has 15 characters at
// most.
func (m *mirror) suffix() string {
	h := fnv.New32a()
	h.Write([]byte(m.name))
	return fmt.Sprintf("%08x", h.Sum32())
}

// makeMaps makes the three writable maps and maps them into memory.
func (m *mirror) makeMaps(queues int) (err error) {
	defer func() {
		if err != nil {
			m.releaseMaps()
		}
	}()
	for _, a := range [...]struct {
		name          string
		size, entries int
		key           string
		value         *btf.Struct
		to            *region
	}{
		{"bvf_c_", queueBytes, queues, "queue", queueType(), &m.counters},
		{"bvf_i_", infoBytes, 1, "device", recordType("barevif_info", infoRecord{}), &m.infos},
		{"bvf_e_", eventBytes, eventSlots, "slot", recordType("barevif_event_record", eventRecord{}), &m.events},
	} {
		mp, err := array(a.name+m.suffix(), a.size, a.entries, keyType(a.key), a.value)
		if err != nil {
			return err
		}
		m.maps = append(m.maps, mp)
		if *a.to, err = mapMap(mp); err != nil {
			return err
		}
	}
	m.named = described(m.maps[0])
	m.info.Counters, m.info.Events = mapID(m.maps[0]), mapID(m.maps[2])
	return nil
}

func (m *mirror) releaseMaps() error {
	err := errors.Join(m.counters.unmap(), m.infos.unmap(), m.events.unmap())
	for _, mp := range m.maps {
		err = errors.Join(err, mp.Close())
	}
	m.maps = nil
	return err
}

// pin pins the maps in the file system. On an error it leaves no pin there.
func (m *mirror) pin(s *Store) (err error) {
	root, gid := s.Root, s.Group
	if root == "" {
		root = DefaultRoot
	}
	if gid == 0 {
		gid = -1
	}
	d, err := openPinDir(root, m.name, gid)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if s.Resume {
		if err := m.resume(d.path); err != nil {
			m.unresumed = err
		}
	}
	var elems [][]byte
	for _, r := range fieldRecords() {
		elems = append(elems, encode(r))
	}
	fields, err := frozen("bvf_f_"+m.suffix(), uint32(fieldBytes), elems, keyType("field"), recordType("barevif_field", fieldRecord{}))
	if err != nil {
		return err
	}
	m.maps = append(m.maps, fields)
	// The metrics file of a killed owner would print its counters, not ours.
	if err := d.drop(pinMetrics); err != nil {
		return fmt.Errorf("make pins: %w", err)
	}
	for i, name := range [...]string{pinCounters, pinInfo, pinEvents, pinFields} {
		if err := d.put(name, m.maps[i], 0o440); err != nil {
			return err
		}
	}
	m.pins = d
	return nil
}

// pinMetrics pins the iterator as the file that prints the counters.
func (m *mirror) pinMetrics(s *Store, queues int) error {
	it, err := attachIterator(m.suffix(), m.name, m.maps[0], m.maps[3], queues)
	if err != nil {
		return err
	}
	mode := os.FileMode(0o440)
	if s.Public {
		mode = 0o444
	}
	if err := m.pins.put(pinMetrics, it, mode); err != nil {
		it.Close()
		return err
	}
	m.metrics = it
	return nil
}

func (m *mirror) makeMemfd(queues int) error {
	f, parts, err := newMemfd(m.name, queues)
	if err != nil {
		return err
	}
	m.file = f
	m.counters, m.infos, m.events = parts[0], parts[1], parts[2]
	return nil
}

func (m *mirror) Kind() string   { return m.kind }
func (m *mirror) Reason() string { return m.reason }

func (m *mirror) Words(queue int, d telemetry.Dir) (words, base []uint64) {
	block := 2*queue + int(d)
	return m.counters.words(block*telemetry.BlockWords, telemetry.BlockWords), m.base[block]
}

func (m *mirror) Update(st telemetry.Status, r telemetry.Reset) {
	if m.ended {
		return
	}
	i := &m.info
	i.State, i.MTU, i.Queues, i.Epoch = uint32(st.State), st.MTU, st.Queues, st.Epoch
	i.Up = 0
	if st.Up {
		i.Up = 1
	}
	for b := range telemetry.FeatureNames {
		i.Features[b] = uint8(st.Features >> b & 1)
	}
	set(i.MAC[:], fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x",
		st.MAC[0], st.MAC[1], st.MAC[2], st.MAC[3], st.MAC[4], st.MAC[5]))
	i.Beat, i.BeatUnix = bootTime(), uint64(time.Now().UnixNano())
	i.Reset = resetRecord{
		Count: r.Count, RxPackets: r.RxPackets, RxBytes: r.RxBytes, TxPackets: r.TxPackets, TxBytes: r.TxBytes,
	}
	if r.Count != 0 {
		i.Reset.Unix = uint64(r.Time.UnixNano())
	}
	i.Done++
	i.Begun = i.Done
	put(m.infos.words(0, infoBytes/8), encode(i))
	// Another process may have changed the events.
	for slot, e := range m.kept {
		if e != nil {
			put(m.events.words(slot*eventBytes/8, eventBytes/8), e)
		}
	}
}

func (m *mirror) Record(e telemetry.Event) {
	if m.ended {
		return
	}
	slot := int(e.Seq % eventSlots)
	m.kept[slot] = encode(eventRecord{
		Seq: e.Seq, Unix: uint64(e.Time.UnixNano()), Kind: uint32(e.Kind), Queue: int32(e.Queue),
		A: e.A, B: e.B, Begun: e.Seq,
	})
	put(m.events.words(slot*eventBytes/8, eventBytes/8), m.kept[slot])
}

// Close removes the pins, if any, and frees all memory. A second Close does nothing.
func (m *mirror) Close() error {
	if m.ended {
		return nil
	}
	m.ended = true
	var err error
	if m.pins != nil {
		err = m.pins.close()
	}
	if m.metrics != nil {
		err = errors.Join(err, m.metrics.Close())
	}
	err = errors.Join(err, m.releaseMaps())
	if m.file != nil {
		err = errors.Join(err, m.file.Close())
	}
	return err
}

// bootTime returns the nanoseconds since boot, including suspend: this clock never jumps.
func bootTime() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return uint64(ts.Nano())
}
