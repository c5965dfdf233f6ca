//go:build linux

// Package steer lets the kernel choose the queue of a TAP as a frontend's Toeplitz hash says.
//
// A kernel that sends a frame through a TAP with several queues chooses the queue before any
// program reads the frame. It asks an eBPF program instead, if the TAP has one
// (TUNSETSTEERINGEBPF of linux/if_tun.h). A [Program] is such a program: it parses the frame,
// computes its hash and looks the queue up in the frontend's table, as
// [barevif/pvnet/toeplitz.Table.Frame] and [pvnet.Device.QueueFor] do, and comes to the same
// result for every frame.
//
// What the frontend asks for changes while frames move, so it lies in a map. The map has two
// records, of which another map names the one in use: a change is written to the other record,
// and then that one is named. A frame that is steered during two changes may still read a
// record that is half of one and half of the other. Then it takes a queue that neither meant,
// as frames of other flows do; no record leads outside the map or to a queue that the TAP does
// not have.
//
// Loading needs CAP_BPF in the first user namespace, and Linux 5.8; CAP_SYS_ADMIN does instead.
package steer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"barevif/pvnet"
	"barevif/telemetry/bpf/refused"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// MaxEntries is how many entries a table of queues may have at most: as many as a TAP may
// have queues (MAX_TAP_QUEUES of drivers/net/tun.c).
const MaxEntries = 256

// Layout of a record of settings, in bytes.
const (
	offTypes   = 0                        // uint32: Steering.Types
	offEntries = 4                        // uint32: entries in use of the table of queues
	offQueues  = 8                        // the table of queues, of uint32
	offBytes   = offQueues + 4*MaxEntries // for each byte of input and each value of its upper, then of its lower four bits: what it contributes to the hash
	nibble     = 16 * 4
	settings   = offBytes + maxInput*2*nibble
)

// maxInput is the longest input of a hash: two IPv6 addresses and two ports.
const maxInput = 36

// A Program steers the frames of a TAP. One goroutine at a time may call its methods.
type Program struct {
	prog    *ebpf.Program
	records *ebpf.Map // two records of settings
	current *ebpf.Map // uint32: which of them is in use
	used    uint32    // what current holds
	record  [settings]byte
}

// New loads a program. Set must follow before a TAP uses it. An error says what the process
// lacks.
func New() (*Program, error) { return load(ebpf.SocketFilter) }

// load loads the program as one of a type that sees frames from their Ethernet header on.
func load(typ ebpf.ProgramType) (*Program, error) {
	p := new(Program)
	if err := p.load(typ); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *Program) load(typ ebpf.ProgramType) (err error) {
	for _, m := range [...]struct {
		to            **ebpf.Map
		name          string
		size, entries uint32
	}{{&p.records, "barevif_steer", settings, 2}, {&p.current, "barevif_steer_i", 4, 1}} {
		*m.to, err = ebpf.NewMap(&ebpf.MapSpec{Name: m.name, Type: ebpf.Array, KeySize: 4, ValueSize: m.size, MaxEntries: m.entries})
		if err != nil {
			return fmt.Errorf("steer: create map %s: %w", m.name, refused.Lacking("CAP_BPF", unix.CAP_BPF, err))
		}
	}
	p.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "barevif_steer",
		Type:         typ,
		Instructions: instructions(p.records.FD(), p.current.FD()),
		License:      "Dual MIT/GPL",
	})
	runtime.KeepAlive(p.records)
	runtime.KeepAlive(p.current)
	if err != nil {
		return fmt.Errorf("steer: load the program: %w", refused.Lacking("CAP_BPF", unix.CAP_BPF, err))
	}
	return nil
}

// FD returns the descriptor of the program, for TUNSETSTEERINGEBPF. It stays the Program's.
func (p *Program) FD() int { return p.prog.FD() }

// Set makes the program choose queues as s says, from the next frame on. The entries of
// s.Queues are numbers of the TAP's queues; of one that is too large the kernel takes the
// remainder. The error is about a table that is empty or has more than [MaxEntries] entries, or
// from the kernel; then the program goes on as before.
func (p *Program) Set(s *pvnet.Steering) error {
	if n := len(s.Queues); n < 1 || n > MaxEntries {
		return fmt.Errorf("steer: a table of %d queues, not of 1 to %d", n, MaxEntries)
	}
	p.encode(s)
	next := 1 - p.used
	if err := p.records.Update(next, p.record[:], ebpf.UpdateAny); err != nil {
		return fmt.Errorf("steer: write the settings: %w", refused.Terse(err))
	}
	if err := p.current.Update(uint32(0), next, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("steer: name the settings in use: %w", refused.Terse(err))
	}
	p.used = next
	return nil
}

// encode makes p.record the settings s.
func (p *Program) encode(s *pvnet.Steering) {
	put := func(at int, v uint32) { binary.NativeEndian.PutUint32(p.record[at:], v) }
	clear(p.record[:])
	put(offTypes, s.Types)
	put(offEntries, uint32(len(s.Queues)))
	for i, q := range s.Queues {
		put(offQueues+4*i, uint32(q))
	}
	var in [maxInput]byte // the hash is linear: that of one byte alone is what the byte contributes
	for i := range in {
		for v := range 16 {
			at := offBytes + i*2*nibble + 4*v
			in[i] = byte(v << 4)
			put(at, s.Table.Sum(in[:]))
			in[i] = byte(v)
			put(at+nibble, s.Table.Sum(in[:]))
		}
		in[i] = 0
	}
}

// Close gives the program and its maps back. A TAP that still has the program keeps both.
func (p *Program) Close() error {
	var errs []error
	if p.prog != nil {
		errs = append(errs, p.prog.Close())
	}
	for _, m := range [...]*ebpf.Map{p.records, p.current} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}
