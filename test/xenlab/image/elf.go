package image

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// libraryDirs is where Debian's packages keep shared objects.
var libraryDirs = [...]string{
	"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64",
}

// libraries adds the shared objects that file needs, directly or indirectly, to found, by name.
func libraries(root, file string, found map[string]string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	defer f.Close()
	names, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, name := range names {
		if found[name] != "" {
			continue
		}
		lib, err := findLibrary(root, name)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		found[name] = lib
		if err := libraries(root, lib, found); err != nil {
			return err
		}
	}
	return nil
}

func findLibrary(root, name string) (string, error) {
	for _, dir := range libraryDirs {
		file := filepath.Join(root, dir, name)
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s is in none of the packages", name)
}

// modules are the kernel modules of one kernel, by name with underscores.
type modules struct {
	dir   string // of modules.builtin and kernel/
	files map[string]string
}

func findModules(root, version string) (*modules, error) {
	for _, lib := range []string{"lib", "usr/lib"} {
		dir := filepath.Join(root, lib, "modules", version)
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		m := &modules{dir: dir, files: map[string]string{}}
		err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
			if base, _, ok := strings.Cut(d.Name(), ".ko"); ok && err == nil {
				m.files[moduleName(base)] = file
			}
			return err
		})
		return m, err
	}
	return nil, fmt.Errorf("no modules of kernel %s in the packages", version)
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// install puts the named modules into the tree, uncompressed, with their dependencies and the
// two indexes that modprobe reads. It replaces depmod.
func (m *modules) install(t *tree, version string, names ...string) error {
	dst := "/lib/modules/" + version
	builtin, err := os.ReadFile(filepath.Join(m.dir, "modules.builtin"))
	if err != nil {
		return err
	}
	t.data(dst+"/modules.builtin", 0o644, builtin)

	infos := map[string]moduleInfo{}
	for _, name := range names {
		if strings.Contains(moduleName(string(builtin)), "/"+moduleName(name)+".ko\n") {
			continue
		}
		if err := m.load(moduleName(name), infos); err != nil {
			return err
		}
	}
	var dep, alias strings.Builder
	loaded := make([]string, 0, len(infos))
	for name := range infos {
		loaded = append(loaded, name)
	}
	slices.Sort(loaded)
	for _, name := range loaded {
		info := infos[name]
		t.data(dst+"/"+name+".ko", 0o644, info.object)
		fmt.Fprintf(&dep, "%s.ko:", name)
		for _, d := range closure(name, infos) {
			fmt.Fprintf(&dep, " %s.ko", d)
		}
		dep.WriteByte('\n')
		for _, a := range info.aliases {
			fmt.Fprintf(&alias, "alias %s %s\n", a, name)
		}
	}
	t.data(dst+"/modules.dep", 0o644, []byte(dep.String()))
	t.data(dst+"/modules.alias", 0o644, []byte(alias.String()))
	return nil
}

type moduleInfo struct {
	object  []byte
	depends []string
	aliases []string
}

func (m *modules) load(name string, infos map[string]moduleInfo) error {
	if _, ok := infos[name]; ok {
		return nil
	}
	file := m.files[name]
	if file == "" {
		return fmt.Errorf("the kernel has no module %s", name)
	}
	object, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(object, []byte("\x7fELF")) {
		if object, err = inflate(object); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	info, err := readModinfo(object)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	infos[name] = info
	for _, d := range info.depends {
		if err := m.load(d, infos); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// readModinfo reads the section that modinfo prints: NUL-terminated key=value pairs.
func readModinfo(object []byte) (moduleInfo, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return moduleInfo{}, err
	}
	section := f.Section(".modinfo")
	if section == nil {
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
					info.depends = append(info.depends, moduleName(d))
				}
			}
		case "alias":
			info.aliases = append(info.aliases, value)
		}
	}
	return info, nil
}

// closure lists the modules that name needs, each one before its own dependencies: modprobe
// loads the list from its end.
func closure(name string, infos map[string]moduleInfo) []string {
	var order []string
	var visit func(string)
	visit = func(n string) {
		for _, d := range infos[n].depends {
			if !slices.Contains(order, d) {
				visit(d)
				order = append(order, d)
			}
		}
	}
	visit(name)
	slices.Reverse(order)
	return order
}
