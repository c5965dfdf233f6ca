//go:build linux

package bpf

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"barevif/telemetry/bpf/refused"
)

// keyType names the index of an array. The kernel accepts an integer or a typedef of one;
// with any other key it silently drops the types of the map.
func keyType(name string) btf.Type { return &btf.Typedef{Name: name, Type: btfU32} }

// array makes a map that can be mapped into our memory.
func array(name string, size, entries int, key, value btf.Type) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: name, Type: ebpf.Array, KeySize: 4, ValueSize: uint32(size), MaxEntries: uint32(entries),
		Flags: unix.BPF_F_MMAPABLE, Key: key, Value: value,
	})
	if errors.Is(err, ebpf.ErrNotSupported) {
		// The library reports this whenever its own trial map fails, also for lack of
		// memory.
		err = fmt.Errorf("%w, or there is no memory for one", err)
	}
	if err != nil {
		return nil, fmt.Errorf("create map %s: %w", name, refused.Lacking("CAP_BPF", unix.CAP_BPF, err))
	}
	return m, nil
}

// frozen makes a map that no process can change any more. It omits BPF_F_RDONLY_PROG: the
// verifier treats loads from such a map as constants, and refuses them if it has more
// than one element.
func frozen(name string, size uint32, elems [][]byte, key, value btf.Type) (*ebpf.Map, error) {
	spec := &ebpf.MapSpec{
		Name: name, Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: uint32(len(elems)),
		Key: key, Value: value,
	}
	for i, e := range elems {
		spec.Contents = append(spec.Contents, ebpf.MapKV{Key: uint32(i), Value: e})
	}
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("create map %s: %w", name, refused.Terse(err))
	}
	if err := m.Freeze(); err != nil {
		m.Close()
		return nil, fmt.Errorf("freeze map %s: %w", name, refused.Terse(err))
	}
	return m, nil
}

// described reports whether the kernel kept the names of m's members.
func described(m *ebpf.Map) bool {
	info, err := m.Info()
	if err != nil {
		return false
	}
	_, ok := info.BTFID()
	return ok
}

// mapID returns the id by which privileged processes find m, or 0.
func mapID(m *ebpf.Map) uint32 {
	info, err := m.Info()
	if err != nil {
		return 0
	}
	id, _ := info.ID()
	return uint32(id)
}

// mapMap maps an array into our memory.
func mapMap(m *ebpf.Map) (region, error) {
	r, err := mapRegion(m.FD(), 0, int(m.ValueSize())*int(m.MaxEntries()))
	runtime.KeepAlive(m)
	return r, err
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
			return nil, fmt.Errorf("%s: %w", p.name, refused.Terse(err))
		}
		*p.to = m
	}
	return e.checked()
}

func openMaps(id uint32) (elements, error) {
	e := &mapElements{}
	var err error
	if e.infos, err = ebpf.NewMapFromID(ebpf.MapID(id)); err != nil {
		return nil, refused.Terse(err)
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
		return nil, refused.Terse(err)
	}
	return e.checked()
}

// checked refuses maps whose shape differs from what the info record says.
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

func (e *mapElements) info() (*infoRecord, error) { return readInfo(e.infos) }

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
