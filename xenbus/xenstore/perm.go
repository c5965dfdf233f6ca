package xenstore

import (
	"fmt"
	"strings"

	"barevif/hypercall"
)

// Access is what a domain may do with a node. The values are the letters of the protocol.
type Access byte

const (
	None      Access = 'n'
	ReadOnly  Access = 'r'
	WriteOnly Access = 'w'
	ReadWrite Access = 'b'
)

// A Perm gives a domain access to a node. The first Perm of a node names its owner, who
// may do everything; its Access holds for all domains without a Perm.
type Perm struct {
	Dom    hypercall.DomID
	Access Access
}

// String returns the form of the protocol, such as "r5".
func (p Perm) String() string { return fmt.Sprintf("%c%d", p.Access, p.Dom) }

func parsePerms(reply string) ([]Perm, error) {
	var perms []Perm
	for s := range strings.SplitSeq(strings.TrimSuffix(reply, "\x00"), "\x00") {
		bad := &ProtocolError{fmt.Sprintf("the permission %q", Clip(s))}
		if s == "" || !strings.ContainsRune("nrwb", rune(s[0])) {
			return nil, bad
		}
		dom, err := ParseUint(s[1:], 1<<16-1)
		if err != nil {
			return nil, bad
		}
		perms = append(perms, Perm{hypercall.DomID(dom), Access(s[0])})
	}
	return perms, nil
}
