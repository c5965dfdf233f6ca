package emu

import (
	"encoding/binary"
	"errors"
	"io"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/emu/emutest"
)

func TestErrorsKeepTheirIdentityOnTheWire(t *testing.T) {
	for _, want := range append(wireErrors(),
		&hypercall.GrantError{Op: "map", Dom: 3, Ref: 9, Status: hypercall.NoSpace},
		&hypercall.GrantError{Op: "copy", Dom: 4, Ref: 10, Status: hypercall.BadPage},
	) {
		var r reply
		text := r.setError(want)
		got := r.error([]byte(text))
		var a, b *hypercall.GrantError
		if errors.As(want, &a) {
			if !errors.As(got, &b) || *a != *b {
				t.Errorf("%v became %v", want, got)
			}
		} else if !errors.Is(got, want) {
			t.Errorf("%v became %v", want, got)
		}
	}
	var r reply
	if got := r.error([]byte(r.setError(io.ErrUnexpectedEOF))); got == nil || got.Error() != "emu: the host: unexpected EOF" {
		t.Errorf("%v", got)
	}
	r.Code = 255
	if r.error(nil) == nil {
		t.Error("an unknown code is no error")
	}
}

// FuzzHost makes two domains send the requests of the input. Each takes 28 bytes: one
// that selects the domain, the request, a ref. No request may harm the host or leave
// anything behind.
func FuzzHost(f *testing.F) {
	seed := func(reqs ...request) {
		var in []byte
		for i, r := range reqs {
			in = append(in, byte(i))
			in, _ = binary.Append(in, binary.NativeEndian, &r)
			in = binary.NativeEndian.AppendUint32(in, reservedRefs)
		}
		f.Add(in)
	}
	seed(request{Op: opShare, Peer: 2, N: 2}, request{Op: opMap, Peer: 1}, request{Op: opEndShare, ID: 5}, request{Op: opUnmap, ID: 6})
	seed(request{Op: opShare, Peer: 2, N: 1, Access: 1}, request{Op: opAttach, Peer: 1, N: 8}, request{Op: opEndShare, ID: 5, Refuse: true})
	seed(request{Op: opWaiter}, request{Op: opWaiter}, request{Op: opUnbound, ID: 5, Peer: 2}, request{Op: opBind, ID: 6, Peer: 1, N: 1},
		request{Op: opFarEnd, N: 1, Gen: 1}, request{Op: opClosePort, N: 1, Gen: 1}, request{Op: opCloseWaiter, ID: 5})
	seed(request{Op: opStore}, request{Op: opCloseStore, ID: 5}, request{Op: opKeepPages, N: 1 << 31}, request{Op: opDropPages, ID: 5},
		request{Op: opLookup, Peer: 1}, request{Op: opLookup, Peer: 9})

	h, err := Listen(filepath.Join(emutest.SocketDir(f), "xen"), Config{
		Grants: 16, Ports: 8,
		Store: func(_ hypercall.DomID, c io.ReadWriteCloser) { _, _ = io.Copy(io.Discard, c) },
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { h.Close() })
	size := 1 + binary.Size(request{}) + 4
	f.Fuzz(func(t *testing.T, in []byte) {
		h.serial.Store(2) // so that ids are the same in each run
		var servers [2]*server
		for i := range servers {
			g, err := h.newGuest(hypercall.DomID(i + 1))
			if err != nil {
				t.Fatal(err)
			}
			defer g.destroy()
			servers[i] = &server{tables: h.tables.(*fileTables), g: g}
		}
		for n := 0; len(in) >= size && n < 64; n++ {
			var r request
			if _, err := binary.Decode(in[1:], binary.NativeEndian, &r); err != nil {
				t.Fatal(err)
			}
			var a answer
			refs := []hypercall.GrantRef{hypercall.GrantRef(binary.NativeEndian.Uint32(in[size-4:]))}
			err := servers[in[0]%2].do(&r, refs, &a)
			if err != nil {
				a.setError(err)
			}
			for _, fd := range a.fds {
				if unix.Close(fd) != nil {
					t.Fatal("an answer with a bad descriptor")
				}
			}
			in = in[size:]
		}
		for _, s := range servers {
			s.g.destroy()
		}
		if err := h.CheckClean(); err != nil {
			t.Error(err)
		}
		if n := h.Ledger().Domains; n != 0 {
			t.Errorf("%d domains", n)
		}
	})
}
