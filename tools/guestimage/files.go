package guestimage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"barevif/tools/cli"
	"barevif/tools/guestimage/guestinit"
)

// Bounds of what a caller adds to an image.
const (
	maxAdded     = 1 << 30 // bytes of all files: the guest keeps them in its memory
	maxAddedName = 4095    // bytes of a path in the guest; Linux leaves out a longer one
)

// A hostFile is a file or directory of this machine that an image has.
type hostFile struct {
	spec   string // HOST:GUEST, of which it comes
	source string // in this machine
	at     string // in the guest, clean and absolute
	dir    bool
	perm   fs.FileMode
}

// hostFiles finds all that the specs HOST:GUEST name. What it returns can be read, and is seen in the
// guest.
func hostFiles(specs []string) (list []hostFile, err error) {
	var size int64
	for _, spec := range specs {
		host, guest, ok := strings.Cut(spec, ":")
		if !ok || host == "" || !path.IsAbs(guest) {
			return nil, &cli.Advice{Err: fmt.Errorf("--file %q: not HOST:GUEST, of which GUEST is absolute", spec), Next: "such as --file ./public:/srv/www", Usage: true}
		}
		err := filepath.WalkDir(host, func(file string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(host, file)
			if err != nil {
				return err
			}
			f, n, err := readable(file, d)
			if err != nil {
				return err
			}
			if size += n; size > maxAdded {
				return &cli.Advice{
					Err:  fmt.Errorf("--file %q: with %s there are %s to add, and an image takes %s", spec, file, cli.BinarySize(uint64(size)), cli.BinarySize(maxAdded)),
					Next: "leave out what the program does not need, or have it fetched when the program runs",
				}
			}
			f.spec, f.at = spec, path.Join(guest, filepath.ToSlash(rel))
			list = append(list, f)
			return seen(f)
		})
		if _, ok := errors.AsType[*cli.Advice](err); err != nil && !ok {
			err = &cli.Advice{Err: fmt.Errorf("--file %q: %w", spec, err), Next: "name files and directories that this user can read"}
		}
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

// readable returns what an image has of a file, and the file's size. The contents are those of the file that a
// link leads to.
func readable(file string, d fs.DirEntry) (hostFile, int64, error) {
	info, err := os.Stat(file)
	switch {
	case err != nil:
		return hostFile{}, 0, err
	case info.IsDir() && d.IsDir():
		return hostFile{source: file, dir: true, perm: 0o755}, 0, nil
	case info.IsDir():
		return hostFile{}, 0, fmt.Errorf("%s is a link to a directory, which is not followed: name the directory in a --file of its own", file)
	case !info.Mode().IsRegular():
		return hostFile{}, 0, fmt.Errorf("%s is no file", file)
	}
	f, err := os.Open(file)
	if err != nil {
		return hostFile{}, 0, err
	}
	return hostFile{source: file, perm: 0o644 | info.Mode()&0o111}, info.Size(), f.Close()
}

// seen refuses a file that the guest would not see where the caller puts it.
func seen(f hostFile) error {
	if len(f.at) > maxAddedName {
		return f.refused(fmt.Sprintf("its path in the guest has %d bytes, and Linux leaves out what has more than %d", len(f.at), maxAddedName), "choose a shorter one")
	}
	if f.at == "/" && !f.dir {
		return f.refused("/ is a directory", "name the file in it: HOST:/NAME")
	}
	for _, dir := range guestinit.MountPoints {
		if strings.HasPrefix(f.at, dir+"/") || f.at == dir && !f.dir {
			return f.refused(fmt.Sprintf("%s would not be seen: a file system is mounted on %s when the guest starts", f.at, dir), "choose another place, such as /etc or /srv")
		}
	}
	return nil
}

func (f *hostFile) refused(why, next string) error {
	return &cli.Advice{Err: fmt.Errorf("--file %q: %s", f.spec, why), Next: next, Usage: true}
}

// addFiles adds the files to a tree that has all that the image needs. None takes the place of
// another, or of what is there.
func addFiles(t *Tree, list []hostFile) error {
	from := map[string]hostFile{}
	for _, f := range list {
		for at := f.at; at != "/"; at = path.Dir(at) {
			kind, there := t.kind(at)
			if !there || kind == modeDir && (at != f.at || f.dir) {
				continue
			}
			what, next := "the image needs it for itself", "choose another place, or leave one of them out"
			if other, ok := from[at]; ok && other.spec == f.spec {
				what = "it is given twice"
			} else if ok {
				what = fmt.Sprintf("--file %q is there", other.spec)
			} else if kind == modeDir {
				what, next = "it is a directory of the image", "name the file in it: HOST:"+path.Join(at, filepath.Base(f.source))
			}
			if at != f.at {
				return f.refused(fmt.Sprintf("%s cannot be below %s: %s", f.at, at, what), next)
			}
			return f.refused(fmt.Sprintf("%s cannot be put there: %s", at, what), next)
		}
		if f.dir {
			if f.at != "/" {
				t.Dir(f.at, f.perm)
			}
		} else {
			t.File(f.at, f.perm, f.source)
		}
		from[f.at] = f
	}
	return nil
}
