package guestimage

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"barevif/tools/guestimage/guestinit"
)

// A ModuleSource has the modules of one kernel.
type ModuleSource interface {
	// Objects returns the files of the named modules, maybe compressed, by name with
	// underscores. Those that do not exist are missing.
	Objects(names []string) (map[string][]byte, error)
	// Builtin returns the list of modules that the kernel has in itself, modules.builtin.
	Builtin() ([]byte, error)
}

// A moduleDir is a source in a directory, such as /lib/modules/6.1.0-9-amd64.
type moduleDir struct {
	dir   string
	files map[string]string // by name with underscores
}

// OpenModules returns the modules in a directory.
func OpenModules(dir string) (ModuleSource, error) {
	m := &moduleDir{dir: dir, files: map[string]string{}}
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if isModule(d, file) && err == nil {
			m.files[guestinit.ModuleName(file)] = file
		}
		return err
	})
	return m, err
}

func isModule(d fs.DirEntry, file string) bool {
	return d != nil && !d.IsDir() && strings.Contains(path.Base(file), ".ko")
}

// FindModules returns the modules of a kernel below the root of unpacked packages.
func FindModules(root, release string) (ModuleSource, error) {
	for _, lib := range moduleRoots {
		dir := filepath.Join(root, lib, release)
		if _, err := os.Stat(dir); err == nil {
			return OpenModules(dir)
		}
	}
	return nil, fmt.Errorf("no modules of kernel %s in the packages", release)
}

// moduleRoots are where packages have their modules.
var moduleRoots = [...]string{"lib/modules", "usr/lib/modules"}

func (m *moduleDir) Objects(names []string) (map[string][]byte, error) {
	objects := map[string][]byte{}
	for _, name := range names {
		file := m.files[name]
		if file == "" {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		objects[name] = b
	}
	return objects, nil
}

func (m *moduleDir) Builtin() ([]byte, error) {
	return os.ReadFile(filepath.Join(m.dir, "modules.builtin"))
}

// Modules are modules that need no others.
type Modules struct {
	infos   map[string]moduleInfo
	builtin []byte
}

type moduleInfo struct {
	object  []byte
	depends []string
	aliases []string
}

// CollectModules reads the named modules and all that they need. It leaves out those that the
// kernel has in itself.
func CollectModules(src ModuleSource, names ...string) (*Modules, error) {
	builtin, err := src.Builtin()
	if err != nil {
		return nil, err
	}
	m := &Modules{infos: map[string]moduleInfo{}, builtin: builtin}
	missing := make([]string, 0, len(names))
	for _, name := range names {
		if name = guestinit.ModuleName(name); !m.isBuiltin(name) && !slices.Contains(missing, name) {
			missing = append(missing, name)
		}
	}
	wantedBy := map[string]string{}
	for len(missing) > 0 {
		objects, err := src.Objects(missing)
		if err != nil {
			return nil, err
		}
		var next []string
		for _, name := range missing {
			info, err := readModule(name, objects[name])
			if err != nil && wantedBy[name] != "" {
				err = fmt.Errorf("%s: %w", wantedBy[name], err)
			}
			if err != nil {
				return nil, err
			}
			m.infos[name] = info
			for _, d := range info.depends {
				if _, have := m.infos[d]; !have && !slices.Contains(missing, d) && !slices.Contains(next, d) && !m.isBuiltin(d) {
					next = append(next, d)
					wantedBy[d] = name
				}
			}
		}
		missing = next
	}
	return m, nil
}

func (m *Modules) isBuiltin(name string) bool {
	for file := range strings.Lines(string(m.builtin)) {
		if guestinit.ModuleName(strings.TrimSpace(file)) == name {
			return true
		}
	}
	return false
}

// Names returns the modules' names, sorted.
func (m *Modules) Names() []string {
	names := make([]string, 0, len(m.infos))
	for name := range m.infos {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Install puts the modules into a directory of a tree, uncompressed.
func (m *Modules) Install(t *Tree, dir string) {
	for name, info := range m.infos {
		t.Data(dir+"/"+name+".ko", 0o644, info.object)
	}
}

// Index puts the indexes that modprobe reads into a directory of a tree, where Install has put the
// modules. It replaces depmod.
func (m *Modules) Index(t *Tree, dir string) {
	t.Data(dir+"/modules.builtin", 0o644, m.builtin)
	var dep, alias strings.Builder
	for _, name := range m.Names() {
		info := m.infos[name]
		fmt.Fprintf(&dep, "%s.ko:", name)
		for _, d := range closure(name, m.infos) {
			fmt.Fprintf(&dep, " %s.ko", d)
		}
		dep.WriteByte('\n')
		for _, a := range info.aliases {
			fmt.Fprintf(&alias, "alias %s %s\n", a, name)
		}
	}
	t.Data(dir+"/modules.dep", 0o644, []byte(dep.String()))
	t.Data(dir+"/modules.alias", 0o644, []byte(alias.String()))
}

func readModule(name string, object []byte) (moduleInfo, error) {
	if object == nil {
		return moduleInfo{}, fmt.Errorf("the kernel has no module %s", name)
	}
	if !bytes.HasPrefix(object, []byte(elf.ELFMAG)) {
		var err error
		if object, err = inflate(object, maxModule); err != nil {
			return moduleInfo{}, fmt.Errorf("module %s: %w", name, err)
		}
	}
	info, err := readModinfo(object)
	if err != nil {
		return moduleInfo{}, fmt.Errorf("module %s: %w", name, err)
	}
	return info, nil
}

// readModinfo reads the section that modinfo prints: NUL-terminated key=value pairs.
func readModinfo(object []byte) (moduleInfo, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return moduleInfo{}, err
	}
	if f.Machine != elf.EM_X86_64 {
		return moduleInfo{}, fmt.Errorf("made for %v, and images are for amd64", f.Machine)
	}
	section := f.Section(".modinfo")
	if section == nil || section.Type == elf.SHT_NOBITS {
		return moduleInfo{}, errors.New("no .modinfo: not a kernel module")
	}
	b, err := section.Data()
	if err != nil {
		return moduleInfo{}, err
	}
	info := moduleInfo{object: object}
	for line := range strings.SplitSeq(string(b), "\x00") {
		switch key, value, _ := strings.Cut(line, "="); key {
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					info.depends = append(info.depends, guestinit.ModuleName(d))
				}
			}
		case "alias":
			info.aliases = append(info.aliases, value)
		}
	}
	return info, nil
}

// LoadOrder returns the files of the named modules and of those that they need, as [Modules.Install]
// names them: each after those that it needs. Modules that the kernel has in itself have none.
func (m *Modules) LoadOrder(names ...string) []string {
	var files []string
	for _, name := range names {
		name = guestinit.ModuleName(name)
		if _, have := m.infos[name]; !have {
			continue
		}
		needed := closure(name, m.infos)
		slices.Reverse(needed)
		for _, n := range append(needed, name) {
			if file := n + ".ko"; !slices.Contains(files, file) {
				files = append(files, file)
			}
		}
	}
	return files
}

// closure lists the modules that name needs, each one before its own dependencies: modprobe
// loads the list from its end. Those that the kernel has in itself are not among them.
func closure(name string, infos map[string]moduleInfo) []string {
	var order []string
	begun := map[string]bool{name: true}
	var visit func(string)
	visit = func(n string) {
		for _, d := range infos[n].depends {
			if _, have := infos[d]; have && !begun[d] {
				begun[d] = true
				visit(d)
				order = append(order, d)
			}
		}
	}
	visit(name)
	slices.Reverse(order)
	return order
}
