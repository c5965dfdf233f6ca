//go:build linux

// Package userdir names the directory that a user has for sockets in the one for temporary
// files: that of an emulated host ([barevif/hypercall/anyxen.Socket]), and those by which
// processes without a directory in /run are looked into and hand over.
//
// Any user of the machine can make a directory of that name first. So the packages that use the
// directory check its owner, and their errors name the owner that they found.
package userdir

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Temp returns the directory of user uid, such as /tmp/barevif-1000. It need not be there.
//
// The number in the name is that of [Outside]: the directory for temporary files is the
// machine's, so all of one user's processes have one name there, those in a user namespace too,
// and none has root's because it believes to be root.
func Temp(uid int) string { return named(Outside(uid)) }

// Former returns the directory that older programs use instead of [Temp] in a user namespace, by
// the number inside, if it is there and that user's: one of them may run. Otherwise it is "".
func Former(uid int) string {
	if Outside(uid) == uid {
		return ""
	}
	dir := named(uid)
	st, err := os.Lstat(dir)
	if err != nil || !st.IsDir() {
		return ""
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != uid {
		return ""
	}
	return dir
}

func named(uid int) string {
	return filepath.Join(os.TempDir(), "barevif-"+strconv.Itoa(uid))
}

// Outside returns the uid that user uid of this process's user namespace has in the namespace
// around it. In the machine's first namespace, and for a uid that the namespace does not map, the
// result is uid. Of nested namespaces it looks at the innermost alone.
func Outside(uid int) int {
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil { // no /proc, or no user namespaces in this kernel
		return uid
	}
	return outside(ids, uid)
}

// outside looks uid up in a table of user_namespaces(7): lines of the first number inside, the
// first outside, and how many.
func outside(ids []byte, uid int) int {
	for lines := bufio.NewScanner(bytes.NewReader(ids)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) != 3 {
			continue
		}
		var n [3]int64
		ok := true
		for i := range n {
			v, err := strconv.ParseUint(f[i], 10, 32)
			n[i], ok = int64(v), ok && err == nil
		}
		if at := int64(uid) - n[0]; ok && at >= 0 && at < n[2] {
			return int(n[1] + at)
		}
	}
	return uid
}
