package guestimage

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
)

// A Kernel is a Linux kernel with its modules.
type Kernel struct {
	Image   []byte // a bzImage or an ELF file
	Release string // as uname -r has it
	Built   time.Time
	Modules ModuleSource
}

// UnpackXen writes the hypervisor as a plain ELF file, without gzip: QEMU's multiboot loader
// does not decompress it.
func UnpackXen(src, dst string) error {
	return rewrite(src, dst, func(b []byte) ([]byte, error) { return inflate(b, maxKernel) })
}

// UnpackKernel extracts vmlinux from a bzImage. Xen and xl can unpack a bzImage themselves, but
// an emulated CPU needs ten seconds for that.
func UnpackKernel(src, dst string) error { return rewrite(src, dst, vmlinux) }

// vmlinux extracts the kernel of a bzImage.
func vmlinux(image []byte) ([]byte, error) {
	payload, err := bzPayload(image)
	if err != nil {
		return nil, err
	}
	return inflate(payload, maxKernel)
}

func rewrite(src, dst string, f func([]byte) ([]byte, error)) error {
	b, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	if b, err = f(b); err != nil {
		return fmt.Errorf("%s: %w", src, err)
	}
	if !bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
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

// checkKernel checks that an image is a kernel that a guest of this architecture can boot.
func checkKernel(image []byte) error {
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		return checkELF(image)
	}
	if len(image) > 0x3c && string(image[0x38:0x3c]) == "ARM\x64" {
		return errors.New("a kernel for arm64, and images are for amd64")
	}
	if _, err := bzPayload(image); err != nil {
		return fmt.Errorf("no Linux kernel: neither an ELF file nor a bzImage: %w", err)
	}
	// xloadflags, since version 2.12: bit 0 is XLF_KERNEL_64.
	if binary.LittleEndian.Uint16(image[0x206:]) < 0x20c || image[0x236]&1 == 0 {
		return errors.New("a 32-bit kernel, and images are for amd64")
	}
	return nil
}

// checkELF checks that b is an ELF file for amd64.
func checkELF(b []byte) error {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return err
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("made for %v, and images are for amd64", f.Machine)
	}
	return nil
}
