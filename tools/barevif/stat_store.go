package main

import (
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/tools/cli"

	"github.com/spf13/cobra"
)

// counterFlag is the flag that selects where other processes can read a device's counters.
type counterFlag struct{ where string }

func (c *counterFlag) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.where, "counters", "auto",
		`where counters can be read from outside: "auto", the best `+"`place`"+` allowed; "public", the same and every user may read the metrics; "heap", nowhere`)
	cli.FixedValues(cmd, "counters", "auto", "public", "heap")
}

// store returns the store for a device's counters. If the store finds no place where others
// can read them, the device works all the same.
func (c *counterFlag) store() (telemetry.Store, error) {
	switch c.where {
	case "auto":
		return &bpf.Store{}, nil
	case "public":
		return &bpf.Store{Public: true}, nil
	case "heap":
		return nil, nil
	}
	return nil, cli.BadValue("counters", c.where, `"auto", "public" or "heap"`)
}

// shown is mirrored, with the command that shows the counters.
func shown(dev *pvnet.Device) string {
	where := mirrored(dev)
	if where == "heap" {
		return "in this process alone"
	}
	return where + `; "barevif stat" shows them while this runs`
}
