package main

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"barevif/tools/vifrouter/config"
	"barevif/tools/vifrouter/dnsproxy"
)

// A clientTable says which guest has an address, by IPv4 address and by /64. It is replaced as a whole.
type clientTable struct {
	now atomic.Pointer[map[netip.Prefix]dnsproxy.Client]
}

func (t *clientTable) set(m map[netip.Prefix]dnsproxy.Client) { t.now.Store(&m) }

func (t *clientTable) find(a netip.Addr) (dnsproxy.Client, bool) {
	m := t.now.Load()
	if m == nil || !a.IsValid() {
		return dnsproxy.Client{}, false
	}
	if c, ok := (*m)[single(a)]; ok {
		return c, true
	}
	if a.Is4() {
		return dnsproxy.Client{}, false
	}
	p, _ := a.Prefix(64)
	c, ok := (*m)[p]
	return c, ok
}

// A service is the name server at one address.
type service struct {
	udp net.PacketConn
	tcp net.Listener
}

func (s *service) close() {
	s.udp.Close()
	s.tcp.Close()
}

// serveNamesLocked listens for queries at the router's addresses in the networks of guests, and
// at no others.
func (d *daemon) serveNamesLocked() {
	want := map[netip.Addr]bool{}
	if !d.cfg.DNS.Off {
		for _, p := range d.applied.Ports {
			if p.ID != uplinkPort {
				for _, a := range p.Addrs {
					want[a.Addr()] = true
				}
			}
		}
	}
	for a, s := range d.services {
		if !want[a] {
			s.close()
			delete(d.services, a)
		}
	}
	for a := range want {
		if d.services[a] != nil {
			continue
		}
		s, err := d.serveNames(a)
		if err != nil {
			d.log.Error("there is no name server at an address of the router", "address", a, "err", err)
			continue
		}
		d.services[a] = s
	}
}

func (d *daemon) serveNames(a netip.Addr) (*service, error) {
	at := netip.AddrPortFrom(a, portDNS)
	udp, err := d.local.listenUDP(at)
	if err != nil {
		return nil, err
	}
	tcp, err := d.local.listenTCP(at)
	if err != nil {
		udp.Close()
		return nil, err
	}
	go d.names.ServePacket(udp) // ends with an error when the socket is closed
	go d.names.Serve(tcp)
	return &service{udp, tcp}, nil
}

// serveMetrics serves the counters as the configuration says, until the function that it returns
// is called.
func (d *daemon) serveMetrics(m config.Metrics) (end func(), err error) {
	if !m.Addr.IsValid() {
		return func() {}, nil
	}
	var l net.Listener
	if m.Machine {
		l, err = net.Listen("tcp", m.Addr.String())
	} else {
		if err = d.local.hold(m.Addr.Addr()); err == nil {
			l, err = d.local.listenTCP(m.Addr)
		}
	}
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", d.metrics)
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) && !d.ended.Load() {
			d.log.Error("the counters are not served any more", "err", err)
		}
	}()
	return func() {
		s.Close()
		<-done
	}, nil
}
