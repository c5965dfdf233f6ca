package xenstored

import "fmt"

// A Defect is a known fault of releases of the daemon before the one whose changelog
// names the advisory.
type Defect struct{ Advisory, CVE, Effect string }

// ResetInTransaction ends the daemon, at the wish of any guest.
var ResetInTransaction = Defect{"XSA-484", "CVE-2026-23557", "RESET_WATCHES within a transaction ends it"}

func (d Defect) String() string { return fmt.Sprintf("%s (%s): %s", d.Advisory, d.CVE, d.Effect) }
