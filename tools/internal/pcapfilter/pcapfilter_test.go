package pcapfilter

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
)

// expressions are compiled by tcpdump, too.
var expressions = strings.Split(strings.TrimSpace(`
tcp
udp
icmp
icmp6
igmp
sctp
arp
rarp
ip
ip6
pim
esp
ah
vrrp
ip6 and tcp
port 80
tcp port 80
udp port 53
sctp port 80
src port 80
dst port 53
tcp src port 80
port 80 or 443
port domain
tcp port http
portrange 1-1024
tcp dst portrange 80-443
udp portrange 9000-53
host 10.9.0.1
src host 10.9.0.1
dst host 10.9.0.1
src 10.9.0.1
src or dst host 10.9.0.1
src and dst host 10.9.0.1
dst or src 10.9.0.1
ip host 10.9.0.1
arp host 10.9.0.1
arp src 10.9.0.2
rarp host 10.9.0.1
host 10.9.0.1 and 10.9.0.2
host 10.9.0.1 or 10.9.0.2 or 192.168.7.1
host fe80::1
src host 2001:db8::1
ip6 host 2001:db8::1
net 10.9.0.0/24
net 10.9
net 10
net 10.9.0.0 mask 255.255.0.0
net 192.168.0.0/16 or net 10.0.0.0/8
src net 10.0.0.0/8
dst net 192.168.7.0/25
net 2001:db8::/32
src net fe80::/10
net 2001:db8::/47
not port 22
! port 22
not not tcp
tcp and port 80
tcp && ! port 80
tcp or udp
tcp or udp and port 53
udp and port 53 or tcp
tcp and (port 80 or port 443)
host 10.9.0.1 and not tcp port 22
(tcp or udp) and (host 10.9.0.1 or host fe80::1)
ether host 00:16:3e:00:01:00
ether src 00:16:3e:00:01:00
ether dst 00-16-3e-00-01-00
ether host 0:16:3e:0:1:0 and arp
ether broadcast
broadcast
multicast
ether multicast
ip multicast
ip6 multicast
ether proto 0x88cc
ether proto 2048
ether proto \ip
ether proto 100
ether proto \arp
ip proto 6
ip proto \tcp
ip6 proto 17
ip6 proto \udp
proto 17
proto \icmp
vlan
vlan 5
vlan 5 and ip
vlan and vlan 7 and tcp port 80
vlan 5 or udp
vlan and host 10.9.0.1
vlan and tcp[13] & 2 != 0
vlan and ip6 and icmp6
tcp[13] & 2 != 0
tcp[tcpflags] & (tcp-syn|tcp-fin) != 0
tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn
tcp[tcpflags] = tcp-syn
ip[6:2] & 0x1fff = 0
ip[0] & 0xf != 5
ip[8] < 5
ip[2:2] > 576
ip[16] >= 224
ether[0] & 1 = 1
ether[0] & 1 = 0 and ip[16] >= 224
ether[6:4] = 0x00163e00
icmp[icmptype] = icmp-echo
icmp[icmptype] != icmp-echo and icmp[icmptype] != icmp-echoreply
icmp6[icmp6type] = icmp6-neighborsolicit
udp[4:2] > 100
udp[8] = 1
ip6[6] = 17
arp[6:2] = 2
len > 100
len <= 110
greater 120
less 100
len = 64 or len - 14 > ip[2:2]
tcp[2:2] = 80
tcp port 80 and (((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0)
ip[ip[0] & 15] = 1
tcp[tcp[12] >> 2] = 71
tcp[((tcp[12:1] & 0xf0) >> 2):4] = 0x47455420
ip[2:2] * 2 = 80
ip[8] / 2 = 32
ip[8] % 3 = 1
ip[8] ^ 64 = 0
0 - ip[8] = 0 - 64
1 < ip[8]
(ip[8] + 1) * 2 = 130
(tcp[13] & 2) != 0
((tcp))
ip[2:2] > ip[4:2]
ether proto 0x0806 and arp[7] = 1
`), "\n")

// frames makes frames of many kinds, whose fields are those that the expressions ask for, or
// others.
func frames(n int) (all [][]byte) {
	r := rand.New(rand.NewPCG(1, 2))
	pick := func(of ...[]byte) []byte { return of[r.IntN(len(of))] }
	num := func(of ...int) int { return of[r.IntN(len(of))] }
	mac := func() []byte {
		return pick([]byte{0, 0x16, 0x3e, 0, 1, 0}, []byte{0, 0x16, 0x3e, 0, 1, 1}, bytes.Repeat([]byte{255}, 6), []byte{1, 0, 0x5e, 0, 0, 1})
	}
	be := func(b []byte, v ...int) []byte {
		for _, w := range v {
			b = binary.BigEndian.AppendUint16(b, uint16(w))
		}
		return b
	}
	v4 := func() []byte {
		return pick([]byte{10, 9, 0, 1}, []byte{10, 9, 0, 2}, []byte{10, 9, 7, 1}, []byte{192, 168, 7, 1}, []byte{192, 168, 7, 200}, []byte{224, 0, 0, 1}, []byte{8, 8, 8, 8})
	}
	v6 := func() []byte {
		b := make([]byte, 16)
		copy(b, pick([]byte{0xfe, 0x80}, []byte{0x20, 1, 0xd, 0xb8}, []byte{0x20, 1, 0xd, 0xb9}, []byte{0xff, 2}))
		b[15] = byte(r.IntN(3))
		return b
	}
	l4 := func(proto int) (b []byte) {
		port := func() int { return num(80, 443, 53, 22, 1024, 9000, 100) }
		switch proto {
		case 1, 58:
			b = append(b, byte(num(0, 8, 3, 128, 135)), byte(r.IntN(3)))
		default:
			b = be(b, port(), port(), num(0, 50, 101), r.IntN(65536))
			b = append(b, byte(r.IntN(256)), byte(r.IntN(256)), 0, 1)
			b = append(b, byte(num(0x50, 0x60)), byte(num(2, 1, 18, 16, 0)))
		}
		return append(b, append([]byte("......GET GET "), make([]byte, r.IntN(90))...)...)
	}
	for range n {
		f := append(append([]byte(nil), mac()...), mac()...)
		for range num(0, 0, 0, 1, 2) {
			f = be(f, num(0x8100, 0x88a8, 0x9100), num(5, 7, 0x2005, 1))
		}
		proto := num(1, 2, 6, 6, 17, 17, 58, 132, 50, 51, 103, 112, 44, 9)
		switch r.IntN(6) {
		case 0, 1:
			f = be(f, 0x800)
			words := num(5, 5, 6)
			f = append(f, byte(0x40|words), 0)
			f = be(f, num(40, 60, 600), num(1, 50), num(0, 0, 0x2000, 0x1234, 0x4000))
			f = append(f, byte(num(64, 1, 3, 128)), byte(proto), 0, 0)
			f = append(append(f, v4()...), v4()...)
			f = append(append(f, bytes.Repeat([]byte{1}, 4*(words-5))...), l4(proto)...)
		case 2, 3:
			f = be(f, 0x86dd)
			f = be(f, 0x6000, 0, 40)
			f = append(f, byte(proto), 64)
			f = append(append(f, v6()...), v6()...)
			if proto == 44 {
				f = append(f, byte(num(6, 17, 58)), 0, 0, 0, 0, 0, 0, 1)
			}
			f = append(f, l4(proto)...)
		case 4:
			f = be(f, num(0x806, 0x8035))
			f = be(f, 1, 0x800, 0x604, num(1, 2))
			f = append(append(append(append(f, mac()...), v4()...), mac()...), v4()...)
		default:
			f = be(f, num(0x88cc, 100, 1500, 0x88b5))
			f = append(f, byte(num(100, 7)))
			f = append(f, make([]byte, 60)...)
		}
		f = append(f, make([]byte, max(0, 100-len(f)))...) // both load beyond no end
		all = append(all, f)
	}
	return all
}

func run(t *testing.T, raw []bpf.RawInstruction) *bpf.VM {
	t.Helper()
	ins, all := bpf.Disassemble(raw)
	if !all {
		t.Fatalf("an instruction is unknown: %v", raw)
	}
	vm, err := bpf.NewVM(ins)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

func accepts(t *testing.T, vm *bpf.VM, frame []byte) bool {
	t.Helper()
	n, err := vm.Run(frame)
	if err != nil {
		t.Fatal(err)
	}
	return n > 0
}

// tcpdump compiles an expression with Debian's tcpdump.
func tcpdump(t *testing.T, path, expression string) (raw []bpf.RawInstruction, err error) {
	t.Helper()
	out, err := exec.Command(path, "-y", "EN10MB", "-ddd", "--", expression).Output()
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil, fmt.Errorf("%w: %s", err, e.Stderr)
	}
	if err != nil {
		return nil, err
	}
	for i, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		if i == 0 {
			continue
		}
		var v [4]uint64
		for j, w := range strings.Fields(line) {
			if v[j], err = strconv.ParseUint(w, 10, 32); err != nil {
				t.Fatal(err)
			}
		}
		raw = append(raw, bpf.RawInstruction{Op: uint16(v[0]), Jt: uint8(v[1]), Jf: uint8(v[2]), K: uint32(v[3])})
	}
	return raw, nil
}

func lookTcpdump(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("tcpdump")
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/tcpdump"); err != nil {
			t.Skip("tcpdump is not installed: ", err)
		}
	}
	return path
}

// Each expression accepts the frames that tcpdump's program accepts.
func TestExpressionsMeanWhatTheyMeanToTcpdump(t *testing.T) {
	path := lookTcpdump(t)
	all := frames(4000)
	for _, e := range expressions {
		theirs, err := tcpdump(t, path, e)
		if err != nil {
			t.Errorf("%s: tcpdump does not compile it: %v", e, err)
			continue
		}
		ours, err := Compile(e)
		if err != nil {
			t.Errorf("%s: %v", e, err)
			continue
		}
		a, b := run(t, ours), run(t, theirs)
		hits := 0
		for _, f := range all {
			got, want := accepts(t, a, f), accepts(t, b, f)
			if got != want {
				t.Errorf("%s: %v, tcpdump says %v, of % x", e, got, want, f)
				break
			}
			if got {
				hits++
			}
		}
		if hits == 0 || hits == len(all) {
			t.Errorf("%s: accepts %d of %d frames, which proves little", e, hits, len(all))
		}
	}
}

// What is wrong is named. Where tcpdump compiles an expression, the error says why we do not.
func TestErrorsNameThePart(t *testing.T) {
	for e, want := range map[string]string{
		"tcp prt 80":                    `"prt"`,
		"host":                          "at its end",
		"port":                          "at its end",
		"tcp and":                       "at its end",
		"and tcp":                       `"and"`,
		"(tcp":                          `")" is missing`,
		"tcp)":                          `")"`,
		"port 70000":                    `"70000"`,
		"port nosuchservice":            `"nosuchservice"`,
		"host example.org":              `"example.org": not an address; names of hosts are not looked up`,
		"example.org":                   `"example.org"`,
		"gateway x":                     `"gateway"`,
		"net loopback":                  `"loopback"`,
		"net 10.9.0.1/24":               "bits behind the prefix",
		"net 10.0.0.0/33":               "length of a prefix",
		"net 10.0.0.0 mask 255.0.255.0": "holes",
		"host 10.0.0.0/8":               `write "net"`,
		"host 10.0.0.256":               `"10.0.0.256"`,
		"host 00:16:3e:00:01:00":        `write "ether host"`,
		"ether host 10.0.0.1":           "not an Ethernet address",
		"ip host fe80::1":               "IPv6 behind ip",
		"ip6 host 10.0.0.1":             "IPv4 behind ip6",
		"arp port 80":                   `"arp": it has no ports`,
		"ip port 80":                    `"ip": it has no ports`,
		"tcp host 10.0.0.1":             "IPv4 behind tcp",
		"80":                            `"80"`,
		"ether":                         "is missing",
		"ip broadcast":                  "not known",
		"tcp multicast":                 "no multicast",
		"ether proto foo":               `"foo"`,
		"ip proto 256":                  `"256"`,
		"vlan 4096":                     `"4096"`,
		"mpls":                          `"mpls": not compiled here`,
		"inbound":                       "--direction",
		"tcp[13":                        `"]" is missing`,
		"tcp[13:3] = 0":                 `"3"`,
		"tcp[100000] = 0":               "no frame",
		"ip[0] / 0 = 1":                 "division by 0",
		"ip[0] << 32 = 1":               "shift",
		"esp[0] = 1":                    `"esp"`,
		"ip[0] =":                       "at its end",
		"tcp;":                          `";"`,
		"port 99999999999":              "32 bits",
		strings.Repeat("(", 2000):       "too deep",
		strings.Repeat("not ", 1000):    "too deep",
		strings.Repeat("x", 5000):       "more than 4096 bytes",
		strings.Repeat("host 10.0.0.1 or ", 120) + "tcp": "",
	} {
		raw, err := Compile(e)
		if want == "" {
			if err != nil {
				t.Errorf("%.40s: %v", e, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: %v, %d instructions; want %q", e, err, len(raw), want)
		}
	}
}

func TestAnEmptyExpressionAcceptsAll(t *testing.T) {
	raw, err := Compile("  ")
	if err != nil || !accepts(t, run(t, raw), []byte{1}) {
		t.Error(raw, err)
	}
}

// A long expression needs jumps of more than 255 instructions.
func TestLongExpressionsReachTheirEnd(t *testing.T) {
	var b strings.Builder
	for i := range 100 {
		fmt.Fprintf(&b, "port %d or ", 30000+i)
	}
	raw, err := Compile(b.String() + "port 80")
	if err != nil {
		t.Fatal(err)
	}
	short, err := Compile("port 80")
	if err != nil {
		t.Fatal(err)
	}
	a, c := run(t, raw), run(t, short)
	for _, f := range frames(500) {
		if accepts(t, a, f) != accepts(t, c, f) {
			t.Fatalf("%d instructions disagree with %d of % x", len(raw), len(short), f)
		}
	}
}

// Whatever is compiled is a program that the virtual machine takes, and never more.
func FuzzCompile(f *testing.F) {
	for _, e := range expressions {
		f.Add(e)
	}
	all := frames(4)
	f.Fuzz(func(t *testing.T, e string) {
		raw, err := Compile(e)
		if err != nil {
			return
		}
		vm := run(t, raw)
		for _, frame := range append(all, nil, []byte{1}) {
			accepts(t, vm, frame)
		}
	})
}
