package guestimage

import (
	"bytes"
	"context"
	"debug/elf"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"barevif/tools/cli"
)

// A Program is the Go program of an image.
type Program struct {
	Package string // the argument of go build; or a program that is built already
	Tags    string // of go build
	LDFlags string // of go build, beside our own

	in string // the directory in which Package is "."; "": the current one, from which Package leads
}

// packageArg returns the package as the go command takes it in p.in.
func (p Program) packageArg() string {
	if p.in != "" {
		return "."
	}
	return p.Package
}

// target is what images run on, whatever this machine is.
var target = []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64"}

// build makes the program, or copies the one that is there, to a file in dir that has the program's name.
func (p Program) build(ctx context.Context, dir string) (file string, err error) {
	if info, err := os.Stat(p.Package); err == nil && info.Mode().IsRegular() && !strings.HasSuffix(p.Package, ".go") {
		return p.copy(dir)
	}
	if _, err := exec.LookPath("go"); err != nil {
		return "", &cli.Advice{Err: errors.New("the go command is not installed"), Next: "install Go, or give a program that is built already"}
	}
	name, err := p.list(ctx)
	if info, serr := os.Stat(p.Package); err != nil && serr == nil && info.IsDir() {
		there := p // it may belong to another module than the current directory, or this one to none
		there.in = p.Package
		if n, lerr := there.list(ctx); lerr == nil {
			p, name, err = there, n, nil
		}
	}
	if err != nil {
		return "", err
	}
	if file, err = filepath.Abs(filepath.Join(dir, name)); err != nil {
		return "", err
	}
	args := []string{"build", "-trimpath", "-buildvcs=false", "-tags=" + p.Tags, "-ldflags=" + strings.TrimSpace("-s -w -buildid= "+p.LDFlags), "-o", file, "--", p.packageArg()}
	if _, err := runGo(ctx, p.in, target, args...); err != nil {
		return "", p.explain(ctx, err)
	}
	return file, p.check(file)
}

// list checks that the argument is one main package and returns the name of its program.
func (p Program) list(ctx context.Context) (string, error) {
	out, err := runGo(ctx, p.in, target, "list", "-tags="+p.Tags, "-f", "{{.Name}}\t{{.ImportPath}}", "--", p.packageArg())
	if err != nil {
		return "", p.explain(ctx, err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 1 || lines[0] == "" {
		return "", &cli.Advice{Err: fmt.Errorf("%q: %d packages, and an image has one program", p.Package, len(lines)), Next: "name one main package", Usage: true}
	}
	f := strings.Split(lines[0], "\t")
	if len(f) != 2 || f[0] != "main" {
		return "", &cli.Advice{Err: fmt.Errorf("%q: package %s is no program: an image runs a package main", p.Package, f[0]), Next: `name the directory of the program's "package main"`, Usage: true}
	}
	if strings.HasSuffix(f[1], "command-line-arguments") {
		return strings.TrimSuffix(filepath.Base(p.Package), ".go"), nil
	}
	return programName(f[1]), nil
}

// programName returns the name that the go command gives the program of a package: that of
// example.org/web/v2 is web. It is not asked for its .Target, which is empty where it would install
// nothing: without a HOME, and with a GOBIN on a machine that is not amd64.
func programName(pkg string) string {
	if dir, version := path.Split(pkg); dir != "" && majorVersion.MatchString(version) {
		return path.Base(dir)
	}
	return path.Base(pkg)
}

// majorVersion is the last element of the path of a module's second and further major versions.
var majorVersion = regexp.MustCompile(`^v([2-9]|[1-9][0-9]+)$`)

// explain adds to an error of the go command the packages that need cgo, if that is the cause.
func (p Program) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	out, lerr := runGo(ctx, p.in, []string{"CGO_ENABLED=1", "GOOS=linux", "GOARCH=amd64"}, "list", "-e", "-deps", "-tags="+p.Tags, "-f", "{{if and .CgoFiles (not .Standard)}}{{.ImportPath}}{{end}}", "--", p.packageArg())
	if cgo := strings.Fields(out); lerr == nil && len(cgo) > 0 && ctx.Err() == nil {
		return &cli.Advice{
			Err:  fmt.Errorf("%q needs cgo, in %s, and an image has no C library: %w", p.Package, strings.Join(cgo, ", "), err),
			Next: "use a package in pure Go instead, or a build tag that leaves cgo out (--tags)",
		}
	}
	return &cli.Advice{Err: fmt.Errorf("%q cannot be built: %w", p.Package, err), Next: `"CGO_ENABLED=0 go build" in its directory says the same`}
}

// copy copies a program that is built already.
func (p Program) copy(dir string) (string, error) {
	b, err := os.ReadFile(p.Package)
	if err != nil {
		return "", &cli.Advice{Err: err, Next: "name a package of Go, or a program"}
	}
	file := filepath.Join(dir, filepath.Base(p.Package))
	if err := os.WriteFile(file, b, 0o755); err != nil {
		return "", err
	}
	return file, p.check(file)
}

// check checks that a program runs in a guest that has no other file.
func (p Program) check(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	refused := func(err error) error {
		return &cli.Advice{Err: fmt.Errorf("%q: %w", p.Package, err), Next: "give a main package of Go, or a program that was built with CGO_ENABLED=0 GOOS=linux GOARCH=amd64"}
	}
	if !bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		return refused(errors.New("no program of Linux"))
	}
	if err := checkELF(b); err != nil {
		return refused(err)
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return refused(err)
	}
	for _, prog := range f.Progs {
		if prog.Type == elf.PT_INTERP {
			return refused(errors.New("it needs shared libraries, which an image does not have"))
		}
	}
	return nil
}

// runGo runs the go command, and returns its standard output. The go command removes nothing when it is
// interrupted, so its temporary files are in a directory of ours.
func runGo(ctx context.Context, dir string, env []string, args ...string) (string, error) {
	work, err := os.MkdirTemp(os.Getenv("GOTMPDIR"), "barevif-go")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	cmd := command(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), env...), "GOTMPDIR="+work)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return "", fmt.Errorf("go %s: %w", args[0], context.Cause(ctx))
	}
	if err != nil {
		said := bytes.TrimSpace(stderr.Bytes())
		return "", fmt.Errorf("go %s: %w\n%s", args[0], err, said[:min(len(said), 2000)])
	}
	return string(out), nil
}

// initSource is process 1. It is built from here, so that the command works outside a clone, without a
// network and with any module's go.mod.
//
//go:embed guestinit/*.go
var initSource embed.FS

// initMain is the command around the package.
const initMain = "// Init is process 1 of an image of barevif.\npackage main\n\nimport \"init/guestinit\"\n\nfunc main() { guestinit.Main() }\n"

// buildInit builds process 1 into a file.
func buildInit(ctx context.Context, file string) error {
	dir, err := os.MkdirTemp("", "barevif-init")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Mkdir(filepath.Join(dir, "guestinit"), 0o755); err != nil {
		return err
	}
	files := map[string][]byte{"go.mod": []byte("module init\n\ngo 1.26.0\n"), "main.go": []byte(initMain)}
	names, err := fs.Glob(initSource, "guestinit/*.go")
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		if files[name], err = initSource.ReadFile(name); err != nil {
			return err
		}
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			return err
		}
	}
	env := append([]string{"GOFLAGS=", "GOWORK=off", "GO111MODULE=on", "GOPROXY=off", "GOTOOLCHAIN=local"}, target...)
	_, err = runGo(ctx, dir, env, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", file, ".")
	if err != nil {
		return fmt.Errorf("process 1 of the image: %w", err)
	}
	return nil
}
