package guestinit

import (
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
)

// Paths in the guest.
const (
	ImageFile  = "/etc/barevif/image.json"
	ModuleDir  = "/lib/modules/barevif" // of the modules and modules.dep
	ProgramDir = "/app"
)

// MountPoints are the directories on which process 1 mounts file systems. What an image has below
// them is not seen in the guest.
var MountPoints = [...]string{"/proc", "/sys", "/dev", "/run", "/tmp"}

// An Image is what the builder tells process 1 about the image, in ImageFile.
type Image struct {
	Program string    // its path
	Kernel  string    // the release that the modules belong to
	Modules []string  // to load, by name
	Without []string  // modules that the image was to be without: what they make is not missed
	Built   time.Time // of the kernel: the clock of a running guest is not before that
}

// has reports whether a module is not among those that the image was to be without.
func (img *Image) has(module string) bool {
	return !slices.ContainsFunc(img.Without, func(o string) bool { return ModuleName(o) == ModuleName(module) })
}

func parseImage(b []byte) (Image, error) {
	var img Image
	if err := json.Unmarshal(b, &img); err != nil {
		return img, fmt.Errorf("%s: %w", ImageFile, err)
	}
	if !path.IsAbs(img.Program) {
		return img, fmt.Errorf("%s names no program", ImageFile)
	}
	return img, nil
}

// loadOrder returns the files to load for the named modules: each after those that it needs, and
// none twice. dep is a modules.dep, a line "FILE: NEEDED..." for each module, in which the
// needed ones are in any order.
func loadOrder(dep string, names []string) (files []string, err error) {
	needs := map[string][]string{}
	byName := map[string]string{}
	for line := range strings.Lines(dep) {
		file, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		needs[file] = strings.Fields(rest)
		byName[ModuleName(file)] = file
	}
	begun := map[string]bool{} // also keeps a circle from being followed for ever
	var visit func(file string)
	visit = func(file string) {
		if begun[file] {
			return
		}
		begun[file] = true
		for _, n := range needs[file] {
			visit(n)
		}
		files = append(files, file)
	}
	for _, name := range names {
		file, ok := byName[ModuleName(name)]
		if !ok {
			err = fmt.Errorf("the image has no module %s", name)
			continue
		}
		visit(file)
	}
	return files, err
}

// ModuleName returns the name by which the kernel knows the module in a file, or of a name with
// dashes.
func ModuleName(file string) string {
	base, _, _ := strings.Cut(path.Base(file), ".")
	return strings.ReplaceAll(base, "-", "_")
}
