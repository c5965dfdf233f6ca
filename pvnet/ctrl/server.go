package ctrl

import (
	"barevif/arena/shm"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
)

// A Handler answers a request with a status and a word of data, which is 0 unless the
// type of the request defines one. The request is a private copy, and hostile: no word of
// it has been checked.
type Handler func(netif.CtrlRequest) (status netif.CtrlStatus, data uint32)

// A Server is the backend's end. It answers requests in order, each before it takes the
// next one, so that another backend can continue where it stops.
type Server struct {
	ring     *ring.Back[netif.CtrlRequest, netif.CtrlResponse]
	handlers map[netif.CtrlType]Handler
}

// Attach returns the server of a ring page that a frontend initialised. The error is
// [ring.ErrCorrupt].
func Attach(page shm.Memory) (*Server, error) {
	r, err := ring.AttachBack[netif.CtrlRequest, netif.CtrlResponse](page, netif.CtrlStride)
	if err != nil {
		return nil, err
	}
	return &Server{ring: r, handlers: make(map[netif.CtrlType]Handler)}, nil
}

// Handle makes h answer the requests of type t. Requests of a type without a handler are
// answered with [netif.CtrlNotSupported].
func (s *Server) Handle(t netif.CtrlType, h Handler) { s.handlers[t] = h }

// Serve answers the next request, if there is one. notify reports whether the peer asked
// to be notified of the response. The error is [ring.ErrCorrupt].
func (s *Server) Serve() (served, notify bool, err error) {
	n, err := s.ring.Poll()
	if n == 0 || err != nil {
		return false, false, err
	}
	req := s.ring.Take()
	rsp := netif.CtrlResponse{ID: req.ID, Type: req.Type, Status: netif.CtrlNotSupported}
	if h := s.handlers[req.Type]; h != nil {
		rsp.Status, rsp.Data = h(req)
	}
	s.ring.Put(rsp)
	return true, s.ring.Publish(), nil
}

// Slot returns the free-running index of the slot of the next request.
func (s *Server) Slot() uint32 { return s.ring.Consumed() }

// Arm asks the peer to notify when the next request comes, and reports whether one has
// come already. The caller may wait only if none has. The error is [ring.ErrCorrupt].
func (s *Server) Arm() (more bool, err error) { return s.ring.Arm(1) }

// Overdue reports whether the request that Arm asked for has come. A watchdog calls it for
// an owner that waits: any goroutine may, while the page is mapped.
func (s *Server) Overdue() bool { return s.ring.Overdue() }
