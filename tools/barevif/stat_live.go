package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"barevif/telemetry"
	"barevif/tools/internal/stat"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
)

// live shows the table until a key or a signal ends it.
func (s *statistics) live(ctx context.Context, w *stat.Watcher) error {
	l := w.Look()
	if err := s.found(l); err != nil {
		return err
	}
	_, err := tea.NewProgram(newLive(s, w, l), tea.WithContext(ctx), tea.WithOutput(s.Stdout), tea.WithoutSignalHandler()).Run()
	if errors.Is(err, tea.ErrProgramKilled) && ctx.Err() != nil {
		return nil // a signal
	}
	return err
}

func newLive(s *statistics, w *stat.Watcher, first *stat.Look) *liveModel {
	m := &liveModel{
		s: s, w: w, look: first, left: s.count, history: stat.NewHistory(600),
		queues: true, coloured: s.coloured(), paint: s.paint(),
	}
	m.history.Add(first)
	return m
}

// sorts are the sort orders of the table.
var sorts = [...]string{"name", "rate", "lost"}

// A liveModel is the state of the live table.
type liveModel struct {
	s       *statistics
	w       *stat.Watcher // used only by the one pending command of again
	history *stat.History
	look    *stat.Look

	coloured bool
	paint    stat.Paint

	width, height        int
	sort, scroll, left   int
	queues, plot, paused bool
	reset                bool // reset the watcher at the next look
}

type lookMsg struct{ *stat.Look }

func (m *liveModel) Init() tea.Cmd { return m.again() }

// again returns a command that looks once the interval is over.
func (m *liveModel) again() tea.Cmd {
	paused, reset := m.paused, m.reset
	m.reset = false
	return tea.Tick(m.s.interval, func(time.Time) tea.Msg {
		if reset {
			m.w.Reset()
		}
		if paused {
			return lookMsg{}
		}
		return lookMsg{m.w.Look()}
	})
}

func (m *liveModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case lookMsg:
		if msg.Look != nil && !m.paused {
			m.look = msg.Look
			m.history.Add(m.look)
			if m.left > 0 {
				if m.left--; m.left <= 1 {
					return m, tea.Quit
				}
			}
		}
		return m, m.again()
	case tea.KeyPressMsg:
		switch msg.String() {
		case "q", "esc", "ctrl+c":
			return m, tea.Quit
		case "r":
			m.reset = true
		case "s":
			m.sort = (m.sort + 1) % len(sorts)
		case "x":
			m.queues = !m.queues
		case "p":
			m.plot = !m.plot
		case "space":
			m.paused = !m.paused
		case "down", "j":
			m.scroll++
		case "up", "k":
			m.scroll = max(0, m.scroll-1)
		case "pgdown":
			m.scroll += m.height / 2
		case "pgup":
			m.scroll = max(0, m.scroll-m.height/2)
		}
	}
	return m, nil
}

func (m *liveModel) View() tea.View {
	v := tea.NewView(m.text())
	v.AltScreen = true
	v.WindowTitle = "barevif stat"
	return v
}

// text returns the screen: a title, the part of the body that fits, and the keys.
func (m *liveModel) text() string {
	state := ""
	if m.paused {
		state = "  " + m.paint(stat.Warn, "paused")
	}
	title := m.paint(stat.Title, "barevif stat") + m.paint(stat.Dim, fmt.Sprintf("  %s  every %v, by %s",
		m.look.Time.Format(time.TimeOnly), m.s.interval, sorts[m.sort])) + state
	body := strings.Split(strings.TrimRight(m.body(), "\n"), "\n")
	room := max(m.height-4, 1)
	m.scroll = min(m.scroll, max(0, len(body)-room))
	more := ""
	if m.height > 0 && len(body) > room {
		more = fmt.Sprintf("  ↑↓ %d more", len(body)-room)
		body = body[m.scroll : m.scroll+room]
	}
	keys := m.paint(stat.Dim, "q quit  r count from now  s sort  x queues  p plot  space pause"+more)
	lines := append([]string{title, ""}, body...)
	lines = append(lines, "", keys)
	if m.width > 0 {
		cut := lipgloss.NewStyle().MaxWidth(m.width)
		for i := range lines {
			lines[i] = cut.Render(lines[i])
		}
	}
	return strings.Join(lines, "\n")
}

func (m *liveModel) body() string {
	var b strings.Builder
	on := stat.Sheet{Width: m.width, Paint: m.paint}
	if len(m.look.Devices) == 0 {
		b.WriteString("no vif counts where this user may look; one that starts appears here\n")
	}
	devices := m.sorted()
	if len(devices) > 0 {
		stat.WriteTable(&b, "", devices, m.queues, on)
	}
	for _, d := range devices {
		if d.Err != nil {
			continue
		}
		for _, line := range d.Losses() {
			b.WriteString(m.paint(stat.Title, d.Name) + " " + m.paint(stat.Warn, line) + "\n")
		}
	}
	stat.WritePairs(&b, m.look, on)
	if m.plot {
		b.WriteString("\n" + stat.Plot(m.history, m.width, 8, m.coloured))
	}
	b.WriteByte('\n')
	for _, d := range devices {
		if d.Err == nil {
			b.WriteString(m.paint(stat.Title, d.Name) + " " + d.Life() + "\n")
			on.Line(&b, stat.Dim, d.Place())
			if n := len(d.Report.Events); n > 0 {
				on.Line(&b, stat.Dim, stat.Event(d.Report.Events[n-1], m.look.Time))
			}
		}
	}
	if left := m.look.Left(); left != "" {
		b.WriteString(m.paint(stat.Dim, left+": see --user and --all-users") + "\n")
	}
	for _, err := range m.look.Errors {
		b.WriteString(m.paint(stat.Bad, stat.Clean(err.Error())) + "\n")
	}
	return b.String()
}

func (m *liveModel) sorted() []*stat.Device {
	out := make([]*stat.Device, len(m.look.Devices))
	for i := range out {
		out[i] = &m.look.Devices[i]
	}
	by := func(get stat.Get) {
		sum := func(d *stat.Device) (r float64) {
			if d.Err != nil {
				return -1
			}
			for _, dir := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
				one, _ := d.Rate(stat.All, dir, get)
				r += one
			}
			return r
		}
		slices.SortStableFunc(out, func(a, b *stat.Device) int { return cmp.Compare(sum(b), sum(a)) })
	}
	switch sorts[m.sort] {
	case "rate":
		by(stat.Bytes)
	case "lost":
		by(stat.Lost)
	}
	return out
}
