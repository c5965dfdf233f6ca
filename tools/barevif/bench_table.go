package main

import (
	"barevif/tools/cli"
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

func benchTableCommand(p *cli.Program) *cobra.Command {
	return &cobra.Command{
		Use:   "table [FILE]",
		Short: "Make a table of lines of JSON, from standard input or a file",
		Long: `table groups lines by what they measure and how. A row has the median of its rounds,
their smallest and largest value, and ratios of medians: to the first row of the
group, and of each row of ours to the Go socket's. More is better in all of them but
round trips.`,
		Args: cli.Arguments(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := cmd.InOrStdin()
			if len(args) == 1 {
				f, err := os.Open(args[0])
				if err != nil {
					return &cli.Advice{Err: fmt.Errorf("read lines: %w", err), Next: "name a file that this user can read, or pipe the lines in"}
				}
				defer f.Close()
				in = f
			}
			results, err := readResults(in)
			if err != nil {
				return err
			}
			return printBench(p.Stdout, results)
		},
	}
}

func readResults(r io.Reader) (all []benchResult, err error) {
	for s := bufio.NewScanner(r); ; {
		if !s.Scan() {
			return all, s.Err()
		}
		if strings.TrimSpace(s.Text()) == "" {
			continue
		}
		var one benchResult
		if err := json.Unmarshal(s.Bytes(), &one); err != nil {
			return nil, fmt.Errorf("line %d: %w", len(all)+1, err)
		}
		all = append(all, one)
	}
}

// A benchRow holds all measurements of one way to do one thing.
type benchRow struct {
	what, way string
	values    []float64 // sorted
}

func (r *benchRow) median() float64 { return r.values[len(r.values)/2] }

// value returns the number to compare: frames per second, bits per second of a stream, or
// microseconds of a round trip.
func (r *benchResult) value() (v float64, unit string) {
	switch {
	case r.Median > 0:
		return r.Median, "us"
	case r.Seconds <= 0:
		return 0, ""
	case r.Frames > 0:
		return float64(r.Frames) / r.Seconds, "frames/s"
	}
	return float64(r.Bytes) * 8 / r.Seconds / 1e6, "Mbit/s"
}

// printBench writes the table.
func printBench(w io.Writer, results []benchResult) error {
	if len(results) == 0 {
		return errors.New("no lines to make a table of")
	}
	var rows []*benchRow
	units := map[string]string{}
	for _, r := range results {
		i := slices.IndexFunc(rows, func(row *benchRow) bool { return row.what == r.What && row.way == r.Way })
		if i < 0 {
			i = len(rows)
			rows = append(rows, &benchRow{what: r.What, way: r.Way})
		}
		v, unit := r.value()
		if u, ok := units[r.What]; ok && u != unit && v > 0 {
			return fmt.Errorf("lines of %q are in %s and in %s", r.What, u, unit)
		}
		if v > 0 {
			units[r.What] = unit
		}
		rows[i].values = append(rows[i].values, v)
	}
	slices.SortStableFunc(rows, func(a, b *benchRow) int {
		first := func(what string) int {
			return slices.IndexFunc(results, func(r benchResult) bool { return r.What == what })
		}
		return first(a.what) - first(b.what)
	})
	for _, row := range rows {
		slices.Sort(row.values)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "traffic\tway\tmedian\tunit\tfrom\tto\trounds\tratio\tto Go's socket")
	for _, row := range rows {
		reference := rows[slices.IndexFunc(rows, func(r *benchRow) bool { return r.what == row.what })]
		socket := ""
		if i := slices.IndexFunc(rows, func(r *benchRow) bool { return r.what == row.what && r.way == "Go UDP socket" }); i >= 0 {
			socket = ratio(row, rows[i])
		}
		fmt.Fprintf(t, "%s\t%s\t%.0f\t%s\t%.0f\t%.0f\t%d\t%s\t%s\n", row.what, row.way, row.median(), units[row.what],
			row.values[0], row.values[len(row.values)-1], len(row.values), ratio(row, reference), socket)
	}
	return t.Flush()
}

func ratio(a, b *benchRow) string {
	if b.median() == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", a.median()/b.median())
}
