//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"barevif/hypercall/xendev"
	"barevif/pvnet"
)

// rounds is how many rounds of "prober send" each list has to be seen in.
const rounds = 10

// groups returns the addresses of the groups from first to last.
func groups(first, last int) []pvnet.MAC {
	list := []pvnet.MAC{}
	for i := first; i <= last; i++ {
		list = append(list, group(i))
	}
	return list
}

// lists are set one after the other. The first is what a device begins with.
var lists = []struct {
	what string
	list []pvnet.MAC
}{
	{"all groups", nil},
	{"three groups", groups(3, 5)},
	{"others added and removed", append(groups(5, 6), group(0))},
	{"no group", groups(1, 0)},
	{"as many groups as there may be", groups(6, 69)},
	{"one group", groups(69, 69)},
	{"all groups again", nil},
}

// multicast goes through lists of groups while frames come.
func multicast(args []string) error {
	if len(args) != 0 {
		return errors.New("usage: prober multicast")
	}
	dom, err := xendev.Open(xendev.Config{})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*patience)
	defer cancel()
	dev, err := pvnet.Connect(ctx, dom, "0", pvnet.Config{Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	defer dev.Disconnect()
	fmt.Println("connected, MAC", dev.MAC())
	if err := goThrough(ctx, dev); err != nil {
		return err
	}
	fmt.Println("checked")
	return nil
}

// goThrough sets the lists one after the other, and checks what comes.
func goThrough(ctx context.Context, dev *pvnet.Device) error {
	rx, err := dev.OwnRX(0)
	if err != nil {
		return err
	}
	m := new(members)
	go m.receive(rx)
	for i, l := range lists {
		if i > 0 { // a device begins with all groups, also after a program that had a list
			if err := dev.SetMulticast(ctx, l.list); err != nil {
				return fmt.Errorf("%s: %w", l.what, err)
			}
		}
		if err := m.see(l.what, l.list); err != nil {
			return err
		}
	}
	if err := dev.SetMulticast(ctx, groups(0, 64)); err == nil {
		return errors.New("a list of 65 groups was taken")
	}
	return nil
}

// members counts the frames of "prober send".
type members struct {
	mu   sync.Mutex
	seen map[pvnet.MAC]int // by destination
}

func (m *members) receive(rx *pvnet.RX) {
	var frames [32]pvnet.Frame
	for {
		n, err := rx.Receive(frames[:])
		if err != nil {
			return
		}
		m.mu.Lock()
		for i := range frames[:n] {
			if b := frames[i].Bytes(); m.seen != nil && binary.BigEndian.Uint16(b[12:]) == testType {
				m.seen[pvnet.MAC(b)]++
			}
		}
		m.mu.Unlock()
		rx.Release(frames[:n])
	}
}

// see waits for enough rounds, and checks that the groups of list, and no others, were in them.
// nil is all groups.
func (m *members) see(what string, list []pvnet.MAC) error {
	time.Sleep(time.Second) // for frames that are under way
	m.mu.Lock()
	m.seen = make(map[pvnet.MAC]int)
	m.mu.Unlock()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		m.mu.Lock()
		done := m.seen[broadcast] > rounds // the first round may have begun before
		m.mu.Unlock()
		if done {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: not %d rounds within %v", what, rounds, patience)
		}
	}
	m.mu.Lock()
	seen := m.seen
	m.seen = nil
	m.mu.Unlock()
	wanted := make(map[pvnet.MAC]bool)
	for _, mac := range list {
		wanted[mac] = true
	}
	frames := 0
	for i := range allGroups {
		mac := group(i)
		switch n := seen[mac]; {
		case (list == nil || wanted[mac]) && n < rounds/2: // a few may be lost on the way
			return fmt.Errorf("%s: %d of %d frames of group %v came", what, n, seen[broadcast], mac)
		case list != nil && !wanted[mac] && n > 0:
			return fmt.Errorf("%s: %d frames of group %v came, which is not listed", what, n, mac)
		default:
			frames += n
		}
	}
	fmt.Printf("%s: %d multicast frames in %d rounds\n", what, frames, seen[broadcast])
	return nil
}
