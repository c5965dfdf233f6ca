package server

import (
	"strings"

	"barevif/xenbus/xenstore/wire"
)

// maxPath bounds a path, not counting a leading /local/domain/<n>/. C xenstored applies
// XENSTORE_REL_PATH_MAX to absolute paths too.
const maxPath = wire.MaxRelPath

// validPath is is_valid_nodename of xenstored_core.c.
func validPath(p string) bool {
	if p == "/" {
		return true
	}
	if len(p) == 0 || p[0] != '/' || p[len(p)-1] == '/' || len(p)-homeLen(p) > maxPath {
		return false
	}
	for i := 0; i < len(p); i++ {
		switch c := p[i]; {
		case c == '/':
			if p[i+1] == '/' { // in bounds: the last byte is no slash
				return false
			}
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '@':
		default:
			return false
		}
	}
	return true
}

// homeLen returns the length of a leading /local/domain/<n>/, where n has at most five
// digits.
func homeLen(p string) int {
	const prefix = "/local/domain/"
	if !strings.HasPrefix(p, prefix) {
		return 0
	}
	digits := 0
	for rest := p[len(prefix):]; digits < len(rest) && digits < 5 && '0' <= rest[digits] && rest[digits] <= '9'; {
		digits++
	}
	end := len(prefix) + digits
	if digits == 0 || end == len(p) || p[end] != '/' {
		return 0
	}
	return end + 1
}

// parentOf returns a substring of p, so that all ancestors of a deep path share its
// memory.
func parentOf(p string) string {
	if i := strings.LastIndexByte(p, '/'); i > 0 {
		return p[:i]
	}
	return "/"
}

func baseOf(p string) string { return p[strings.LastIndexByte(p, '/')+1:] }

func join(dir, name string) string {
	if dir == "/" {
		return "/" + name
	}
	return dir + "/" + name
}

// within reports whether p is dir or below it.
func within(p, dir string) bool {
	if dir == "/" {
		return strings.HasPrefix(p, "/")
	}
	return strings.HasPrefix(p, dir) && (len(p) == len(dir) || p[len(dir)] == '/')
}
