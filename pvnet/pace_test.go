package pvnet

import (
	"testing"
	"testing/synctest"
	"time"
)

// stepFor simulates a peer that never rests, for d, and returns how many moves were made.
func stepFor(p *pace, d time.Duration) (moves int) {
	for end := time.Now().Add(d); time.Now().Before(end); moves++ {
		p.step(time.Now())
		time.Sleep(time.Until(p.until))
	}
	return moves
}

func TestAPaceIsForgivingFirstAndAfterAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		for range 2 {
			for i := range stepsAtOnce - 1 {
				p.step(time.Now())
				if !p.until.IsZero() {
					t.Fatalf("move %d is followed by a pause", i)
				}
			}
			if n := stepFor(&p, 10*time.Second); n < 9*stepsBetween || n > 14*stepsBetween {
				t.Errorf("%d moves in 10 s", n)
			}
			if n := stepFor(&p, time.Hour); n > 3601*stepsBetween {
				t.Errorf("%d moves in an hour", n)
			}
			time.Sleep(forgetAfter + time.Second)
		}
	})
}
