package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/inspect"
	"barevif/tools/cli"
	"barevif/tools/internal/stat"

	"github.com/spf13/cobra"
)

const aboutRing = `ring shows the rings of vifs as their process has them, which Linux's netback and
netfront show in debugfs: the indexes of both ends, the indexes at which each end wants an
event, what is outstanding, grant refs and ports. The process is asked, not its memory
read: each half of a queue is of one moment, "read ... ago", whatever its owner does.

VIF is a name as in "stat": "front-1-2-0", "1.0" for both ends, or a pattern. Without one it
shows all vifs of this user and root.

  req prod      the frontend's index in the shared page: requests it has published
  rsp prod      the backend's: responses it has published
  pvt           the private index of the end that produces: published, or about to be
  cons          the private index of the end that consumes
  event         the index at which the other end wants to be notified
  (+5)          slots more than rsp prod, the base

A tx ring carries frames from the frontend to the backend, an rx ring the other way. The
owner of a half is "away" from it, "inside" a call that works, "waiting" in one for an
event, or, in a Poller, "asleep".

--kick notifies the other end and makes this one look at its rings, as "kick" in netback's
debugfs does. It is harmless. A link that moves again afterwards had lost an event.`

func ringCommand(p *cli.Program) *cobra.Command {
	r := rings{inspected: inspected{Program: p}}
	cmd := &cobra.Command{
		Use:   "ring [VIF...]",
		Short: "Show the rings of vifs: indexes, events, what is outstanding; kick a link",
		Long:  aboutRing,
		Example: `  barevif ring
  barevif ring --slots front-1-2-0
  barevif ring --kick vif1.0
  barevif ring --json 1.0 | jq '.[].halves[] | {ring, half, outstanding}'`,
		ValidArgsFunction: r.completeInspected,
		RunE:              func(cmd *cobra.Command, args []string) error { return r.run(cmd.Context(), args) },
	}
	r.register(cmd)
	f := cmd.Flags()
	f.BoolVar(&r.json, "json", false, "print JSON")
	f.BoolVar(&r.kick, "kick", false, "notify the other end, and look at the rings, before they are shown")
	f.BoolVar(&r.slots, "slots", false, "list every outstanding request with its id and grant ref")
	cli.Exclusive(cmd, "json", "slots")
	return cmd
}

type rings struct {
	inspected
	json, kick, slots bool
}

// shownRings is the JSON of one vif.
type shownRings struct {
	Vif    string `json:"vif"`
	PID    int    `json:"pid"`
	UID    int    `json:"uid"`
	Kicked *int   `json:"kicked,omitempty"` // how many halves --kick reached
	*pvnet.RingState
}

func (r *rings) run(ctx context.Context, names []string) error {
	found, err := r.find(ctx, names)
	if err != nil {
		return err
	}
	var all []shownRings
	var errs error
	for _, v := range found {
		s, err := r.look(ctx, &v)
		if err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		all = append(all, *s)
	}
	if r.json {
		enc := json.NewEncoder(r.Stdout)
		enc.SetIndent("", "  ")
		return errors.Join(enc.Encode(all), errs)
	}
	var b strings.Builder
	for i := range all {
		if i > 0 {
			b.WriteByte('\n')
		}
		writeRings(&b, &all[i], r.slots)
	}
	_, err = io.WriteString(r.Stdout, b.String())
	return errors.Join(err, errs)
}

func (r *rings) look(ctx context.Context, v *inspect.Vif) (*shownRings, error) {
	s := &shownRings{Vif: v.Name, PID: v.PID, UID: v.UID}
	if r.kick {
		n, err := v.Kick(ctx, true)
		if err != nil {
			return nil, err
		}
		s.Kicked = &n
	}
	var err error
	s.RingState, err = v.Rings(ctx)
	return s, err
}

func writeRings(b *strings.Builder, s *shownRings, slots bool) {
	other := "frontend"
	if s.Role == other {
		other = "backend"
	}
	fmt.Fprintf(b, "%s  %s in domain %d of vif %s, %s in domain %d; process %d\n", stat.Clean(s.Vif), stat.Clean(s.Role), s.Own, stat.Clean(s.ID), other, s.Peer, s.PID)
	link := "up"
	if !s.Up {
		link = "down: " + stat.Clean(s.Reason)
	}
	fmt.Fprintf(b, "  %s, %s; connection %d, queues: %d", stat.Clean(s.State), link, s.Epoch, s.Queues)
	if len(s.Features) > 0 {
		fmt.Fprintf(b, "; agreed: %s", stat.Clean(strings.Join(s.Features, " ")))
	}
	b.WriteByte('\n')
	if s.Kicked != nil {
		fmt.Fprintf(b, "  kicked: %d halves, and the other end of each\n", *s.Kicked)
	}
	for i := range s.Halves {
		writeHalf(b, &s.Halves[i], s.Role == "frontend", slots)
	}
}

func writeHalf(b *strings.Builder, h *pvnet.HalfState, front, slots bool) {
	does := "sends"
	if h.Half == "rx" {
		does = "receives"
	}
	fmt.Fprintf(b, "\nqueue %d, %s ring: this end %s; its owner is %s", h.Queue, stat.Clean(h.Ring), does, stat.Clean(h.Owner))
	switch {
	case h.Owner == "shut":
		b.WriteString("\n  no ring: the link is down\n")
		return
	case h.Unread:
		b.WriteString("\n  unknown: it did not answer\n")
		return
	}
	fmt.Fprintf(b, "; read %v ago\n", h.Age.Round(time.Microsecond))
	peer := ""
	if h.Joined != nil {
		peer = ", the other end is there"
		if !*h.Joined {
			peer = ", the other end is gone"
		}
	}
	fmt.Fprintf(b, "  %d slots, gref %d, port %d%s\n", h.Size, h.RingRef, h.Port, peer)
	base := h.RspProd
	rel := func(v uint32) string { return fmt.Sprintf("%d (%+d)", v, int32(v-base)) }
	req, rsp := "pvt", "cons"
	if !front {
		req, rsp = "cons", "pvt"
	}
	fmt.Fprintf(b, "  req prod %s  %s %s  event %s\n", rel(h.ReqProd), req, rel(h.ReqPrivate), rel(h.ReqEvent))
	fmt.Fprintf(b, "  rsp prod %d (base)  %s %s  event %s\n", h.RspProd, rsp, rel(h.RspPrivate), rel(h.RspEvent))
	fmt.Fprintf(b, "  %d outstanding, %d free, %d to take", h.Outstanding, h.Free, h.Waiting)
	if h.Waiting > h.Size {
		b.WriteString(" (impossible: the other end broke the protocol, or was about to)")
	}
	fmt.Fprintf(b, "; %d buffers free", h.Buffers)
	if front {
		fmt.Fprintf(b, ", %d pages with the backend", h.Lent)
	}
	if h.Parsed {
		b.WriteString(", a frame waits for the owner")
	}
	if h.Shortage > 0 {
		fmt.Fprintf(b, ", short of %d slots", h.Shortage)
	}
	b.WriteByte('\n')
	writeSlots(b, h.Slots, slots)
}

// writeSlots lists the outstanding requests, as runs of numbers unless each is wanted.
func writeSlots(b *strings.Builder, all []pvnet.SlotState, each bool) {
	if len(all) == 0 {
		return
	}
	if each {
		for _, s := range all {
			fmt.Fprintf(b, "    id %d  gref %d  %s\n", s.ID, s.Ref, stat.Clean(s.Of))
		}
		return
	}
	var ids, refs []uint32
	of := map[string]int{}
	var kinds []string
	for _, s := range all {
		ids, refs = append(ids, uint32(s.ID)), append(refs, uint32(s.Ref))
		if of[s.Of]++; of[s.Of] == 1 {
			kinds = append(kinds, s.Of)
		}
	}
	for i, k := range kinds {
		kinds[i] = fmt.Sprintf("%d %s", of[k], stat.Clean(k))
	}
	fmt.Fprintf(b, "  %s: ids %s; grefs %s\n", strings.Join(kinds, ", "), runs(ids), runs(refs))
}

// runs writes numbers as runs, "0-4, 9"; at most 12 of them.
func runs(all []uint32) string {
	slices.Sort(all)
	var out []string
	for i := 0; i < len(all); {
		j := i
		for j+1 < len(all) && all[j+1]-all[j] <= 1 {
			j++
		}
		if len(out) == 12 {
			out = append(out, fmt.Sprintf("and %d more", len(all)-i))
			break
		}
		if all[i] == all[j] {
			out = append(out, fmt.Sprint(all[i]))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", all[i], all[j]))
		}
		i = j + 1
	}
	return strings.Join(out, ", ")
}
