//go:build linux

package guestimage

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func gzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return z.Bytes()
}

// bzImage returns an image with a header of the boot protocol, filler for the setup code, and
// a payload with the length word that the kernel's build appends.
func bzImage(payload []byte) []byte {
	b := make([]byte, 3*512)
	b[0x1f1] = 2 // setup sectors
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(b[0x248:], 100)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)+4))
	b = append(b, make([]byte, 100)...)
	b = append(b, payload...)
	return append(b, 1, 2, 3, 4, 5, 6)
}

func TestKernelIsFoundInItsImage(t *testing.T) {
	vmlinux := []byte("\x7fELF and the rest of the kernel")
	packed := map[string][]byte{"gzip": gzipped(t, vmlinux)}
	cmd := exec.Command("xz", "-c")
	cmd.Stdin = bytes.NewReader(vmlinux)
	if out, err := cmd.Output(); err == nil {
		packed["xz"] = out
	} else {
		t.Logf("not tried: xz: %v", err)
	}
	for name, payload := range packed {
		t.Run(name, func(t *testing.T) {
			src, dst := filepath.Join(t.TempDir(), "vmlinuz"), filepath.Join(t.TempDir(), "vmlinux")
			if err := os.WriteFile(src, bzImage(payload), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := UnpackKernel(src, dst); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(dst); !bytes.Equal(got, vmlinux) {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestDamagedImageIsRefused(t *testing.T) {
	good := bzImage(gzipped(t, []byte("\x7fELF")))
	damage := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	for name, b := range map[string][]byte{
		"empty":               nil,
		"short":               good[:0x24f],
		"no magic":            damage(func(b []byte) { b[0x202] = 'X' }),
		"old protocol":        damage(func(b []byte) { b[0x206] = 7 }),
		"payload past end":    damage(func(b []byte) { b[0x24e] = 0xff }),
		"payload far away":    damage(func(b []byte) { b[0x24b] = 0xff }),
		"unknown compression": damage(func(b []byte) { b[3*512+100] = 0 }),
		"not an ELF file":     bzImage(gzipped(t, []byte("MZ"))),
	} {
		src, dst := filepath.Join(t.TempDir(), "vmlinuz"), filepath.Join(t.TempDir(), "vmlinux")
		if err := os.WriteFile(src, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := UnpackKernel(src, dst); err == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := os.Stat(dst); err == nil {
			t.Errorf("%s: left a file", name)
		}
	}
}

// module makes a minimal ELF file with a .modinfo section.
func module(t *testing.T, info string) []byte {
	t.Helper()
	const headerSize, sectionSize = 64, 64
	names := "\x00.modinfo\x00.shstrtab\x00"
	infoAt := uint64(headerSize + 3*sectionSize)
	namesAt := infoAt + uint64(len(info))
	var b bytes.Buffer
	put := func(v any) {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	put(elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Shoff: headerSize, Ehsize: headerSize, Shentsize: sectionSize, Shnum: 3, Shstrndx: 2,
	})
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: infoAt, Size: uint64(len(info))})
	put(elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names))})
	b.WriteString(info + names)
	return b.Bytes()
}

func TestModulesComeWithWhatTheyNeed(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "usr/lib/modules/6.1")
	for name, b := range map[string][]byte{
		"modules.builtin":               []byte("kernel/net/packet/af_packet.ko\n"),
		"kernel/drivers/net/top-one.ko": module(t, "depends=left,right\x00alias=net-top\x00license=GPL\x00"),
		"kernel/left.ko":                module(t, "depends=base\x00"),
		"kernel/right.ko.gz":            gzipped(t, module(t, "depends=base\x00")),
		"kernel/base.ko":                module(t, "depends=\x00"),
		"kernel/other.ko":               module(t, "depends=base\x00"),
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	source, err := FindModules(root, "6.1")
	if err != nil {
		t.Fatal(err)
	}
	modules, err := CollectModules(source, "top-one", "af_packet")
	if err != nil {
		t.Fatal(err)
	}
	tree := NewTree()
	modules.Install(tree, "/lib/modules/6.1")
	modules.Index(tree, "/lib/modules/6.1")
	text := func(name string) string { return string(tree.entries["lib/modules/6.1/"+name].data) }
	wantDep := "base.ko:\nleft.ko: base.ko\nright.ko: base.ko\ntop_one.ko: right.ko left.ko base.ko\n"
	if got := text("modules.dep"); got != wantDep {
		t.Errorf("modules.dep\n%s, want\n%s", got, wantDep)
	}
	if got := text("modules.alias"); got != "alias net-top top_one\n" {
		t.Errorf("modules.alias %q", got)
	}
	if !strings.HasPrefix(text("right.ko"), "\x7fELF") {
		t.Error("a module is still compressed")
	}
	if tree.Has("lib/modules/6.1/other.ko") || tree.Has("lib/modules/6.1/af_packet.ko") {
		t.Error("more modules than asked for")
	}
	for names, want := range map[string]string{
		"top-one af_packet": "base.ko left.ko right.ko top_one.ko",
		"right top_one":     "base.ko right.ko left.ko top_one.ko",
		"af_packet":         "",
	} {
		if got := strings.Join(modules.LoadOrder(strings.Fields(names)...), " "); got != want {
			t.Errorf("%s: loaded in the order %q, want %q", names, got, want)
		}
	}
	if _, err := CollectModules(source, "absent"); err == nil {
		t.Error("a missing module is no error")
	}
	if _, err := FindModules(root, "6.2"); err == nil {
		t.Error("a missing kernel is no error")
	}
}
