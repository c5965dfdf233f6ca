// Package pause waits between attempts.
package pause

import (
	"context"
	"math/rand/v2"
	"time"
)

// Wait waits for d or the end of ctx, and returns the cause of that.
func Wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Jitter is a random time between half of d and d, so that many who wait do not all come
// back at once.
func Jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }
