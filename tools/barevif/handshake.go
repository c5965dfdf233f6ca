package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/tools/internal/storetrace"
	"barevif/xenbus"
	"barevif/xenbus/toolstack"
)

// A handshake prints the changes of a vif's two xenstore directories as they happen.
type handshake struct {
	vif   toolstack.Vif
	print func(line string)
	began time.Time
	done  chan struct{}
	have  map[string]bool // used by run only: the keys that exist

	mu    sync.Mutex
	cond  sync.Cond
	queue []moment // guarded by mu
	busy  bool     // guarded by mu: a moment is being printed
	ended bool     // guarded by mu
}

// A moment holds the changes of one xenstore request, and its time.
type moment struct {
	at      time.Duration
	changes []storetrace.Change
}

// watchHandshake starts a handshake. The caller calls end.
func watchHandshake(vif toolstack.Vif, print func(line string)) *handshake {
	h := &handshake{vif: vif, print: print, began: time.Now(), done: make(chan struct{}), have: make(map[string]bool)}
	h.cond.L = &h.mu
	go h.run()
	return h
}

// tap returns a connection to xenstore that reports its requests to the handshake.
func (h *handshake) tap(conn io.ReadWriteCloser, dom hypercall.DomID) io.ReadWriteCloser {
	return storetrace.Tap(conn, dom, h.tell)
}

func (h *handshake) tell(changes []storetrace.Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.queue = append(h.queue, moment{time.Since(h.began), changes})
	h.cond.Broadcast()
}

// flush waits until every reported moment is printed.
func (h *handshake) flush() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.queue) > 0 || h.busy {
		h.cond.Wait()
	}
}

// end flushes and stops.
func (h *handshake) end() {
	h.flush()
	h.mu.Lock()
	h.ended = true
	h.cond.Broadcast()
	h.mu.Unlock()
	<-h.done
}

func (h *handshake) run() {
	defer close(h.done)
	for {
		h.mu.Lock()
		h.busy = false
		h.cond.Broadcast()
		for len(h.queue) == 0 && !h.ended {
			h.cond.Wait()
		}
		if len(h.queue) == 0 {
			h.mu.Unlock()
			return
		}
		m := h.queue[0]
		h.queue, h.busy = h.queue[1:], true
		h.mu.Unlock()
		for _, line := range h.lines(m) {
			h.print(line)
		}
	}
}

// lineWidth is the column at which lines of keys are wrapped.
const lineWidth = 84

// lines formats the changes of a moment, for each of the two directories.
func (h *handshake) lines(m moment) (lines []string) {
	for _, dir := range []struct{ name, path string }{
		{"frontend", h.vif.FrontDir()}, {"backend", h.vif.BackDir()},
	} {
		var words []string
		for _, c := range m.changes {
			if c.Path == dir.path && c.Removed {
				words = append(words, "removed")
			} else if key, ok := strings.CutPrefix(c.Path, dir.path+"/"); ok && (c.Value != "" || h.have[c.Path]) {
				words = append(words, word(key, c))
				h.have[c.Path] = !c.Removed
			}
		}
		who := dir.name
		if len(words) > 0 && m.changes[0].By == 0 {
			words = append([]string{"(by the toolstack)"}, words...)
		}
		head := fmt.Sprintf("%7.1f ms  %-9s ", float64(m.at.Microseconds())/1000, who)
		for len(words) > 0 {
			n, width := 1, len(words[0])
			for n < len(words) && width+1+len(words[n]) <= lineWidth {
				width += 1 + len(words[n])
				n++
			}
			lines = append(lines, head+strings.Join(words[:n], " "))
			words = words[n:]
			head = strings.Repeat(" ", len(head))
		}
	}
	return lines
}

// word formats one key with its value.
func word(key string, c storetrace.Change) string {
	switch {
	case c.Removed:
		return "-" + key
	case key == netif.KeyState && len(c.Value) == 1 && c.Value[0] >= '0' && c.Value[0] <= '9':
		return fmt.Sprintf("state=%s (%v)", c.Value, xenbus.State(c.Value[0]-'0'))
	}
	for _, r := range c.Value {
		if r <= ' ' || r > '~' { // quote what a terminal could interpret
			return key + "=" + strconv.Quote(c.Value)
		}
	}
	return key + "=" + c.Value
}
