//go:build linux

package guestimage

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"barevif/tools/guestimage/guestinit"
)

// writeModule makes a Go module of files, and returns its directory.
func writeModule(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	files["go.mod"] = "module example.org/web\n\ngo 1.26\n"
	for name, text := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// webProgram waits for a SIGTERM.
const webProgram = `package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	_, err := os.Stat("/srv/www/index.html")
	fmt.Println("web: ready", os.Getpid() > 1, err)
	<-c
	os.Exit(3)
}
`

func buildWeb(t *testing.T, change func(*Config)) (Config, *Result) {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the go command is not installed: ", err)
	}
	dir := writeModule(t, map[string]string{"cmd/web/main.go": webProgram, "www/index.html": "<p>hello", "www/more/x": "x"})
	t.Chdir(dir)
	cfg := Config{
		Program: Program{Package: "./cmd/web"}, Args: []string{"-addr", "10.9.0.2/24"}, Out: filepath.Join(t.TempDir(), "new", "out"),
		Packages: []string{kernelDeb(t)}, Files: []string{"www:/srv/www"},
	}
	change(&cfg)
	r, err := Build(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return cfg, r
}

func read(t *testing.T, dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestImageHoldsWhatAGuestNeeds(t *testing.T) {
	cfg, r := buildWeb(t, func(c *Config) {
		c.Modules, c.Uncompressed = []string{"top", "af_packet"}, true
		c.Params = guestinit.Settings{Hostname: "web-1", Restart: guestinit.Always, Stop: 5e9, Grants: 700}
	})
	if !bytes.Equal(read(t, cfg.Out, "kernel"), vmlinuxFile(t)) {
		t.Error("the kernel is not the one of the package")
	}
	var names []string
	for _, e := range readCPIO(t, read(t, cfg.Out, "initramfs")) {
		name, rest, _ := strings.Cut(e, " ")
		mode, _, _ := strings.Cut(rest, " ")
		names = append(names, name+" "+mode)
		if want := `srv/www/index.html 100644 "<p>hello"`; name == "srv/www/index.html" && e != want {
			t.Errorf("%s, want %s", e, want)
		}
		if name == strings.TrimPrefix(guestinit.ImageFile, "/") && (!strings.Contains(e, `"program /app/web\nkernel 6.1.0-9-amd64\n`) || !strings.Contains(e, `module base.ko\nmodule top.ko\n`)) {
			t.Error(e)
		}
	}
	modules := "base top tun xen_evtchn xen_gntalloc xen_gntdev xen_privcmd xenfs"
	want := strings.Fields("app app/web dev etc etc/barevif etc/barevif/image etc/group etc/hosts etc/passwd init lib lib/modules lib/modules/barevif")
	for _, m := range strings.Fields(modules) {
		if !strings.Contains(m, ".") {
			m += ".ko"
		}
		want = append(want, "lib/modules/barevif/"+m)
	}
	want = append(want, strings.Fields("proc run sbin sbin/poweroff sbin/reboot srv srv/www srv/www/index.html srv/www/more srv/www/more/x sys tmp")...)
	for i, name := range want {
		mode := map[string]string{"app/web": "100755", "init": "100755", "sbin/poweroff": "120777", "sbin/reboot": "120777"}[name]
		if mode == "" && slices.ContainsFunc(want, func(o string) bool { return strings.HasPrefix(o, name+"/") }) || slices.Contains([]string{"dev", "proc", "run", "sys", "tmp"}, name) {
			mode = "40755"
		} else if mode == "" {
			mode = "100644"
		}
		want[i] += " " + mode
	}
	slices.Sort(want)
	slices.Sort(names)
	if !slices.Equal(names, want) {
		t.Errorf("it holds\n%s, want\n%s", strings.Join(names, "\n"), strings.Join(want, "\n"))
	}
	for name, kind := range map[string]string{"xl.cfg": "pvh", "xl-pv.cfg": "pv"} {
		got, err := parseXL(string(read(t, cfg.Out, name)))
		if err != nil {
			t.Fatal(err)
		}
		for key, want := range map[string]string{
			"type": kind, "kernel": cfg.Out + "/kernel", "ramdisk": cfg.Out + "/initramfs", "name": "web", "memory": "144",
			"extra": "console=hvc0 barevif.hostname=web-1 barevif.restart=always barevif.stop=5s barevif.grants=700 -- -addr 10.9.0.2/24",
		} {
			if got[key] == nil || got[key][0] != want {
				t.Errorf("%s: %s=%q, want %q", name, key, got[key], want)
			}
		}
	}
	if r.Kernel != int64(len(vmlinuxFile(t))) || r.Initramfs != r.Unpacked || r.Release != "6.1.0-9-amd64" || r.Memory != 144 {
		t.Errorf("%+v", r)
	}
	if left, err := filepath.Glob(filepath.Join(cfg.Out, ".image-*")); len(left) > 0 || err != nil {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

func TestImageIsWithoutTheModulesNamed(t *testing.T) {
	cfg, r := buildWeb(t, func(c *Config) {
		c.Without, c.Uncompressed = []string{"tun", "xenfs", "xen_privcmd", "xen-gntdev"}, true
	})
	if want := []string{"xen_evtchn", "xen_gntalloc"}; !slices.Equal(r.Modules, want) {
		t.Errorf("it has %q, want %q", r.Modules, want)
	}
	for _, e := range readCPIO(t, read(t, cfg.Out, "initramfs")) {
		if strings.HasPrefix(e, "lib/modules/barevif/") && strings.Contains(e, "tun") {
			t.Error(e)
		}
		if strings.HasPrefix(e, "etc/barevif/image ") && !strings.Contains(e, `without tun\nwithout xenfs\n`) {
			t.Errorf("process 1 is not told: %s", e)
		}
	}
}

// The same input makes the same bytes, in another directory and at another time.
func TestImageIsReproducible(t *testing.T) {
	first, _ := buildWeb(t, func(c *Config) { c.Dir = "/srv/web" })
	second, r := buildWeb(t, func(c *Config) { c.Dir = "/srv/web" })
	for _, name := range []string{"kernel", "initramfs", "xl.cfg", "xl-pv.cfg"} {
		if !bytes.Equal(read(t, first.Out, name), read(t, second.Out, name)) {
			t.Errorf("%s is not the same", name)
		}
	}
	z, err := gzip.NewReader(bytes.NewReader(read(t, second.Out, "initramfs")))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, z); n != r.Unpacked || err != nil {
		t.Errorf("it unpacks to %d bytes, not %d: %v", n, r.Unpacked, err)
	}
	if b := read(t, second.Out, "kernel"); string(b[0x202:0x206]) != "HdrS" {
		t.Error("the kernel is not as it was in the package")
	}
}

// unpackCPIO writes the entries of an archive below a directory.
func unpackCPIO(t *testing.T, archive []byte, root string) {
	t.Helper()
	cmd := exec.Command("cpio", "-id", "--quiet")
	cmd.Dir, cmd.Stdin = root, bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("no cpio to unpack it: %v: %s", err, out)
	}
}

// The image starts in namespaces of its own, as any user: its process 1 runs the program, says what
// such a machine does not allow, and ends when it is asked to.
func TestImageStartsWithoutAKernelOfItsOwn(t *testing.T) {
	cfg, _ := buildWeb(t, func(c *Config) { c.Uncompressed = true })
	root := t.TempDir()
	unpackCPIO(t, read(t, cfg.Out, "initramfs"), root)
	cmd := exec.CommandContext(t.Context(), "/init")
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot:      root,
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Skip("no namespaces of one's own on this machine: ", err)
	}
	var said strings.Builder
	for lines := bufio.NewScanner(r); lines.Scan(); {
		said.WriteString(lines.Text() + "\n")
		if strings.HasPrefix(lines.Text(), "web: ready") {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
		}
	}
	cmd.Wait() // reboot(2) ends it by a signal
	for _, want := range []string{"barevif: kernel ", "this is no guest of Xen", "web: ready true <nil>\n", "barevif: asked to power off", "barevif: /app/web exited with status 3\n"} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("no %q in\n%s", want, &said)
		}
	}
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGINT {
		t.Errorf("process 1 ended with %v", cmd.ProcessState)
	}
}

func TestProgramThatCannotBeInAnImageIsNamed(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the go command is not installed: ", err)
	}
	dir := writeModule(t, map[string]string{
		"lib/lib.go": "package lib\n", "two/a/main.go": "package main\nfunc main() {}\n", "two/b/main.go": "package main\nfunc main() {}\n",
		"c/main.go": "package main\nimport \"C\"\nfunc main() {}\n", "needsc/main.go": "package main\nimport _ \"example.org/web/cgo\"\nfunc main() {}\n",
		"cgo/cgo.go": "package cgo\nimport \"C\"\n", "broken/main.go": "package main\nfunc main() { x }\n", "text.txt": "hello",
	})
	t.Chdir(dir)
	arm := module(t, "")
	arm[0x12] = 0xb7 // EM_AARCH64
	if err := os.WriteFile("arm", arm, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ pkg, cause, next string }{
		{"./lib", `"./lib": package lib is no program`, `"package main"`},
		{"./two/...", "2 packages, and an image has one program", "one main package"},
		{"./c", "needs cgo, in example.org/web/c, and an image has no C library", "--tags"},
		{"./needsc", "needs cgo, in example.org/web/cgo, and", "pure Go"},
		{"./broken", `"./broken" cannot be built`, "CGO_ENABLED=0 go build"},
		{"./absent", `"./absent" cannot be built`, "CGO_ENABLED=0 go build"},
		{"text.txt", `"text.txt": no program of Linux`, "main package of Go"},
		{"arm", `"arm": made for EM_AARCH64, and images are for amd64`, "GOARCH=amd64"},
		{"/bin/sh", `"/bin/sh": it needs shared libraries`, "CGO_ENABLED=0"},
	} {
		_, err := Program{Package: c.pkg}.build(t.Context(), t.TempDir())
		requireAdvice(t, err, c.cause, c.next)
	}
	t.Setenv("PATH", t.TempDir())
	_, err := Program{Package: "./two/a"}.build(t.Context(), t.TempDir())
	requireAdvice(t, err, "the go command is not installed", "a program that is built already")
}

func TestNamesOfPrograms(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the go command is not installed: ", err)
	}
	main := "package main\nfunc main() {}\n"
	dir := writeModule(t, map[string]string{"main.go": main, "v2/main.go": main, "v1/main.go": main, "v05/main.go": main})
	t.Chdir(dir)
	names := func() {
		t.Helper()
		for pkg, want := range map[string]string{".": "web", "example.org/web": "web", "./v2": "web", "./v1": "v1", "./v05": "v05", "main.go": "main"} {
			name, err := Program{Package: pkg}.list(t.Context())
			if name != want || err != nil {
				t.Errorf("%s: %q, %v", pkg, name, err)
			}
		}
	}
	names()
	// The go command says where it would put a program only if there is a home for it.
	goEnv, err := runGo(t.Context(), "", nil, "env", "GOCACHE", "GOMODCACHE")
	if err != nil {
		t.Fatal(err)
	}
	caches := strings.Split(goEnv, "\n")
	t.Setenv("GOCACHE", caches[0])
	t.Setenv("GOMODCACHE", caches[1])
	t.Setenv("GOPATH", "")
	t.Setenv("GOBIN", "")
	t.Setenv("HOME", "")
	os.Unsetenv("HOME") // and Setenv restores it
	names()
	// From a directory that belongs to no module, too.
	t.Chdir(t.TempDir())
	if err := os.Mkdir("made", 0o755); err != nil {
		t.Fatal(err)
	}
	file, err := Program{Package: filepath.Join(dir, "v2")}.build(t.Context(), "made")
	if info, serr := os.Stat(file); err != nil || serr != nil || info.Size() == 0 || !strings.HasSuffix(file, "/made/web") {
		t.Errorf("%s, %v, %v", file, err, serr)
	}
}

func TestWhatKeepsAnImageFromBeingMadeIsNamed(t *testing.T) {
	if os.Geteuid() != 0 {
		file := filepath.Join(t.TempDir(), "closed")
		if err := os.Mkdir(file, 0o500); err != nil {
			t.Fatal(err)
		}
		_, err := workDir(filepath.Join(file, "out"))
		requireAdvice(t, err, "the image cannot be written", "one that you may write to")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := workDir(file)
	requireAdvice(t, err, "the image cannot be written", "--out")
	_, err = Build(t.Context(), Config{Args: slices.Repeat([]string{"x"}, 99)})
	requireAdvice(t, err, "99 words, and the kernel takes 30", "--file HOST:GUEST")

	good := filepath.Join(t.TempDir(), "vmlinuz")
	image := bzImage(gzipped(t, vmlinuxFile(t)))
	image[0x236] = 1
	if err := os.WriteFile(good, image, 0o600); err != nil {
		t.Fatal(err)
	}
	modules := filepath.Join(t.TempDir(), "6.1.0-9")
	if err := os.MkdirAll(modules, 0o755); err != nil {
		t.Fatal(err)
	}
	_, err = KernelOfFiles(good, modules)
	requireAdvice(t, err, "is no directory of a kernel's modules", "--modules")
	_, err = KernelOfFiles("/no/such/vmlinuz", modules)
	requireAdvice(t, err, "/no/such/vmlinuz", "--vmlinuz")
	_, err = KernelOfFiles(file, modules)
	requireAdvice(t, err, "no Linux kernel", "another kernel")
	for name, b := range map[string][]byte{"modules.builtin": []byte("kernel/drivers/net/xen-netfront.ko\n"), "tun.ko": module(t, "depends=\x00")} {
		if err := os.WriteFile(filepath.Join(modules, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k, err := KernelOfFiles(good, modules)
	if err != nil || k.Release != "6.1.0-9" {
		t.Fatalf("%+v, %v", k, err)
	}
	_, err = (&Config{}).modules(k)
	requireAdvice(t, err, "kernel 6.1.0-9: the kernel has no module xen_evtchn", "as Debian's is")

	k, err = KernelOfPackages(t.Context(), []string{kernelDeb(t)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for advice, without := range map[string]Config{
		"xen_privcmd: xenfs needs it":                {Without: []string{"xen-privcmd"}},
		"has af_packet built in":                     {Without: []string{"af-packet"}},
		"xen_gntdev is asked for and to be left out": {Without: []string{"xen_gntdev"}, Modules: []string{"xen-gntdev"}},
	} {
		_, err = without.modules(k)
		requireAdvice(t, err, advice, "")
	}
	_, err = Build(t.Context(), Config{Without: []string{"af_packet"}})
	requireAdvice(t, err, "an image has no module af_packet to leave out", "xen-evtchn, xen-gntalloc,")
	_, err = Build(t.Context(), Config{Without: []string{"xen_gntalloc"}, Params: guestinit.Settings{Grants: 700}})
	requireAdvice(t, err, "pages cannot be granted without xen-gntalloc", "keep the module")
	k.Modules.(*debModules).builtin = []byte("kernel/drivers/net/xen-netfront.ko\n")
	_, err = (&Config{}).modules(k)
	requireAdvice(t, err, "xen-netfront would take the vif", "built in")
}

// fakeApt puts an apt into PATH that has a package, or fails.
func fakeApt(t *testing.T, script string) {
	t.Helper()
	bin := t.TempDir()
	for _, name := range []string{"apt-get", "apt-cache"} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
}

func TestKernelIsFetchedOnce(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "cache")
	var said []string
	say := func(format string, args ...any) { said = append(said, format) }
	fakeApt(t, `echo "E: no network" >&2; exit 100`)
	_, err := FetchKernel(t.Context(), cache, say)
	requireAdvice(t, err, "no kernel: apt-cache depends", "apt-get update")

	const file = "linux-image-6.1.0-9-amd64_6.1.27-1_amd64.deb"
	count := filepath.Join(t.TempDir(), "count")
	fakeApt(t, `case "$*" in
*depends*) echo linux-image-amd64; echo "  Depends: linux-image-6.1.0-9-amd64" ;;
*print-uris*) echo "'http://x/y' `+file+` 5 SHA256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824" ;;
"download linux-image-6.1.0-9-amd64=6.1.27-1") echo x >>"`+count+`"; printf hello >`+file+` ;;
esac`)
	for range 2 {
		got, err := FetchKernel(t.Context(), cache, say)
		if err != nil || got != filepath.Join(cache, file) {
			t.Fatalf("%s, %v", got, err)
		}
	}
	if n := len(read(t, filepath.Dir(count), "count")); n != 2 {
		t.Errorf("fetched %d times", n/2)
	}
	// Without a network the one that is there will do, and that is said.
	fakeApt(t, `exit 100`)
	said = nil
	got, err := FetchKernel(t.Context(), cache, say)
	if err != nil || got != filepath.Join(cache, file) || len(said) != 1 || !strings.HasPrefix(said[0], "no newer kernel than") {
		t.Errorf("%s, %v, %q", got, err, said)
	}
}
