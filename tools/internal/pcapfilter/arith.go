package pcapfilter

import (
	"golang.org/x/net/bpf"
)

// An arith is an arithmetic expression: the tests that must be true before it means
// anything, such as "is TCP" for tcp[13], and code that leaves its value in A. It may use
// the scratch words from the given one on.
type arith struct {
	guards []test
	gen    func(c *code, scratch int)
	fixed  bool // its value is val, whatever the frame
	val    uint32
}

func constant(v uint32) arith {
	return arith{fixed: true, val: v, gen: func(c *code, _ int) { c.emit(bpf.LoadConstant{Dst: bpf.RegA, Val: v}) }}
}

// names are the numbers that have a name in an expression.
var names = map[string]uint32{
	"tcpflags": 13, "tcp-fin": 1, "tcp-syn": 2, "tcp-rst": 4, "tcp-push": 8, "tcp-ack": 16, "tcp-urg": 32, "tcp-ece": 64, "tcp-cwr": 128,
	"icmptype": 0, "icmpcode": 1, "icmp-echoreply": 0, "icmp-unreach": 3, "icmp-sourcequench": 4, "icmp-redirect": 5, "icmp-echo": 8,
	"icmp-routeradvert": 9, "icmp-routersolicit": 10, "icmp-timxceed": 11, "icmp-paramprob": 12, "icmp-tstamp": 13,
	"icmp-tstampreply": 14, "icmp-ireq": 15, "icmp-ireqreply": 16, "icmp-maskreq": 17, "icmp-maskreply": 18,
	"icmp6type": 0, "icmp6code": 1, "icmp6-destinationunreach": 1, "icmp6-packettoobig": 2, "icmp6-timeexceeded": 3,
	"icmp6-parameterproblem": 4, "icmp6-echo": 128, "icmp6-echoreply": 129, "icmp6-multicastlistenerquery": 130,
	"icmp6-multicastlistenerreportv1": 131, "icmp6-multicastlistenerdone": 132, "icmp6-routersolicit": 133,
	"icmp6-routeradvert": 134, "icmp6-neighborsolicit": 135, "icmp6-neighboradvert": 136, "icmp6-redirect": 137,
	"icmp6-routerrenum": 138, "icmp6-nodeinformationquery": 139, "icmp6-nodeinformationresponse": 140,
	"icmp6-ineighbordiscoverysolicit": 141, "icmp6-ineighbordiscoveryadvert": 142, "icmp6-multicastlistenerreportv2": 143,
	"icmp6-homeagentdiscoveryrequest": 144, "icmp6-homeagentdiscoveryreply": 145, "icmp6-mobileprefixsolicit": 146,
	"icmp6-mobileprefixadvert": 147, "icmp6-certpathsolicit": 148, "icmp6-certpathadvert": 149,
	"icmp6-multicastrouteradvert": 151, "icmp6-multicastroutersolicit": 152, "icmp6-multicastroutertermination": 153,
}

var relations = map[string]bpf.JumpTest{
	"=": bpf.JumpEqual, "==": bpf.JumpEqual, "!=": bpf.JumpNotEqual, ">": bpf.JumpGreaterThan, "<": bpf.JumpLessThan,
	">=": bpf.JumpGreaterOrEqual, "<=": bpf.JumpLessOrEqual,
}

// levels are the binary operators, those that bind least first.
var levels = []map[string]bpf.ALUOp{
	{"|": bpf.ALUOpOr},
	{"^": bpf.ALUOpXor},
	{"&": bpf.ALUOpAnd},
	{"<<": bpf.ALUOpShiftLeft, ">>": bpf.ALUOpShiftRight},
	{"+": bpf.ALUOpAdd, "-": bpf.ALUOpSub},
	{"*": bpf.ALUOpMul, "/": bpf.ALUOpDiv, "%": bpf.ALUOpMod},
}

// relation parses "a > b". It returns nil, and perhaps an error, if there is none: what is
// there may then be a primitive.
func (p *parser) relation() (test, error) {
	left, err := p.arith(0)
	if err != nil {
		return nil, err
	}
	rel := p.take()
	cond, ok := relations[rel.text]
	if !ok || rel.kind != operator {
		return nil, nil
	}
	right, err := p.arith(0)
	if err != nil {
		return nil, err
	}
	compare := func(c *code, t, f label) {
		if right.fixed {
			left.gen(c, 0)
			c.jump(op{cond: cond, val: right.val}, t, f)
			return
		}
		right.gen(c, 0)
		c.emit(bpf.StoreScratch{Src: bpf.RegA, N: 0})
		left.gen(c, 1)
		c.emit(bpf.LoadScratch{Dst: bpf.RegX, N: 0})
		c.jump(op{cond: cond, x: true}, t, f)
	}
	return and(append(append(append([]test(nil), left.guards...), right.guards...), compare)...), nil
}

func (p *parser) arith(level int) (arith, error) {
	if p.depth++; p.depth > maxDepth {
		return arith{}, p.fail(p.peek(), "too deep")
	}
	defer func() { p.depth-- }()
	if level == len(levels) {
		return p.factor()
	}
	left, err := p.arith(level + 1)
	for err == nil {
		o := p.peek()
		alu, ok := levels[level][o.text]
		if !ok || o.kind != operator {
			return left, nil
		}
		p.at++
		var right arith
		if right, err = p.arith(level + 1); err == nil {
			left, err = p.binary(o, alu, left, right)
		}
	}
	return arith{}, err
}

func (p *parser) binary(o token, alu bpf.ALUOp, a, b arith) (arith, error) {
	if b.fixed && b.val == 0 && (alu == bpf.ALUOpDiv || alu == bpf.ALUOpMod) {
		return arith{}, p.fail(o, "a division by 0")
	}
	if b.fixed && b.val > 31 && (alu == bpf.ALUOpShiftLeft || alu == bpf.ALUOpShiftRight) {
		return arith{}, p.fail(o, "a shift by more than 31 bits")
	}
	if a.fixed && b.fixed {
		return constant(fold(alu, a.val, b.val)), nil
	}
	return arith{
		guards: append(append([]test(nil), a.guards...), b.guards...),
		gen: func(c *code, scratch int) {
			if b.fixed {
				a.gen(c, scratch)
				c.emit(bpf.ALUOpConstant{Op: alu, Val: b.val})
				return
			}
			b.gen(c, scratch)
			c.emit(bpf.StoreScratch{Src: bpf.RegA, N: scratch})
			a.gen(c, scratch+1)
			c.emit(bpf.LoadScratch{Dst: bpf.RegX, N: scratch})
			c.emit(bpf.ALUOpX{Op: alu})
		},
	}, nil
}

func fold(alu bpf.ALUOp, a, b uint32) uint32 {
	switch alu {
	case bpf.ALUOpOr:
		return a | b
	case bpf.ALUOpXor:
		return a ^ b
	case bpf.ALUOpAnd:
		return a & b
	case bpf.ALUOpShiftLeft:
		return a << b
	case bpf.ALUOpShiftRight:
		return a >> b
	case bpf.ALUOpAdd:
		return a + b
	case bpf.ALUOpSub:
		return a - b
	case bpf.ALUOpMul:
		return a * b
	case bpf.ALUOpDiv:
		return a / b
	default:
		return a % b
	}
}

func (p *parser) factor() (arith, error) {
	t := p.take()
	switch {
	case t.kind == number:
		return constant(t.val), nil
	case t.kind == operator && t.text == "-":
		a, err := p.arith(len(levels))
		if err != nil {
			return a, err
		}
		return p.binary(t, bpf.ALUOpSub, constant(0), a)
	case t.kind == operator && t.text == "(":
		a, err := p.arith(0)
		if err == nil && !p.accept(")") {
			err = p.fail(p.peek(), `")" is missing`)
		}
		return a, err
	case t.kind == word && t.text == "len":
		return arith{gen: func(c *code, _ int) { c.emit(bpf.LoadExtension{Num: bpf.ExtLen}) }}, nil
	case t.kind == word:
		if v, ok := names[t.text]; ok {
			return constant(v), nil
		}
		if p.accept("[") {
			return p.bytes(t)
		}
	}
	return arith{}, p.fail(t, "not expected here")
}

// bytes parses the rest of "proto[offset:size]".
func (p *parser) bytes(proto token) (arith, error) {
	index, err := p.arith(0)
	if err != nil {
		return arith{}, err
	}
	if index.fixed && index.val > 65535 {
		return arith{}, p.fail(proto, "no frame has a byte there")
	}
	size := uint32(1)
	if p.accept(":") {
		t := p.peek()
		if size, err = p.number(); err != nil {
			return arith{}, err
		}
		if size != 1 && size != 2 && size != 4 {
			return arith{}, p.fail(t, "the size is 1, 2 or 4 bytes")
		}
	}
	if !p.accept("]") {
		return arith{}, p.fail(p.peek(), `"]" is missing`)
	}
	base, behind4 := 0, false
	a := arith{guards: index.guards}
	guard := func(t ...test) { a.guards = append(append([]test(nil), a.guards...), t...) }
	switch n := proto.text; n {
	case "ether":
	case "ip", "ip6", "arp", "rarp", "atalk", "aarp":
		base = p.net()
		guard(p.ether(n))
	case "icmp6":
		base = p.net() + 40
		guard(p.ether("ip6"), is(p.net()+6, 1, ipProtos[n]))
	case "icmp", "igmp", "igrp", "pim", "vrrp", "carp", "tcp", "udp", "sctp":
		base, behind4 = p.net(), true
		guard(p.on4(ipProtos[n]), unfragmented(p.net()))
	default:
		return arith{}, p.fail(proto, "its bytes cannot be named")
	}
	header := p.net()
	a.gen = func(c *code, scratch int) {
		if index.fixed && !behind4 {
			c.emit(bpf.LoadAbsolute{Off: uint32(base) + index.val, Size: int(size)})
			return
		}
		if index.fixed {
			c.emit(bpf.LoadMemShift{Off: uint32(header)})
			c.emit(bpf.LoadIndirect{Off: uint32(base) + index.val, Size: int(size)})
			return
		}
		index.gen(c, scratch)
		if behind4 {
			c.emit(bpf.LoadMemShift{Off: uint32(header)})
			c.emit(bpf.ALUOpX{Op: bpf.ALUOpAdd})
		}
		c.emit(bpf.TAX{})
		c.emit(bpf.LoadIndirect{Off: uint32(base), Size: int(size)})
	}
	return a, nil
}
