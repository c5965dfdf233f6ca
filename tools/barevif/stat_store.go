package main

import (
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/bpf"

	"github.com/spf13/cobra"
)

// counterFlag says where the counters of a device can be read from outside.
type counterFlag struct{ where string }

func (c *counterFlag) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.where, "counters", "auto",
		`where counters can be read from outside: "auto", the best `+"`place`"+` allowed; "public", the same and every user may read the metrics; "heap", nowhere`)
}

// store gives what a device is to be told. A store that can have no place does not
// keep a device from working.
func (c *counterFlag) store() (telemetry.Store, error) {
	switch c.where {
	case "auto":
		return &bpf.Store{}, nil
	case "public":
		return &bpf.Store{Public: true}, nil
	case "heap":
		return nil, nil
	}
	return nil, badValue("counters", c.where, `"auto", "public" or "heap"`)
}

// shown is mirrored, with what to do about it.
func shown(dev *pvnet.Device) string {
	where := mirrored(dev)
	if where == "heap" {
		return "in this process alone"
	}
	return where + `; "barevif stat" shows them while this runs`
}
