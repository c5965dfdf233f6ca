package xenbus

import "context"

// mostBeside bounds the number of sibling devices that Unconnected reads.
const mostBeside = 64

// Unconnected counts the other devices of our type that the toolstack gave this domain
// and that are not connected. When they connect they share the domain's limits (grants,
// event channels) with this one. It reads 64 devices at most, and leaves out those whose state it may
// not read.
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
			continue // being removed, or not readable for us
		}
		if !isUp(parseState(state)) {
			n++
		}
	}
	return n, nil
}
