//go:build linux

package xendev

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// The pages of a Share belong to an open file of gntalloc, and ports to one of evtchn. Another
// process of the domain that gets descriptors of these files, over a unix socket, maps the
// same pages and reads the same events. The kernel ends grants and ports with the last
// descriptor and mapping.

// An offered is the State of an Offer, in JSON. The files are those of the shares, then those
// of the waiters.
type offered struct {
	Dom     hypercall.DomID
	Shares  []offeredShare
	Waiters [][]hypercall.PortID
}

type offeredShare struct {
	Peer   hypercall.DomID
	Access hypercall.Access
	Index  uint64 // of the first page, in the file
	Refs   []byte // see putRefs
}

// maxOfferedFiles bounds an Offer: one message takes no more descriptors (SCM_MAX_FD of
// Linux's net/scm.h).
const maxOfferedFiles = 253

// putRefs packs refs as the differences between neighbours, because the kernel mostly gives
// neighbouring numbers.
func putRefs(refs []hypercall.GrantRef) (b []byte) {
	last := int64(0)
	for _, r := range refs {
		b = binary.AppendVarint(b, int64(r)-last)
		last = int64(r)
	}
	return b
}

// parseRefs undoes putRefs.
func parseRefs(b []byte) (refs []hypercall.GrantRef, err error) {
	last := int64(0)
	for len(b) > 0 {
		d, n := binary.Varint(b)
		if last += d; n <= 0 || last < 8 || last > 1<<32-1 || len(refs) == maxPages { // Xen reserves 0 to 7
			return nil, errors.New("xendev: an offer with refs that cannot be")
		}
		refs, b = append(refs, hypercall.GrantRef(last)), b[n:]
	}
	return refs, nil
}

// errNotOurs is returned by Offer for what cannot be offered.
var errNotOurs = errors.New("xendev: a share or waiter that is not ours, is in use, or is offered already")

// Offer implements [hypercall.HandoverDomain].
func (d *Domain) Offer(shares []*hypercall.Share, waiters []hypercall.Waiter) (*hypercall.Offer, error) {
	if n := len(shares) + len(waiters); n == 0 || n > maxOfferedFiles {
		return nil, fmt.Errorf("xendev: an offer of %d shares and waiters (1 to %d)", n, maxOfferedFiles)
	}
	state := offered{Dom: d.ID()}
	var owned []*ownedShare
	var ours []*waiter
	for _, s := range shares {
		o, ok := s.Owned().(*ownedShare)
		if !ok || o.d != d || o.given.Load() || slices.Contains(owned, o) {
			return nil, errNotOurs
		}
		owned = append(owned, o)
		state.Shares = append(state.Shares, offeredShare{s.Peer, s.Access, o.index, putRefs(s.Refs)})
	}
	for _, hw := range waiters {
		w, ok := hw.(*waiter)
		if !ok || w.d != d || slices.Contains(ours, w) {
			return nil, errNotOurs
		}
		ours = append(ours, w)
	}
	if !d.reserve(owned, ours) {
		return nil, errNotOurs
	}
	withdraw := func() { d.unreserve(owned, ours) }
	for _, w := range ours {
		ports, err := w.rest()
		if err != nil {
			withdraw()
			return nil, err
		}
		state.Waiters = append(state.Waiters, ports)
	}
	files, err := duplicates(owned, ours)
	if err != nil {
		withdraw()
		return nil, err
	}
	b, err := json.Marshal(state)
	if err != nil {
		closeFiles(files)
		withdraw()
		return nil, err
	}
	return hypercall.NewOffer(b, files, func() {
		for _, o := range owned {
			o.given.Store(true)
		}
		for _, w := range ours {
			w.given.Store(true)
		}
		withdraw()
	}, withdraw), nil
}

// reserve notes that objects are in an Offer. It reports false if one is already.
func (d *Domain) reserve(shares []*ownedShare, waiters []*waiter) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := offeredObjects(shares, waiters)
	for _, o := range all {
		if d.offered[o] {
			return false
		}
	}
	if d.offered == nil {
		d.offered = make(map[any]bool)
	}
	for _, o := range all {
		d.offered[o] = true
	}
	return true
}

func (d *Domain) unreserve(shares []*ownedShare, waiters []*waiter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range offeredObjects(shares, waiters) {
		delete(d.offered, o)
	}
}

func offeredObjects(shares []*ownedShare, waiters []*waiter) (all []any) {
	for _, s := range shares {
		all = append(all, s)
	}
	for _, w := range waiters {
		all = append(all, w)
	}
	return all
}

// rest unmasks all ports, since the next process does not know which are masked, and returns
// their numbers.
func (w *waiter) rest() ([]hypercall.PortID, error) {
	w.d.begin() // finds out whether the domain was resumed
	defer w.d.end()
	switch {
	case w.dead.Load():
		return nil, errResumed
	case w.given.Load() || w.group.Load() != nil:
		return nil, errNotOurs
	}
	if err := w.settle(true); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.ports)), nil
}

// duplicates returns descriptors for another process.
func duplicates(shares []*ownedShare, waiters []*waiter) (files []*os.File, err error) {
	add := func(f *os.File) {
		if err != nil {
			return
		}
		var fd int
		if fd, err = duplicate(f); err == nil {
			files = append(files, os.NewFile(uintptr(fd), f.Name()))
		}
	}
	for _, s := range shares {
		add(s.file)
	}
	for _, w := range waiters {
		add(w.file)
	}
	if err != nil {
		closeFiles(files)
		return nil, err
	}
	return files, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// parseOffer checks the State of an Offer that comes with n files.
func (d *Domain) parseOffer(state []byte, n int) (o offered, refs [][]hypercall.GrantRef, err error) {
	if err := json.Unmarshal(state, &o); err != nil {
		return o, nil, fmt.Errorf("xendev: an offer: %w", err)
	}
	switch want := len(o.Shares) + len(o.Waiters); {
	case o.Dom != d.ID():
		return o, nil, fmt.Errorf("xendev: an offer of domain %d, this is %d: %w", o.Dom, d.ID(), hypercall.ErrNoOffer)
	case want == 0 || want > maxOfferedFiles:
		return o, nil, fmt.Errorf("xendev: an offer of %d shares and waiters (1 to %d)", want, maxOfferedFiles)
	case n != want:
		return o, nil, fmt.Errorf("xendev: an offer of %d shares and waiters with %d files", want, n)
	}
	seen := make(map[hypercall.GrantRef]bool)
	for _, s := range o.Shares {
		list, err := parseRefs(s.Refs)
		if err == nil {
			err = checkPages("offer", len(list))
		}
		if err == nil && (s.Access > hypercall.ReadWrite || s.Index%shm.PageSize != 0 || s.Index > 1<<62) {
			err = errors.New("xendev: an offer with a share that cannot be")
		}
		for _, r := range list {
			if seen[r] && err == nil {
				err = fmt.Errorf("xendev: an offer with ref %d twice", r)
			}
			seen[r] = true
		}
		if err != nil {
			return o, nil, err
		}
		refs = append(refs, list)
	}
	ports := make(map[hypercall.PortID]bool)
	for _, list := range o.Waiters {
		for _, id := range list {
			if id == 0 || ports[id] {
				return o, nil, fmt.Errorf("xendev: an offer with port %d, which is none or there twice", id)
			}
			ports[id] = true
		}
	}
	return o, refs, nil
}

// Adopt implements [hypercall.HandoverDomain].
func (d *Domain) Adopt(state []byte, files []*os.File, onThread []bool) (*hypercall.Adopted, error) {
	o, refs, err := d.parseOffer(state, len(files))
	if err != nil {
		return nil, err
	}
	var drops []func()
	drop := func() {
		for _, f := range slices.Backward(drops) {
			f()
		}
	}
	var shares []*hypercall.Share
	var waiters []hypercall.AdoptedWaiter
	for i, s := range o.Shares {
		share, err := d.adoptShare(s, refs[i], files[i])
		if err != nil {
			drop()
			return nil, err
		}
		owned := share.Owned().(*ownedShare)
		shares = append(shares, share)
		drops = append(drops, func() {
			owned.given.Store(true)
			share.End()
		})
	}
	for i, ports := range o.Waiters {
		w, err := d.adoptWaiter(ports, files[len(shares)+i], i < len(onThread) && onThread[i])
		if err != nil {
			drop()
			return nil, err
		}
		aw := hypercall.AdoptedWaiter{Waiter: w}
		for _, id := range ports {
			aw.Ports = append(aw.Ports, w.ports[id])
		}
		waiters = append(waiters, aw)
		drops = append(drops, w.letGo)
	}
	return hypercall.NewAdopted(shares, waiters, drop), nil
}

func (d *Domain) adoptShare(s offeredShare, refs []hypercall.GrantRef, f *os.File) (*hypercall.Share, error) {
	if err := d.gntalloc.check(d.cfg, f); err != nil {
		return nil, err
	}
	fd, err := duplicate(f)
	if err != nil {
		return nil, err
	}
	own := &ownedShare{d: d, file: os.NewFile(uintptr(fd), f.Name()), index: s.Index, access: s.Access}
	share, err := own.mapPages(s.Peer, refs)
	if err != nil {
		return nil, errors.Join(err, own.file.Close())
	}
	return share, nil
}

func (d *Domain) adoptWaiter(ports []hypercall.PortID, f *os.File, onThread bool) (*waiter, error) {
	if err := d.evtchn.check(d.cfg, f); err != nil {
		return nil, err
	}
	fd, err := duplicate(f)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), f.Name())
	w, err := newWaiter(d, file)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if onThread {
		err = w.onThread()
	}
	if err == nil {
		err = w.adoptPorts(ports)
	}
	if err != nil {
		w.letGo()
		return nil, err
	}
	return w, nil
}

// adoptPorts enters ports that the file has.
func (w *waiter) adoptPorts(ports []hypercall.PortID) error {
	w.d.begin()
	defer w.d.end()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return net.ErrClosed
	}
	w.d.enter(w)
	for _, id := range ports {
		var p *port
		// The driver refuses a port that is none of the file's. The peer sees one event more.
		var err error
		if w.raw.Control(func(fd uintptr) { err = w.d.evtchn.notify(int(fd), id) }) != nil {
			err = net.ErrClosed
		}
		if err == nil {
			p, err = newPort(w, id)
		}
		if err != nil {
			return err
		}
		w.bound[id] = struct{}{}
		w.enterLocked(p)
	}
	return nil
}

// letGo closes the waiter without closing its ports, which another process has too.
func (w *waiter) letGo() {
	w.given.Store(true)
	w.Close()
}
