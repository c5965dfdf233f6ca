package dnsproxy

import (
	"container/list"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Bounds of a group's memory.
const (
	cacheEntries = 2048
	cacheRecords = 8192            // of all entries
	entryRecords = 64              // of one; an answer with more is not kept
	cacheBytes   = 8 << 20         // of all entries, as weight counts them
	entryBytes   = 64 << 10        // of one; an answer with more is not kept
	longest      = time.Hour       // that an answer is kept
	longestNone  = 5 * time.Minute // that an answer is kept which says that there is no such name or record
)

// A cache is the memory of one group: the answers of a bounded number of questions, of which it
// forgets the one that was asked for least lately.
type cache struct {
	entries map[string]*list.Element
	order   list.List // of *entry, the latest first
	records int
	bytes   int
}

type entry struct {
	key     string
	m       *dnsmessage.Message // immutable
	records int
	bytes   int
	since   time.Time
	until   time.Time
}

func newCache() *cache { return &cache{entries: map[string]*list.Element{}} }

// get returns an answer whose records have the time to live that is left of them; nil: there is none.
func (c *cache) get(key string, now time.Time) *dnsmessage.Message {
	e := c.entries[key]
	if e == nil {
		return nil
	}
	en := e.Value.(*entry)
	if !now.Before(en.until) || now.Before(en.since) {
		c.remove(e)
		return nil
	}
	c.order.MoveToFront(e)
	age := uint32(now.Sub(en.since) / time.Second)
	return &dnsmessage.Message{Header: en.m.Header, Answers: aged(en.m.Answers, age), Authorities: aged(en.m.Authorities, age), Additionals: aged(en.m.Additionals, age)}
}

// aged returns copies of records whose time to live is shorter by age seconds.
func aged(list []dnsmessage.Resource, age uint32) []dnsmessage.Resource {
	out := append([]dnsmessage.Resource(nil), list...)
	for i := range out {
		if h := &out[i].Header; h.Type != dnsmessage.TypeOPT {
			h.TTL -= min(h.TTL, age)
		}
	}
	return out
}

func (c *cache) remove(e *list.Element) {
	en := e.Value.(*entry)
	c.order.Remove(e)
	delete(c.entries, en.key)
	c.records -= en.records
	c.bytes -= en.bytes
}

// weight returns about how many bytes of memory an answer takes. Texts and records of types that are not
// known to dnsmessage are as long as their sender likes, and an empty text of one byte in the message is
// 16 here.
func weight(m *dnsmessage.Message) (n int) {
	const record, text, parameter = 640, 16, 40 // with two names of 256 bytes
	for _, list := range [...][]dnsmessage.Resource{m.Answers, m.Authorities, m.Additionals} {
		for _, r := range list {
			n += record
			switch b := r.Body.(type) {
			case *dnsmessage.TXTResource:
				for _, s := range b.TXT {
					n += text + len(s)
				}
			case *dnsmessage.SVCBResource:
				n += parameters(b.Params, parameter)
			case *dnsmessage.HTTPSResource:
				n += parameters(b.Params, parameter)
			case *dnsmessage.OPTResource:
				for _, o := range b.Options {
					n += parameter + len(o.Data)
				}
			case *dnsmessage.UnknownResource:
				n += len(b.Data)
			}
		}
	}
	return n
}

func parameters(list []dnsmessage.SVCParam, each int) (n int) {
	for _, p := range list {
		n += each + len(p.Value)
	}
	return n
}

// put keeps an answer if it may be kept.
func (c *cache) put(key string, m *dnsmessage.Message, now time.Time) {
	life := lifetime(m)
	n := len(m.Answers) + len(m.Authorities) + len(m.Additionals)
	bytes := weight(m) + len(key)
	if life <= 0 || n > entryRecords || bytes > entryBytes {
		return
	}
	if old := c.entries[key]; old != nil {
		c.remove(old)
	}
	for len(c.entries) >= cacheEntries || len(c.entries) > 0 && (c.records+n > cacheRecords || c.bytes+bytes > cacheBytes) {
		c.remove(c.order.Back())
	}
	c.entries[key] = c.order.PushFront(&entry{key, m, n, bytes, now, now.Add(life)})
	c.records += n
	c.bytes += bytes
}

// lifetime returns how long an answer may be kept (RFC 2181, 5.2; RFC 2308, 5): 0 for one that
// may not.
func lifetime(m *dnsmessage.Message) time.Duration {
	if m.Header.Truncated || m.Header.RCode != dnsmessage.RCodeSuccess && m.Header.RCode != dnsmessage.RCodeNameError {
		return 0
	}
	life := longest
	shorten := func(seconds uint32) {
		if seconds >= 1<<31 { // RFC 2181, section 8
			seconds = 0
		}
		life = min(life, time.Duration(seconds)*time.Second)
	}
	for _, list := range [...][]dnsmessage.Resource{m.Answers, m.Authorities, m.Additionals} {
		for _, r := range list {
			if r.Header.Type != dnsmessage.TypeOPT {
				shorten(r.Header.TTL)
			}
		}
	}
	if len(m.Answers) > 0 && m.Header.RCode == dnsmessage.RCodeSuccess {
		return life
	}
	for _, r := range m.Authorities {
		if soa, ok := r.Body.(*dnsmessage.SOAResource); ok {
			shorten(soa.MinTTL)
			return min(life, longestNone)
		}
	}
	return 0
}
