package guestimage

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"barevif/tools/cli"
	"barevif/tools/guestimage/guestinit"
)

// A debModules is a source of modules in packages. It reads a package from its beginning each time,
// because unpacking all of it would take a hundred times the space of what is wanted.
type debModules struct {
	ctx      context.Context
	packages []*debFile
	release  string // of the modules
	builtin  []byte
	objects  map[string][]byte // read ahead, by name with underscores
}

// release is how a kernel's release may look. It becomes part of paths and messages.
var releaseName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.+~_-]{0,63}$`)

// KernelOfPackages reads the kernel of packages: of one, or where the modules are in a package of
// their own, of both. likely are names of modules that will be asked for.
func KernelOfPackages(ctx context.Context, files, likely []string) (*Kernel, error) {
	src := &debModules{ctx: ctx, objects: map[string][]byte{}}
	for _, file := range files {
		d, err := openDeb(ctx, file)
		if err != nil {
			return nil, err
		}
		src.packages = append(src.packages, d)
	}
	k := &Kernel{Modules: src}
	for _, name := range likely {
		src.objects[guestinit.ModuleName(name)] = nil
	}
	for _, d := range src.packages {
		err := d.walk(ctx, d.data, func(name string, h *tar.Header, r io.Reader) error {
			return src.readAhead(k, name, h, r)
		})
		if err != nil {
			return nil, err
		}
	}
	if k.Image == nil {
		return nil, &cli.Advice{
			Err:  fmt.Errorf("no kernel, which is a file /boot/vmlinuz-*, is in %s", src.names()),
			Next: "give the package with a version in its name, such as linux-image-6.1.0-9-amd64; linux-image-amd64 only depends on it",
		}
	}
	if err := checkKernel(k.Image); err != nil {
		return nil, src.packages[0].damaged(fmt.Errorf("vmlinuz-%s: %w", k.Release, err))
	}
	if src.builtin == nil || src.release != k.Release {
		return nil, &cli.Advice{
			Err:  fmt.Errorf("no modules of kernel %s are in %s", k.Release, src.names()),
			Next: "give the package of its modules too, with another --deb",
		}
	}
	return k, nil
}

func (s *debModules) names() string {
	var names []string
	for _, d := range s.packages {
		names = append(names, d.Package)
	}
	return strings.Join(names, ", ")
}

// readAhead takes from one entry what belongs to the kernel.
func (s *debModules) readAhead(k *Kernel, name string, h *tar.Header, r io.Reader) (err error) {
	if release, ok := strings.CutPrefix(name, "boot/vmlinuz-"); ok {
		if k.Image != nil || !releaseName.MatchString(release) {
			return fmt.Errorf("%q: not the only kernel, or no name of one", name)
		}
		k.Release, k.Built = release, h.ModTime.UTC()
		k.Image, err = readEntry(h, r, maxKernel)
		return err
	}
	if path.Base(name) == "modules.builtin" && inModules(name) {
		s.release = path.Base(path.Dir(name))
		s.builtin, err = readEntry(h, r, maxList)
		return err
	}
	return s.readModule(name, h, r)
}

// readModule reads a module that is wanted: that has a place in objects which is nil.
func (s *debModules) readModule(name string, h *tar.Header, r io.Reader) (err error) {
	if !strings.Contains(path.Base(name), ".ko") || !inModules(name) {
		return nil
	}
	module := guestinit.ModuleName(name)
	if b, wanted := s.objects[module]; wanted && b == nil {
		s.objects[module], err = readEntry(h, r, maxModule)
	}
	return err
}

func inModules(name string) bool {
	return slices.ContainsFunc(moduleRoots[:], func(root string) bool { return strings.HasPrefix(name, root+"/") })
}

// Objects implements ModuleSource.
func (s *debModules) Objects(names []string) (map[string][]byte, error) {
	missing := false
	for _, name := range names {
		if s.objects[name] == nil {
			s.objects[name], missing = nil, true
		}
	}
	for _, d := range s.packages {
		if !missing {
			break
		}
		if err := d.walk(s.ctx, d.data, s.readModule); err != nil {
			return nil, err
		}
	}
	found := map[string][]byte{}
	for _, name := range names {
		if b := s.objects[name]; b != nil {
			found[name] = b
		}
	}
	return found, nil
}

// Builtin implements ModuleSource.
func (s *debModules) Builtin() ([]byte, error) { return s.builtin, nil }

// KernelOfFiles reads a kernel, and its modules from a directory such as /lib/modules/6.1.0-9-amd64.
func KernelOfFiles(image, modules string) (*Kernel, error) {
	info, err := os.Stat(image)
	if err == nil && info.Size() > maxKernel {
		err = fmt.Errorf("%s: %d bytes, and at most %d are plausible", image, info.Size(), maxKernel)
	}
	if err != nil {
		return nil, &cli.Advice{Err: err, Next: "name a kernel with --vmlinuz, such as /boot/vmlinuz-6.1.0-9-amd64"}
	}
	k := &Kernel{Built: info.ModTime().UTC(), Release: filepath.Base(filepath.Clean(modules))}
	if k.Image, err = os.ReadFile(image); err != nil {
		return nil, &cli.Advice{Err: err, Next: "kernels in /boot are for root to read: copy it, or use --deb", Refused: true}
	}
	if err := checkKernel(k.Image); err != nil {
		return nil, &cli.Advice{Err: fmt.Errorf("%s: %w", image, err), Next: "name another kernel with --vmlinuz"}
	}
	if _, err := os.Stat(filepath.Join(modules, "modules.builtin")); err != nil || !releaseName.MatchString(k.Release) {
		return nil, &cli.Advice{
			Err:  errors.Join(fmt.Errorf("%q is no directory of a kernel's modules", modules), err),
			Next: "name it with --modules, by the kernel's release, such as /lib/modules/6.1.0-9-amd64",
		}
	}
	k.Modules, err = OpenModules(modules)
	return k, err
}

// kernelPackage is the package of Debian that depends on the newest kernel.
const kernelPackage = "linux-image-amd64"

// FetchKernel brings the package of the newest kernel that apt knows into a directory and
// returns its path. Without a network it returns the newest one that is there, and says so.
func FetchKernel(ctx context.Context, dir string, say func(format string, args ...any)) (string, error) {
	file, err := fetchKernel(ctx, dir, say)
	if err == nil || ctx.Err() != nil {
		return file, err
	}
	if old := newestKernel(dir); old != "" {
		say("no newer kernel than %s, which is here: %v", filepath.Base(old), err)
		return old, nil
	}
	return "", &cli.Advice{
		Err:  fmt.Errorf("no kernel: %w", err),
		Next: `as root, "apt-get update" gives apt its index; or give a kernel with --deb FILE, or with --vmlinuz FILE and --modules DIR`,
	}
}

func fetchKernel(ctx context.Context, dir string, say func(format string, args ...any)) (string, error) {
	name, err := Versioned(ctx, kernelPackage, "linux-image-")
	if err != nil {
		return "", err
	}
	packages, err := Resolve(ctx, name)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	file := filepath.Join(dir, packages[0].File)
	if !packages[0].verify(dir) {
		say("fetching %s to %s", packages[0].File, dir)
	}
	return file, Download(ctx, dir, packages[:1])
}

// newestKernel returns the package of a kernel in a directory that was fetched last, or "".
func newestKernel(dir string) (newest string) {
	files, _ := filepath.Glob(filepath.Join(dir, "linux-image-*_amd64.deb")) // the pattern is correct
	var last int64
	for _, file := range files {
		if info, err := os.Stat(file); err == nil && info.ModTime().UnixNano() > last {
			newest, last = file, info.ModTime().UnixNano()
		}
	}
	return newest
}
