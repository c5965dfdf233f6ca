// Package pcapfilter compiles filter expressions of tcpdump (pcap-filter(7)) to classic BPF,
// for Ethernet frames that have their VLAN tags in them.
//
// It compiles what says something about frames of a vif: addresses, networks, ports,
// protocols from Ethernet to TCP, VLANs, lengths, and arithmetic on bytes. The rest is an
// error that names the word: tcpdump's names of hosts and networks, which would have to be
// looked up, and link layers that a vif does not have. The compiled programs accept the
// frames that tcpdump's accept, but are not the same programs; a test compares them.
//
// It is here because libpcap's own compiler needs cgo, and the Go packages that do not are
// no replacement: the one to be had compiles "icmp", "vlan 5 and ip" and "tcp[13] & 2 != 0"
// to other filters, without an error.
package pcapfilter

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/net/bpf"
)

// maxExpression bounds an expression in bytes, and maxDepth how deep it nests.
const (
	maxExpression = 4096
	maxDepth      = 100
)

// A SyntaxError says which part of an expression cannot be compiled, and why.
type SyntaxError struct {
	Part string // "" at the end of the expression
	Why  string
}

func (e *SyntaxError) Error() string {
	if e.Part == "" {
		return e.Why + " at its end"
	}
	return fmt.Sprintf("%q: %s", e.Part, e.Why)
}

// Compile compiles an expression. An empty one accepts every frame. The error is a
// [*SyntaxError], or says that the program would be too long.
func Compile(expression string) ([]bpf.RawInstruction, error) {
	if len(expression) > maxExpression {
		return nil, fmt.Errorf("it has more than %d bytes", maxExpression)
	}
	tokens, err := lex(expression)
	if err != nil {
		return nil, err
	}
	var c code
	yes, no := c.label(), c.label()
	if len(tokens) > 1 {
		p := parser{tokens: tokens, link: 12}
		t, err := p.parse()
		if err != nil {
			return nil, err
		}
		t(&c, yes, no)
	}
	c.bind(yes)
	c.emit(bpf.RetConstant{Val: 262144})
	c.bind(no)
	c.emit(bpf.RetConstant{})
	return c.assemble()
}

// A label is a place in the code, which is bound after all jumps to it.
type label int

// A test is code that goes on at t if it is true, and at f otherwise.
type test func(c *code, t, f label)

// An op is an instruction, or a conditional jump: then cond or condX is set.
type op struct {
	ins   bpf.Instruction // nil: a jump
	cond  bpf.JumpTest
	x     bool // compare with X
	val   uint32
	t, f  label
	long  bool // the jump is three instructions
	place int
}

// code collects instructions. All jumps go forward.
type code struct {
	ops   []op
	bound []int // by label: the op that it stands before
}

func (c *code) label() label {
	c.bound = append(c.bound, -1)
	return label(len(c.bound) - 1)
}

func (c *code) bind(l label)           { c.bound[l] = len(c.ops) }
func (c *code) emit(i bpf.Instruction) { c.ops = append(c.ops, op{ins: i}) }
func (c *code) jump(o op, t, f label)  { o.t, o.f = t, f; c.ops = append(c.ops, o) }
func (c *code) places() (total int) {
	for i := range c.ops {
		c.ops[i].place = total
		if total++; c.ops[i].long {
			total += 2
		}
	}
	return total
}

// assemble resolves the labels. A jump has 8 bits for its distance; one that goes farther
// becomes three instructions.
func (c *code) assemble() ([]bpf.RawInstruction, error) {
	at := func(l label) int { return c.ops[c.bound[l]].place }
	for again := true; again; {
		again = false
		c.places()
		for i := range c.ops {
			o := &c.ops[i]
			if o.ins == nil && !o.long && max(at(o.t), at(o.f))-o.place-1 > 255 {
				o.long, again = true, true
			}
		}
	}
	if n := c.places(); n > 4096 {
		return nil, errors.New("the program would have more than 4096 instructions")
	}
	var out []bpf.Instruction
	for i := range c.ops {
		o := &c.ops[i]
		if o.ins != nil {
			out = append(out, o.ins)
			continue
		}
		t, f := at(o.t)-o.place-1, at(o.f)-o.place-1
		if o.long {
			t, f = 0, 1
		}
		if o.x {
			out = append(out, bpf.JumpIfX{Cond: o.cond, SkipTrue: uint8(t), SkipFalse: uint8(f)})
		} else {
			out = append(out, bpf.JumpIf{Cond: o.cond, Val: o.val, SkipTrue: uint8(t), SkipFalse: uint8(f)})
		}
		if o.long {
			out = append(out, bpf.Jump{Skip: uint32(at(o.t) - o.place - 2)}, bpf.Jump{Skip: uint32(at(o.f) - o.place - 3)})
		}
	}
	return bpf.Assemble(out)
}

// and is true if all tests are; it stops at the first that is not.
func and(tests ...test) test {
	return func(c *code, t, f label) {
		for i, x := range tests {
			next := t
			if i < len(tests)-1 {
				next = c.label()
			}
			x(c, next, f)
			if i < len(tests)-1 {
				c.bind(next)
			}
		}
	}
}

// or is true if one of the tests is; it stops at the first that is.
func or(tests ...test) test {
	return func(c *code, t, f label) {
		for i, x := range tests {
			next := f
			if i < len(tests)-1 {
				next = c.label()
			}
			x(c, t, next)
			if i < len(tests)-1 {
				c.bind(next)
			}
		}
	}
}

func not(x test) test { return func(c *code, t, f label) { x(c, f, t) } }

// field compares size bytes at off, of which only those of mask count.
func field(off, size int, mask uint32, cond bpf.JumpTest, val uint32) test {
	return func(c *code, t, f label) {
		c.emit(bpf.LoadAbsolute{Off: uint32(off), Size: size})
		if mask != ^uint32(0) {
			c.emit(bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: mask})
		}
		c.jump(op{cond: cond, val: val}, t, f)
	}
}

func is(off, size int, val uint32) test { return field(off, size, ^uint32(0), bpf.JumpEqual, val) }

// behindIP compares two bytes at off behind an IPv4 header that begins at ip.
func behindIP(ip, off int, cond bpf.JumpTest, val uint32) test {
	return func(c *code, t, f label) {
		c.emit(bpf.LoadMemShift{Off: uint32(ip)})
		c.emit(bpf.LoadIndirect{Off: uint32(ip + off), Size: 2})
		c.jump(op{cond: cond, val: val}, t, f)
	}
}

// unfragmented is true for the first or only fragment of an IPv4 packet.
func unfragmented(ip int) test { return field(ip+6, 2, 0x1fff, bpf.JumpEqual, 0) }

// A token is a word, a number or an operator of an expression.
type token struct {
	kind kind
	text string
	val  uint32 // of a number
}

type kind uint8

const (
	end kind = iota
	word
	number
	address // of any kind, and a network with its prefix
	operator
)

var operators = []string{"&&", "||", "==", "!=", ">=", "<=", "<<", ">>", "(", ")", "[", "]", ":", "&", "|", "^", "+", "-", "*", "/", "%", "!", "<", ">", "="}

func digit(c byte) bool { return '0' <= c && c <= '9' }
func hex(c byte) bool   { return digit(c) || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F' }
func letter(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || c == '\\'
}

// span returns the longest beginning of s of which ok holds for each byte.
func span(s string, ok func(byte) bool) string {
	n := 0
	for n < len(s) && ok(s[n]) {
		n++
	}
	return s[:n]
}

func lex(s string) (out []token, err error) {
	for s = strings.TrimLeft(s, " \t\r\n"); s != ""; s = strings.TrimLeft(s, " \t\r\n") {
		t, err := lexOne(s)
		if err != nil {
			return nil, err
		}
		out = append(out, t)
		s = s[len(t.text):]
	}
	return append(out, token{}), nil
}

func lexOne(s string) (token, error) {
	if a := span(s, func(c byte) bool { return hex(c) || c == ':' || c == '.' || c == '/' }); isAddress(a) {
		return token{kind: address, text: a}, nil
	}
	if a := span(s, func(c byte) bool { return hex(c) || c == '-' }); isMAC(a) {
		return token{kind: address, text: a}, nil
	}
	switch c := s[0]; {
	case digit(c):
		if a := span(s, func(c byte) bool { return hex(c) || c == '.' }); strings.Contains(a, ".") {
			return token{}, &SyntaxError{a, "not an address"}
		}
		text := span(s, func(c byte) bool { return digit(c) || letter(c) && c != '\\' })
		v, err := parseNumber(text)
		return token{kind: number, text: text, val: v}, err
	case letter(c):
		text := span(s, func(c byte) bool { return letter(c) || digit(c) || c == '-' || c == '.' })
		return token{kind: word, text: text}, nil
	}
	for _, o := range operators {
		if strings.HasPrefix(s, o) {
			return token{kind: operator, text: o}, nil
		}
	}
	return token{}, &SyntaxError{s[:1], "no part of an expression"}
}
