//go:build linux

package steer

import (
	"strconv"

	"barevif/pvnet/netif"
	"barevif/pvnet/packet"

	"github.com/cilium/ebpf/asm"
)

// Offsets in struct __sk_buff of linux/bpf.h.
const (
	skbLen         = 0
	skbVLANPresent = 20
)

// The program's stack, in bytes from the frame pointer.
const (
	header  = -40 // the fixed IP header
	scratch = -48 // what was read last
	input   = -88 // of the hash: addresses and ports
	end     = -96 // of the options that may hold the length of a jumbogram, from the IP header
	at      = -104
	proto   = -112
)

// The bounds of packet.Parse.
const (
	ethernet      = 14
	maxChain      = 256 // bytes of an IPv6 header with its extension headers
	maxExtensions = 8
	fixed6        = 40 // bytes of an IPv6 header without them
)

// An assembler collects instructions. The program keeps the frame in R6, its record of
// settings in R7 and the frame's length in R8.
type assembler struct {
	ins  asm.Instructions
	next string // label of the next instruction
}

func (a *assembler) label(name string) { a.next = name }

func (a *assembler) emit(ins ...asm.Instruction) {
	if a.next != "" {
		ins[0], a.next = ins[0].WithSymbol(a.next), ""
	}
	a.ins = append(a.ins, ins...)
}

// read copies n bytes of the frame to the stack, from a constant offset on, or jumps to
// missing if the frame is too short.
func (a *assembler) read(from int32, to int32, n int32, missing string) {
	a.emit(asm.Mov.Imm(asm.R2, from))
	a.readR2(to, n, missing)
}

// readR2 is read from the offset in R2 on.
func (a *assembler) readR2(to int32, n int32, missing string) {
	a.emit(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, to),
		asm.Mov.Imm(asm.R4, n),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, missing),
	)
}

// half loads a 16-bit field of the stack in the host's order.
func half(r asm.Register, at int16) []asm.Instruction {
	return []asm.Instruction{asm.LoadMem(r, asm.RFP, at, asm.Half), asm.HostTo(asm.BE, r, asm.Half)}
}

// unless jumps to label if the frontend has not asked for hashes of the type.
func (a *assembler) unless(t netif.HashType, label string) {
	a.emit(
		asm.LoadMem(asm.R1, asm.R7, offTypes, asm.Word),
		asm.And.Imm(asm.R1, int32(t.Flag())),
		asm.JEq.Imm(asm.R1, 0, label),
	)
}

// addresses copies n bytes of the header to the input, from byte from on.
func (a *assembler) addresses(from, n int16) {
	for i := int16(0); i < n; i += 4 {
		a.emit(
			asm.LoadMem(asm.R1, asm.RFP, header+from+i, asm.Word),
			asm.StoreMem(asm.RFP, input+i, asm.R1, asm.Word),
		)
	}
}

// instructions assembles the program. It follows packet.Parse and toeplitz.Table.Frame.
func instructions(records, current int) asm.Instructions {
	a := new(assembler)
	a.begin(records, current)
	a.ipv4()
	a.ipv6()
	a.hash()
	a.queue()
	return a.ins
}

// begin loads R6 to R8 and finds out the kind of the frame. A frame with a VLAN tag has no
// hash, whether the tag lies in the frame or beside it.
func (a *assembler) begin(records, current int) {
	a.emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMapValue(asm.R1, current, 0),
		asm.LoadMem(asm.R1, asm.R1, 0, asm.Word),
		asm.And.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, scratch, asm.R1, asm.Word),
		asm.LoadMapPtr(asm.R1, records),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, scratch),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "exit"),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.Mov.Imm(asm.R1, 0),
	)
	for i := int16(0); i < 40; i += 8 {
		a.emit(asm.StoreMem(asm.RFP, input+i, asm.R1, asm.DWord))
	}
	a.emit(
		asm.LoadMem(asm.R8, asm.R6, skbLen, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, skbVLANPresent, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "none"),
	)
	a.read(12, scratch, 2, "none")
	a.emit(half(asm.R1, scratch)...)
	a.emit(
		asm.JEq.Imm(asm.R1, packet.IPv4, "ipv4"),
		asm.JEq.Imm(asm.R1, packet.IPv6, "ipv6"),
		asm.Ja.Label("none"),
	)
}

// ipv4 makes the input of an IPv4 packet, with its length in R9.
func (a *assembler) ipv4() {
	const fixed = 20
	a.label("ipv4")
	a.read(ethernet, header, fixed, "none")
	a.emit(
		asm.LoadMem(asm.R9, asm.RFP, header, asm.Byte),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.RSh.Imm(asm.R1, 4),
		asm.JNE.Imm(asm.R1, 4, "none"),
		asm.And.Imm(asm.R9, 15),
		asm.LSh.Imm(asm.R9, 2), // the length of the header
		asm.JLT.Imm(asm.R9, fixed, "none"),
	)
	a.emit(half(asm.R1, header+2)...) // the length of the packet
	a.emit(
		asm.JNE.Imm(asm.R1, 0, "ipv4 length"),
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Sub.Imm(asm.R2, ethernet),
		asm.JLE.Imm(asm.R2, 0xffff, "ipv4 length"),
		asm.Mov.Reg(asm.R1, asm.R2),
	)
	a.label("ipv4 length")
	a.emit(
		asm.JLT.Reg(asm.R1, asm.R9, "none"),
		asm.Add.Imm(asm.R1, ethernet),
		asm.JGT.Reg(asm.R1, asm.R8, "none"),
	)
	a.unless(netif.HashIPv4TCP, "ipv4 plain")
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, header+9, asm.Byte),
		asm.JNE.Imm(asm.R1, packet.TCP, "ipv4 plain"),
	)
	a.emit(half(asm.R1, header+6)...)
	a.emit(
		asm.And.Imm(asm.R1, 0x3fff), // a fragment: more of them, or an offset
		asm.JNE.Imm(asm.R1, 0, "ipv4 plain"),
		asm.Mov.Reg(asm.R2, asm.R9),
		asm.Add.Imm(asm.R2, ethernet),
	)
	a.readR2(input+8, 4, "ipv4 plain")
	a.emit(asm.Mov.Imm(asm.R9, 12), asm.Ja.Label("ipv4 addresses"))
	a.label("ipv4 plain")
	a.unless(netif.HashIPv4, "none")
	a.emit(asm.Mov.Imm(asm.R9, 8))
	a.label("ipv4 addresses")
	a.addresses(12, 8)
	a.emit(asm.Ja.Label("hash"))
}

// ipv6 makes the input of an IPv6 packet, with its length in R9.
func (a *assembler) ipv6() {
	a.label("ipv6")
	a.read(ethernet, header, fixed6, "none")
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, header, asm.Byte),
		asm.RSh.Imm(asm.R1, 4),
		asm.JNE.Imm(asm.R1, 6, "none"),
	)
	a.emit(half(asm.R9, header+4)...) // the length of the payload
	a.emit(asm.JNE.Imm(asm.R9, 0, "ipv6 length"))
	a.jumbo()
	a.label("ipv6 length")
	a.emit(
		asm.Mov.Reg(asm.R1, asm.R8),
		asm.Sub.Imm(asm.R1, ethernet+fixed6),
		asm.JGT.Reg(asm.R9, asm.R1, "none"),
	)
	a.unless(netif.HashIPv6TCP, "ipv6 plain")
	a.extensions()
	a.label("transport") // R1 is the protocol
	a.emit(
		asm.JNE.Imm(asm.R1, packet.TCP, "ipv6 plain"),
		asm.LoadMem(asm.R2, asm.RFP, at, asm.DWord),
	)
	a.readR2(input+32, 4, "ipv6 plain")
	a.emit(asm.Mov.Imm(asm.R9, 36), asm.Ja.Label("ipv6 addresses"))
	a.label("ipv6 plain")
	a.unless(netif.HashIPv6, "none")
	a.emit(asm.Mov.Imm(asm.R9, 32))
	a.label("ipv6 addresses")
	a.addresses(8, 32)
}

// jumbo finds the length of the payload, in R9, of a packet whose header says 0: that of a
// jumbogram, of a packet of more than 64 KiB for which Linux leaves it at 0, or 0.
func (a *assembler) jumbo() {
	// In bytes from the IP header: the first option, the end of the shortest header with
	// options, and a mask for where an option may begin. The mask changes no offset. It makes
	// the verifier forget what it knows of the offset, so that the rounds of the loop look
	// alike to it and it need not follow each way through all of them.
	const first, least, farthest = 42, 48, 0x1ff
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, header+6, asm.Byte),
		asm.JNE.Imm(asm.R1, 0, "no jumbogram"), // no hop-by-hop options
		asm.JLT.Imm(asm.R8, ethernet+least, "no jumbogram"),
	)
	a.read(ethernet+41, scratch, 1, "no jumbogram")
	a.emit(
		asm.LoadMem(asm.R1, asm.RFP, scratch, asm.Byte),
		asm.LSh.Imm(asm.R1, 3),
		asm.Add.Imm(asm.R1, least),
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Sub.Imm(asm.R2, ethernet),
		asm.JLE.Reg(asm.R1, asm.R2, "options in the frame"),
		asm.Mov.Reg(asm.R1, asm.R2),
	)
	a.label("options in the frame")
	a.emit(asm.JLE.Imm(asm.R1, maxChain, "options"), asm.Mov.Imm(asm.R1, maxChain))
	a.label("options")
	a.emit(
		asm.StoreMem(asm.RFP, end, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R1, first),
		asm.StoreMem(asm.RFP, at, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R9, 0), // counts options, so that the verifier sees an end
	)
	a.label("option")
	a.emit(
		asm.LoadMem(asm.R2, asm.RFP, at, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, end, asm.DWord),
		asm.And.Imm(asm.R2, farthest),
		asm.And.Imm(asm.R1, farthest),
		asm.Mov.Reg(asm.R3, asm.R2),
		asm.Add.Imm(asm.R3, 2),
		asm.JGT.Reg(asm.R3, asm.R1, "no jumbogram"),
		asm.Add.Imm(asm.R2, ethernet),
	)
	a.readR2(scratch, 2, "no jumbogram")
	a.emit(
		asm.LoadMem(asm.R3, asm.RFP, at, asm.DWord),
		asm.And.Imm(asm.R3, farthest),
		asm.LoadMem(asm.R1, asm.RFP, scratch, asm.Byte),
		asm.LoadMem(asm.R2, asm.RFP, scratch+1, asm.Byte),
		asm.JEq.Imm(asm.R1, 0, "pad1"),
		asm.JNE.Imm(asm.R1, 0xc2, "other option"),
		asm.JNE.Imm(asm.R2, 4, "other option"),
		asm.Mov.Reg(asm.R1, asm.R3),
		asm.Add.Imm(asm.R1, 6),
		asm.LoadMem(asm.R4, asm.RFP, end, asm.DWord),
		asm.And.Imm(asm.R4, farthest),
		asm.JGT.Reg(asm.R1, asm.R4, "other option"),
		asm.Mov.Reg(asm.R2, asm.R3),
		asm.Add.Imm(asm.R2, ethernet+2),
	)
	a.readR2(scratch, 4, "no jumbogram")
	a.emit(
		asm.LoadMem(asm.R9, asm.RFP, scratch, asm.Word),
		asm.HostTo(asm.BE, asm.R9, asm.Word),
		asm.JLE.Imm(asm.R9, 0xffff, "no jumbogram"),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.RSh.Imm(asm.R1, 31),
		asm.JNE.Imm(asm.R1, 0, "no jumbogram"),
		asm.Ja.Label("ipv6 length"),
	)
	a.label("other option")
	a.emit(asm.Add.Imm(asm.R3, 1), asm.Add.Reg(asm.R3, asm.R2))
	a.label("pad1")
	a.emit(
		asm.Add.Imm(asm.R3, 1),
		asm.And.Imm(asm.R3, farthest),
		asm.StoreMem(asm.RFP, at, asm.R3, asm.DWord),
		asm.Add.Imm(asm.R9, 1),
		asm.JLT.Imm(asm.R9, maxChain-first, "option"),
	)
	a.label("no jumbogram")
	a.emit(
		asm.Mov.Reg(asm.R9, asm.R8),
		asm.Sub.Imm(asm.R9, ethernet+fixed6),
		asm.JGT.Imm(asm.R9, 0xffff, "ipv6 length"),
		asm.Mov.Imm(asm.R9, 0),
	)
}

// extensions walks over the extension headers and jumps to "transport", with the offset of
// the transport header in at, or to "ipv6 plain" if there is none. R9 is the length of the
// payload.
func (a *assembler) extensions() {
	const routing, fragment, auth, destination = 43, 44, 51, 60 // and hop-by-hop, 0
	a.emit(
		asm.Add.Imm(asm.R9, ethernet+fixed6), // the end of the packet
		asm.JLE.Imm(asm.R9, ethernet+maxChain, "chain"),
		asm.Mov.Imm(asm.R9, ethernet+maxChain),
	)
	a.label("chain")
	a.emit(
		asm.Mov.Imm(asm.R1, ethernet+fixed6),
		asm.StoreMem(asm.RFP, at, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, header+6, asm.Byte),
		asm.StoreMem(asm.RFP, proto, asm.R1, asm.DWord),
	)
	for i := range maxExtensions + 1 {
		name := func(s string) string { return s + " " + strconv.Itoa(i) }
		a.emit(
			asm.LoadMem(asm.R1, asm.RFP, proto, asm.DWord),
			asm.JEq.Imm(asm.R1, fragment, "ipv6 plain"),
		)
		for _, p := range []int32{0, routing, auth, destination} {
			a.emit(asm.JEq.Imm(asm.R1, p, name("extension")))
		}
		a.emit(asm.Ja.Label("transport"))
		a.label(name("extension"))
		if i == maxExtensions {
			a.emit(asm.Ja.Label("ipv6 plain"))
			break
		}
		a.emit(
			asm.LoadMem(asm.R2, asm.RFP, at, asm.DWord),
			asm.Mov.Reg(asm.R3, asm.R2),
			asm.Add.Imm(asm.R3, 8),
			asm.JGT.Reg(asm.R3, asm.R9, "ipv6 plain"),
		)
		a.readR2(scratch, 2, "ipv6 plain")
		a.emit(
			asm.LoadMem(asm.R2, asm.RFP, scratch+1, asm.Byte), // its length
			asm.LoadMem(asm.R1, asm.RFP, proto, asm.DWord),
			asm.JEq.Imm(asm.R1, auth, name("auth")),
			asm.Add.Imm(asm.R2, 1),
			asm.LSh.Imm(asm.R2, 3),
			asm.Ja.Label(name("next")),
		)
		a.label(name("auth"))
		a.emit(asm.Add.Imm(asm.R2, 2), asm.LSh.Imm(asm.R2, 2))
		a.label(name("next"))
		a.emit(
			asm.LoadMem(asm.R3, asm.RFP, at, asm.DWord),
			asm.Add.Reg(asm.R3, asm.R2),
			asm.JGT.Reg(asm.R3, asm.R9, "ipv6 plain"),
			asm.StoreMem(asm.RFP, at, asm.R3, asm.DWord),
			asm.LoadMem(asm.R1, asm.RFP, scratch, asm.Byte),
			asm.StoreMem(asm.RFP, proto, asm.R1, asm.DWord),
		)
	}
}

// hash computes the hash of the input, whose length is in R9, in R0. A frame that no type
// applies to has the hash 0.
func (a *assembler) hash() {
	a.label("hash")
	a.emit(asm.Mov.Imm(asm.R0, 0))
	for i := range int16(maxInput) {
		if i == 8 || i == 12 || i == 32 {
			a.emit(asm.JEq.Imm(asm.R9, int32(i), "queue"))
		}
		entry := offBytes + i*2*nibble
		a.emit(
			asm.LoadMem(asm.R1, asm.RFP, input+i, asm.Byte),
			asm.Mov.Reg(asm.R2, asm.R1),
			asm.RSh.Imm(asm.R2, 4),
			asm.LSh.Imm(asm.R2, 2),
			asm.Add.Reg(asm.R2, asm.R7),
			asm.LoadMem(asm.R3, asm.R2, entry, asm.Word),
			asm.Xor.Reg(asm.R0, asm.R3),
			asm.And.Imm(asm.R1, 15),
			asm.LSh.Imm(asm.R1, 2),
			asm.Add.Reg(asm.R1, asm.R7),
			asm.LoadMem(asm.R3, asm.R1, entry+nibble, asm.Word),
			asm.Xor.Reg(asm.R0, asm.R3),
		)
	}
	a.emit(asm.Ja.Label("queue"))
	a.label("none")
	a.emit(asm.Mov.Imm(asm.R0, 0))
}

// queue returns the queue of the hash in R0.
func (a *assembler) queue() {
	a.label("queue")
	a.emit(
		asm.LoadMem(asm.R1, asm.R7, offEntries, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "exit"), // no settings yet
		asm.Mod.Reg(asm.R0, asm.R1),
		asm.JGE.Imm(asm.R0, MaxEntries, "exit"),
		asm.LSh.Imm(asm.R0, 2),
		asm.Add.Reg(asm.R0, asm.R7),
		asm.LoadMem(asm.R0, asm.R0, offQueues, asm.Word),
		asm.Return(),
	)
	a.label("exit")
	a.emit(asm.Mov.Imm(asm.R0, 0), asm.Return())
}
