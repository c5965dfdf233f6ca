package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/inspect"
	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/tools/internal/pcapfilter"
	"barevif/tools/internal/stat"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/spf13/cobra"
)

const aboutDump = `dump captures the frames that a vif moves, as pcapng for Wireshark, tshark and
"tcpdump -r". It asks the process that has the vif, which copies frames only while somebody
captures. VIF is a name as in "stat": "front-1-2-0", "vif1.0" for the backend. With both ends
on this machine "1.0" is two vifs, so choose one.

EXPRESSION is tcpdump's (pcap-filter(7)), for Ethernet. It is compiled here and runs in that
process, on all bytes of a frame. What tcpdump compiles and dump does not can be given as
--program: "tcpdump -y EN10MB -ddd EXPRESSION >FILE".

Each frame has its direction (inbound: received by that end), its queue, and the number of
frames that were not copied before it. Its comment says what the bytes do not:

  checksum partial   the field holds the sum of the pseudo-header, and is completed by
                     whoever gets the frame: what looks wrong is not
  gso tcp4 1448      one long frame, to be cut into pieces of 1448 bytes of payload
  checksum verified  the other end says that it is right
  dropped: REASON    the device dropped it: the reasons are those of COUNTERS.md

A capture never delays the vif. Frames for which it has no room, since the file or the
reader is slow, are not copied, and are counted at the end. It goes on when the vif loses its
connection, and when its process ends it waits for another. A signal or --count ends it.`

func dumpCommand(p *cli.Program) *cobra.Command {
	d := dumping{inspected: inspected{Program: p}}
	cmd := &cobra.Command{
		Use:   "dump VIF [EXPRESSION...]",
		Short: "Capture the frames of a vif as pcapng",
		Long:  aboutDump,
		Example: `  barevif dump front-1-2-0 -w card.pcapng
  barevif dump vif1.0 -w - tcp port 80 | tshark -r -
  barevif dump vif1.0 -c 10 -s 96 -Q in -w - arp or icmp | tcpdump -nr -`,
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 { // the expression
				return completeNothing(cmd, args, word)
			}
			return d.completeInspected(cmd, args, word)
		},
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return &cli.Advice{Err: errors.New("the name of a vif is missing"), Next: `"barevif ring" lists those that can be captured`, Usage: true}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return d.run(cmd.Context(), args[0], strings.Join(args[1:], " "))
		},
	}
	d.register(cmd)
	f := cmd.Flags()
	f.StringVarP(&d.file, "write", "w", "-", "`file` to write; -: standard output")
	f.IntVarP(&d.count, "count", "c", 0, "end after this `number` of frames; 0: never")
	f.IntVarP(&d.snaplen, "snaplen", "s", 0, "keep that many `bytes` of each frame; 0: all")
	f.StringVarP(&d.direction, "direction", "Q", "inout", "`which` frames: in, received by that end; out, sent by it; inout")
	cli.FixedValues(cmd, "direction", "in", "out", "inout")
	f.StringArrayVar(&d.queues, "queue", nil, "only frames of this `queue`; repeatable")
	f.StringVar(&d.program, "program", "", "`file` with a compiled filter, as tcpdump -ddd prints it, instead of an expression")
	return cmd
}

type dumping struct {
	inspected
	file, direction, program string
	count, snaplen           int
	queues                   []string
}

// config checks the flags.
func (d *dumping) config(expression string) (cfg inspect.DumpConfig, err error) {
	cfg.Snaplen = d.snaplen
	for _, s := range d.queues {
		q, err := strconv.ParseUint(s, 10, 16)
		if err != nil {
			return cfg, cli.BadValue("queue", s, "the number of a queue, from 0")
		}
		cfg.Queues = append(cfg.Queues, int(q))
	}
	switch d.direction {
	case "in":
		cfg.Received = true
	case "out":
		cfg.Sent = true
	case "inout":
	default:
		return cfg, cli.BadValue("direction", d.direction, "in, out or inout")
	}
	if d.count < 0 {
		return cfg, cli.BadValue("count", strconv.Itoa(d.count), "a number of frames")
	}
	if d.snaplen < 0 {
		return cfg, cli.BadValue("snaplen", strconv.Itoa(d.snaplen), "a number of bytes")
	}
	switch {
	case d.program != "" && expression != "":
		return cfg, &cli.Advice{Err: errors.New("there are an expression and --program"), Next: "leave one of them out", Usage: true}
	case d.program != "":
		f, err := os.Open(d.program)
		if err != nil {
			return cfg, &cli.Advice{Err: fmt.Errorf("--program: %w", err), Next: "name a file that \"tcpdump -ddd\" has printed"}
		}
		defer f.Close()
		if cfg.Program, err = readProgram(f); err != nil {
			return cfg, &cli.Advice{Err: fmt.Errorf("--program: %s: %w", d.program, err), Next: `tcpdump -y EN10MB -ddd EXPRESSION >FILE`, Usage: true}
		}
	case expression != "":
		raw, err := pcapfilter.Compile(expression)
		if err != nil {
			return cfg, &cli.Advice{Err: fmt.Errorf("the expression: %w", err), Next: `see pcap-filter(7); what tcpdump can compile, it can for --program: "barevif dump --help"`, Usage: true}
		}
		cfg.Program = inspect.Program(raw)
	}
	return cfg, nil
}

// readProgram reads what tcpdump -ddd prints: the number of instructions, and four decimal
// numbers for each.
func readProgram(r io.Reader) (p []inspect.Insn, err error) {
	in := bufio.NewScanner(io.LimitReader(r, 1<<20))
	n := -1
	for line := 1; in.Scan(); line++ {
		if strings.TrimSpace(in.Text()) == "" {
			continue
		}
		if n < 0 {
			if n, err = strconv.Atoi(strings.TrimSpace(in.Text())); err != nil || n < 1 || n > inspect.MaxProgram {
				return nil, fmt.Errorf("line %d: %q is no number of instructions from 1 to %d", line, in.Text(), inspect.MaxProgram)
			}
			continue
		}
		var one inspect.Insn
		words := strings.Fields(in.Text())
		if len(words) != len(one) || len(p) == n {
			return nil, fmt.Errorf("line %d: %q is not one of %d instructions of 4 numbers", line, in.Text(), n)
		}
		for i, w := range words {
			v, err := strconv.ParseUint(w, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("line %d: %q is not one of %d instructions of 4 numbers", line, in.Text(), n)
			}
			one[i] = uint32(v)
		}
		p = append(p, one)
	}
	if in.Err() == nil && len(p) != n {
		return nil, fmt.Errorf("%d instructions instead of %d", len(p), n)
	}
	return p, in.Err()
}

func (d *dumping) run(ctx context.Context, name, expression string) error {
	cfg, err := d.config(expression)
	if err != nil {
		return err
	}
	v, err := d.one(ctx, name)
	if err != nil {
		return err
	}
	out := d.Stdout
	if d.file != "-" {
		f, err := os.Create(d.file)
		if err != nil {
			return &cli.Advice{Err: err, Next: "name a file that this user can write"}
		}
		defer f.Close()
		out = f
	} else if isTerminal(d.Stdout) {
		return &cli.Advice{Err: errors.New("pcapng is nothing for a terminal"), Next: "name a file with --write, or pipe it: ... | tcpdump -nr -", Usage: true}
	}
	c, err := newCapture(out, v, cfg, expression)
	if err != nil {
		return err
	}
	defer c.stop()
	err = d.follow(ctx, c, v, cfg)
	c.end()
	d.Note("%s", c.summary())
	if err == nil {
		err = c.err()
	}
	return err
}

// searchEvery is how often dump looks for a vif whose process has ended.
const searchEvery = 500 * time.Millisecond

// follow captures, from one process after the other, until ctx or the count ends it.
func (d *dumping) follow(ctx context.Context, c *capture, v *inspect.Vif, cfg inspect.DumpConfig) error {
	for {
		st, err := v.Dump(ctx, cfg, func() {
			d.Note("capturing %s of process %d; a signal ends it", stat.Clean(v.Name), v.PID)
		}, func(f *pvnet.TapFrame) error {
			if err := c.write(f); err != nil {
				return err
			}
			if c.frames == d.count {
				return io.EOF
			}
			return nil
		})
		c.add(st)
		if !errors.Is(err, inspect.ErrEnded) {
			return err
		}
		d.Note("%s of process %d has ended; waiting for it to come back", stat.Clean(v.Name), v.PID)
		for again := (*inspect.Vif)(nil); again == nil; {
			select {
			case <-time.After(searchEvery):
			case <-ctx.Done():
				return nil
			}
			again = d.again(ctx, v.Name)
			if again != nil {
				v = again
			}
		}
	}
}

// again returns the vif of that name if one process shows it.
func (d *dumping) again(ctx context.Context, name string) *inspect.Vif {
	quiet := *d
	quiet.Program = &cli.Program{Stdout: io.Discard, Stderr: io.Discard}
	quiet.PID = 0
	v, err := quiet.one(ctx, name)
	if err != nil {
		return nil
	}
	return v
}

// A capture writes a pcapng file.
type capture struct {
	frames int
	stats  pvnet.TapStats
	began  time.Time
	help   map[string]string // of drop reasons, by name

	mu     sync.Mutex
	w      *pcapgo.NgWriter
	failed error // guarded by mu: the first error of w
	done   chan struct{}
	wg     sync.WaitGroup
}

// flushEvery is how long a frame may stay in the buffer of the file.
const flushEvery = 100 * time.Millisecond

func newCapture(out io.Writer, v *inspect.Vif, cfg inspect.DumpConfig, expression string) (*capture, error) {
	intf := pcapgo.NgInterface{
		Name: stat.Clean(v.Name), Description: fmt.Sprintf("vif %s of process %d", stat.Clean(v.Name), v.PID),
		Filter: expression, OS: runtime.GOOS, LinkType: layers.LinkTypeEthernet, SnapLength: uint32(cfg.Snaplen),
		TimestampResolution: 9,
	}
	w, err := pcapgo.NewNgWriterInterface(out, intf, pcapgo.NgWriterOptions{SectionInfo: pcapgo.NgSectionInfo{
		Hardware: runtime.GOARCH, OS: runtime.GOOS, Application: "barevif dump",
	}})
	if err == nil {
		err = w.Flush() // whoever reads a pipe sees that it has begun
	}
	if err != nil {
		return nil, err
	}
	c := &capture{w: w, began: time.Now(), done: make(chan struct{}), help: make(map[string]string)}
	for _, f := range telemetry.Fields() {
		c.help[f.Name] = f.Help
	}
	c.wg.Go(func() {
		t := time.NewTicker(flushEvery)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				c.locked(w.Flush)
			case <-c.done:
				return
			}
		}
	})
	return c, nil
}

// locked does something with the writer, unless that has failed before.
func (c *capture) locked(do func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == nil {
		c.failed = do()
	}
	return c.failed
}

func (c *capture) err() error { return c.locked(func() error { return nil }) }

func (c *capture) write(f *pvnet.TapFrame) error {
	c.frames++
	queue := uint32(f.Queue)
	flags := pcapgo.NgEpbFlags{Direction: pcapgo.NgEpbFlagDirectionInbound}
	if f.Dir == telemetry.TX {
		flags.Direction = pcapgo.NgEpbFlagDirectionOutbound
	}
	opts := pcapgo.NgPacketOptions{Flags: &flags, Queue: &queue}
	if f.Lost > 0 {
		opts.DropCount = &f.Lost
	}
	if comment := c.comment(f); comment != "" {
		opts.Comments = []string{comment}
	}
	return c.locked(func() error {
		return c.w.WritePacketWithOptions(gopacket.CaptureInfo{Timestamp: f.Time, CaptureLength: len(f.Data), Length: f.Len}, f.Data, opts)
	})
}

// comment says what the bytes of a frame do not show.
func (c *capture) comment(f *pvnet.TapFrame) string {
	var say []string
	if f.Dropped != 0 {
		reason := f.Dropped.String()
		if help := c.help[reason]; help != "" {
			reason += " (" + help + ")"
		}
		say = append(say, "dropped: "+reason)
	}
	switch f.Checksum {
	case pvnet.ChecksumPartial:
		who := "left to the receiver"
		if f.Finished {
			who = "completed before the other end gets the frame"
		}
		say = append(say, "checksum partial: the field holds the sum of the pseudo-header, "+who)
	case pvnet.ChecksumVerified:
		say = append(say, "checksum verified")
	}
	if f.GSO.Size != 0 {
		name := map[pvnet.GSOType]string{pvnet.GSOTCPv4: "tcp4", pvnet.GSOTCPv6: "tcp6"}[f.GSO.Type]
		say = append(say, fmt.Sprintf("gso %s %d", name, f.GSO.Size))
	}
	return strings.Join(say, "; ")
}

// add adds the counts of one process.
func (c *capture) add(s pvnet.TapStats) {
	c.stats.Captured += s.Captured
	c.stats.Filtered += s.Filtered
	c.stats.Lost += s.Lost
}

// end writes the statistics, and all that is left.
func (c *capture) end() {
	c.locked(func() error {
		now := time.Now()
		err := c.w.WriteInterfaceStats(0, pcapgo.NgInterfaceStatistics{
			LastUpdate: now, StartTime: c.began, EndTime: now,
			PacketsReceived: c.stats.Captured + c.stats.Lost, PacketsDropped: c.stats.Lost,
		})
		return errors.Join(err, c.w.Flush())
	})
}

func (c *capture) stop() {
	close(c.done)
	c.wg.Wait()
}

func (c *capture) summary() string {
	return fmt.Sprintf("%s frames captured\n%s refused by the filter\n%s not copied for lack of room; the vif lost none by that",
		cli.Grouped(uint64(c.frames)), cli.Grouped(c.stats.Filtered), cli.Grouped(c.stats.Lost))
}
