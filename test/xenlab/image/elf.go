package image

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
)

// libraryDirs is where Debian's packages keep shared objects.
var libraryDirs = [...]string{
	"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64", "usr/lib/x86_64-linux-gnu/systemd",
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
