//go:build !amd64 || race

package telemetry

import "sync/atomic"

// put stores a word of a mirror, after all earlier stores and before all later ones.
func put(p *uint64, v uint64) { atomic.StoreUint64(p, v) }
