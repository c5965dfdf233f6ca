package guestinit

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Paths in the guest.
const (
	ImageFile  = "/etc/barevif/image"
	ModuleDir  = "/lib/modules/barevif"
	ProgramDir = "/app"
)

// MountPoints are the directories on which process 1 mounts file systems. What an image has below
// them is not seen in the guest.
var MountPoints = [...]string{"/proc", "/sys", "/dev", "/run", "/tmp"}

// An Image is what the builder tells process 1 about the image, in ImageFile.
type Image struct {
	Program string    // its path
	Kernel  string    // the release that the modules belong to
	Modules []string  // files in ModuleDir to load, in this order
	Without []string  // modules that the image was to be without: what they make is not missed
	Built   time.Time // of the kernel: the clock of a running guest is not before that
}

// has reports whether a module is not among those that the image was to be without.
func (img *Image) has(module string) bool {
	return !slices.ContainsFunc(img.Without, func(o string) bool { return ModuleName(o) == ModuleName(module) })
}

// Format returns the text of ImageFile: a line "NAME VALUE" for each fact, which process 1 reads
// much sooner than JSON, and a line for each module.
func (img *Image) Format() (string, error) {
	var text strings.Builder
	line := func(name, value string) error {
		if strings.ContainsRune(value, '\n') {
			return fmt.Errorf("%q has a line break, which the image's description cannot hold", value)
		}
		text.WriteString(name + " " + value + "\n")
		return nil
	}
	err := errors.Join(line(programLine, img.Program), line(kernelLine, img.Kernel),
		line(builtLine, strconv.FormatInt(img.Built.Unix(), 10)))
	for _, m := range img.Modules {
		err = errors.Join(err, line(moduleLine, m))
	}
	for _, m := range img.Without {
		err = errors.Join(err, line(withoutLine, m))
	}
	return text.String(), err
}

// Names of the lines in ImageFile.
const (
	programLine = "program"
	kernelLine  = "kernel"
	builtLine   = "built" // in seconds of Unix time
	moduleLine  = "module"
	withoutLine = "without"
)

func parseImage(text string) (Image, error) {
	var img Image
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		switch name {
		case programLine:
			img.Program = value
		case kernelLine:
			img.Kernel = value
		case builtLine:
			sec, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return img, fmt.Errorf("%s: when the kernel was built: %w", ImageFile, err)
			}
			img.Built = time.Unix(sec, 0)
		case moduleLine:
			img.Modules = append(img.Modules, value)
		case withoutLine:
			img.Without = append(img.Without, value)
		default:
			return img, fmt.Errorf("%s: a line %q: not of this version of barevif", ImageFile, line)
		}
	}
	if !path.IsAbs(img.Program) {
		return img, fmt.Errorf("%s names no program", ImageFile)
	}
	return img, nil
}

// ModuleName returns the name by which the kernel knows the module in a file, or of a name with
// dashes.
func ModuleName(file string) string {
	base, _, _ := strings.Cut(path.Base(file), ".")
	return strings.ReplaceAll(base, "-", "_")
}
