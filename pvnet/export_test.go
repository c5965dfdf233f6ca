package pvnet

import "time"

// SetPatience sets how long quiesce waits for a caller to leave a half.
func (d *Device) SetPatience(t time.Duration) { d.callerTimeout = t }

// Parked returns how many waits the receiver of queue i has begun, if it waits now.
func (d *Device) Parked(i int) int {
	if n := d.rx[i].waitSeq.Load(); n%2 == 1 {
		return int(n+1) / 2
	}
	return 0
}
