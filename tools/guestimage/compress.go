package guestimage

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"

	"barevif/tools/cli"
)

// Bounds of what something may unpack to, in bytes. Debian's are a tenth of them.
const (
	maxKernel  = 512 << 20
	maxModule  = 64 << 20
	maxArchive = 8 << 30 // all files of a package
)

// compressions are the formats in which distributions ship kernels, modules and packages.
var compressions = [...]struct {
	magic   string
	suffix  string   // of a file's name
	program []string // which unpacks it from its input to its output; nil: we do
	pkg     string   // of Debian, with the program
}{
	{"\x1f\x8b", ".gz", nil, ""},
	{"\xfd7zXZ\x00", ".xz", []string{"xz", "-dc", "--single-stream", "--memlimit-decompress=1GiB"}, "xz-utils"},
	{"\x28\xb5\x2f\xfd", ".zst", []string{"zstd", "-dcq"}, "zstd"},
}

// errTooLong is the error for more bytes than allowed.
var errTooLong = errors.New("unpacks to more than is plausible")

// inflate decompresses b. It ignores bytes behind the compressed stream, such as the kernel's length
// word. The result has at most limit bytes.
func inflate(b []byte, limit int64) ([]byte, error) {
	for _, c := range compressions {
		if !bytes.HasPrefix(b, []byte(c.magic)) {
			continue
		}
		r, done, err := decompress(context.Background(), c.suffix, bytes.NewReader(b))
		if err != nil {
			return nil, err
		}
		out, err := io.ReadAll(io.LimitReader(r, limit+1))
		if int64(len(out)) > limit {
			err = errTooLong
		}
		// zstd complains of the bytes behind the stream, after it has given everything.
		if derr := done(); err == nil && derr != nil && !(c.suffix == ".zst" && len(out) > 0) {
			err = derr
		}
		if err != nil {
			return nil, err
		}
		return out, nil
	}
	return nil, fmt.Errorf("unknown compression, starts with % x", b[:min(6, len(b))])
}

// decompress returns a reader of what r holds, in the format of a suffix of file names; "" is
// none. The caller must call done, after which the reader is of no use. done returns an error if
// the decompressor failed, and none if it was ended early.
func decompress(ctx context.Context, suffix string, r io.Reader) (out io.Reader, done func() error, err error) {
	nothing := func() error { return nil }
	if suffix == "" {
		return r, nothing, nil
	}
	for _, c := range compressions {
		if c.suffix != suffix {
			continue
		}
		if c.program == nil {
			z, err := gzip.NewReader(r)
			if err != nil {
				return nil, nil, err
			}
			z.Multistream(false)
			return z, nothing, nil
		}
		return runFilter(ctx, r, c.program, c.pkg)
	}
	return nil, nil, fmt.Errorf("unknown compression %q", suffix)
}

// runFilter starts a program that decompresses r.
func runFilter(ctx context.Context, r io.Reader, argv []string, pkg string) (out io.Reader, done func() error, err error) {
	if _, err := exec.LookPath(argv[0]); err != nil {
		return nil, nil, &cli.Advice{Err: fmt.Errorf("it is compressed with %s, which this machine does not have", argv[0]), Next: "install it: apt-get install " + pkg}
	}
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin = r
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, nil, err
	}
	return pipe, func() error {
		defer cancel()
		if rest, _ := io.Copy(io.Discard, io.LimitReader(pipe, 1)); rest > 0 { // an error shows in the program's end
			cancel()
			cmd.Wait() // it was killed
			return nil
		}
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("%s: %w: %s", argv[0], err, bytes.TrimSpace(stderr.Bytes()))
		}
		return nil
	}, nil
}
