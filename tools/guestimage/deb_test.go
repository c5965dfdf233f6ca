//go:build linux

package guestimage

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/tools/cli"
)

// built is the time of every file of a package.
var built = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// An entry of a package's archive. The Size of the header is that of body unless it is set.
type debEntry struct {
	tar.Header
	body []byte
}

func regular(name string, body []byte) debEntry {
	return debEntry{Header: tar.Header{Name: name, Typeflag: tar.TypeReg}, body: body}
}

func tarOf(t *testing.T, entries ...debEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.ModTime, h.Mode = built, 0o644
		if h.Size == 0 {
			h.Size = int64(len(e.body))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.body); err != nil {
			t.Fatal(err)
		}
	}
	if h := entries[len(entries)-1]; h.Size > int64(len(h.body)) {
		return b.Bytes() // an archive that ends early
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// ar makes the outer archive: a name, its contents, the next name.
func ar(members ...any) []byte {
	b := []byte("!<arch>\n")
	for i := 0; i < len(members); i += 2 {
		body := members[i+1].([]byte)
		b = fmt.Appendf(b, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", members[i], 0, 0, 0, "100644", len(body))
		b = append(b, body...)
		if len(body)%2 == 1 {
			b = append(b, '\n')
		}
	}
	return b
}

func control(t *testing.T, pkg, arch string) []byte {
	t.Helper()
	return gzipped(t, tarOf(t, regular("./control", []byte("Package: "+pkg+"\nVersion: 1\nArchitecture: "+arch+"\n"))))
}

// kernelEntries are the files of a kernel's package. Its modules are the ones of every image and a few
// that depend on each other in a circle-free way.
func kernelEntries(t *testing.T) []debEntry {
	t.Helper()
	image := bzImage(gzipped(t, vmlinuxFile(t)))
	image[0x236] = 1 // XLF_KERNEL_64
	const dir = "./usr/lib/modules/6.1.0-9-amd64/"
	entries := []debEntry{
		{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir}},
		regular("./boot/vmlinuz-6.1.0-9-amd64", image),
		{Header: tar.Header{Name: "./boot/vmlinuz", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}},
		regular(dir+"modules.builtin", []byte("kernel/net/packet/af_packet.ko\n")),
		regular(dir+"kernel/other.ko", module(t, "depends=nowhere\x00")),
		regular(dir+"kernel/base.ko", module(t, "depends=\x00")),
	}
	for name, needs := range map[string]string{
		"xen-evtchn": "", "xen-gntalloc": "", "xen-gntdev": "", "xen-privcmd": "", "xenfs": "xen-privcmd", "tun": "", "top": "base,af_packet",
	} {
		entries = append(entries, regular(dir+"kernel/"+name+".ko.gz", gzipped(t, module(t, "depends="+needs+"\x00"))))
	}
	return entries
}

// vmlinuxFile is an ELF file for amd64.
func vmlinuxFile(t *testing.T) []byte { return module(t, "a kernel\x00") }

func writeDeb(t *testing.T, b []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "linux-image-6.1.0-9-amd64_1_amd64.deb")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func kernelDeb(t *testing.T) string {
	t.Helper()
	return writeDeb(t, ar("debian-binary", []byte("2.0\n"), "control.tar.gz", control(t, "linux-image-6.1.0-9-amd64", "amd64"), "data.tar", tarOf(t, kernelEntries(t)...)))
}

func TestKernelIsReadFromItsPackage(t *testing.T) {
	data := tarOf(t, kernelEntries(t)...)
	packed := map[string][]byte{"data.tar": data, "data.tar.gz": gzipped(t, data)}
	for suffix, program := range map[string]string{".xz": "xz", ".zst": "zstd"} {
		cmd := exec.Command(program, "-c")
		cmd.Stdin = bytes.NewReader(data)
		out, err := cmd.Output()
		if err != nil {
			t.Logf("not tried: %s: %v", program, err)
			continue
		}
		packed["data.tar"+suffix] = out
	}
	for name, b := range packed {
		file := writeDeb(t, ar("debian-binary", []byte("2.0\n"), "control.tar.gz/", control(t, "linux-image-6.1.0-9-amd64", "amd64"), name, b))
		k, err := KernelOfPackages(t.Context(), []string{file}, []string{"xenfs"})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if k.Release != "6.1.0-9-amd64" || !k.Built.Equal(built) || len(k.Image) == 0 {
			t.Errorf("%s: %q, %v, %d bytes", name, k.Release, k.Built, len(k.Image))
		}
		m, err := CollectModules(k.Modules, "xenfs", "top", "af_packet") // a second and a third reading of the package
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := strings.Join(m.Names(), " "); got != "base top xen_privcmd xenfs" {
			t.Errorf("%s: modules %s", name, got)
		}
	}
}

func TestModulesMayBeInAPackageOfTheirOwn(t *testing.T) {
	all := kernelEntries(t)
	isBoot := func(e debEntry) bool { return strings.Contains(e.Name, "boot") }
	image := writeDeb(t, ar("control.tar.gz", control(t, "linux-image-6.1", "amd64"), "data.tar", tarOf(t, slices.DeleteFunc(slices.Clone(all), func(e debEntry) bool { return !isBoot(e) })...)))
	modules := writeDeb(t, ar("control.tar.gz", control(t, "linux-modules-6.1", "amd64"), "data.tar", tarOf(t, slices.DeleteFunc(slices.Clone(all), isBoot)...)))
	for _, files := range [][]string{{image, modules}, {modules, image}} {
		k, err := KernelOfPackages(t.Context(), files, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := CollectModules(k.Modules, BaseModules...); err != nil {
			t.Error(err)
		}
	}
	_, err := KernelOfPackages(t.Context(), []string{image}, nil)
	requireAdvice(t, err, "no modules of kernel 6.1.0-9-amd64 are in linux-image-6.1", "another --deb")
	_, err = KernelOfPackages(t.Context(), []string{modules}, nil)
	requireAdvice(t, err, "no kernel, which is a file /boot/vmlinuz-*, is in linux-modules-6.1", "linux-image-amd64 only depends on it")
}

// requireAdvice checks that an error names its cause and the next step.
func requireAdvice(t *testing.T, err error, cause, next string) {
	t.Helper()
	a, ok := errors.AsType[*cli.Advice](err)
	if !ok || !strings.Contains(err.Error(), cause) || !strings.Contains(a.Next, next) {
		t.Errorf("%v (%+v), want %q, and next %q", err, a, cause, next)
	}
}

func TestHostilePackageIsRefused(t *testing.T) {
	good := control(t, "linux-image-6.1", "amd64")
	deb := func(entries ...debEntry) []byte { return ar("control.tar.gz", good, "data.tar", tarOf(t, entries...)) }
	kernel := kernelEntries(t)
	with := func(e ...debEntry) []byte { return deb(append(slices.Clone(kernel), e...)...) }
	sized := func(name string, size int64) debEntry {
		return debEntry{Header: tar.Header{Name: name, Typeflag: tar.TypeReg, Size: size}}
	}
	wrongKernel := bzImage(nil) // without XLF_KERNEL_64
	arm := make([]byte, 64)
	copy(arm[0x38:], "ARM\x64")
	for name, c := range map[string]struct {
		deb   []byte
		cause string
	}{
		"empty":            {nil, "not a package of Debian"},
		"text":             {[]byte("hello, world"), "not a package of Debian"},
		"magic alone":      {[]byte("!<arch>\n"), "it is truncated"},
		"cut header":       {with()[:100], "it is truncated"},
		"cut data":         {with()[:len(with())/2], "it is truncated: data.tar ends at"},
		"no data":          {ar("control.tar.gz", good), "control.tar and data.tar are not both there"},
		"negative size":    {bytes.Replace(with(), fmt.Appendf(nil, "%-10d`", len(good)), []byte("-1        `"), 1), "no archive member at byte 8"},
		"huge size":        {bytes.Replace(with(), fmt.Appendf(nil, "%-10d`", len(good)), []byte("9999999999`"), 1), "it is truncated"},
		"many members":     {ar(slices.Repeat([]any{"x", []byte("y")}, 17)...), "more than 16 members"},
		"odd compression":  {ar("control.tar.gz", good, "data.tar.lz4", []byte("x")), `unknown compression ".lz4"`},
		"damaged gzip":     {ar("control.tar.gz", good, "data.tar.gz", gzipped(t, tarOf(t, kernel...))[:200]), "data.tar.gz: unexpected EOF"},
		"damaged xz":       {ar("control.tar.gz", good, "data.tar.xz", []byte("\xfd7zXZ\x00 and so on")), "data.tar.xz: xz: "},
		"no tar":           {ar("control.tar.gz", good, "data.tar", bytes.Repeat([]byte("x"), 1024)), "data.tar: archive/tar: invalid"},
		"outside":          {with(regular("./boot/../../etc/passwd", nil)), `the name "./boot/../../etc/passwd" leads out`},
		"absolute":         {with(regular("/etc/passwd", nil)), `the name "/etc/passwd" leads out`},
		"outside, a link":  {with(debEntry{Header: tar.Header{Name: "../x", Typeflag: tar.TypeSymlink, Linkname: "/"}}), `the name "../x" leads out`},
		"two kernels":      {with(regular("./boot/vmlinuz-7.0", nil)), "not the only kernel"},
		"release":          {deb(regular("./boot/vmlinuz-6.1/x", []byte("x"))), "not the only kernel, or no name of one"},
		"huge kernel":      {deb(sized("./boot/vmlinuz-6.1", maxKernel+1)), "at most 536870912 are plausible"},
		"huge list":        {deb(sized("./lib/modules/6.1/modules.builtin", maxList+1)), "at most 4194304 are plausible"},
		"huge module":      {deb(sized("./lib/modules/6.1/tun.ko", maxModule+1)), "at most 67108864 are plausible"},
		"cut module":       {deb(debEntry{Header: tar.Header{Name: "./lib/modules/6.1/tun.ko", Typeflag: tar.TypeReg, Size: 4096}, body: []byte("x")}), "unexpected EOF"},
		"no kernel at all": {deb(regular("./boot/vmlinuz-6.1", []byte("MZ"))), "vmlinuz-6.1: no Linux kernel: neither an ELF file nor a bzImage"},
		"32 bits":          {deb(regular("./boot/vmlinuz-6.1", wrongKernel)), "vmlinuz-6.1: a 32-bit kernel"},
		"arm64 kernel":     {deb(regular("./boot/vmlinuz-6.1", arm)), "vmlinuz-6.1: a kernel for arm64"},
	} {
		if _, err := exec.LookPath("xz"); err != nil && name == "damaged xz" {
			continue // TestAMachineWithoutTheDecompressorSaysSo has what is said then
		}
		_, err := KernelOfPackages(t.Context(), []string{writeDeb(t, c.deb)}, []string{"tun"})
		a, ok := errors.AsType[*cli.Advice](err)
		if !ok || !strings.Contains(err.Error(), c.cause) || !strings.Contains(a.Next, "fetch the package again") {
			t.Errorf("%s: %v, want %q", name, err, c.cause)
		}
	}
	_, err := KernelOfPackages(t.Context(), []string{writeDeb(t, ar("control.tar.gz", control(t, "linux-image-6.1-arm64", "arm64"), "data.tar", tarOf(t, kernel...)))}, nil)
	requireAdvice(t, err, `linux-image-6.1-arm64 is for "arm64", and images are for amd64`, "apt-get download linux-image-amd64:amd64")
	_, err = KernelOfPackages(t.Context(), []string{"/no/such.deb"}, nil)
	requireAdvice(t, err, "/no/such.deb", "apt-get download")
}

// What unpacks to more than is plausible is not unpacked to the end.
func TestBombsAreBounded(t *testing.T) {
	zeros := make([]byte, 1<<20)
	for _, limit := range []int64{1<<20 - 1, 1 << 20} {
		b, err := inflate(gzipped(t, zeros), limit)
		if (err == nil) != (limit == 1<<20) || err == nil && len(b) != 1<<20 {
			t.Errorf("limit %d: %d bytes, %v", limit, len(b), err)
		}
	}
	err := walkTar(&boundedReader{r: bytes.NewReader(tarOf(t, regular("a", zeros), regular("b", zeros))), left: 1 << 20}, func(string, *tar.Header, io.Reader) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "plausible") {
		t.Errorf("a long archive: %v", err)
	}
}

func TestAMachineWithoutTheDecompressorSaysSo(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := KernelOfPackages(t.Context(), []string{writeDeb(t, ar("control.tar.gz", control(t, "linux-image-6.1", "amd64"), "data.tar.xz", []byte("x")))}, nil)
	requireAdvice(t, err, "it is compressed with xz, which this machine does not have", "apt-get install xz-utils")
}

// No package makes the reader panic, or return a kernel with a name that is none.
func FuzzPackage(f *testing.F) {
	var t testing.T
	f.Add(ar("control.tar.gz", control(&t, "linux-image-6.1", "amd64"), "data.tar", tarOf(&t, kernelEntries(&t)...)))
	f.Add(ar("control.tar", []byte("x"), "data.tar.gz", []byte("\x1f\x8b")))
	f.Fuzz(func(t *testing.T, b []byte) {
		file := filepath.Join(t.TempDir(), "x.deb")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", "") // what xz makes of it is xz's
		k, err := KernelOfPackages(t.Context(), []string{file}, []string{"tun"})
		if err == nil && (!releaseName.MatchString(k.Release) || k.Image == nil) {
			t.Errorf("kernel %q with %d bytes", k.Release, len(k.Image))
		}
		if err == nil {
			CollectModules(k.Modules, "tun") // may fail; must not panic
		}
	})
}
