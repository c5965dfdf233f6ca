//go:build linux

package netns

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"

	"barevif/pvnet/link"

	"golang.org/x/sys/unix"
)

// A request is one message to the child; exactly one field is set.
type request struct {
	Card   *Config
	Socket *socketRequest
}

type socketRequest struct{ Domain, Type, Protocol int }

// An answer is one message from the child. A descriptor accompanies it unless it failed.
type answer struct {
	Kind   string // kind of the card
	Info   link.Info
	Note   string // why the card is not of a better kind
	Failed string // the error, empty if there was none
	Errno  uint
}

const (
	kindTAP  = "TAP"
	kindVeth = "veth pair"
)

// maxMessage is larger than any message of this protocol.
const maxMessage = 8192

// readMessage reads one message into v, with at most one descriptor.
func readMessage(c *net.UnixConn, v any) (*os.File, error) {
	b := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	f, err := descriptor(oob[:oobn])
	if err != nil {
		return nil, err
	}
	if n == 0 {
		err = io.EOF
	} else if err = json.Unmarshal(b[:n], v); err != nil {
		err = fmt.Errorf("decode message: %w", err)
	}
	if err != nil && f != nil {
		f.Close()
		f = nil
	}
	return f, err
}

func descriptor(oob []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) == 0 {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) == 0 {
		return nil, err
	}
	// The runtime's poller accepts only non-blocking descriptors.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "netns"), nil
}

// writeMessage sends v, with the descriptor fd unless it is negative.
func writeMessage(c *net.UnixConn, v any, fd int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	return err
}
