// Package systemd tells the service manager about this process.
package systemd

import (
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long the manager may take to make room for a message.
const patience = 5 * time.Second

// Notify tells systemd about a change (sd_notify(3)), "READY=1". Without systemd it does
// nothing.
func Notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return // the manager that set the variable is gone
	}
	defer c.Close()
	_ = c.SetWriteDeadline(time.Now().Add(patience)) // a manager that does not read must not keep us
	_, _ = c.Write([]byte(state))                    // it waits for an answer of nobody
}

// Reloading tells systemd that a reload begins, for a unit of Type=notify-reload too, which wants
// to know when. Notify("READY=1") ends it.
func Reloading() {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) != nil {
		return
	}
	Notify(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000))
}
