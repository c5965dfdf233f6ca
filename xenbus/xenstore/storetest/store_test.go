package storetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/server"
)

func TestEmbeddedStore(t *testing.T) {
	Run(t, func(t testing.TB) Dialer {
		s := server.New(server.Config{})
		t.Cleanup(func() { s.Close() })
		return func(_ context.Context, dom hypercall.DomID) (io.ReadWriteCloser, error) {
			if home := fmt.Sprintf("/local/domain/%d", dom); dom != 0 {
				s.Introduce(dom)
				if _, err := s.Read(home); err != nil {
					if err := errors.Join(s.Mkdir(home), s.SetPerms(home, fmt.Sprintf("n%d", dom))); err != nil {
						return nil, err
					}
				}
			}
			ours, theirs := net.Pipe()
			go s.ServeConn(theirs, dom)
			return ours, nil
		}
	})
}
