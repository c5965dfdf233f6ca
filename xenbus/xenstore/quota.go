package xenstore

import "barevif/xenbus/xenstore/wire"

// quota names the limit that a request has met and the option that raises it, because
// xenstored says only ENOSPC or E2BIG, which do not help the reader of a log. The
// defaults are those of C xenstored and its options; oxenstored has its own in
// oxenstored.conf.
func (e *Error) quota() string {
	full := e.Code == ErrNoSpace || e.Code == ErrQuota
	switch e.Op {
	case opName(wire.Watch):
		if full || e.Code == ErrTooBig {
			return "xenstore allows this domain no more watches: 128 by default, xenstored --watch-nb, or quota-maxwatch of oxenstored.conf"
		}
	case opName(wire.TransactionStart):
		if full {
			return "xenstore allows this domain no more transactions at once: 10 by default, xenstored --transaction, or quota-transaction of oxenstored.conf"
		}
	case opName(wire.Write), opName(wire.Mkdir), opName(wire.TransactionEnd):
		if full {
			return "xenstore allows this domain no more nodes, those the toolstack made for it included: 1000 by default, xenstored --entry-nb, or quota-maxentity of oxenstored.conf (or one node has grown too large: 2048 bytes, --entry-size)"
		}
		if e.Code == ErrNoMemory {
			return "xenstore allows this domain no more memory: 2.5 MB by default, xenstored --quota memory"
		}
	case opName(wire.SetPerms):
		if full {
			return "xenstore allows a node no more permissions: 5 by default, xenstored --perm-nb"
		}
	}
	return ""
}
