// Package proto defines the messages between the lab's host and the agents in its domains.
// The host sends a [Call], the agent answers with a [Reply], and each is one line of JSON.
//
// The host has a connection to the agent in dom0 only, which forwards calls for other domains.
// Both ends trust each other: nothing here checks what a hostile peer might send.
package proto

import (
	"bytes"
	"compress/flate"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Port names dom0's virtio-serial port to the host.
const Port = "org.barevif.xenlab"

// Store is the directory of a domain's link to dom0, below the domain's own. A
// domain owns data/, so it may write there.
const Store = "data/xenlab"

// StoreArgument is an argument on dom0's kernel command line, NAME=PROGRAM, that selects
// another xenstore daemon than xenstored.
const StoreArgument = "xenlab.store"

// Role is an argument on each kernel's command line, NAME=ROLE: one of the values below.
const (
	Role        = "xenlab"
	RoleDom0    = "dom0"
	RoleGuest   = "guest"
	RoleSystemd = "systemd" // a guest whose process 1 is systemd, which mounts file systems, and loads modules when the scenario wants it
)

// An Op is the operation of a Call.
type Op string

const (
	// Start starts Argv with Stdin. The Reply has Proc and comes at once.
	Start Op = "start"
	// Wait waits until Proc ends, or, with Match, until its output matches that regular
	// expression. The Reply has the output so far.
	Wait Op = "wait"
	// Kill sends Signal to Proc and its children.
	Kill Op = "kill"
	// Run is Start and Wait in one. With Until it runs Argv again and again
	// until it succeeds. At the Timeout the process is killed.
	Run Op = "run"
	// Put writes Stdin to Path, which it makes with Mode. Get returns the contents of
	// Path as Stdout.
	Put Op = "put"
	Get Op = "get"
	// Shell starts a shell on the console.
	Shell Op = "shell"
	// Off ends the domain.
	Off Op = "off"
)

// A Call is one request to the agent of one domain.
type Call struct {
	ID      uint64        `json:"id"`
	Domain  int           `json:"domain,omitempty"`
	Op      Op            `json:"op"`
	Argv    []string      `json:"argv,omitempty"`
	Stdin   Blob          `json:"stdin,omitempty"`
	Path    string        `json:"path,omitempty"`
	Mode    uint32        `json:"mode,omitempty"`
	Proc    int           `json:"proc,omitempty"`
	Signal  int           `json:"signal,omitempty"`
	Match   string        `json:"match,omitempty"`
	Until   bool          `json:"until,omitempty"`
	Timeout time.Duration `json:"timeout,omitempty"`
}

// A Reply answers the Call of the same ID. A Reply with ID 0 is the agent's first message: its
// domain is ready, or Err says why not.
type Reply struct {
	ID      uint64 `json:"id"`
	Proc    int    `json:"proc,omitempty"`
	Running bool   `json:"running,omitempty"` // Proc had not ended
	Exit    int    `json:"exit,omitempty"`    // like a shell's: 128 + signal if a signal ended it
	Stdout  Blob   `json:"stdout,omitempty"`
	Stderr  Blob   `json:"stderr,omitempty"`
	Err     string `json:"err,omitempty"` // why the call could not be done at all
}

// A Blob is compressed in transit if that is worthwhile: a domain's link to dom0 consists of
// small xenstore nodes.
type Blob []byte

const worthwhile = 256 // bytes

type packed struct {
	Raw  []byte `json:"r,omitempty"`
	Flat []byte `json:"z,omitempty"`
}

func (b Blob) MarshalJSON() ([]byte, error) {
	if len(b) < worthwhile {
		return json.Marshal(packed{Raw: b})
	}
	var z bytes.Buffer
	w, err := flate.NewWriter(&z, flate.BestSpeed)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return json.Marshal(packed{Flat: z.Bytes()})
}

func (b *Blob) UnmarshalJSON(in []byte) error {
	var p packed
	if err := json.Unmarshal(in, &p); err != nil {
		return err
	}
	*b = p.Raw
	if p.Flat == nil {
		return nil
	}
	out, err := io.ReadAll(flate.NewReader(bytes.NewReader(p.Flat)))
	if err != nil {
		return fmt.Errorf("blob: %w", err)
	}
	*b = out
	return nil
}
