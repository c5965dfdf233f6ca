//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// stageEnv holds the plan for a process in the namespaces of a machine.
	stageEnv = "BAREVIF_MACHINE"

	// insideFailed is the exit status of a process that could not make the machine.
	insideFailed = 125

	// user is the ordinary user's uid and gid.
	user     = 47110
	userName = "machines"
)

// A site is the directory with the ordinary user's clone and caches. It is at the same
// path for all rows, so that they share their builds.
type site struct {
	dir, tree, goroot, modules string
}

// newSite makes a site. Only rows of an ordinary user need more than the directory.
func newSite(ctx context.Context, chosen []row) (*site, error) {
	s := &site{dir: "/var/tmp/bvm"} // short: it contains sockets, whose paths have at most 107 bytes
	for _, v := range []struct {
		name string
		to   *string
	}{{"GOROOT", &s.goroot}, {"GOMODCACHE", &s.modules}, {"GOMOD", &s.tree}} {
		out, err := exec.CommandContext(ctx, "go", "env", v.name).Output()
		if err != nil {
			return nil, fmt.Errorf("go env %s: %w", v.name, err)
		}
		*v.to = strings.TrimSpace(string(out))
	}
	s.tree = filepath.Dir(s.tree)
	if err := os.Mkdir(s.dir, 0o755); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%s is there: of another run, or left behind by one that was killed", s.dir)
	} else if err != nil {
		return nil, err
	}
	for _, name := range []string{"go", "mod", "home", "gocache", "cache", "tree", "tmp"} {
		path := filepath.Join(s.dir, name)
		if err := errors.Join(os.Mkdir(path, 0o755), os.Chown(path, user, user)); err != nil {
			return nil, errors.Join(err, s.remove())
		}
	}
	if !slices.ContainsFunc(chosen, func(r row) bool { return r.User }) {
		return s, nil
	}
	// Download all modules while there is a network.
	for _, step := range [][]string{
		{"go", "mod", "download"},
		{"sh", "-c", `git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c 'for f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done' - |
			tar -c --null -T - | tar -x -C "$0" --no-same-owner && chown -R "$1:$1" "$0"`, s.path("tree"), fmt.Sprint(user)},
	} {
		cmd := exec.CommandContext(ctx, step[0], step[1:]...)
		cmd.Dir = s.tree
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w: %s", step[0], err, bytes.TrimSpace(out)), s.remove())
		}
	}
	return s, nil
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

// remove removes the site. All mounts below it were in namespaces that are gone.
func (s *site) remove() error { return os.RemoveAll(s.dir) }

// A plan says what a process does in the namespaces of a machine before it executes go.
type plan struct {
	Row             row
	Binds           [][2]string // from, to; read-only
	Tmpfs           string      // directory on which to mount a tmpfs
	Passwd          string      // file to mount as /etc/passwd; Group as /etc/group
	Group           string
	InUserNamespace bool // the process is in the user namespace already

	Path string // path of the program
	Args []string
	Env  []string
	Dir  string
}

// command returns a command that runs go with these arguments on a machine. done frees
// its resources.
func (s *site) command(ctx context.Context, r row, args []string) (cmd *exec.Cmd, done func(), err error) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		return nil, nil, err
	}
	p := plan{Row: r, Path: goTool, Args: append([]string{"go"}, args...), Dir: s.tree}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "BAREVIF_XENLAB" || r.User && (strings.HasPrefix(name, "XDG_") || strings.HasPrefix(name, "SUDO_"))
	})
	env = append(env, "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -buildvcs=false"))
	// A short path, since it becomes part of the paths of sockets.
	tmp, err := os.MkdirTemp(s.path("tmp"), "")
	if err != nil {
		return nil, nil, err
	}
	done = func() { os.RemoveAll(tmp) }
	defer func() {
		if err != nil {
			done()
		}
	}()
	if err := os.Chmod(tmp, 0o777|os.ModeSticky); err != nil {
		return nil, nil, err
	}
	switch {
	case r.Tmp == "tmpfs":
		p.Tmpfs = tmp
		fallthrough
	case r.Tmp == "disk", r.User:
		env = append(env, "TMPDIR="+tmp)
	}
	if r.Offline {
		cache := filepath.Join(tmp, "cache")
		if err := errors.Join(os.Mkdir(cache, 0o755), os.Chown(cache, user, user)); err != nil {
			return nil, nil, err
		}
		if !r.User {
			os.Chown(cache, 0, 0)
		}
		env = append(env, "BAREVIF_CACHE="+cache, "GOPROXY=off", "GOSUMDB=off")
	} else if r.User {
		env = append(env, "BAREVIF_CACHE="+s.path("cache"))
	}
	if r.User {
		p.Binds = [][2]string{{s.goroot, s.path("go")}, {s.modules, s.path("mod")}}
		goroot := s.path("go")
		if everybodyMayEnter(s.goroot) {
			// At another path all of Go's own packages would have to be built again.
			p.Binds, goroot = p.Binds[1:], s.goroot
		}
		p.Path, p.Dir = goroot+"/bin/go", s.path("tree")
		if p.Passwd, err = s.appendAccount(tmp, "/etc/passwd", fmt.Sprintf("%s:x:%d:%d::%s:/bin/sh\n", userName, user, user, s.path("home"))); err == nil {
			p.Group, err = s.appendAccount(tmp, "/etc/group", fmt.Sprintf("%s:x:%d:\n", userName, user))
		}
		if err != nil {
			return nil, nil, err
		}
		env = append(env, "HOME="+s.path("home"), "USER="+userName, "LOGNAME="+userName, "PATH="+goroot+"/bin:"+os.Getenv("PATH"),
			"GOROOT="+goroot, "GOCACHE="+s.path("gocache"), "GOMODCACHE="+s.path("mod"), "GOPATH="+s.path("home/go"), "GOTOOLCHAIN=local")
	}
	p.Env = lastSettings(append(env, r.Env...))
	flags := uintptr(unix.CLONE_NEWNS)
	if r.Offline {
		flags |= unix.CLONE_NEWNET
	}
	cmd = exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), stageEnv+"="+encode(p))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: flags}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	return cmd, done, nil
}

// lastSettings keeps the last setting of each variable; some programs read the first.
func lastSettings(env []string) (kept []string) {
	seen := map[string]bool{}
	for _, v := range slices.Backward(env) {
		if name, _, _ := strings.Cut(v, "="); !seen[name] {
			seen[name] = true
			kept = append(kept, v)
		}
	}
	slices.Reverse(kept)
	return kept
}

// everybodyMayEnter reports whether every user may enter the directory.
func everybodyMayEnter(dir string) bool {
	for ; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil || info.Mode()&0o005 != 0o005 {
			return false
		}
		if dir == "/" {
			return true
		}
	}
}

// appendAccount writes a copy of an account file with one more line.
func (s *site) appendAccount(dir, file, line string) (path string, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, filepath.Base(file))
	return path, os.WriteFile(path, append(text, line...), 0o644)
}

// runInside makes the machine of a plan around this process, and then executes the program.
// It returns only with an error.
func runInside(text string) error {
	runtime.LockOSThread()
	var p plan
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return err
	}
	os.Unsetenv(stageEnv)
	if !p.InUserNamespace {
		if err := p.mounts(); err != nil {
			return err
		}
		if p.Row.Offline {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(lo); err != nil {
				return fmt.Errorf("lo: %w", err)
			}
		}
	}
	if p.Row.NoUsers && !p.InUserNamespace {
		return p.enterUserNamespace()
	}
	if p.InUserNamespace {
		// The limit holds for each user of this user namespace, and so for root in it.
		if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0\n"), 0); err != nil {
			return err
		}
	}
	if p.Row.User {
		if err := errors.Join(syscall.Setgroups([]int{user}), syscall.Setresgid(user, user, user), syscall.Setresuid(user, user, user)); err != nil {
			return fmt.Errorf("become another user: %w", err)
		}
	}
	if err := os.Chdir(p.Dir); err != nil {
		return err
	}
	return fmt.Errorf("exec %s: %w", p.Path, syscall.Exec(p.Path, p.Args, p.Env))
}

// enterUserNamespace runs the rest of the plan in a user namespace that maps every user to itself.
func (p plan) enterUserNamespace() error {
	p.InUserNamespace = true
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), stageEnv+"="+encode(p))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	const all = 1 << 16
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 unix.CLONE_NEWUSER,
		UidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: all}},
		GidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: all}},
		GidMappingsEnableSetgroups: true,
		Pdeathsig:                  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("a user namespace: %w", err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		for s := range signals {
			cmd.Process.Signal(s) // go ends its tests and then itself
		}
	}()
	err := cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		os.Exit(exit.ExitCode())
	}
	if err == nil {
		os.Exit(0)
	}
	return err
}

// mounts makes the machine's mounts, in its own mount namespace.
func (p plan) mounts() error {
	bind := func(from, to string, flags uintptr) error {
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", from, to, err)
		}
		if flags == 0 {
			return nil
		}
		return unix.Mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
	}
	if p.Row.Tun != "" {
		if err := os.MkdirAll("/dev/net", 0o755); err != nil {
			return err
		}
		if err := unix.Mount("none", "/dev/net", "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("mount a tmpfs at /dev/net: %w", err)
		}
	}
	if p.Row.Tun != "" && p.Row.Tun != "none" {
		var mode uint32
		if _, err := fmt.Sscanf(p.Row.Tun, "%o", &mode); err != nil {
			return err
		}
		const node = "/dev/net/tun"
		if err := unix.Mknod(node, unix.S_IFCHR|mode, int(unix.Mkdev(10, 200))); err != nil {
			return fmt.Errorf("make %s: %w", node, err)
		}
		if err := os.Chmod(node, os.FileMode(mode)); err != nil {
			return err
		}
	}
	for _, b := range p.Binds {
		if err := bind(b[0], b[1], unix.MS_RDONLY); err != nil {
			return err
		}
	}
	for file, other := range map[string]string{"/etc/passwd": p.Passwd, "/etc/group": p.Group} {
		if other == "" {
			continue
		}
		if err := bind(other, file, 0); err != nil {
			return err
		}
	}
	if p.Tmpfs != "" {
		if err := unix.Mount("none", p.Tmpfs, "tmpfs", 0, "mode=1777"); err != nil {
			return fmt.Errorf("mount a tmpfs at %s: %w", p.Tmpfs, err)
		}
	}
	return nil
}
