package domaintest_test

import (
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/domaintest"
)

// openDomain is what a port calls to become a domain.
var openDomain func() (hypercall.Domain, error)

// The test of a port that has one domain: it is its own peer, as on a Xen where no other
// domain answers.
func ExampleRun() {
	_ = func(t *testing.T) { // TestDomain, in the port's package
		domaintest.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
			d, err := openDomain()
			if err != nil {
				t.Fatal(err)
			}
			return d, d
		})
	}
}
