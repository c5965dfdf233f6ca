package image

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
)

// unpackXen writes the hypervisor as a plain ELF file, without gzip: QEMU's multiboot loader
// does not decompress it.
func unpackXen(src, dst string) error {
	return rewrite(src, dst, func(b []byte) ([]byte, error) { return inflate(b) })
}

// unpackKernel extracts vmlinux from a bzImage. Xen and xl can unpack a bzImage themselves, but
// an emulated CPU needs ten seconds for that.
func unpackKernel(src, dst string) error {
	return rewrite(src, dst, func(b []byte) ([]byte, error) {
		payload, err := bzPayload(b)
		if err != nil {
			return nil, err
		}
		return inflate(payload)
	})
}

func rewrite(src, dst string, f func([]byte) ([]byte, error)) error {
	b, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	if b, err = f(b); err != nil {
		return fmt.Errorf("%s: %w", src, err)
	}
	if !bytes.HasPrefix(b, []byte("\x7fELF")) {
		return fmt.Errorf("%s: does not hold an ELF file", src)
	}
	return os.WriteFile(dst, b, 0o644)
}

// bzPayload finds the compressed kernel by the header of the Linux x86 boot
// protocol (Documentation/x86/boot.rst): setup_sects at 0x1f1, "HdrS" at 0x202,
// payload_offset and payload_length at 0x248 and 0x24c, since version 2.08.
func bzPayload(image []byte) ([]byte, error) {
	const headerEnd = 0x250
	if len(image) < headerEnd || string(image[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	if v := binary.LittleEndian.Uint16(image[0x206:]); v < 0x208 {
		return nil, fmt.Errorf("boot protocol %d.%02d says nothing about a payload", v>>8, v&0xff)
	}
	sectors := uint64(image[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + uint64(binary.LittleEndian.Uint32(image[0x248:]))
	end := start + uint64(binary.LittleEndian.Uint32(image[0x24c:]))
	if end > uint64(len(image)) {
		return nil, fmt.Errorf("payload ends at %d of %d bytes", end, len(image))
	}
	return image[start:end], nil
}

// inflate decompresses the formats in which Debian ships kernels and modules. It ignores bytes
// behind the compressed stream, such as the kernel's length word.
func inflate(b []byte) ([]byte, error) {
	switch {
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, err
		}
		z.Multistream(false)
		return io.ReadAll(z)
	case bytes.HasPrefix(b, []byte("\xfd7zXZ\x00")):
		return filter(b, "xz", "-dc", "--single-stream")
	}
	return nil, fmt.Errorf("unknown compression, starts with % x", b[:min(6, len(b))])
}

func filter(in []byte, name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(in)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
