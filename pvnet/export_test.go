package pvnet

import "time"

// SetPatience sets for how long a caller may stay in a half that is to be empty.
func (d *Device) SetPatience(t time.Duration) { d.patience = t }
