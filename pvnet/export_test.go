package pvnet

import "time"

// SetPatience sets for how long a caller may stay in a half that is to be empty.
func (d *Device) SetPatience(t time.Duration) { d.patience = t }

// Parked is how often the receiver of queue i has begun to wait, if it waits.
func (d *Device) Parked(i int) int {
	if n := d.rx[i].parked.Load(); n%2 == 1 {
		return int(n+1) / 2
	}
	return 0
}
