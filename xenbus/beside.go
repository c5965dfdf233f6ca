package xenbus

import "context"

// mostBeside bounds how many devices beside ours are looked at.
const mostBeside = 64

// Unconnected is how many other devices of our type this domain has, of those its
// toolstack gave it, that are not connected: frontends yet to come, which share its
// limits with us. It looks at 64 at most.
func (d *Device) Unconnected(ctx context.Context) (n int, err error) {
	parent := parentOf(d.dir)
	all, err := list(ctx, d.c, parent)
	if err != nil {
		return 0, err
	}
	for _, id := range all[:min(len(all), mostBeside)] {
		if id == d.id {
			continue
		}
		state, err := d.c.Read(ctx, parent+"/"+id+"/state")
		if err != nil {
			continue // going, or not ours to read
		}
		if !parseState(state).up() {
			n++
		}
	}
	return n, nil
}
