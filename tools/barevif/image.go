package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"barevif/tools/cli"
	"barevif/tools/guestimage"
	"barevif/tools/guestimage/guestinit"

	"github.com/spf13/cobra"
)

func imageCommand(p *cli.Program) *cobra.Command {
	m := imageFlags{Program: p}
	cmd := &cobra.Command{
		Use:   "image [flags] PACKAGE [-- [NAME=VALUE...] ARGUMENT...]",
		Short: "Make a Xen guest of a Go program",
		Long: `image makes what "xl create" needs to run a Go program, and nothing else, in a guest:

  kernel      of Debian, as it is in the package
  initramfs   the program, a process 1, and the modules for /dev/xen and TAPs
  xl.cfg      a configuration for a PVH guest; xl-pv.cfg is the one for PV

PACKAGE is a main package of Go, which is built without cgo, or a program that is
built already. What follows "--" is for the program: its environment, then arguments.

Process 1 mounts /proc, /sys, /dev, /run, /tmp, bpffs and cgroups, loads the modules,
raises the limit of pages to grant, starts the program and powers the guest off when it
has ended; if it has failed, starts it again. "xl shutdown" sends it SIGTERM. The
guest's console says what happens, and what is missing: "xl console", "xl create -c".
The kernel's xen-netfront is left out, so that the vif is the program's.

extra= in the configuration can be changed without a new image:

  extra="console=hvc0 barevif.restart=never -- GOGC=50 -addr 10.9.0.2/24 'two words'"

  barevif.restart=never|on-failure|always   after which ends the program starts again
  barevif.stop=10s                          how long it may take to end when asked to
  barevif.hostname=NAME
  barevif.grants=PAGES                      in place of two times 514 for each queue
  -- NAME=VALUE... ARGUMENT...              the program's environment and arguments

Behind "--", quotes and backslashes are a shell's, and nothing else of it: 'as it is',
"with \" and \\", one\ word. A second "--" ends the environment. The kernel allows 30
words there, and Xen 1023 bytes in all for a PV guest.

--file puts files of this machine into the guest, 1 GiB at most: a file, or a directory with all
that is in it. They may replace /etc/passwd, /etc/group and /etc/hosts, and nothing else that is in
the image. /proc, /sys, /dev, /run and /tmp are mounted when the guest starts, so no file can
be put below them.

An image has the modules xen-evtchn, xen-gntalloc, xen-gntdev, xen-privcmd, xenfs and tun. A program
that is a frontend alone needs the first two, and starts sooner --without the others: xen-gntdev
is for a backend, tun for TAPs, xen-privcmd for doorbells by hypercall, and xenfs, which needs
xen-privcmd, for programs that look into /proc/xen. A backend alone needs no xen-gntalloc.

A guest that serves vifs to others is a driver domain: --config driver_domain=1.

The kernel comes from the package that apt would install, which is fetched once and
kept; or from --deb, or --vmlinuz and --modules. Nothing needs root, and with a package
that is there nothing needs a network. The same input makes the same bytes.`,
		Example: `  barevif image -o out ./tools/hello -- -addr 10.9.0.2/24
  xl create out/xl.cfg
  curl http://10.9.0.2/
  xl shutdown hello

  barevif image -o out --deb linux-image-6.1.0-9-amd64_6.1.27-1_amd64.deb ./cmd/router
  barevif image -o out --vif bridge=br0,mac=00:16:3e:00:00:01 --file ./public:/srv/www ./cmd/web
  barevif image -o out --name router --config driver_domain=1 --file router.conf:/etc/vifrouter/router.conf \
    ./tools/vifrouter -- run --xen --store data/vifrouter /etc/vifrouter/router.conf`,
		Args: m.arguments,
		RunE: func(cmd *cobra.Command, args []string) error { return m.run(cmd.Context()) },
	}
	m.register(cmd)
	return cmd
}

type imageFlags struct {
	*cli.Program
	cfg     guestimage.Config
	restart string
	words   []string // the program's environment and arguments
}

func (m *imageFlags) register(cmd *cobra.Command) {
	f, c := cmd.Flags(), &m.cfg
	f.StringVarP(&c.Out, "out", "o", "out", "`directory` for the files, made if necessary")
	f.StringArrayVar(&c.Packages, "deb", nil, "take the kernel from this `package` of Debian; repeatable, for modules in another one")
	f.StringVar(&c.Vmlinuz, "vmlinuz", "", "take this `file` as the kernel; needs --modules")
	f.StringVar(&c.ModuleDir, "modules", "", "take modules from this `directory`, such as /lib/modules/6.1.0-9-amd64")
	f.StringArrayVar(&c.Modules, "module", nil, "load this `module` too, such as af_packet; repeatable")
	f.StringArrayVar(&c.Without, "without", nil, "leave out this `module` of those that every image has otherwise; repeatable")
	f.StringArrayVar(&c.Files, "file", nil, "put a file or directory of this machine into the guest: `HOST:GUEST`; repeatable")
	f.BoolVar(&c.Uncompressed, "uncompressed", false, "write kernel and initramfs unpacked: the guest starts sooner, the files are five times as large")
	f.StringVar(&c.Program.Tags, "tags", "", "build `tags`, for go build")
	f.StringVar(&c.Program.LDFlags, "ldflags", "", "`flags` of the linker, for go build")
	f.StringVar(&c.Domain.Name, "name", "", "`name` of the guest; default: the program's")
	f.IntVar(&c.Domain.Memory, "memory", 0, "`MiB` of memory; 0: enough for an ordinary program")
	f.IntVar(&c.Domain.VCPUs, "vcpus", 1, "`number` of processors")
	f.StringArrayVar(&c.Domain.VIFs, "vif", []string{"bridge=xenbr0"}, "a `vif` of the guest, in xl's syntax; repeatable; \"none\": no vif")
	f.StringArrayVar(&c.Domain.Lines, "config", nil, "a `line` to add to the configurations, such as on_crash=\"preserve\"; repeatable")
	f.StringArrayVar(&c.Domain.Linux, "kernel-arg", nil, "an `argument` for the kernel, such as loglevel=4; repeatable")
	f.StringVar(&c.Dir, "dir", "", "the `directory` of the files in dom0, for the configurations; default: that of --out")
	f.StringVar(&m.restart, "restart", "", "`when` to start the program again: never, on-failure or always")
	f.DurationVar(&c.Params.Stop, "stop", 0, "the `time` the program may take to end when asked to; 0: 10s")
	f.IntVar(&c.Params.Grants, "grants", 0, "`pages` that may be granted; 0: by the number of processors and vifs")
	cli.FixedValues(cmd, "restart", string(guestinit.Never), string(guestinit.OnFailure), string(guestinit.Always))
	cli.Exclusive(cmd, "deb", "vmlinuz")
	cli.Exclusive(cmd, "deb", "modules")
}

// arguments splits the arguments at "--".
func (m *imageFlags) arguments(cmd *cobra.Command, args []string) error {
	program := args
	if dash := cmd.ArgsLenAtDash(); dash >= 0 {
		program, m.words = args[:dash], args[dash:]
	}
	if len(program) > 1 {
		return &cli.Advice{Err: fmt.Errorf("%q: an image has one program", program[1]), Next: `put what is for the program behind "--"`, Usage: true}
	}
	if len(program) == 0 {
		return &cli.Advice{Err: errors.New("the program is missing"), Next: "name the directory of a main package: barevif image ./tools/hello", Usage: true}
	}
	m.cfg.Program.Package = program[0]
	return nil
}

// check checks the flags that cobra does not, and completes the configuration.
func (m *imageFlags) check() error {
	c := &m.cfg
	c.Env, c.Args = guestinit.SplitEnv(m.words)
	if (c.Vmlinuz == "") != (c.ModuleDir == "") {
		return &cli.Advice{Err: errors.New("--vmlinuz and --modules: one of them is missing"), Next: "give the modules of that kernel, or use --deb", Usage: true}
	}
	switch c.Params.Restart = guestinit.Restart(m.restart); c.Params.Restart {
	case "", guestinit.Never, guestinit.OnFailure, guestinit.Always:
	default:
		return cli.BadValue("restart", m.restart, "never, on-failure or always")
	}
	if c.Params.Stop < 0 || c.Params.Stop > guestinit.MaxStop {
		return cli.BadValue("stop", c.Params.Stop.String(), "a time up to "+guestinit.MaxStop.Round(time.Minute).String())
	}
	if c.Params.Grants < 0 || c.Params.Grants > guestinit.MaxGrants {
		return cli.BadValue("grants", fmt.Sprint(c.Params.Grants), fmt.Sprintf("a number of pages up to %d", guestinit.MaxGrants))
	}
	if n := c.Domain.Memory; n != 0 && (n < 32 || n > 1<<24) {
		return cli.BadValue("memory", fmt.Sprint(n), "MiB from 32 on, or 0")
	}
	if n := c.Domain.VCPUs; n < 1 || n > 512 {
		return cli.BadValue("vcpus", fmt.Sprint(n), "a number from 1 to 512")
	}
	if name := c.Domain.Name; name != "" && guestinit.CheckHostname(name) != nil {
		return cli.BadValue("name", name, "a name of letters, digits, dots and dashes, up to 64 bytes")
	}
	c.Params.Hostname = c.Domain.Name
	if len(c.Domain.VIFs) == 1 && c.Domain.VIFs[0] == "none" {
		c.Domain.VIFs = nil
	}
	for _, line := range c.Domain.Lines {
		if strings.ContainsAny(line, "\n\r\x00") {
			return cli.BadValue("config", line, "one line")
		}
	}
	return nil
}

func (m *imageFlags) run(ctx context.Context) error {
	if err := m.check(); err != nil {
		return err
	}
	m.cfg.Say = func(format string, args ...any) { m.Note("barevif image: "+format, args...) }
	r, err := guestimage.Build(ctx, m.cfg)
	if err != nil {
		return err
	}
	config := filepath.Join(m.cfg.Out, "xl.cfg")
	_, err = fmt.Fprintf(m.Stdout, `kernel      %s, Linux %s
initramfs   %s, in the guest %s; the program is %s
modules     %s
memory      %d MiB
next        xl create %s
`, size(r.Kernel), r.Release, size(r.Initramfs), size(r.Unpacked), size(r.Program), strings.Join(r.Modules, " "), r.Memory, config)
	return err
}

func size(n int64) string { return cli.BinarySize(uint64(n)) }
