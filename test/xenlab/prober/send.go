//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"barevif/pvnet"

	"golang.org/x/sys/unix"
)

// testType is the EtherType of what send sends: for local experiments (IEEE 802).
const testType = 0x88b5

// allGroups is how many groups get frames: more than a backend's list has room for.
const allGroups = 70

// group returns the address of group i.
func group(i int) pvnet.MAC { return pvnet.MAC{1, 0, 0x5e, 9, 1, byte(i)} }

var broadcast = pvnet.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// send sends rounds of frames: one to each group, and then a broadcast.
func send(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: prober send INTERFACE")
	}
	i, err := net.InterfaceByName(args[0])
	if err != nil {
		return err
	}
	s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		return fmt.Errorf("open a packet socket: %w", err)
	}
	defer unix.Close(s)
	to := &unix.SockaddrLinklayer{Ifindex: i.Index}
	fmt.Println("sending")
	for ; ; time.Sleep(100 * time.Millisecond) {
		for _, f := range round(i.HardwareAddr) {
			// The interface's queue may be full for a moment: the next round comes soon.
			if err := unix.Sendto(s, f, 0, to); err != nil && err != unix.ENOBUFS {
				return fmt.Errorf("send on %s: %w", i.Name, err)
			}
		}
	}
}

// round returns the frames of a round.
func round(from net.HardwareAddr) (frames [][]byte) {
	for n := range allGroups + 1 {
		mac := broadcast
		if n < allGroups {
			mac = group(n)
		}
		f := append(mac[:], from...)
		frames = append(frames, append(binary.BigEndian.AppendUint16(f, testType), make([]byte, 46)...))
	}
	return frames
}
