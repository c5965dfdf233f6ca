//go:build linux

package xendev

import (
	"slices"
	"testing"

	"barevif/hypercall"
)

// The grant that a map failed for is found in a few tries, however many a peer has named.
func TestTheFirstBadGrantIsFound(t *testing.T) {
	for _, n := range []int{1, 2, 3, 512} {
		refs := make([]hypercall.GrantRef, n)
		for i := range refs {
			refs[i] = hypercall.GrantRef(100 + i)
		}
		for i := range refs {
			bad, tried := []hypercall.GrantRef{refs[i], refs[n-1]}, 0
			got := firstBad(refs, func(part []hypercall.GrantRef) bool {
				tried++
				return !slices.ContainsFunc(part, func(r hypercall.GrantRef) bool { return slices.Contains(bad, r) })
			})
			if got != refs[i] || tried > 9 {
				t.Errorf("grant %d of %d: found %d in %d tries", i, n, got-100, tried)
			}
		}
	}
}
