//go:build linux

package netns

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/pvnet/netstack"
	"barevif/pvnet/pvnettest"
	"barevif/xenbus/toolstack"
)

// vif makes an emulated machine with one vif and returns both ends.
func vif(t *testing.T, mtu int) (front, back *pvnet.Device) {
	t.Helper()
	w := pvnettest.New(t, toolstack.Vif{MAC: [6]byte{0, 0x16, 0x3e, 0, 0, 1}, MTU: mtu}, pvnet.Config{}, pvnet.Config{})
	return w.Front, w.Back
}

// The complete path: the kernel's TCP, its card, the joint, both ends of the rings, and
// the stack of a guest in this process.
func TestKernelBrowsesAGuest(t *testing.T) {
	const size = 8 << 20
	seed := [32]byte{1, 2, 3}
	want := sha256.New()
	io.CopyN(want, rand.NewChaCha8(seed), size)
	both(t, func(t *testing.T, cfg Config) {
		for _, mtu := range []int{1500, 9000} {
			cfg.MTU = mtu
			sb := start(t, cfg)
			front, back := vif(t, mtu)
			ctx, cancel := context.WithCancel(context.Background())
			var joint link.Joint
			joined := make(chan error, 1)
			go func() { joined <- joint.Run(ctx, back, sb.Link()) }()
			guest, err := netstack.New(front, netstack.Config{Addr: netip.PrefixFrom(there, 24)})
			if err != nil {
				t.Fatal(err)
			}
			l, err := guest.Listen("tcp", ":80")
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				got := sha256.New()
				if n, err := io.Copy(got, r.Body); err != nil || n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
					t.Errorf("the guest got %d bytes, %v", n, err)
				}
				io.CopyN(w, rand.NewChaCha8(seed), size)
			})}
			go srv.Serve(l)

			tr := &http.Transport{DialContext: sb.DialContext}
			client := &http.Client{Transport: tr, Timeout: 3 * wait}
			begin := time.Now()
			resp, err := client.Post("http://192.0.2.2/", "", io.LimitReader(rand.NewChaCha8(seed), size))
			if err != nil {
				t.Fatalf("%v; %+v", err, joint.Stats())
			}
			got := sha256.New()
			n, err := io.Copy(got, resp.Body)
			resp.Body.Close()
			if err != nil || n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
				t.Fatalf("the kernel got %d bytes, %v; %+v", n, err, joint.Stats())
			}
			t.Logf("MTU %d: %d MiB each way in %v; %+v", mtu, size>>20, time.Since(begin).Round(time.Millisecond), joint.Stats())
			if st := joint.Stats(); st.Oversize+st.Uncut+st.Refused+st.Segments != 0 {
				t.Errorf("MTU %d: %+v", mtu, st)
			}

			// And the guest is a client of a server in the kernel's namespace.
			kl, err := sb.Listen("tcp", "192.0.2.1:8080")
			if err != nil {
				t.Fatal(err)
			}
			ksrv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) })}
			go ksrv.Serve(kl)
			gtr := &http.Transport{DialContext: guest.DialContext}
			resp, err = (&http.Client{Transport: gtr, Timeout: wait}).Get("http://192.0.2.1:8080/")
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if from, perr := netip.ParseAddrPort(string(b)); err != nil || perr != nil || from.Addr() != there {
				t.Errorf("the kernel saw %q, %v", b, err)
			}
			gtr.CloseIdleConnections()
			tr.CloseIdleConnections()
			ksrv.Close()
			srv.Close()
			guest.Close()
			cancel()
			if err := <-joined; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
	})
}
