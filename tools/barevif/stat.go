package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/tools/cli"
	"barevif/tools/internal/stat"
	"barevif/tools/internal/statweb"
	"barevif/tools/internal/users"

	"charm.land/lipgloss/v2"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

const aboutStat = `stat shows what the vifs of this machine count, whichever process owns them. VIF is a
name as stat shows it, "front-1-2-0" for domain 1's end of its vif 0 with domain 2,
or a pattern: "front-*". Without one it shows all. Other names work too:

  vif1.0     as "back" calls its interface: the backend of domain 1's vif 0
  1.0        both ends of domain 1's vif 0
  xvif0      as "attach" calls its interface: the frontend of vif 0
  eth0       an interface of this machine: the frontend that has its MAC

It changes nothing, asks nothing of the owner, and needs no right but reading:

  pins       /sys/fs/bpf/barevif/VIF/, for root and the group the owner chose
  metrics    the text below them, for whoever may read that file
  memfd      a sealed file of the owner, for its user and root

Any user can make a memfd of any name. Shown are those of this user, of who became
root by sudo, of root, and of the user to whom root gave the directory of the pins;
--user names more, --all-users shows the rest too, with owners. A device of a user
that was not named never stands for another: in metrics it is "NAME@UID".

rx is what that end hands to its user, tx what its user gave it: a frame from the
frontend is tx there and rx at the backend. Where both ends run on this machine, stat
also compares them: sent = received + dropped. At rest that holds to the frame,
"balanced". While frames move it holds to as many as moved while the two ends were
read, "balanced to 12, moving". What is missing beyond that is in flight while the ring
can hold it; what it cannot is lost, or one end has counted for longer: "unequal".

A device is stale when its owner has given no sign of life for 3 seconds, and torn
when the owner died in the middle of a write.

-S prints every counter and histogram by its name in COUNTERS.md, one per line as
"ethtool -S" does: the sums first, then each queue, "queue_0_rx_packets". Order and
names stay the same from look to look.

--prune removes what owners left in the directory of the pins that were killed, or
lost power: directories of this user, as root of all users, whose owner is dead. It
prints each. What a live process owns stays.

--watch is a live table: q quits, r counts from now on, s sorts, x folds queues,
p plots, space pauses. Where the output is no terminal, or with --count, it is the
text again and again, each with its time.

--http answers on this machine alone, unless it is given an address. Since stat may
read what others may not, JSON and metrics are for those who send a token, as
"Authorization: Bearer TOKEN"; the page takes it from its address. It is a new one
each time, and printed, or that of --token-file, which is made if it is not there
and which a Prometheus can read, too (authorization: credentials_file). It crosses
a network unencrypted. --no-token lets everybody read who can reach the address.

--json prints an object, with --watch one per line. Names are those of COUNTERS.md
with their direction, rx_packets; a number above 2^53 is a string of its digits.`

func statCommand(p *cli.Program) *cobra.Command {
	s := statistics{Program: p}
	cmd := &cobra.Command{
		Use:   "stat [VIF...]",
		Short: "Show the counters of vifs: as text, live, as JSON or a web page",
		Long:  aboutStat,
		Example: `  barevif stat
  barevif stat --watch
  barevif stat -S vif1.0 | grep drop
  barevif stat --json 'front-*' | jq '.devices[].totals.counters.rx_packets'
  barevif stat --http localhost:9464
  barevif stat --http 9464 --token-file /etc/barevif/token`,
		Annotations:       map[string]string{"--plot": "press p in the live table of --watch, or open the page of --http, which plots"},
		ValidArgsFunction: s.completeCounting,
		RunE: func(cmd *cobra.Command, args []string) error {
			s.patterns = args
			return s.run(cmd.Context(), cmd.Flags().Changed("count"))
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&s.watch, "watch", "w", false, "go on until a signal, or --count looks")
	f.BoolVar(&s.json, "json", false, "print JSON")
	f.BoolVarP(&s.names, "statistics", "S", false, "print every counter by name, one per line")
	f.DurationVar(&s.interval, "interval", time.Second, "`time` from one look to the next, 100ms at least")
	f.IntVar(&s.count, "count", 0, "`number` of looks; more than one is --watch")
	f.StringVar(&s.http, "http", "", "serve a page with live plots, JSON and OpenMetrics at this `address`: a port alone is for this machine only")
	f.StringVar(&s.tokenFile, "token-file", "", "with --http: the `file` of the token")
	f.BoolVar(&s.noToken, "no-token", false, "with --http: answer everybody")
	f.BoolVar(&s.allUsers, "all-users", false, "show devices of every user, with their owners")
	f.StringArrayVar(&s.users, "user", nil, "show devices of this `user` too, by name or number; repeatable")
	f.StringVar(&s.root, "root", bpf.DefaultRoot, "`directory` of the pins")
	f.BoolVar(&s.prune, "prune", false, "remove the pins of dead owners, and show nothing")
	for _, other := range []string{"watch", "json", "statistics", "count", "http", "user", "all-users"} {
		cli.Exclusive(cmd, "prune", other)
	}
	cli.Exclusive(cmd, "json", "http")
	cli.Exclusive(cmd, "statistics", "json")
	cli.Exclusive(cmd, "statistics", "http")
	cli.Exclusive(cmd, "http", "watch")
	cli.Exclusive(cmd, "http", "count")
	cli.Exclusive(cmd, "token-file", "no-token")
	return cmd
}

type statistics struct {
	*cli.Program
	patterns          []string
	watch, json       bool
	interval          time.Duration
	count             int
	http, root        string
	tokenFile         string
	noToken, allUsers bool
	users             []string
	prune             bool
	names             bool // every counter by name
}

func (s *statistics) run(ctx context.Context, counted bool) error {
	if s.interval < 100*time.Millisecond {
		return cli.BadValue("interval", s.interval.String(), "100ms or more")
	}
	if counted && s.count < 1 {
		return cli.BadValue("count", strconv.Itoa(s.count), "a number from 1")
	}
	if at, err := os.Stat(s.root); err == nil && !at.IsDir() {
		return cli.BadValue("root", s.root, "a directory")
	}
	if s.prune {
		return s.pruned()
	}
	w, err := stat.NewWatcher(s.root, append(s.patterns, s.cards()...)...)
	if err != nil {
		return &cli.Advice{Err: err, Next: `a name as "barevif stat" shows it, or a pattern such as 'front-*'`, Usage: true}
	}
	w.AllUsers = s.allUsers
	for _, name := range s.users {
		uid, err := users.Lookup(name)
		if err != nil {
			return cli.BadValue("user", name, "a user of this machine")
		}
		w.Users = append(w.Users, uid)
	}
	if s.http != "" {
		return s.serve(ctx, w)
	}
	if s.tokenFile != "" || s.noToken {
		return cli.BadValue("http", "", "an address, which --token-file and --no-token are about")
	}
	if s.watch && !s.json && !s.names && isTerminal(s.Stdout) && isTerminal(os.Stdin) {
		return s.live(ctx, w)
	}
	if s.watch || s.count > 1 {
		return s.repeat(ctx, w)
	}
	l := w.Look()
	if err := s.found(l); err != nil {
		return err
	}
	s.warn(l)
	if s.json {
		return s.encode(l, "  ")
	}
	if len(l.Devices) == 0 {
		_, err := fmt.Fprintln(s.Stdout, `no vif counts on this machine where this user may look; "barevif demo" makes two`)
		return err
	}
	if s.names {
		return stat.WriteNames(s.Stdout, l)
	}
	return stat.Write(s.Stdout, l, stat.Sheet{Width: s.width(), Paint: s.paint()})
}

// pruned removes the pins of dead owners and prints their names.
func (s *statistics) pruned() error {
	if len(s.patterns) > 0 {
		return &cli.Advice{Err: fmt.Errorf("%q: --prune takes no names, it removes the pins of every dead owner", s.patterns[0]), Usage: true}
	}
	removed, err := bpf.Prune(s.root)
	for _, dir := range removed {
		fmt.Fprintf(s.Stdout, "removed %s\n", stat.Clean(dir))
	}
	if errors.Is(err, fs.ErrPermission) {
		return &cli.Advice{Err: err, Next: "run as root, which removes those of every user", Refused: true}
	}
	if err != nil {
		return &cli.Advice{Err: err, Next: "name the directory of the pins with --root"}
	}
	if len(removed) == 0 {
		fmt.Fprintf(s.Stdout, "nothing to remove: no pins of a dead owner in %s that this user may remove\n", s.root)
	}
	return nil
}

// cards returns the names of the frontends whose MAC is that of an interface of this machine
// that the user has named.
func (s *statistics) cards() (names []string) {
	for _, p := range s.patterns {
		card, err := net.InterfaceByName(p)
		if err != nil || len(card.HardwareAddr) != 6 {
			continue
		}
		w, err := stat.NewWatcher(s.root)
		if err != nil {
			return nil
		}
		w.AllUsers = s.allUsers
		for _, d := range w.Look().Devices {
			if info, ok := d.Info(); ok && info.Role == telemetry.Frontend && d.Report != nil && d.Report.Status.MAC == [6]byte(card.HardwareAddr) {
				names = append(names, d.Source.Name)
			}
		}
	}
	return names
}

// found returns an error if the user has named vifs and none of them was found.
func (s *statistics) found(l *stat.Look) error {
	if len(l.Devices) > 0 || len(s.patterns) == 0 {
		return nil
	}
	next := "nothing counts on this machine where this user may look"
	if l.Hidden > 0 {
		next = l.Left() + ": --all-users shows what there is"
	} else if w, err := stat.NewWatcher(s.root); err == nil {
		var names []string
		all := w.Look()
		for i := range all.Devices {
			names = append(names, all.Devices[i].Name)
		}
		if len(names) > 0 {
			next = "the vifs that count here are " + strings.Join(cli.Quoted(names), ", ")
		}
	}
	return &cli.Advice{Err: fmt.Errorf("no counters of %s", strings.Join(cli.Quoted(s.patterns), ", ")), Next: next}
}

func (s *statistics) warn(l *stat.Look) {
	for _, err := range l.Errors {
		s.Note("barevif stat: %s", stat.Clean(err.Error()))
	}
	if left := l.Left(); left != "" {
		s.Note("barevif stat: %s: see --user and --all-users", left)
	}
}

func (s *statistics) encode(l *stat.Look, indent string) error {
	enc := json.NewEncoder(s.Stdout)
	enc.SetIndent("", indent)
	return enc.Encode(l.JSON())
}

// repeat prints a look per interval, for a file or a pipe.
func (s *statistics) repeat(ctx context.Context, w *stat.Watcher) error {
	tick := time.NewTicker(s.interval)
	defer tick.Stop()
	for n := 1; ; n++ {
		l := w.Look()
		if n == 1 {
			if err := s.found(l); err != nil {
				return err
			}
			s.warn(l)
		}
		if err := s.one(l, n > 1); err != nil || n == s.count {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done(): // a signal
			return nil
		}
	}
}

// one prints one look of several. again says that it is not the first.
func (s *statistics) one(l *stat.Look, again bool) error {
	if s.json {
		return s.encode(l, "")
	}
	var b strings.Builder
	if again {
		b.WriteByte('\n')
	}
	b.WriteString(s.paint()(stat.Title, l.Time.Format(time.RFC3339)) + "\n")
	write := func() error { return stat.Write(&b, l, stat.Sheet{Width: s.width(), Paint: s.paint()}) }
	if s.names {
		write = func() error { return stat.WriteNames(&b, l) }
	}
	if err := write(); err != nil {
		return err
	}
	_, err := io.WriteString(s.Stdout, b.String())
	return err
}

func (s *statistics) serve(ctx context.Context, w *stat.Watcher) error {
	host, port, err := net.SplitHostPort(s.http)
	if err != nil {
		if _, number := strconv.ParseUint(s.http, 10, 16); number != nil {
			return cli.BadValue("http", s.http, "an address such as localhost:9464, or a port")
		}
		host, port = "", s.http
	}
	if host == "" {
		host = "127.0.0.1"
	}
	var token, secret, where string
	switch {
	case s.noToken:
	case s.tokenFile != "":
		if token, err = tokenFrom(s.tokenFile); err != nil {
			return err
		}
		secret, where = "#token=TOKEN", "in "+s.tokenFile
	default:
		token = rand.Text()
		secret, where = "#token="+token, token
	}
	addr := net.JoinHostPort(host, port)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return cli.ListenRefused(err, addr, "http")
	}
	s.Say("page      http://%s/%s\nJSON      http://%s/stat.json\nmetrics   http://%s/metrics", l.Addr(), secret, l.Addr(), l.Addr())
	if token != "" {
		s.Say("token     %s\n          for JSON and metrics: Authorization: Bearer TOKEN", where)
	}
	s.Say("a signal ends it")
	tcp, ok := l.Addr().(*net.TCPAddr)
	switch remote := ok && !tcp.IP.IsLoopback(); {
	case remote && s.noToken:
		s.Note("barevif stat: other machines can read this without a token: how much a vif carries, and when")
	case remote:
		s.Note("barevif stat: other machines can reach this; the token and the counters cross the network unencrypted")
	case s.noToken:
		s.Note("barevif stat: every user of this machine can read this, whatever pins and memfds keep from them")
	}
	err = statweb.Serve(ctx, l, w, s.interval, token)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// width returns the width of the terminal in columns, or 0 if the output is not a terminal.
func (s *statistics) width() int {
	if f, ok := s.Stdout.(*os.File); ok {
		if columns, _, err := term.GetSize(int(f.Fd())); err == nil {
			return columns
		}
	}
	return 0
}

// coloured reports whether the output is a terminal that shows colours, and the user wants
// them.
func (s *statistics) coloured() bool {
	return isTerminal(s.Stdout) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

func (s *statistics) paint() stat.Paint {
	if !s.coloured() {
		return stat.NoPaint
	}
	return colours()
}

// colours uses only the 16 ANSI colours, which a user's terminal theme keeps readable.
func colours() stat.Paint {
	style := [...]lipgloss.Style{
		stat.Plain: lipgloss.NewStyle(),
		stat.Title: lipgloss.NewStyle().Bold(true),
		stat.Head:  lipgloss.NewStyle().Foreground(lipgloss.Cyan),
		stat.Dim:   lipgloss.NewStyle().Faint(true),
		stat.Good:  lipgloss.NewStyle().Foreground(lipgloss.Green),
		stat.Warn:  lipgloss.NewStyle().Foreground(lipgloss.Yellow),
		stat.Bad:   lipgloss.NewStyle().Foreground(lipgloss.Red).Bold(true),
	}
	return func(t stat.Tone, text string) string {
		if t == stat.Plain || text == "" {
			return text
		}
		return style[t].Render(text)
	}
}
