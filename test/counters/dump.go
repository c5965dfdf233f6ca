// Package counters proves on a running vif what its counters say: both ends'
// counts, read by bpftool, by cat and by the command of this project, are the
// frames that were sent.
package counters

import (
	"encoding/json"
	"errors"
	"fmt"
)

// A Dump is what "bpftool -j map dump" prints of the counters of a vif: each by its
// name, for every queue.
type Dump []map[string]json.RawMessage

// ParseDump reads it.
func ParseDump(out []byte) (Dump, error) {
	var elements []struct {
		Formatted struct {
			Value map[string]json.RawMessage
		}
	}
	if err := json.Unmarshal(out, &elements); err != nil {
		return nil, fmt.Errorf("bpftool -j map dump: %w", err)
	}
	var d Dump
	for _, e := range elements {
		d = append(d, e.Formatted.Value)
	}
	if len(d) == 0 {
		return nil, errors.New("bpftool -j map dump: no queue")
	}
	return d, nil
}

// Total is a counter's sum over all queues.
func (d Dump) Total(name string) (sum uint64, err error) {
	for _, queue := range d {
		var n uint64
		if err := json.Unmarshal(queue[name], &n); err != nil {
			return 0, fmt.Errorf("counter %s is %q", name, queue[name])
		}
		sum += n
	}
	return sum, nil
}
