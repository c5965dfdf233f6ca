package xenstore

// StartIDs makes the next request id follow id.
func (c *Client) StartIDs(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastID = id
}

// Tokens returns how many watches the Client still knows.
func (c *Client) Tokens() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.watches)
}
