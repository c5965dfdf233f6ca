package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"barevif/tools/cli"
	"barevif/tools/table"

	"github.com/spf13/cobra"
)

func tableCommand(p *cli.Program) *cobra.Command {
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
			return printTable(p.Stdout, results)
		},
	}
}

func readResults(r io.Reader) (all []result, err error) {
	for s := bufio.NewScanner(r); ; {
		if !s.Scan() {
			return all, s.Err()
		}
		if strings.TrimSpace(s.Text()) == "" {
			continue
		}
		var one result
		if err := json.Unmarshal(s.Bytes(), &one); err != nil {
			return nil, fmt.Errorf("line %d: %w", len(all)+1, err)
		}
		all = append(all, one)
	}
}

// A row of the table holds all measurements of one way to do one thing.
type row struct {
	what, way string
	values    []float64 // sorted
}

func (r *row) median() float64 { return r.values[len(r.values)/2] }

// value returns the number to compare: frames per second, bits per second of a stream, or
// microseconds of a round trip.
func (r *result) value() (v float64, unit string) {
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

// rowsOf groups results, in the order in which each kind of traffic came first.
func rowsOf(results []result) (rows []*row, units map[string]string, err error) {
	units = map[string]string{}
	order := map[string]int{}
	for i, r := range results {
		if _, ok := order[r.What]; !ok {
			order[r.What] = i
		}
		v, unit := r.value()
		if u, ok := units[r.What]; ok && u != unit && v > 0 {
			return nil, nil, fmt.Errorf("lines of %q are in %s and in %s", r.What, u, unit)
		}
		if v > 0 {
			units[r.What] = unit
		}
		one := find(rows, r.What, r.Way)
		if one == nil {
			one = &row{what: r.What, way: r.Way}
			rows = append(rows, one)
		}
		one.values = append(one.values, v)
	}
	slices.SortStableFunc(rows, func(a, b *row) int { return order[a.what] - order[b.what] })
	for _, r := range rows {
		slices.Sort(r.values)
	}
	return rows, units, nil
}

// find returns the first row of what and way, or nil. way may be "", for any.
func find(rows []*row, what, way string) *row {
	for _, r := range rows {
		if r.what == what && (way == "" || r.way == way) {
			return r
		}
	}
	return nil
}

// printTable writes the table.
func printTable(w io.Writer, results []result) error {
	if len(results) == 0 {
		return errors.New("no lines to make a table of")
	}
	rows, units, err := rowsOf(results)
	if err != nil {
		return err
	}
	t := table.Table{
		Head: []string{"traffic", "way", "median", "unit", "from", "to", "rounds", "ratio", "to Go's socket"},
		Left: func(column int) bool { return column < 2 || column == 3 },
	}
	for _, r := range rows {
		socket := ""
		if s := find(rows, r.what, "Go UDP socket"); s != nil {
			socket = ratio(r, s)
		}
		whole := func(v float64) string { return strconv.FormatFloat(v, 'f', 0, 64) }
		t.Rows = append(t.Rows, []string{r.what, r.way, whole(r.median()), units[r.what],
			whole(r.values[0]), whole(r.values[len(r.values)-1]), strconv.Itoa(len(r.values)), ratio(r, find(rows, r.what, "")), socket})
	}
	_, err = io.WriteString(w, t.String())
	return err
}

func ratio(a, b *row) string {
	if b.median() == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", a.median()/b.median())
}
