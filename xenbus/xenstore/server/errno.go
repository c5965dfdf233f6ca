package server

import "io/fs"

// An Errno is an error of the protocol: a name from xsd_errors in
// xen/include/public/io/xs_wire.h.
type Errno string

const (
	EINVAL Errno = "EINVAL" // malformed path or arguments
	EACCES Errno = "EACCES" // not allowed, or not allowed to know whether the node exists
	EEXIST Errno = "EEXIST" // the same path and token are watched already
	ENOENT Errno = "ENOENT" // no such node, transaction, watch or domain
	ENOMEM Errno = "ENOMEM" // memory quota, or commit of a transaction with a refused write
	ENOSPC Errno = "ENOSPC" // any other quota but the one of watches
	ENOSYS Errno = "ENOSYS" // unknown operation
	EBUSY  Errno = "EBUSY"  // a transaction within a transaction
	EAGAIN Errno = "EAGAIN" // the transaction conflicts: redo all of it
	E2BIG  Errno = "E2BIG"  // quota of watches, or the reply would not fit
	EPERM  Errno = "EPERM"  // only a privileged domain may change the owner
)

func (e Errno) Error() string { return "xenstore: " + string(e) }

// Is makes errors.Is match fs.ErrNotExist, fs.ErrPermission and fs.ErrExist.
func (e Errno) Is(target error) bool {
	switch target {
	case fs.ErrNotExist:
		return e == ENOENT
	case fs.ErrPermission:
		return e == EACCES || e == EPERM
	case fs.ErrExist:
		return e == EEXIST
	}
	return false
}
