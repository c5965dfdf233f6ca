package xenbus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/internal/pause"
	"barevif/xenbus/xenstore"
)

var (
	// ErrGone is returned when our own directory is no longer there, or was made
	// anew since we claimed it: the device was taken away. Nothing was written, so
	// that it does not come back half.
	ErrGone = errors.New("xenbus: the device's directory is gone")

	// ErrClaimed is returned when another process has claimed the device.
	ErrClaimed = errors.New("xenbus: the device is claimed by another process")
)

// A NoDeviceError is a device that is not there, with those that are.
type NoDeviceError struct {
	Dir  string   // where it would be
	Have []string // ids beside it
}

func (e *NoDeviceError) Error() string {
	if len(e.Have) == 0 {
		return fmt.Sprintf("no device at %q, nor any other", xenstore.Clip(e.Dir))
	}
	// Ids are numbers: without quotation marks one reads as how many there are.
	return fmt.Sprintf("no device at %q; the devices there are: %s", xenstore.Clip(e.Dir), strings.Trim(fmt.Sprintf("%q", e.Have), "[]"))
}

// Unwrap gives ErrNotFound.
func (e *NoDeviceError) Unwrap() error { return xenstore.ErrNotFound }

// A WaitError is a wait that ended before what it waited for came.
type WaitError struct {
	Dir     string   // our end of the device
	Missing []string // keys that were not there yet, if it was for keys
	Own     State    // as it was at the end
	Seen    []State  // of the peer, oldest first, at most the last 16
	Err     error    // the context's cause
}

func (e *WaitError) Error() string {
	if len(e.Missing) > 0 {
		return fmt.Sprintf("xenbus %s: still without %s: %v", e.Dir, strings.Join(e.Missing, ", "), e.Err)
	}
	seen := "no state we may read"
	if len(e.Seen) > 0 {
		seen = strings.Trim(fmt.Sprint(e.Seen), "[]")
	}
	return fmt.Sprintf("xenbus %s: own state %v, other end showed %s: %v", e.Dir, e.Own, seen, e.Err)
}

func (e *WaitError) Unwrap() error { return e.Err }

const maxSeen = 16

// A Device is one end of a xenbus device: its directory, the other end's, and what
// both say. One goroutine of its own reads them again when xenstore says they may
// have changed. Methods may be called from any goroutine.
type Device struct {
	c       *xenstore.Client
	role    Role
	typ, id string
	dir     string // ours, relative to the domain's home
	cancel  context.CancelFunc
	done    chan struct{}
	own     *xenstore.Watch // on dir
	changes chan Change
	poke    chan struct{} // holds one: look at our directory again
	setting sync.Mutex    // held by SetState throughout
	written uint64        // by the peer, its state; run's alone. See Change.PeerWrites

	mu      sync.Mutex
	cur     Change  // guarded by mu
	told    bool    // guarded by mu; cur has been delivered
	spent   bool    // guarded by mu; changes is closed
	peer    end     // guarded by mu
	seen    []State // guarded by mu
	wrote   State   // guarded by mu; last state we wrote, Unknown: none
	writing State   // guarded by mu; the one SetState is about to write
	writes  uint64  // guarded by mu; grows when a SetState begins and when it ends
	failed  State   // guarded by mu; one that SetState may have written although it failed
	reads   uint64  // guarded by mu; times our own directory was read, and told of
	mark    string  // guarded by mu; a key we published last, "" if none
	claim   string  // guarded by mu; our id, "" if not claimed
	trouble error   // guarded by mu; why Current may be out of date
	lasting bool    // guarded by mu; the claim's node was there before the claim
}

// An end is the other end's directory, and whose it is.
type end struct {
	dir string // absolute
	dom hypercall.DomID
}

// Frontends lists the ids of this domain's devices of a type, in order.
func Frontends(ctx context.Context, c *xenstore.Client, typ string) ([]string, error) {
	return list(ctx, c, "device/"+typ)
}

// list gives the device ids below dir, none if it is not there.
func list(ctx context.Context, c *xenstore.Client, dir string) ([]string, error) {
	all, err := c.Directory(ctx, dir)
	if errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(id string) bool { return !validID(id) })
	slices.SortFunc(all, func(a, b string) int { // as numbers: none has a leading zero
		return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
	return all, nil
}

// validID says whether id is a device number as the toolstack writes it.
func validID(id string) bool {
	_, err := xenstore.ParseUint(id, 1<<31-1)
	return err == nil
}

// OpenFrontend opens this domain's device of a type ("vif") and id ("0"). It waits
// for the keys the toolstack writes, until ctx ends: then a [*WaitError] that says
// which are missing. A device that is not there is a [*NoDeviceError]; keys that
// contradict each other are a [*ValueError].
func OpenFrontend(ctx context.Context, c *xenstore.Client, typ, id string) (*Device, error) {
	return openDevice(ctx, c, &Device{role: Frontend, typ: typ, id: id, dir: "device/" + typ + "/" + id}, "device/"+typ)
}

// OpenBackend opens the end this domain serves of another's device; typ is the
// backend type, by which the toolstack chose us. It waits as OpenFrontend does,
// also for the frontend's state.
func OpenBackend(ctx context.Context, c *xenstore.Client, typ string, front hypercall.DomID, id string) (*Device, error) {
	parent := fmt.Sprintf("backend/%s/%d", typ, front)
	return openDevice(ctx, c, &Device{role: Backend, typ: typ, id: id, dir: parent + "/" + id}, parent)
}

func openDevice(ctx context.Context, c *xenstore.Client, d *Device, parent string) (*Device, error) {
	d.c = c
	d.done = make(chan struct{})
	d.changes = make(chan Change, 1)
	d.poke = make(chan struct{}, 1)
	absent := func() error {
		have, err := list(ctx, c, parent)
		if err != nil {
			return err
		}
		return &NoDeviceError{d.dir, have}
	}
	if !xenstore.ValidName(d.typ) {
		return nil, &NoDeviceError{Dir: d.dir}
	}
	if !validID(d.id) {
		return nil, absent()
	}
	if _, err := c.Read(ctx, d.dir); errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
		return nil, absent()
	} else if err != nil {
		return nil, err
	}
	var err error
	if d.own, err = c.Watch(ctx, d.dir); err != nil {
		return nil, err
	}
	d.skip()
	peer, err := d.find(ctx)
	if errors.Is(err, ErrGone) {
		err = absent()
	}
	if err != nil {
		d.own.Close()
		return nil, err
	}
	d.peer = peer
	stale := everything()
	stale.backend = false // find has read it
	for stale.any() {
		if stale, err = d.refresh(ctx, stale); err == nil {
			break
		}
		if pause.Wait(ctx, retryPause) != nil {
			d.own.Close()
			return nil, fmt.Errorf("xenbus %s: %w", d.dir, err)
		}
	}
	life, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	go d.run(life)
	return d, nil
}

// Role says which end of the device this is.
func (d *Device) Role() Role { return d.role }

// Dir is our directory, relative to the domain's home.
func (d *Device) Dir() string { return d.dir }

// ID is the device's number among those of its type.
func (d *Device) ID() string { return d.id }

// Peer gives the other end's directory, absolute, and its domain. For a frontend
// they may change with the Generation.
func (d *Device) Peer() (dir string, dom hypercall.DomID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.peer.dir, d.peer.dom
}

// Changes delivers what xenstore says, once after opening and then when it differs
// from before. One that was not taken is replaced by the next. It is closed when
// the Device or the Client is. One goroutine should receive from it.
func (d *Device) Changes() <-chan Change { return d.changes }

// Current is the last Change, taken or not.
func (d *Device) Current() Change {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cur
}

// Trouble is why Current may be out of date: xenstore refused to be read, or watched.
// It is tried again until it succeeds; nil means that it did.
func (d *Device) Trouble() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.trouble
}

// Seen lists the states the peer went through, as far as they were caught, oldest
// first, at most the last 16.
func (d *Device) Seen() []State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.seen)
}

// Await receives from Changes until ok accepts one. If ctx ends before, the error
// is a [*WaitError]; net.ErrClosed if the Device or Client is closed.
func (d *Device) Await(ctx context.Context, ok func(Change) bool) (Change, error) {
	for {
		select {
		case ch, open := <-d.changes:
			if !open {
				return d.Current(), fmt.Errorf("xenbus %s: %w", d.dir, net.ErrClosed)
			}
			if ok(ch) {
				return ch, nil
			}
		case <-ctx.Done():
			ch := d.Current()
			return ch, &WaitError{Dir: d.dir, Own: ch.Own, Seen: d.Seen(), Err: context.Cause(ctx)}
		}
	}
}

// SetState writes our state if it is not that already, also where it is only
// because another wrote over it. The next Change has it. ErrGone if the directory is
// not there, of which Current says so too, ErrClaimed if it is another's by now.
func (d *Device) SetState(ctx context.Context, s State) error {
	d.setting.Lock()
	defer d.setting.Unlock()
	d.mu.Lock()
	d.writes++
	d.writing = s
	reads := d.reads
	if s != d.wrote && (s == Initialising || s == Connected) {
		// From here on, not from the commit on: the peer may be quick to refuse.
		d.cur.SawClosing = d.cur.Peer == Closing
		d.told = false
	}
	d.mu.Unlock()

	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		was, err := d.guard(tx)
		if err != nil || was == s.value() {
			return err
		}
		return tx.Write(d.dir+"/state", s.value())
	})

	d.mu.Lock()
	defer d.mu.Unlock()
	d.writes++
	d.writing = Unknown
	read := d.reads != reads
	if read || d.cur.Gone {
		// It may be newer than the write or older. What it said of our state is read
		// again; that the directory is gone stands until then.
		d.lookAgain()
	}
	if err != nil {
		var refused *xenstore.Error
		switch {
		case errors.Is(err, ErrGone):
			if !read {
				ch := d.cur
				ch.Gone = true
				d.tellLocked(ch)
			}
			d.lookAgain()
		case errors.Is(err, ErrClaimed), errors.As(err, &refused):
		default: // the answer was lost, or nobody waited for it
			d.failed = s
		}
		return fmt.Errorf("xenbus %s: set state %v: %w", d.dir, s, err)
	}
	d.wrote, d.failed = s, Unknown
	ch := d.cur
	ch.Own, ch.Overwritten = s, ""
	d.tellLocked(ch)
	return nil
}

// lookAgain has our directory read again.
func (d *Device) lookAgain() {
	select {
	case d.poke <- struct{}{}:
	default:
	}
}

// guard makes a transaction fail unless the directory is there and ours. It gives
// the state that is written now.
func (d *Device) guard(tx xenstore.Tx) (state string, err error) {
	state, err = tx.Read(d.dir + "/state")
	if errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
		return "", ErrGone
	}
	if err != nil {
		return "", err
	}
	d.mu.Lock()
	claim, w := d.claim, d.writtenLocked()
	d.mu.Unlock()
	if !w.ours(state) && w.restarted(state) {
		if mark, err := tx.Read(d.dir + "/" + w.mark); errors.Is(err, xenstore.ErrNotFound) || err == nil && mark == "" {
			return "", ErrGone
		} else if err != nil {
			return "", err
		}
	}
	if claim == "" {
		return state, nil
	}
	owner, err := tx.Read(d.dir + claimKey)
	if errors.Is(err, xenstore.ErrNotFound) || err == nil && owner == "" { // made anew: ours was in another one
		return "", ErrGone
	}
	if err != nil {
		return "", err
	}
	if owner, _, _ := strings.Cut(owner, " "); owner != claim {
		return "", ErrClaimed
	}
	return state, nil
}

// A written is what we know of what we wrote.
type written struct {
	last, writing, failed State
	mark                  string
}

func (d *Device) writtenLocked() written {
	return written{d.wrote, d.writing, d.failed, d.mark}
}

// ours reports whether a state that was found is one we may have written.
func (w written) ours(found string) bool {
	if w.last == Unknown {
		return true
	}
	for _, s := range []State{w.last, w.writing, w.failed} {
		if s != Unknown && found == s.value() {
			return true
		}
	}
	return false
}

// restarted reports whether a state that is not ours is that of a directory made
// anew, if the mark is not there either.
func (w written) restarted(found string) bool {
	return found == Initialising.value() && w.mark != ""
}

// Publish sets keys of our directory, and removes others with all below them, in
// one transaction: the peer sees all of it or nothing. Keys may have several
// components. ErrGone and ErrClaimed as in SetState; ErrQuota if xenstore is full.
func (d *Device) Publish(ctx context.Context, keys xenstore.Values, remove ...string) error {
	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		if _, err := d.guard(tx); err != nil {
			return err
		}
		if err := d.clear(tx, remove...); err != nil {
			return err
		}
		var paths, values []string
		for _, key := range slices.Sorted(maps.Keys(keys)) {
			paths, values = append(paths, d.dir+"/"+key), append(values, keys[key])
		}
		return tx.WriteAll(paths, values)
	})
	if err != nil {
		return fmt.Errorf("xenbus %s: publish: %w", d.dir, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for key := range keys {
		// hotplug-status is in a directory that was just made, too.
		if !strings.Contains(key, "/") && key != "hotplug-status" && (key < d.mark || !keys.Has(d.mark)) {
			d.mark = key
		}
	}
	return nil
}

// Remove removes our directory, and those above it that are for this peer alone, if
// it is ours: for a backend whose device has been taken away where no toolstack
// cleans up, as in a driver domain. One that is gone is no error. ErrClaimed as in
// SetState.
func (d *Device) Remove(ctx context.Context) error {
	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		if _, err := d.guard(tx); err != nil {
			return err
		}
		if err := tx.Remove(d.dir); err != nil || d.role == Frontend {
			return err
		}
		if err := removeEmpty(tx, parentOf(d.dir)); !errors.Is(err, xenstore.ErrAccess) { // it may be the toolstack's
			return err
		}
		return nil
	})
	if err != nil && !errors.Is(err, ErrGone) {
		return fmt.Errorf("xenbus %s: remove: %w", d.dir, err)
	}
	return nil
}

func parentOf(dir string) string { return dir[:strings.LastIndexByte(dir, '/')] }

// removeEmpty removes a directory in which there is nothing.
func removeEmpty(tx xenstore.Tx, dir string) error {
	left, err := tx.Directory(dir)
	if err != nil || len(left) > 0 {
		return err
	}
	return tx.Remove(dir)
}

// ReadOwn reads a key of our directory.
func (d *Device) ReadOwn(ctx context.Context, key string) (string, error) {
	return d.c.Read(ctx, d.dir+"/"+key)
}

// ReadPeer reads a key of the other end's directory.
func (d *Device) ReadPeer(ctx context.Context, key string) (string, error) {
	dir, _ := d.Peer()
	return d.c.Read(ctx, dir+"/"+key)
}

// OwnKeys lists what is in our directory.
func (d *Device) OwnKeys(ctx context.Context) ([]string, error) {
	return d.c.Directory(ctx, d.dir)
}

// OwnValues reads keys of our directory in one transaction. Those that are not
// there are not in the result.
func (d *Device) OwnValues(ctx context.Context, keys ...string) (xenstore.Values, error) {
	return d.c.ReadKeys(ctx, d.dir, keys...)
}

// PeerValues is OwnValues for the other end's directory.
func (d *Device) PeerValues(ctx context.Context, keys ...string) (xenstore.Values, error) {
	dir, _ := d.Peer()
	return d.c.ReadKeys(ctx, dir, keys...)
}

// Fail leaves a note of why for the administrator, where Linux leaves its own
// (xenbus_dev_error), or removes it if why is nil, and the directories it was alone
// in. It changes no state.
func (d *Device) Fail(ctx context.Context, why error) error {
	dir := "error/" + d.dir
	if why == nil {
		if _, err := d.c.Read(ctx, parentOf(dir)); errors.Is(err, xenstore.ErrNotFound) {
			return nil // the usual case, in which there is nothing to commit
		}
		err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
			err := tx.Remove(dir)
			// Not error itself, which a guest could not make again.
			for up := parentOf(dir); err == nil && up != "error"; up = parentOf(up) {
				err = removeEmpty(tx, up)
			}
			return err
		})
		if errors.Is(err, xenstore.ErrNotFound) {
			return nil
		}
		return err
	}
	const most = 512
	text := why.Error()
	return d.c.Write(ctx, dir+"/error", text[:min(len(text), most)])
}

// Close stops watching and gives a claim back, which takes until ctx ends at most.
// The state stays as it is. It is idempotent.
func (d *Device) Close(ctx context.Context) error {
	d.cancel()
	<-d.done
	return d.unclaim(ctx)
}

// tellLocked makes ch current and delivers it if it differs.
func (d *Device) tellLocked(ch Change) {
	if d.spent || d.told && ch == d.cur {
		return
	}
	d.cur, d.told = ch, true
	select {
	case <-d.changes: // not taken: out of date
	default:
	}
	d.changes <- ch
}

// retryPause is between attempts to read what xenstore would not give.
const retryPause = 100 * time.Millisecond
