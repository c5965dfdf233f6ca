//go:build linux

package xenstored_test

import (
	"testing"

	"barevif/test/storesuite"
	"barevif/test/xenstored"
)

func TestClientAgainstDebiansDaemon(t *testing.T) {
	storesuite.Run(t, func(t testing.TB) storesuite.Dialer {
		return xenstored.Start(t).Dial
	})
}
