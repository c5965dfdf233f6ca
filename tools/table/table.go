// Package table lays out rows of text in columns.
package table

import (
	"strings"

	"charm.land/lipgloss/v2"
	"charm.land/lipgloss/v2/table"
)

// A Table is a head and rows. A row of another length than the head's is a line of its
// own, whose cells do not stand in the columns. Cells may have colours.
type Table struct {
	Head []string
	Rows [][]string
	Left func(column int) bool // the column is aligned to the left; nil: none is
}

const gap = 2 // between columns

// grid returns the head and the rows in columns.
func (t *Table) grid() string {
	grid := table.New().Headers(t.Head...).
		BorderTop(false).BorderBottom(false).BorderLeft(false).BorderRight(false).
		BorderHeader(false).BorderColumn(false).BorderRow(false).
		StyleFunc(func(_, column int) lipgloss.Style {
			style := lipgloss.NewStyle().Align(lipgloss.Right)
			if t.Left != nil && t.Left(column) {
				style = style.Align(lipgloss.Left)
			}
			if column > 0 {
				style = style.PaddingLeft(gap)
			}
			return style
		})
	for _, row := range t.Rows {
		if len(row) == len(t.Head) {
			grid.Row(row...)
		}
	}
	return grid.String()
}

// Width returns the width of the columns together.
func (t *Table) Width() int { return lipgloss.Width(t.grid()) }

// Lines returns the head and the rows, a line each.
func (t *Table) Lines() []string {
	rendered := strings.Split(t.grid(), "\n")
	lines := []string{strings.TrimRight(rendered[0], " ")}
	next := 1
	for _, row := range t.Rows {
		line := strings.Join(row, strings.Repeat(" ", gap))
		if len(row) == len(t.Head) {
			line = rendered[next]
			next++
		}
		lines = append(lines, strings.TrimRight(line, " "))
	}
	return lines
}

// String returns the lines with a newline after each.
func (t *Table) String() string { return strings.Join(t.Lines(), "\n") + "\n" }
