package xenstore

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"barevif/xenbus/xenstore/wire"
)

// A Code is xenstored's name for the reason of a refusal. It is an error, to be tested
// with [errors.Is].
type Code string

// The names are those of xen/include/public/io/xs_wire.h. ErrQuota is oxenstored's own,
// where the C daemon says ENOSPC.
const (
	ErrInvalid  Code = "EINVAL"    // also fs.ErrInvalid; a path is checked before it is sent
	ErrAccess   Code = "EACCES"    // also fs.ErrPermission; also for a missing node in a directory that the domain may not read
	ErrExists   Code = "EEXIST"    // also fs.ErrExist
	ErrIsDir    Code = "EISDIR"    //
	ErrNotFound Code = "ENOENT"    // also fs.ErrNotExist
	ErrNoMemory Code = "ENOMEM"    //
	ErrNoSpace  Code = "ENOSPC"    // also ErrQuota: nodes, node size, transactions
	ErrIO       Code = "EIO"       //
	ErrNotEmpty Code = "ENOTEMPTY" //
	ErrNoSys    Code = "ENOSYS"    // also errors.ErrUnsupported
	ErrReadOnly Code = "EROFS"     //
	ErrBusy     Code = "EBUSY"     //
	ErrAgain    Code = "EAGAIN"    // the transaction conflicts and has to run again
	ErrIsConn   Code = "EISCONN"   //
	ErrTooBig   Code = "E2BIG"     // a request over Config.MaxPayload; for a watch, also ErrQuota
	ErrPerm     Code = "EPERM"     // also fs.ErrPermission
	ErrQuota    Code = "EQUOTA"    // any limit on what one domain may have

	// ErrUnknown stands for any other name; Error.Text holds it.
	ErrUnknown Code = "unknown error"
)

func (c Code) Error() string { return "xenstore: " + string(c) }

// Is makes errors.Is match a Code with the errors of package fs.
func (c Code) Is(target error) bool { return target != nil && target == c.portable() }

// portable returns the standard error that the Code also is, or nil.
func (c Code) portable() error {
	switch c {
	case ErrNotFound:
		return fs.ErrNotExist
	case ErrAccess, ErrPerm:
		return fs.ErrPermission
	case ErrExists:
		return fs.ErrExist
	case ErrInvalid:
		return fs.ErrInvalid
	case ErrNoSys:
		return errors.ErrUnsupported
	case ErrNoSpace:
		return ErrQuota
	}
	return nil
}

// parseCode reads the payload of an ERROR reply: a name and a NUL.
func parseCode(payload string) (Code, string) {
	name := strings.TrimSuffix(payload, "\x00")
	switch c := Code(name); c {
	case ErrInvalid, ErrAccess, ErrExists, ErrIsDir, ErrNotFound, ErrNoMemory,
		ErrNoSpace, ErrIO, ErrNotEmpty, ErrNoSys, ErrReadOnly, ErrBusy,
		ErrAgain, ErrIsConn, ErrTooBig, ErrPerm, ErrQuota:
		return c, ""
	}
	return ErrUnknown, Clip(name)
}

// An Error is a request that xenstored refused, or that the Client refused to send.
type Error struct {
	Op   string // "read", "write", "watch" ...
	Path string // or the other argument of the request
	Code Code
	Text string // the server's text, clipped, if Code is ErrUnknown
}

func (e *Error) Error() string {
	name := string(e.Code)
	if e.Text != "" {
		name = fmt.Sprintf("%q", e.Text)
	}
	if quota := e.quota(); quota != "" {
		name += " (" + quota + ")"
	}
	if e.Path == "" {
		return fmt.Sprintf("xenstore %s: %s", e.Op, name)
	}
	return fmt.Sprintf("xenstore %s %s: %s", e.Op, e.Path, name)
}

// Unwrap returns the Code.
func (e *Error) Unwrap() error { return e.Code }

// Is maps E2BIG as the answer to a watch to ErrQuota: there are too many watches.
func (e *Error) Is(target error) bool {
	return target == ErrQuota && e.Code == ErrTooBig && e.Op == opName(wire.Watch)
}

// ErrLost is returned when the connection broke after a changing request was sent:
// xenstored may or may not have carried it out. The caller may send it again. The Client
// itself repeats requests that change nothing, up to 8 times.
var ErrLost = errors.New("xenstore: connection lost, outcome unknown")

// ErrUnanswered is in an error of [Client.Transact] if the transaction may have been committed all
// the same: a commit was sent and has no answer.
var ErrUnanswered = errors.New("xenstore: a commit without an answer, outcome unknown")

// A ProtocolError is a message that no correct xenstored sends. The Client closes the
// connection it came on.
type ProtocolError struct{ Reason string }

func (e *ProtocolError) Error() string { return "xenstore broke the protocol: " + e.Reason }

// A ConflictError is a transaction that conflicted in each of its attempts. Err is the
// last ErrAgain.
type ConflictError struct {
	Attempts int
	Err      error
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("xenstore transaction given up after %d attempts: %v", e.Attempts, e.Err)
}

func (e *ConflictError) Unwrap() error { return e.Err }

// Clip bounds a peer's text for an error or a log line to 64 bytes.
func Clip(s string) string {
	const most = 64
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

func opName(op wire.Op) string {
	switch op {
	case wire.Control:
		return "control"
	case wire.Directory, wire.DirectoryPart:
		return "directory"
	case wire.Read:
		return "read"
	case wire.GetPerms:
		return "get-perms"
	case wire.Watch:
		return "watch"
	case wire.Unwatch:
		return "unwatch"
	case wire.TransactionStart:
		return "transaction-start"
	case wire.TransactionEnd:
		return "transaction-end"
	case wire.Introduce:
		return "introduce"
	case wire.Release:
		return "release"
	case wire.GetDomainPath:
		return "get-domain-path"
	case wire.Write:
		return "write"
	case wire.Mkdir:
		return "mkdir"
	case wire.Rm:
		return "rm"
	case wire.SetPerms:
		return "set-perms"
	case wire.IsDomainIntroduced:
		return "is-domain-introduced"
	case wire.Resume:
		return "resume"
	case wire.SetTarget:
		return "set-target"
	case wire.ResetWatches:
		return "reset-watches"
	case wire.GetFeature:
		return "get-feature"
	case wire.SetFeature:
		return "set-feature"
	case wire.GetQuota:
		return "get-quota"
	case wire.SetQuota:
		return "set-quota"
	}
	return fmt.Sprintf("request %d", uint32(op))
}
