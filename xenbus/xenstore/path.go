package xenstore

import (
	"strings"

	"barevif/xenbus/xenstore/wire"
)

// ValidPath reports whether xenstored accepts path as a node, absolute or relative to the
// domain's home. A path is not empty, has no "//" and no "/" at the end, and has at most
// 2048 bytes after an optional /local/domain/<n>/ (tools/xenstored).
func ValidPath(path string) bool {
	if path == "/" {
		return true
	}
	if path == "" || path[len(path)-1] == '/' || strings.Contains(path, "//") {
		return false
	}
	for i := range len(path) {
		if !pathByte(path[i]) && path[i] != '/' {
			return false
		}
	}
	return len(afterHome(path)) <= wire.MaxRelPath
}

// validWatch also accepts the special names, such as "@releaseDomain".
func validWatch(path string) bool {
	return ValidPath(path) && (path[0] != '@' || !strings.Contains(path, "/"))
}

// ValidName reports whether name is a valid component of a path.
func ValidName(name string) bool {
	if name == "" || len(name) > wire.MaxRelPath {
		return false
	}
	for i := range len(name) {
		if !pathByte(name[i]) {
			return false
		}
	}
	return true
}

func pathByte(b byte) bool {
	switch {
	case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z', '0' <= b && b <= '9':
		return true
	}
	return b == '-' || b == '_' || b == '@'
}

// afterHome returns path without a leading /local/domain/<n>/.
func afterHome(path string) string {
	rest, ok := strings.CutPrefix(path, "/local/domain/")
	if !ok {
		return path
	}
	id, rest, ok := strings.Cut(rest, "/")
	if _, err := ParseUint(id, 1<<16-1); err != nil || !ok {
		return path
	}
	return rest
}

// below reports whether path is dir or a node below it.
func below(path, dir string) bool {
	if dir == "/" {
		return strings.HasPrefix(path, "/")
	}
	rest, ok := strings.CutPrefix(path, dir)
	return ok && (rest == "" || rest[0] == '/')
}
