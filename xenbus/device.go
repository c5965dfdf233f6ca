package xenbus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/internal/pause"
	"barevif/xenbus/xenstore"
)

var (
	// ErrGone is returned when our directory no longer exists, or was made again since we
	// claimed it: the toolstack took the device away. The call wrote nothing, so no half
	// of a removed device comes back.
	ErrGone = errors.New("xenbus: the device's directory is gone")

	// ErrClaimed is returned when another process has claimed the device.
	ErrClaimed = errors.New("xenbus: the device is claimed by another process")
)

// A NoDeviceError says that a device does not exist, and lists the ones that do.
type NoDeviceError struct {
	Dir  string   // the directory that was looked for
	Have []string // ids of the devices beside it
}

func (e *NoDeviceError) Error() string {
	if len(e.Have) == 0 {
		return fmt.Sprintf("no device at %q, nor any other", xenstore.Clip(e.Dir))
	}
	// Ids are numbers: without quotation marks the list would read as a count.
	return fmt.Sprintf("no device at %q; the devices there are: %s", xenstore.Clip(e.Dir), strings.Trim(fmt.Sprintf("%q", e.Have), "[]"))
}

// Unwrap gives ErrNotFound.
func (e *NoDeviceError) Unwrap() error { return xenstore.ErrNotFound }

// A WaitError says that the context ended before xenstore showed what the caller waited
// for.
type WaitError struct {
	Dir     string   // our end of the device
	Missing []string // keys that were still missing, if the wait was for keys
	Own     State    // our state when the wait ended
	Seen    []State  // states of the peer, oldest first, at most the last 16
	Err     error    // the context's cause; nil in [Device.Trouble], which goes on waiting
}

func (e *WaitError) Error() string {
	if len(e.Missing) > 0 {
		text := fmt.Sprintf("xenbus %s: still without %s", e.Dir, strings.Join(e.Missing, ", "))
		if e.Err != nil {
			text += ": " + e.Err.Error()
		}
		return text
	}
	seen := "no state we may read"
	if len(e.Seen) > 0 {
		seen = strings.Trim(fmt.Sprint(e.Seen), "[]")
	}
	return fmt.Sprintf("xenbus %s: own state %v, other end showed %s: %v", e.Dir, e.Own, seen, e.Err)
}

func (e *WaitError) Unwrap() error { return e.Err }

const maxSeen = 16

// A Device is one end of a xenbus device. It follows its own directory and the other
// end's with watches: a goroutine of the Device reads the nodes again on each event and
// delivers a Change. Methods may be called from any goroutine.
type Device struct {
	c       *xenstore.Client
	role    Role
	typ, id string
	dir     string // ours, relative to the domain's home
	cancel  context.CancelFunc
	done    chan struct{}
	own     *xenstore.Watch // on dir
	changes chan Change
	reread  chan struct{} // holds one: a request to read our directory again
	setting sync.Mutex    // held by setState throughout
	written uint64        // used by run only; counts Change.PeerWrites
	settled uint64        // used by run only; counts Change.Settings

	mu        sync.Mutex
	cur       Change  // guarded by mu
	delivered bool    // guarded by mu; cur has been put in changes
	ended     bool    // guarded by mu; changes is closed
	peer      end     // guarded by mu
	seen      []State // guarded by mu
	wrote     State   // guarded by mu; last state we wrote, Unknown: none
	writing   State   // guarded by mu; the state that a running setState writes
	writes    uint64  // guarded by mu; grows when a setState begins and when it ends
	failed    State   // guarded by mu; the state of a failed setState that may have been committed
	reads     uint64  // guarded by mu; how often run read our own directory
	mark      string  // guarded by mu; a key we published, to recognise our directory by; "" if none
	claim     string  // guarded by mu; the id of our claim, "" if not claimed
	earlier   string  // guarded by mu; an id that Renew replaces, "" if none
	trouble   error   // guarded by mu; why Current may be out of date
	lasting   bool    // guarded by mu; the claim's node existed before we claimed it

	followOwn, followPeer []string // guarded by mu; replaced, never changed
}

// An end is the other end: its directory and its domain.
type end struct {
	dir string // absolute
	dom hypercall.DomID
}

// Frontends lists the ids of this domain's devices of type typ, in numerical order.
func Frontends(ctx context.Context, c *xenstore.Client, typ string) ([]string, error) {
	return list(ctx, c, "device/"+typ)
}

// list returns the device ids below dir, none if dir does not exist or may not be read.
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

// validID reports whether id is a device number in the toolstack's spelling.
func validID(id string) bool {
	_, err := xenstore.ParseUint(id, 1<<31-1)
	return err == nil
}

// OpenFrontend opens this domain's device of a type ("vif") and id ("0"). It waits until
// the toolstack has written the keys that name the backend. If ctx ends first, the error
// is a [*WaitError] that lists the missing keys. A device that does not exist is a
// [*NoDeviceError]; keys that contradict each other are a [*xenstore.ValueError].
func OpenFrontend(ctx context.Context, c *xenstore.Client, typ, id string) (*Device, error) {
	return openDevice(ctx, c, &Device{role: Frontend, typ: typ, id: id, dir: "device/" + typ + "/" + id}, "device/"+typ)
}

// OpenBackend opens the backend of a device of domain front; typ is the backend type by
// which the toolstack chose this backend. It waits and fails as OpenFrontend does, and
// also waits for the frontend's state, unless the toolstack takes the device away.
func OpenBackend(ctx context.Context, c *xenstore.Client, typ string, front hypercall.DomID, id string) (*Device, error) {
	parent := fmt.Sprintf("backend/%s/%d", typ, front)
	return openDevice(ctx, c, &Device{role: Backend, typ: typ, id: id, dir: parent + "/" + id}, parent)
}

func openDevice(ctx context.Context, c *xenstore.Client, d *Device, parent string) (*Device, error) {
	d.c = c
	d.done = make(chan struct{})
	d.changes = make(chan Change, 1)
	d.reread = make(chan struct{}, 1)
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

// Role returns the end that this Device is.
func (d *Device) Role() Role { return d.role }

// Dir returns our directory, relative to the domain's home.
func (d *Device) Dir() string { return d.dir }

// ID returns the device's number among those of its type.
func (d *Device) ID() string { return d.id }

// Peer returns the other end's directory, an absolute path, and its domain. For a
// frontend both may change with the Generation.
func (d *Device) Peer() (dir string, dom hypercall.DomID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.peer.dir, d.peer.dom
}

// Changes delivers a Change after opening and then one for each difference. A Change that
// nobody received is replaced by the next. The channel is closed when the Device or the
// Client is closed. One goroutine should receive from it.
func (d *Device) Changes() <-chan Change { return d.changes }

// Follow makes each write to one of these keys, of our directory and of the other end's,
// grow Change.Settings, so that the owner reads them again. It may be called once, at any
// time; the keys need not exist. Keys of the other end take no watch more than its state.
func (d *Device) Follow(own, peer []string) {
	d.mu.Lock()
	d.followOwn, d.followPeer = own, peer
	d.mu.Unlock()
	if len(peer) > 0 {
		d.requestRead() // makes run watch them
	}
}

// follows returns the keys that Follow named.
func (d *Device) follows() (own, peer []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.followOwn, d.followPeer
}

// Current returns the last Change, whether or not it was received.
func (d *Device) Current() Change {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cur
}

// Trouble returns why Current may be out of date: a read or a watch that xenstore
// refused. The Device repeats it until it succeeds, and then Trouble returns nil.
func (d *Device) Trouble() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.trouble
}

// Seen lists the states the Device read from the peer, oldest first, at most the last 16.
// It may have missed some.
func (d *Device) Seen() []State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.seen)
}

// Await receives from Changes until ok accepts a Change. If ctx ends first, the error is
// a [*WaitError]; it is net.ErrClosed if the Device or the Client is closed.
func (d *Device) Await(ctx context.Context, ok func(Change) bool) (Change, error) {
	for {
		select {
		case ch, open := <-d.changes:
			if !open {
				return d.Current(), fmt.Errorf("xenbus %s: %w", d.dir, hypercall.ErrClosed)
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

// SetState writes our state unless the node holds it already; so it also repairs a state
// that another domain overwrote. The next Change shows the state. The error is ErrGone if
// our directory does not exist, which Current then shows too, and ErrClaimed if another
// process has claimed it.
func (d *Device) SetState(ctx context.Context, s State) error {
	if err := d.setState(ctx, s, nil, nil); err != nil {
		return fmt.Errorf("xenbus %s: set state %v: %w", d.dir, s, err)
	}
	return nil
}

// PublishState is [Device.Publish] and [Device.SetState] in one transaction: the peer sees the
// state with the keys, or neither. So a frontend connects with one transaction instead of two. After
// an error that is not [xenstore.ErrUnanswered] neither was written.
func (d *Device) PublishState(ctx context.Context, s State, keys xenstore.Values, remove ...string) error {
	err := d.setState(ctx, s, keys, remove)
	if err == nil || errors.Is(err, xenstore.ErrUnanswered) {
		d.chooseMark(keys)
	}
	if err != nil {
		return fmt.Errorf("xenbus %s: publish with state %v: %w", d.dir, s, err)
	}
	return nil
}

func (d *Device) setState(ctx context.Context, s State, keys xenstore.Values, remove []string) error {
	d.setting.Lock()
	defer d.setting.Unlock()
	d.mu.Lock()
	d.writes++
	d.writing = s
	reads := d.reads
	if s != d.wrote && (s == Initialising || s == Connected) {
		// Reset before the commit: a quick peer may write Closing before Transact
		// returns.
		d.cur.SawClosing = d.cur.Peer == Closing
		d.delivered = false
	}
	d.mu.Unlock()

	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		was, err := d.guard(tx)
		if err != nil {
			return err
		}
		state := formatState(s)
		if was == state {
			state = ""
		}
		return d.writeKeys(tx, keys, remove, state)
	})

	d.mu.Lock()
	defer d.mu.Unlock()
	d.writes++
	d.writing = Unknown
	read := d.reads != reads
	if read || d.cur.Gone {
		// The read may be older or newer than our write. So our state is read again; if
		// the read said that the directory is gone, Gone stays set until then.
		d.requestRead()
	}
	if errors.Is(err, ErrGone) {
		if !read {
			ch := d.cur
			ch.setGone()
			d.deliverLocked(ch)
		}
		d.requestRead()
	}
	if errors.Is(err, xenstore.ErrUnanswered) {
		d.failed = s
	}
	if err != nil {
		return err
	}
	d.wrote, d.failed = s, Unknown
	ch := d.cur
	ch.Own, ch.Overwritten = s, ""
	d.deliverLocked(ch)
	return nil
}

// requestRead makes run read our directory again.
func (d *Device) requestRead() {
	select {
	case d.reread <- struct{}{}:
	default:
	}
}

// guard fails with ErrGone or ErrClaimed unless our directory exists and is ours. It
// returns the state in the node.
func (d *Device) guard(tx xenstore.Tx) (state string, err error) {
	state, err = tx.Read(d.dir + "/state")
	if errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
		return "", ErrGone
	}
	if err != nil {
		return "", err
	}
	d.mu.Lock()
	claim, earlier, w := d.claim, d.earlier, d.writtenLocked()
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
	if errors.Is(err, xenstore.ErrNotFound) || err == nil && owner == "" { // a new directory: our claim was in the old one
		return "", ErrGone
	}
	if err != nil {
		return "", err
	}
	if owner, _, _ := strings.Cut(owner, " "); owner != claim && owner != earlier {
		return "", ErrClaimed
	}
	return state, nil
}

// A written holds the states we wrote, or may have written, and a key we published.
type written struct {
	last, writing, failed State
	mark                  string
}

func (d *Device) writtenLocked() written {
	return written{d.wrote, d.writing, d.failed, d.mark}
}

// ours reports whether we may have written the state that was found.
func (w written) ours(found string) bool {
	if w.last == Unknown {
		return true
	}
	for _, s := range []State{w.last, w.writing, w.failed} {
		if s != Unknown && found == formatState(s) {
			return true
		}
	}
	return false
}

// restarted reports whether found, which we did not write, is the first state of a
// directory made again. It is if the mark is missing as well.
func (w written) restarted(found string) bool {
	return found == formatState(Initialising) && w.mark != ""
}

// Publish sets keys of our directory and removes others, with all nodes below them, in
// one transaction: the peer sees the whole change or none of it. A key may have several
// components. The error is ErrGone or ErrClaimed as from SetState, or ErrQuota if
// xenstore is full.
func (d *Device) Publish(ctx context.Context, keys xenstore.Values, remove ...string) error {
	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		if _, err := d.guard(tx); err != nil {
			return err
		}
		return d.writeKeys(tx, keys, remove, "")
	})
	if err != nil {
		return fmt.Errorf("xenbus %s: publish: %w", d.dir, err)
	}
	d.chooseMark(keys)
	return nil
}

// writeKeys removes keys of our directory, sets others, and then the state, unless that is "".
func (d *Device) writeKeys(tx xenstore.Tx, keys xenstore.Values, remove []string, state string) error {
	if err := d.clear(tx, remove...); err != nil {
		return err
	}
	var paths, values []string
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		paths, values = append(paths, d.dir+"/"+key), append(values, keys[key])
	}
	if state != "" {
		paths, values = append(paths, d.dir+"/state"), append(values, state)
	}
	return tx.WriteAll(paths, values)
}

// chooseMark chooses one of the keys that were written as the mark of our directory.
func (d *Device) chooseMark(keys xenstore.Values) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key := range keys {
		// The toolstack writes hotplug-status and hotplug-error too, and a reason and
		// "carrier" go while the directory stays: these do not mark a directory as ours.
		lasting := key != "hotplug-status" && key != "hotplug-error" && key != KeyReason && key != "carrier"
		if lasting && !strings.Contains(key, "/") && (key < d.mark || !keys.Has(d.mark)) {
			d.mark = key
		}
	}
}

// Remove removes our directory and, for a backend, its parent if that is empty. A backend
// calls it when its device was taken away and no toolstack cleans up, as in a driver
// domain. A directory that is gone is no error. ErrClaimed as from SetState.
func (d *Device) Remove(ctx context.Context) error {
	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		if _, err := d.guard(tx); err != nil {
			return err
		}
		if err := tx.Remove(d.dir); err != nil || d.role == Frontend {
			return err
		}
		if err := removeEmpty(tx, parentOf(d.dir)); !errors.Is(err, xenstore.ErrAccess) { // the toolstack may own the parent
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

// removeEmpty removes a directory that has no children.
func removeEmpty(tx xenstore.Tx, dir string) error {
	left, err := tx.Directory(dir)
	if err != nil || len(left) > 0 {
		return err
	}
	return tx.Remove(dir)
}

// WritePeer sets a key in the other end's directory, which the toolstack must have allowed:
// as libxl allows a backend to set the mtu of its frontend. The error is ErrGone or
// ErrClaimed as from SetState, ErrNotFound if the other end has no directory, or ErrAccess.
func (d *Device) WritePeer(ctx context.Context, key, value string) error {
	dir, _ := d.Peer()
	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		if _, err := d.guard(tx); err != nil {
			return err
		}
		if _, err := tx.Read(dir); err != nil { // a write would make a directory that the toolstack has removed
			return err
		}
		if was, err := tx.Read(dir + "/" + key); err == nil && was == value {
			return nil
		}
		return tx.Write(dir+"/"+key, value)
	})
	if err != nil {
		return fmt.Errorf("xenbus %s: write the other end's %s: %w", d.dir, key, err)
	}
	return nil
}

// ReadPeer reads a key of the other end's directory. The error is ErrNotFound if the key is missing, or
// ErrAccess.
func (d *Device) ReadPeer(ctx context.Context, key string) (string, error) {
	dir, _ := d.Peer()
	return d.c.Read(ctx, dir+"/"+key)
}

// OwnKeys lists the keys of our directory. The error is ErrNotFound if that does not exist, or ErrAccess.
func (d *Device) OwnKeys(ctx context.Context) ([]string, error) {
	return d.c.Directory(ctx, d.dir)
}

// OwnValues reads keys of our directory. The result omits missing keys. The values may be of
// different moments: that the keys are there is said by a state, which is written last, and a
// key that changes afterwards is for [Device.Follow].
func (d *Device) OwnValues(ctx context.Context, keys ...string) (xenstore.Values, error) {
	return d.c.ReadKeys(ctx, d.dir, keys...)
}

// PeerValues is OwnValues for the other end's directory.
func (d *Device) PeerValues(ctx context.Context, keys ...string) (xenstore.Values, error) {
	dir, _ := d.Peer()
	return d.c.ReadKeys(ctx, dir, keys...)
}

// Fail writes why to the error node that Linux uses (xenbus_dev_error), for the
// administrator. With a nil why it removes the note and the parent directories that are
// then empty. It changes no state.
func (d *Device) Fail(ctx context.Context, why error) error {
	dir := "error/" + d.dir
	if why == nil {
		if _, err := d.c.Read(ctx, parentOf(dir)); errors.Is(err, xenstore.ErrNotFound) {
			return nil // the usual case: no note, so no transaction is needed
		}
		err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
			err := tx.Remove(dir)
			// error itself stays: a guest could not make it again.
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
	return d.c.Write(ctx, dir+"/error", Reason(why.Error()))
}

// Close stops the watches and gives our claim back, for which it waits until ctx ends at
// most. It leaves the state as it is. It is idempotent. Afterwards Current shows nothing new,
// but Claim, SetState, Remove and another Close work as before, for what was left undone.
func (d *Device) Close(ctx context.Context) error {
	d.cancel()
	<-d.done
	return d.unclaim(ctx)
}

// deliverLocked makes ch the current Change, and delivers it if it differs from the last.
func (d *Device) deliverLocked(ch Change) {
	if d.ended || d.delivered && ch == d.cur {
		return
	}
	d.cur, d.delivered = ch, true
	select {
	case <-d.changes: // nobody received the last Change, which is now out of date
	default:
	}
	d.changes <- ch
}

// retryPause is the time between attempts to read nodes that xenstore refused.
const retryPause = 100 * time.Millisecond
