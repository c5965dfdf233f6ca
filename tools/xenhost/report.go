//go:build linux

package xenhost

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/xendev"
	"barevif/hypercall/xendev/privcmd"
)

// A Found is one fact of a Report, or the error that hid it.
type Found[T any] struct {
	Value T
	Err   error
}

func found[T any](v T, err error) Found[T] { return Found[T]{v, err} }

func (f Found[T]) String() string {
	if f.Err != nil {
		return "unknown: " + f.Err.Error()
	}
	return fmt.Sprint(f.Value)
}

func (f Found[T]) restricted() bool { return errors.Is(f.Err, privcmd.ErrRestricted) }

// A Report says where this program runs and what it may use.
type Report struct {
	Xen          Found[string]          // Xen's version: "4.17.7"
	Kernel       Found[string]          // release of Linux
	Domain       Found[hypercall.DomID] // our id
	Guest        Found[string]          // "PV", "PVH" or "HVM"; /sys/hypervisor/guest_type
	Control      Found[bool]            // this is the control domain
	Capabilities Found[string]          // the kinds of guest this Xen can run
	Nodes        []xendev.Node
	GrantLimit   Found[int]                // pages that gntalloc grants in the whole system
	MapLimit     Found[int]                // grants that gntdev maps in one call
	GrantTable   Found[privcmd.GrantTable] // of this domain
	Ports        Found[Ports]              // of this domain
	Vifs         Found[[]Vif]
}

// Ports counts event channels by the kind of their other end.
type Ports struct {
	Total, Unbound, Interdomain, Other int
}

func (p Ports) String() string {
	return fmt.Sprintf("%d in use (%d between domains, %d waiting for a peer, %d interrupts)",
		p.Total, p.Interdomain, p.Unbound, p.Other)
}

// Inspect makes a Report. Facts that need a hypercall are unknown where the kernel
// permits none, as in most domUs. Facts not asked for when ctx ends have its error.
func Inspect(ctx context.Context, cfg xendev.Config) Report {
	var r Report
	r.Xen = found(xenVersion(cfg))
	r.Kernel = found(kernelRelease())
	r.Guest = found(text(cfg, "sys/hypervisor/guest_type"))
	r.Capabilities = found(text(cfg, "sys/hypervisor/properties/capabilities"))
	r.Control = found(isControl(cfg))
	r.Nodes = xendev.Nodes(cfg)
	r.GrantLimit = found(xendev.GrantLimit(cfg))
	r.MapLimit = found(mapLimit(cfg))
	r.Vifs = found(Vifs(cfg))
	r.Domain = found(domainID(ctx, cfg))
	r.GrantTable, r.Ports = reportCalls(ctx, cfg, r.Nodes)
	return r
}

// domainID asks xenstore for our id.
func domainID(ctx context.Context, cfg xendev.Config) (hypercall.DomID, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	d, err := xendev.Open(cfg)
	if err != nil {
		return 0, err
	}
	return d.ID(), d.Close()
}

// reportCalls reports what only hypercalls tell. If privcmd does not open, the error is
// that of its node, which says how to fix it.
func reportCalls(ctx context.Context, cfg xendev.Config, nodes []xendev.Node) (Found[privcmd.GrantTable], Found[Ports]) {
	c, err := privcmd.Open(path(cfg, "dev/xen"))
	if err != nil {
		for _, n := range nodes {
			if n.Module == "xen-privcmd" && n.Err != nil {
				err = n.Err
				break
			}
		}
		return Found[privcmd.GrantTable]{Err: err}, Found[Ports]{Err: err}
	}
	defer c.Close()
	return found(c.GrantTable(hypercall.DomSelf)), found(countPorts(ctx, c))
}

// maxPorts is how many event channels a domain can have (EVTCHN_FIFO_NR_CHANNELS of the
// FIFO interface).
const maxPorts = 1 << 17

// countPorts asks Xen for each port until Xen says that there are no more.
func countPorts(ctx context.Context, c *privcmd.Conn) (n Ports, err error) {
	for p := range hypercall.PortID(maxPorts) {
		if p == 0 {
			continue // never valid
		}
		if err := ctx.Err(); err != nil {
			return n, err
		}
		port, err := c.Port(hypercall.DomSelf, p)
		if errors.Is(err, unix.EINVAL) {
			break
		}
		if err != nil {
			return n, err
		}
		switch port.Kind {
		case privcmd.PortClosed:
			continue
		case privcmd.PortUnbound:
			n.Unbound++
		case privcmd.PortInterdomain:
			n.Interdomain++
		default:
			n.Other++
		}
		n.Total++
	}
	return n, nil
}

// text returns the content of a file without the space around it.
func text(cfg xendev.Config, name string) (string, error) {
	b, err := os.ReadFile(path(cfg, name))
	if errors.Is(err, fs.ErrNotExist) && !onXen(cfg) {
		return "", xendev.ErrNotXen
	}
	return strings.TrimSpace(string(b)), err
}

// xenVersion joins the three parts of the version in sysfs. extra begins with a dot.
func xenVersion(cfg xendev.Config) (string, error) {
	var part [3]string
	for i, name := range []string{"major", "minor", "extra"} {
		var err error
		if part[i], err = text(cfg, "sys/hypervisor/version/"+name); err != nil {
			return "", err
		}
	}
	return part[0] + "." + part[1] + part[2], nil
}

// mapLimit reads the limit of drivers/xen/gntdev.c.
func mapLimit(cfg xendev.Config) (int, error) {
	b, err := os.ReadFile(path(cfg, "sys/module/xen_gntdev/parameters/limit"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

func kernelRelease() (string, error) {
	var u unix.Utsname
	err := unix.Uname(&u)
	return unix.ByteSliceToString(u.Release[:]), err
}

func isControl(cfg xendev.Config) (bool, error) {
	s, err := text(cfg, "proc/xen/capabilities")
	if errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("%w: mount it: mount -t xenfs xenfs /proc/xen", err)
	}
	return strings.Contains(s, "control_d"), err
}

// String returns the report as text, one line per fact.
func (r Report) String() string {
	var b strings.Builder
	told := false
	line := func(name string, value any) {
		// Explain only once what hypercalls need.
		if f, ok := value.(interface{ restricted() bool }); ok && f.restricted() && told {
			value = "unknown: no hypercalls"
		} else if ok && f.restricted() {
			told = true
		}
		fmt.Fprintf(&b, "%-13s %v\n", name, value)
	}
	line("xen", r.Xen)
	line("kernel", r.Kernel)
	line("domain", r.Domain)
	line("guest", r.Guest)
	line("control", r.Control)
	line("capabilities", r.Capabilities)
	if t := r.GrantTable; t.Err != nil {
		line("grant table", t)
	} else {
		free := t.Value.MaxFrames - t.Value.Frames
		line("grant table", fmt.Sprintf("%d frames of 512 grants in use, %d more free", t.Value.Frames, free))
	}
	if l := r.GrantLimit; l.Err != nil {
		line("grant limit", l)
	} else {
		line("grant limit", fmt.Sprintf("%d pages for the whole system (/sys/module/xen_gntalloc/parameters/limit)", l.Value))
	}
	line("map limit", r.MapLimit)
	line("ports", r.Ports)
	for _, n := range r.Nodes {
		switch {
		case n.Err != nil:
			line("node", n.Err)
		default:
			line("node", fmt.Sprintf("%s (%s)", n.Path, n.Module))
		}
	}
	switch {
	case r.Vifs.Err != nil:
		line("vif", r.Vifs)
	case len(r.Vifs.Value) == 0:
		line("vif", "none")
	}
	for _, v := range r.Vifs.Value {
		owner := "free"
		if v.Driver != "" {
			owner = "belongs to " + v.module()
			if v.Interface != "" {
				owner += " as " + v.Interface
			}
		}
		line("vif", fmt.Sprintf("%s (%s) %s", v.Name, v.Node, owner))
	}
	return b.String()
}
