// Package pause waits between attempts.
package pause

import (
	"context"
	"math/rand/v2"
	"time"
)

// Wait waits for d or for the end of ctx. It returns nil after d, else the cause of ctx.
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

// Jitter returns a random duration between d/2 and d, so that waiters that started
// together do not all retry together.
func Jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }
