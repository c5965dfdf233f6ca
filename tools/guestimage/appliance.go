package guestimage

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"barevif/tools/cli"
	"barevif/tools/guestimage/guestinit"
)

// BaseModules are those that an image has unless it is to be without them: the devices through which a program
// reaches Xen, and TAPs.
// xen-netfront is not among them, because it would take every vif.
var BaseModules = []string{"xen-evtchn", "xen-gntalloc", "xen-gntdev", "xen-privcmd", "xenfs", "tun"}

const netfront = "xen_netfront"

// Config describes an image.
type Config struct {
	Program Program
	Args    []string // of the program
	Env     []string // of the program, NAME=value
	Out     string   // directory, made if necessary

	// Where the kernel comes from: Packages, or Vmlinuz and ModuleDir, or, if neither is
	// given, the package that apt would fetch, which is kept in Cache; "": in [CacheDir].
	Packages           []string
	Vmlinuz, ModuleDir string
	Cache              string

	Modules      []string // to load, beside BaseModules
	Without      []string // of BaseModules, not to have
	Files        []string // HOST:GUEST; a directory with all that is in it
	Uncompressed bool     // starts sooner, and takes more space

	// For xl's configuration. Kernel, Ramdisk, Type and Program are filled in, and the zero
	// values of Name and Memory are the program's name, and enough.
	Domain Domain
	Dir    string             // of the files in dom0; "": Out
	Params guestinit.Settings // Hostname, Restart, Stop and Grants; the zero values are not written

	Say func(format string, args ...any) // gets the progress; nil: silent
}

// A Result describes the files of an image.
type Result struct {
	Kernel, Initramfs int64 // bytes of the files
	Unpacked          int64 // bytes of the initramfs in the guest
	Program           int64 // bytes
	Release           string
	Modules           []string
	Memory            int // MiB
}

// Names of the files in Config.Out.
const (
	kernelFile    = "kernel"
	initramfsFile = "initramfs"
)

// configFiles are the names of the configurations.
var configFiles = map[GuestType]string{PVH: "xl.cfg", PV: "xl-pv.cfg"}

// Build makes an image. It replaces the files of an older one at its end, each as a whole.
func Build(ctx context.Context, cfg Config) (*Result, error) {
	if cfg.Say == nil {
		cfg.Say = func(string, ...any) {}
	}
	program, err := guestinit.Format(cfg.Env, cfg.Args)
	if err != nil {
		return nil, &cli.Advice{Err: err, Next: `put what is long or has lines into a file of the image: --file HOST:GUEST`, Usage: true}
	}
	cfg.Domain.Program = program
	if err := cfg.checkWithout(); err != nil {
		return nil, err
	}
	more, err := hostFiles(cfg.Files)
	if err != nil {
		return nil, err
	}
	work, err := workDir(cfg.Out)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	cfg.Say("building %s", cfg.Program.Package)
	file, err := cfg.Program.build(ctx, work)
	if err != nil {
		return nil, err
	}
	if err := buildInit(ctx, filepath.Join(work, ".init")); err != nil {
		return nil, err
	}
	kernel, err := cfg.kernel(ctx)
	if err != nil {
		return nil, err
	}
	modules, err := cfg.modules(kernel)
	if err != nil {
		return nil, err
	}
	tree, err := cfg.tree(kernel, modules, file, filepath.Join(work, ".init"), more)
	if err != nil {
		return nil, err
	}
	r := &Result{Release: kernel.Release, Modules: modules.Names(), Program: fileSize(file)}
	files, err := cfg.files(r, kernel, tree, filepath.Base(file))
	if err != nil {
		return nil, err
	}
	return r, replace(cfg.Out, work, files)
}

// workDir makes the output directory, and one in it for files in the making.
func workDir(out string) (string, error) {
	err := os.MkdirAll(out, 0o755)
	if err == nil {
		var dir string
		if dir, err = os.MkdirTemp(out, ".image-"); err == nil {
			return dir, nil
		}
	}
	next := "name another directory with --out"
	if errors.Is(err, fs.ErrPermission) {
		next += ", one that you may write to"
	}
	return "", &cli.Advice{Err: fmt.Errorf("the image cannot be written: %w", err), Next: next, Refused: errors.Is(err, fs.ErrPermission)}
}

func fileSize(name string) int64 {
	info, err := os.Stat(name)
	if err != nil {
		return 0 // for a message only
	}
	return info.Size()
}

// kernel finds the kernel.
func (cfg *Config) kernel(ctx context.Context) (*Kernel, error) {
	if cfg.Vmlinuz != "" || cfg.ModuleDir != "" {
		return KernelOfFiles(cfg.Vmlinuz, cfg.ModuleDir)
	}
	packages := cfg.Packages
	if len(packages) == 0 {
		cache := cfg.Cache
		if cache == "" {
			var err error
			if cache, err = CacheDir(); err != nil {
				return nil, &cli.Advice{Err: fmt.Errorf("no folder for a fetched kernel: %w", err), Next: "set BAREVIF_CACHE to a directory, or give a kernel with --deb FILE, or with --vmlinuz FILE and --modules DIR"}
			}
		}
		file, err := FetchKernel(ctx, cache, cfg.Say)
		if err != nil {
			return nil, err
		}
		packages = []string{file}
	}
	cfg.Say("reading %s", strings.Join(packages, ", "))
	return KernelOfPackages(ctx, packages, cfg.moduleNames())
}

// moduleNames returns the modules to load.
func (cfg *Config) moduleNames() []string {
	base := slices.DeleteFunc(slices.Clone(BaseModules), func(name string) bool { return among(cfg.Without, name) })
	return slices.Concat(base, cfg.Modules)
}

// among reports whether a list has a module, whichever way its name is spelled.
func among(list []string, name string) bool {
	return slices.ContainsFunc(list, func(o string) bool { return guestinit.ModuleName(o) == guestinit.ModuleName(name) })
}

// checkWithout refuses what an image cannot be without because it never has it.
func (cfg *Config) checkWithout() error {
	for _, name := range cfg.Without {
		if !among(BaseModules, name) {
			return &cli.Advice{Err: fmt.Errorf("an image has no module %s to leave out", name), Next: "leave out any of " + strings.Join(BaseModules, ", "), Usage: true}
		}
	}
	if cfg.Params.Grants != 0 && among(cfg.Without, "xen-gntalloc") {
		return &cli.Advice{Err: errors.New("pages cannot be granted without xen-gntalloc"), Next: "leave out the number of pages to grant, or keep the module", Usage: true}
	}
	return nil
}

// modules collects the modules, and refuses a kernel that would keep the vif from the program.
func (cfg *Config) modules(k *Kernel) (*Modules, error) {
	m, err := CollectModules(k.Modules, cfg.moduleNames()...)
	if err != nil {
		return nil, &cli.Advice{Err: fmt.Errorf("kernel %s: %w", k.Release, err), Next: "give a kernel for guests of Xen, as Debian's is, with the modules named"}
	}
	if _, has := m.infos[netfront]; has || m.isBuiltin(netfront) {
		return nil, &cli.Advice{
			Err:  errors.New("xen-netfront would take the vif, which belongs to the program"),
			Next: "leave it out; a kernel that has it built in cannot be used",
		}
	}
	for _, name := range cfg.Without {
		name = guestinit.ModuleName(name)
		if m.isBuiltin(name) {
			return nil, &cli.Advice{Err: fmt.Errorf("kernel %s has %s built in", k.Release, name), Next: "do not ask for an image without it"}
		}
		for other, info := range m.infos {
			if slices.Contains(info.depends, name) {
				return nil, &cli.Advice{Err: fmt.Errorf("the image cannot be without %s: %s needs it", name, other), Next: "leave that out, too"}
			}
		}
		if _, has := m.infos[name]; has {
			return nil, &cli.Advice{Err: fmt.Errorf("%s is asked for and to be left out", name), Next: "say one of the two", Usage: true}
		}
	}
	return m, nil
}

// tree returns the initramfs, with more in it.
func (cfg *Config) tree(k *Kernel, m *Modules, program, init string, more []hostFile) (*Tree, error) {
	t := NewTree()
	for _, dir := range guestinit.MountPoints {
		t.Dir(dir, 0o755)
	}
	t.File("/init", 0o755, init)
	for _, name := range [...]string{"poweroff", "reboot"} { // the paths that the kernel runs for the toolstack's requests
		t.Link("/sbin/"+name, "/init")
	}
	m.Install(t, guestinit.ModuleDir)
	at := guestinit.ProgramDir + "/" + filepath.Base(program)
	t.File(at, 0o755, program)
	img := guestinit.Image{
		Program: at, Kernel: k.Release, Modules: m.LoadOrder(cfg.moduleNames()...), Without: cfg.Without, Built: k.Built,
	}
	text, err := img.Format()
	if err != nil {
		return nil, err
	}
	t.Data(guestinit.ImageFile, 0o644, []byte(text))
	if err := addFiles(t, more); err != nil {
		return nil, err
	}
	for name, text := range replaceable {
		if !t.Has(name) {
			t.Data(name, 0o644, []byte(text))
		}
	}
	return t, nil
}

// replaceable are the files that an image has unless the caller has others.
var replaceable = map[string]string{
	"/etc/passwd": "root:x:0:0:root:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n",
	"/etc/group":  "root:x:0:\nnogroup:x:65534:\n",
	"/etc/hosts":  "127.0.0.1 localhost\n::1 localhost\n",
}

// files returns the contents of the output files, by name.
func (cfg *Config) files(r *Result, k *Kernel, t *Tree, program string) (map[string][]byte, error) {
	var archive bytes.Buffer
	if err := t.Write(&archive); err != nil {
		return nil, err
	}
	r.Unpacked = int64(archive.Len())
	files := map[string][]byte{kernelFile: k.Image, initramfsFile: archive.Bytes()}
	if cfg.Uncompressed {
		if !bytes.HasPrefix(k.Image, []byte(elf.ELFMAG)) {
			b, err := vmlinux(k.Image)
			if err != nil {
				return nil, fmt.Errorf("kernel %s: %w", k.Release, err)
			}
			if err := checkELF(b); err != nil {
				return nil, fmt.Errorf("kernel %s: %w", k.Release, err)
			}
			files[kernelFile] = b
		}
	} else {
		b, err := packGzip(archive.Bytes())
		if err != nil {
			return nil, err
		}
		files[initramfsFile] = b
	}
	r.Kernel, r.Initramfs = int64(len(files[kernelFile])), int64(len(files[initramfsFile]))
	return files, cfg.addConfigs(files, r, program)
}

// packGzip compresses b. The header has no name and no time.
func packGzip(b []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// Memory of a guest, in MiB: what the kernel and an ordinary program take, and the step to which it is rounded.
// While it starts, the guest has its initramfs twice.
const (
	baseMemory = 128
	memoryStep = 16
)

// addConfigs adds the configurations for xl.
func (cfg *Config) addConfigs(files map[string][]byte, r *Result, program string) error {
	d := cfg.Domain
	if d.Name == "" {
		d.Name = program
	}
	need := baseMemory + 2*int(r.Unpacked>>20)
	enough := (need + memoryStep - 1) / memoryStep * memoryStep
	switch least := int((2*r.Unpacked + 1<<20 - 1) >> 20); { // its root, a tmpfs, holds half of its memory
	case d.Memory == 0:
		d.Memory = enough
	case d.Memory < least:
		return &cli.Advice{
			Err:  fmt.Errorf("--memory %d: the initramfs has %s, for which the guest needs %d MiB", d.Memory, cli.BinarySize(uint64(r.Unpacked)), least),
			Next: fmt.Sprintf("leave --memory out, which gives the guest %d, or add fewer files", enough), Usage: true,
		}
	}
	d.VCPUs = max(1, d.VCPUs)
	r.Memory = d.Memory
	dir := cfg.Dir
	if dir == "" {
		var err error
		if dir, err = filepath.Abs(cfg.Out); err != nil {
			return err
		}
	}
	d.Kernel, d.Ramdisk = path.Join(dir, kernelFile), path.Join(dir, initramfsFile)
	d.Linux = slices.Concat(d.Linux, params(cfg.Params))
	for kind, name := range configFiles {
		d.Type = kind
		text, err := d.Config()
		if err != nil {
			return &cli.Advice{Err: err, Usage: true}
		}
		files[name] = []byte(text)
	}
	return nil
}

// params returns the parameters of process 1 for the kernel's command line.
func params(s guestinit.Settings) (words []string) {
	if s.Hostname != "" {
		words = append(words, "barevif.hostname="+s.Hostname)
	}
	if s.Restart != "" {
		words = append(words, "barevif.restart="+string(s.Restart))
	}
	if s.Stop != 0 {
		words = append(words, "barevif.stop="+s.Stop.String())
	}
	if s.Grants != 0 {
		words = append(words, fmt.Sprintf("barevif.grants=%d", s.Grants))
	}
	return words
}

// replace writes the files and gives each its name as a whole.
func replace(out, work string, files map[string][]byte) error {
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(work, name+".new"), b, 0o644); err != nil {
			return err
		}
	}
	for name := range files {
		if err := os.Rename(filepath.Join(work, name+".new"), filepath.Join(out, name)); err != nil {
			return err
		}
	}
	return nil
}
