package guestimage

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// Types of file in a mode, from Documentation/driver-api/early-userspace/buffer-format.rst.
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
)

// A Tree holds the files of an initramfs. It reads the files of the host only when it writes
// the archive.
type Tree struct {
	entries map[string]entry // by path without a leading slash
}

type entry struct {
	mode   uint32
	source string // a file of the host, if not empty
	data   []byte // otherwise the contents, or the target of a link
}

// NewTree returns an empty tree.
func NewTree() *Tree { return &Tree{entries: map[string]entry{}} }

func (t *Tree) add(name string, e entry) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	t.entries[name] = e
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := t.entries[dir]; !ok {
			t.entries[dir] = entry{mode: modeDir | 0o755}
		}
	}
}

// Has reports whether the tree has an entry of that name.
func (t *Tree) Has(name string) bool {
	_, ok := t.entries[strings.TrimPrefix(name, "/")]
	return ok
}

// kind returns the type of the entry of that name, modeDir, modeFile or modeLink.
func (t *Tree) kind(name string) (kind uint32, ok bool) {
	e, ok := t.entries[strings.TrimPrefix(name, "/")]
	return e.mode &^ 0o7777, ok
}

// Dir adds a directory. Those above an entry are added with it.
func (t *Tree) Dir(name string, perm fs.FileMode) {
	t.add(name, entry{mode: modeDir | uint32(perm)})
}

// Link adds a symbolic link.
func (t *Tree) Link(name, target string) {
	t.add(name, entry{mode: modeLink | 0o777, data: []byte(target)})
}

// Data adds a file with these contents.
func (t *Tree) Data(name string, perm fs.FileMode, data []byte) {
	t.add(name, entry{mode: modeFile | uint32(perm), data: data})
}

// File adds a copy of a file of the host.
func (t *Tree) File(name string, perm fs.FileMode, source string) {
	t.add(name, entry{mode: modeFile | uint32(perm), source: source})
}

// WriteFile writes the tree as a cpio archive in the "newc" format, which the kernel unpacks.
func (t *Tree) WriteFile(dst string) (err error) {
	f, err := os.Create(dst)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := t.Write(w); err != nil {
		return err
	}
	return w.Flush()
}

// Write writes the archive. Its bytes depend only on the entries.
func (t *Tree) Write(w io.Writer) error {
	names := make([]string, 0, len(t.entries))
	for name := range t.entries {
		names = append(names, name)
	}
	slices.Sort(names) // a directory comes before what is in it
	for i, name := range names {
		if err := writeEntry(w, i+1, name, t.entries[name]); err != nil {
			return fmt.Errorf("cpio: %s: %w", name, err)
		}
	}
	return writeEntry(w, 0, "TRAILER!!!", entry{})
}

func writeEntry(w io.Writer, inode int, name string, e entry) error {
	body := io.Reader(bytes.NewReader(e.data))
	size := int64(len(e.data))
	if e.source != "" {
		f, err := os.Open(e.source)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		body, size = f, info.Size()
	}
	if size > 0xffffffff {
		return fmt.Errorf("%d bytes do not fit the format", size)
	}
	// magic, inode, mode, uid, gid, links, mtime, size, device and rdevice
	// (major, minor), length of the name with its NUL, checksum.
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode, e.mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	if _, err := io.WriteString(w, head+padding(int64(len(head)))); err != nil {
		return err
	}
	n, err := io.Copy(w, body)
	if err != nil {
		return err
	}
	if n != size {
		return fmt.Errorf("%s changed while it was read", e.source)
	}
	_, err = io.WriteString(w, padding(n))
	return err
}

// padding returns the NULs that fill n bytes up to a multiple of four.
func padding(n int64) string { return "\x00\x00\x00"[:-n&3] }
