package guestimage

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"barevif/tools/cli"
)

// Bounds of a package.
const (
	maxMembers = 16      // of the outer archive; dpkg makes 3
	maxEntries = 200_000 // files and directories; a kernel has 6000
	maxControl = 1 << 20 // bytes
	maxList    = 4 << 20 // bytes, of modules.builtin
)

// A debFile is a package of Debian, deb(5): an ar archive of debian-binary, control.tar and
// data.tar, of which the last two are compressed.
type debFile struct {
	name          string
	control, data member
	Package, Arch string
}

// A member of the outer archive.
type member struct {
	name      string
	off, size int64
}

// openDeb reads a package's directory and control file.
func openDeb(ctx context.Context, name string) (*debFile, error) {
	d := &debFile{name: name}
	f, err := os.Open(name)
	if err != nil {
		return nil, &cli.Advice{Err: err, Next: `give a package, such as the one that "apt-get download linux-image-amd64" depends on`}
	}
	defer f.Close()
	if err := d.readMembers(f); err != nil {
		return nil, d.damaged(err)
	}
	err = d.walk(ctx, d.control, func(name string, h *tar.Header, r io.Reader) error {
		if name != "control" {
			return nil
		}
		b, err := readEntry(h, r, maxControl)
		if err != nil {
			return err
		}
		d.Package, d.Arch = controlField(b, "Package"), controlField(b, "Architecture")
		return errEnough
	})
	if err != nil {
		return nil, err
	}
	if d.Arch != "amd64" && d.Arch != "all" {
		return nil, &cli.Advice{
			Err:  fmt.Errorf("%s: %s is for %q, and images are for amd64", name, d.Package, d.Arch),
			Next: "give the package for amd64: apt-get download linux-image-amd64:amd64",
		}
	}
	return d, nil
}

// damaged is the error for a package that is not as dpkg makes them.
func (d *debFile) damaged(err error) error {
	if _, ok := errors.AsType[*cli.Advice](err); ok {
		return err
	}
	return &cli.Advice{Err: fmt.Errorf("%s: %w", d.name, err), Next: "fetch the package again, with apt-get download, which checks its signature"}
}

// readMembers finds the members of the outer archive.
func (d *debFile) readMembers(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	magic := make([]byte, 8)
	if _, err := f.ReadAt(magic, 0); err != nil || string(magic) != "!<arch>\n" {
		return errors.New("not a package of Debian")
	}
	off, size := int64(len(magic)), info.Size()
	for n := 0; off < size; n++ {
		if n == maxMembers {
			return fmt.Errorf("more than %d members", maxMembers)
		}
		m, err := readMember(f, off, size)
		if err != nil {
			return err
		}
		switch base, _, _ := strings.Cut(m.name, "."); {
		case base == "control":
			d.control = m
		case base == "data":
			d.data = m
		}
		off = m.off + m.size + m.size%2
	}
	if d.control.name == "" || d.data.name == "" {
		return errors.New("it is truncated, or no package of Debian: control.tar and data.tar are not both there")
	}
	return nil
}

// readMember reads the header at off: name 16 bytes, times and owners, size at 48 in 10 decimal digits,
// and two bytes that end it.
func readMember(f io.ReaderAt, off, size int64) (member, error) {
	const headerSize = 60
	h := make([]byte, headerSize)
	if _, err := f.ReadAt(h, off); err != nil {
		return member{}, errors.New("it is truncated")
	}
	n, err := strconv.ParseUint(strings.TrimRight(string(h[48:58]), " "), 10, 62)
	if err != nil || string(h[58:]) != "`\n" {
		return member{}, fmt.Errorf("no archive member at byte %d", off)
	}
	m := member{name: strings.TrimRight(strings.TrimRight(string(h[:16]), " "), "/"), off: off + headerSize, size: int64(n)}
	if m.size > size-m.off {
		return member{}, fmt.Errorf("it is truncated: %s ends at byte %d of %d", m.name, m.off+m.size, size)
	}
	return m, nil
}

// errEnough ends a walk early.
var errEnough = errors.New("enough")

// walk calls visit with every regular file of a member, until visit returns an error. Names
// are relative, and lead nowhere else. The reader is good only during the call.
func (d *debFile) walk(ctx context.Context, m member, visit func(name string, h *tar.Header, r io.Reader) error) (err error) {
	f, err := os.Open(d.name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, suffix, _ := strings.Cut(m.name, ".tar")
	r, done, err := decompress(ctx, suffix, io.NewSectionReader(f, m.off, m.size))
	if err != nil {
		return d.damaged(fmt.Errorf("%s: %w", m.name, err))
	}
	bounded := &boundedReader{r: r, left: maxArchive}
	err = walkTar(bounded, visit)
	if derr := done(); derr != nil && !errors.Is(err, errEnough) { // the decompressor knows why the archive ends
		err = derr
	}
	switch {
	case errors.Is(err, errEnough):
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return d.damaged(fmt.Errorf("%s: %w", m.name, err))
	}
	return nil
}

func walkTar(r io.Reader, visit func(name string, h *tar.Header, r io.Reader) error) error {
	t := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return err
		}
		if n == maxEntries {
			return fmt.Errorf("more than %d files", maxEntries)
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "./"))
		if path.IsAbs(h.Name) || name == ".." || strings.HasPrefix(name, "../") || strings.ContainsRune(h.Name, 0) {
			return fmt.Errorf("the name %q leads out of the package", h.Name)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if err := visit(name, h, t); err != nil {
			return err
		}
	}
}

// readEntry reads a file of at most limit bytes.
func readEntry(h *tar.Header, r io.Reader, limit int64) ([]byte, error) {
	if h.Size > limit {
		return nil, fmt.Errorf("%s has %d bytes, and at most %d are plausible", h.Name, h.Size, limit)
	}
	b, err := io.ReadAll(io.LimitReader(r, limit))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.Name, err)
	}
	return b, nil
}

// A boundedReader fails when more was read than it allows, where an io.LimitedReader would end.
type boundedReader struct {
	r    io.Reader
	left int64
}

func (b *boundedReader) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// controlField returns a field of a control file, which has one line.
func controlField(control []byte, name string) string {
	for line := range strings.Lines(string(control)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
