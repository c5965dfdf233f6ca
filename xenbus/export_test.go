package xenbus

import "context"

// StartIDs makes the next request id follow id.
func (c *Client) StartIDs(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastID = id
}

// Tokens is how many watches the Client still knows of.
func (c *Client) Tokens() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.watches)
}

// ValidPath is what requests are checked with.
func ValidPath(path string) bool { return validPath(path) }

// Values is what Device.OwnValues and PeerValues read with.
func (c *Client) Values(ctx context.Context, dir string, keys []string) (Values, error) {
	return c.values(ctx, dir, keys)
}
