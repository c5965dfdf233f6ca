// Package release says which version of this project a program is.
package release

import (
	"runtime/debug"
	"strings"
)

// Version is the version of this source, and the first heading of CHANGELOG.md. The go command
// knows another only of a module that it fetched by version: for a clone without tags it makes
// one up, of v0.0.0 and the commit.
const Version = "0.1-dev"

// Of returns the version of the program with this build info, which may be nil, and the commit
// that it was built of, "" if that is not known.
func Of(info *debug.BuildInfo) (version, commit string) {
	version = Version
	if info == nil {
		return version, ""
	}
	if v := info.Main.Version; v != "" && v != "(devel)" && !strings.HasPrefix(v, "v0.0.0-") {
		version = v
	}
	var dirty string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			commit = s.Value
		case "vcs.modified":
			if s.Value == "true" {
				dirty = ", and changes that were not committed"
			}
		}
	}
	if commit != "" {
		commit += dirty
	}
	return version, commit
}
