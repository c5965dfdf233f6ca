//go:build !unix

package hostile

import (
	"testing"
	"time"
)

// cpuTime does not know: there is no operating system that would tell.
func cpuTime(testing.TB) (used time.Duration, known bool) { return 0, false }
