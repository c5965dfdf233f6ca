// Package storetest checks that package xenbus and an implementation of xenstore work
// together: the client's requests, transactions and watches, and devices whose ends are
// in different domains.
//
// It requires the behaviour of Debian's C xenstored 4.17, and runs against that daemon
// and against every other implementation.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/xenstore"
)

// A Dialer connects to one xenstore as a domain. Domain 0 is privileged and may have
// several connections at once. Any other domain is introduced, and its home
// /local/domain/<n> made, when it first connects.
type Dialer func(ctx context.Context, dom hypercall.DomID) (io.ReadWriteCloser, error)

// Run runs the suite. start returns a Dialer to a new, empty xenstore that lives as long
// as its test.
func Run(t *testing.T, start func(testing.TB) Dialer) {
	for _, c := range []struct {
		name string
		f    func(*testing.T, *rig)
	}{
		{"ReadGivesWhatWasWritten", readGivesWhatWasWritten},
		{"RequestsStopAtMaxPayload", requestsStopAtMaxPayload},
		{"PathsAreCheckedOnBothSidesAlike", pathsAreCheckedOnBothSidesAlike},
		{"RemoveOfNothingNeedsAParent", removeOfNothingNeedsAParent},
		{"DirectoryOfManyMessages", directoryOfManyMessages},
		{"PermsGoRoundAndHold", permsGoRoundAndHold},
		{"TransactionIsSeenWholeOrNot", transactionIsSeenWholeOrNot},
		{"TransactionInConflictRunsAgain", transactionInConflictRunsAgain},
		{"TransactionsOfOneClientTakeTurns", transactionsOfOneClientTakeTurns},
		{"AbandonedTransactionIsEnded", abandonedTransactionIsEnded},
		{"WatchHearsChangesBelow", watchHearsChangesBelow},
		{"WatchIsSilentAfterClose", watchIsSilentAfterClose},
		{"WatchThatIsNotReadForgetsPathsNotChanges", watchThatIsNotReadForgetsPathsNotChanges},
		{"ResetWatchesKeepsOurs", resetWatchesKeepsOurs},
		{"QuotaIsAnError", quotaIsAnError},
		{"DomainsAreKnown", domainsAreKnown},
		{"ManyCallersShareAConnection", manyCallersShareAConnection},
		{"LostConnectionIsReplaced", lostConnectionIsReplaced},
		{"CloseEndsEveryWait", closeEndsEveryWait},

		{"FrontendIsFoundOrThoseThatExistAreNamed", frontendIsFoundOrThoseThatExistAreNamed},
		{"HalfWrittenDirectoryIsWaitedFor", halfWrittenDirectoryIsWaitedFor},
		{"DirectoriesThatContradictAreRefused", directoriesThatContradictAreRefused},
		{"PathsOfAnotherDepthAreRefused", pathsOfAnotherDepthAreRefused},
		{"BothEndsConnectAndClose", bothEndsConnectAndClose},
		{"DriverDomainServesAnotherGuest", driverDomainServesAnotherGuest},
		{"FrontendThatMayNotReadBack", frontendThatMayNotReadBack},
		{"StatesOfGarbageAreUnknown", statesOfGarbageAreUnknown},
		{"SetStateDoesNotBringBackADirectory", setStateDoesNotBringBackADirectory},
		{"RemovalDuringAWriteIsNotLost", removalDuringAWriteIsNotLost},
		{"RemovalMetByAWriteIsSeen", removalMetByAWriteIsSeen},
		{"StateOverwrittenDuringAWriteIsSeen", stateOverwrittenDuringAWriteIsSeen},
		{"StateOverwrittenByOthersIsKnownAndPutRight", stateOverwrittenByOthersIsKnownAndPutRight},
		{"WriteWithoutAnAnswerIsOurs", writeWithoutAnAnswerIsOurs},
		{"PublishReplacesWholeSets", publishReplacesWholeSets},
		{"PublishStateIsWholeOrNot", publishStateIsWholeOrNot},
		{"UnplugIsSeenByBothEnds", unplugIsSeenByBothEnds},
		{"DriverDomainCleansUp", driverDomainCleansUp},
		{"FrontendFollowsANewBackend", frontendFollowsANewBackend},
		{"DirectoryMadeAnewWhileItIsRead", directoryMadeAnewWhileItIsRead},
		{"PeerThatTogglesIsMerged", peerThatTogglesIsMerged},
		{"AwaitSaysWhatItSaw", awaitSaysWhatItSaw},
		{"ClaimKeepsOthersOut", claimKeepsOthersOut},
		{"ClaimOfTheDeadIsTakenOver", claimOfTheDeadIsTakenOver},
		{"ClaimSurvivesANewDirectory", claimSurvivesANewDirectory},
		{"FailLeavesANote", failLeavesANote},
		{"BackendsAppearAndVanish", backendsAppearAndVanish},
		{"DeviceSurvivesALostConnection", deviceSurvivesALostConnection},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			t.Cleanup(cancel)
			c.f(t, &rig{T: t, ctx: ctx, dial: start(t)})
		})
	}
}

// A rig is the state of one test.
type rig struct {
	*testing.T
	ctx  context.Context
	dial Dialer
}

// must ends the test on an error.
func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// want ends the test unless err matches target.
func (r *rig) want(err, target error) {
	r.Helper()
	if !errors.Is(err, target) {
		r.Fatalf("error %v, want %v", err, target)
	}
}

// client connects as a domain, with the limits of a socket or ring.
func (r *rig) client(dom hypercall.DomID) *xenstore.Client {
	r.Helper()
	c, _ := r.breakable(dom, xenstore.Config{MaxPayload: 4096, Pipeline: 8})
	return c
}

// breakable returns a client, and a function that cuts its connection.
func (r *rig) breakable(dom hypercall.DomID, cfg xenstore.Config) (c *xenstore.Client, cut func()) {
	r.Helper()
	var (
		mu  sync.Mutex
		now io.Closer
	)
	c, err := xenstore.Dial(r.ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
		conn, err := r.dial(ctx, dom)
		mu.Lock()
		defer mu.Unlock()
		now = conn
		return conn, err
	}, cfg)
	r.must(err)
	r.Cleanup(func() { c.Close() })
	return c, func() {
		mu.Lock()
		defer mu.Unlock()
		now.Close()
	}
}

// read returns the value of a node, which must exist.
func (r *rig) read(c *xenstore.Client, path string) string {
	r.Helper()
	v, err := c.Read(r.ctx, path)
	r.must(err)
	return v
}

func (r *rig) watch(c *xenstore.Client, path string) *xenstore.Watch {
	r.Helper()
	w, err := c.Watch(r.ctx, path)
	r.must(err)
	return w
}

// event waits until w fires and returns the paths.
func (r *rig) event(w *xenstore.Watch) (paths []string, all bool) {
	r.Helper()
	select {
	case _, open := <-w.C():
		if !open {
			r.Fatalf("watch ended: %v", w.Err())
		}
	case <-r.ctx.Done():
		r.Fatal("no event")
	}
	return w.Paths()
}

// quiet checks that w has not fired for any request answered so far. The reply to a later
// request comes after the events.
func (r *rig) quiet(c *xenstore.Client, w *xenstore.Watch) {
	r.Helper()
	if _, err := c.GetDomainPath(r.ctx, 0); err != nil {
		r.Fatal(err)
	}
	select {
	case <-w.C():
		paths, all := w.Paths()
		r.Fatalf("unexpected event: %q, all %v", paths, all)
	default:
	}
}

func readGivesWhatWasWritten(t *testing.T, r *rig) {
	c := r.client(0)
	binary := "\x00\xff\n" + strings.Repeat("v", 4000) + "\x00"
	for path, value := range map[string]string{
		"/a/b/c": "value", "/empty": "", "/binary": binary, "relative": "home", "/x@y_z-0": "1",
	} {
		r.must(c.Write(r.ctx, path, value))
		if got := r.read(c, path); got != value {
			t.Errorf("%s: read %q, want %q", path, got, value)
		}
	}
	if got := r.read(c, "/local/domain/0/relative"); got != "home" {
		t.Errorf("relative path: %q under the home of domain 0", got)
	}
	if got := r.read(c, "/a/b"); got != "" {
		t.Errorf("parent made by the way has value %q", got)
	}
	r.must(c.Mkdir(r.ctx, "/m/n"))
	r.must(c.Write(r.ctx, "/m/n", "kept"))
	r.must(c.Mkdir(r.ctx, "/m/n"))
	if got := r.read(c, "/m/n"); got != "kept" {
		t.Errorf("mkdir of a node that is there left %q", got)
	}
	_, err := c.Read(r.ctx, "/none")
	r.want(err, xenstore.ErrNotFound)
	_, err = c.Directory(r.ctx, "/none")
	r.want(err, xenstore.ErrNotFound)
	if names, err := c.Directory(r.ctx, "/empty"); err != nil || len(names) != 0 {
		t.Errorf("directory of a leaf: %q, %v", names, err)
	}
}

func requestsStopAtMaxPayload(t *testing.T, r *rig) {
	path := "/big"
	for _, limit := range []int{4096, 4080} {
		c, _ := r.breakable(0, xenstore.Config{MaxPayload: limit})
		value := strings.Repeat("v", limit-len(path)-1)
		r.must(c.Write(r.ctx, path, value))
		if got := r.read(c, path); got != value {
			t.Errorf("limit %d: value of %d bytes came back with %d", limit, len(value), len(got))
		}
		r.want(c.Write(r.ctx, path, value+"v"), xenstore.ErrTooBig)
		if s := c.Stats(); s.Reconnects != 0 {
			t.Errorf("limit %d: %d connections lost", limit, s.Reconnects)
		}
	}
}

func pathsAreCheckedOnBothSidesAlike(t *testing.T, r *rig) {
	c := r.client(0)
	long := strings.Repeat("p", 2048)
	for _, path := range []string{"/" + long[1:], long, "/local/domain/7/" + long} {
		if _, err := c.Read(r.ctx, path); !errors.Is(err, xenstore.ErrNotFound) {
			t.Errorf("path of %d bytes: %v, want ErrNotFound", len(path), err)
		}
	}
	sent := c.Stats().Requests
	for _, path := range []string{
		"", "//", "/a//b", "/a/", "a b", "/a+b", "/a\x00b", "/ä", "/" + long, "/local/domain/7/" + long + "p",
		"/local/domain/07/" + long,
	} {
		for what, err := range map[string]error{
			"write":  c.Write(r.ctx, path, ""),
			"mkdir":  c.Mkdir(r.ctx, path),
			"remove": c.Remove(r.ctx, path),
			"perms":  c.SetPerms(r.ctx, path, xenstore.Perm{}),
		} {
			if !errors.Is(err, xenstore.ErrInvalid) {
				t.Errorf("%s %.20q: %v, want ErrInvalid", what, path, err)
			}
		}
		if _, err := c.Watch(r.ctx, path); !errors.Is(err, xenstore.ErrInvalid) {
			t.Errorf("watch %.20q: %v, want ErrInvalid", path, err)
		}
	}
	if now := c.Stats().Requests; now != sent {
		t.Errorf("%d invalid requests were sent", now-sent)
	}
}

func removeOfNothingNeedsAParent(t *testing.T, r *rig) {
	c := r.client(0)
	r.must(c.Write(r.ctx, "/a/b/c", "1"))
	r.must(c.Remove(r.ctx, "/a/none"))
	r.want(c.Remove(r.ctx, "/none/none"), xenstore.ErrNotFound)
	r.must(c.Remove(r.ctx, "/a"))
	_, err := c.Read(r.ctx, "/a/b/c")
	r.want(err, xenstore.ErrNotFound)
	r.want(c.Remove(r.ctx, "/"), xenstore.ErrInvalid)
}

func directoryOfManyMessages(t *testing.T, r *rig) {
	c := r.client(0)
	var want []string
	for i := range 700 {
		want = append(want, fmt.Sprintf("name-%d", i*7919))
	}
	r.must(c.Transact(r.ctx, func(tx xenstore.Tx) error {
		for _, name := range want {
			if err := tx.Write("/many/"+name, ""); err != nil {
				return err
			}
		}
		return nil
	}))
	slices.Sort(want)
	check := func(got []string, err error) {
		t.Helper()
		r.must(err)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%d names, want %d", len(got), len(want))
		}
	}
	check(c.Directory(r.ctx, "/many"))
	r.must(c.Transact(r.ctx, func(tx xenstore.Tx) error {
		check(tx.Directory("/many"))
		return nil
	}))
}

func permsGoRoundAndHold(t *testing.T, r *rig) {
	zero, seven, eight := r.client(0), r.client(7), r.client(8)
	r.must(zero.Write(r.ctx, "/shared", "1"))
	want := []xenstore.Perm{{Dom: 7, Access: xenstore.None}, {Dom: 8, Access: xenstore.ReadOnly}}
	r.must(zero.SetPerms(r.ctx, "/shared", want...))
	for _, c := range []*xenstore.Client{zero, seven, eight} {
		got, err := c.Perms(r.ctx, "/shared")
		r.must(err)
		if !slices.Equal(got, want) {
			t.Errorf("perms %v, want %v", got, want)
		}
	}
	r.must(seven.Write(r.ctx, "/shared", "2"))
	if got := r.read(eight, "/shared"); got != "2" {
		t.Errorf("domain 8 reads %q", got)
	}
	r.want(eight.Write(r.ctx, "/shared", "3"), xenstore.ErrAccess)
	r.want(eight.Write(r.ctx, "/local/domain/7/x", "3"), xenstore.ErrAccess)
	_, err := eight.Read(r.ctx, "/local/domain/7/none")
	r.want(err, xenstore.ErrAccess) // not ErrNotFound: domain 8 may not learn whether the node exists
	r.must(eight.Write(r.ctx, "mine", "3"))
	if got := r.read(zero, "/local/domain/8/mine"); got != "3" {
		t.Errorf("home of domain 8 has %q", got)
	}
	r.want(zero.SetPerms(r.ctx, "/shared", xenstore.Perm{Dom: 99, Access: xenstore.None}), xenstore.ErrNotFound)
}

func transactionIsSeenWholeOrNot(t *testing.T, r *rig) {
	c, other := r.client(0), r.client(0)
	r.must(c.Transact(r.ctx, func(tx xenstore.Tx) error {
		r.must(tx.Write("/t/a", "1"))
		r.must(tx.Write("/t/b", "2"))
		if v, err := tx.Read("/t/a"); v != "1" || err != nil {
			t.Errorf("inside: %q, %v", v, err)
		}
		_, err := other.Read(r.ctx, "/t/a")
		r.want(err, xenstore.ErrNotFound)
		return nil
	}))
	if r.read(other, "/t/a") != "1" || r.read(other, "/t/b") != "2" {
		t.Error("commit did not show all of it")
	}
	sorry := errors.New("changed my mind")
	err := c.Transact(r.ctx, func(tx xenstore.Tx) error {
		r.must(tx.Remove("/t"))
		return sorry
	})
	if err != sorry {
		t.Errorf("error %v, want fn's own", err)
	}
	if r.read(other, "/t/a") != "1" {
		t.Error("aborted transaction took effect")
	}
}

func transactionInConflictRunsAgain(t *testing.T, r *rig) {
	c, other := r.client(0), r.client(0)
	r.must(c.Write(r.ctx, "/counter", "0"))
	runs := 0
	r.must(c.Transact(r.ctx, func(tx xenstore.Tx) error {
		v, err := tx.Read("/counter")
		r.must(err)
		if runs++; runs <= 3 {
			r.must(other.Write(r.ctx, "/counter", fmt.Sprint("other", runs)))
		}
		return tx.Write("/counter", v+"+")
	}))
	if got := r.read(other, "/counter"); runs != 4 || got != "other3+" {
		t.Errorf("%d runs ended in %q", runs, got)
	}
	if n := c.Stats().Conflicts; n != 3 {
		t.Errorf("counted %d conflicts", n)
	}
}

func transactionsOfOneClientTakeTurns(t *testing.T, r *rig) {
	c := r.client(7) // an unprivileged domain may have ten transactions open
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			if err := c.Transact(r.ctx, func(tx xenstore.Tx) error {
				return tx.Write(fmt.Sprintf("dir/%d", i), "")
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	names, err := c.Directory(r.ctx, "dir")
	r.must(err)
	if s := c.Stats(); len(names) != 24 || s.Conflicts != 0 {
		t.Errorf("%d nodes, %d conflicts of our own making", len(names), s.Conflicts)
	}
}

func abandonedTransactionIsEnded(t *testing.T, r *rig) {
	c := r.client(7)
	for i := range 30 { // three times the quota
		ctx, cancel := context.WithCancel(r.ctx)
		err := c.Transact(ctx, func(tx xenstore.Tx) error {
			r.must(tx.Write("x", fmt.Sprint(i)))
			cancel()
			return nil
		})
		if r.want(err, context.Canceled); errors.Is(err, xenstore.ErrUnanswered) {
			t.Errorf("maybe committed, though that was not asked for: %v", err)
		}
	}
	r.must(c.Transact(r.ctx, func(tx xenstore.Tx) error { return tx.Write("x", "last") }))
}

func watchHearsChangesBelow(t *testing.T, r *rig) {
	c, other := r.client(7), r.client(0)
	r.must(c.Write(r.ctx, "dir/node", "0"))
	w, again := r.watch(c, "dir"), r.watch(c, "dir")
	defer again.Close()
	if paths, all := r.event(w); all || !slices.Equal(paths, []string{"dir"}) {
		t.Errorf("first event: %q, all %v", paths, all)
	}
	r.event(again)
	r.must(other.Write(r.ctx, "/local/domain/7/dir/node", "1"))
	for _, w := range []*xenstore.Watch{w, again} {
		if paths, all := r.event(w); all || !slices.Equal(paths, []string{"dir/node"}) {
			t.Errorf("event: %q, all %v", paths, all)
		}
	}
	r.must(other.Write(r.ctx, "/local/domain/7/dirt", "1")) // only shares the prefix
	r.quiet(c, w)
	r.must(other.Remove(r.ctx, "/local/domain/7/dir"))
	if paths, _ := r.event(w); !slices.Contains(paths, "dir") {
		t.Errorf("removal named %q", paths)
	}
	special := r.watch(other, "@releaseDomain")
	defer special.Close()
	r.event(special)
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

func watchIsSilentAfterClose(t *testing.T, r *rig) {
	c := r.client(0)
	for i := range 200 { // more than any quota, if the watches stayed
		w := r.watch(c, "/node")
		w.Close()
		w.Close()
		if _, open := <-w.C(); open {
			<-w.C()
		}
		r.want(w.Err(), net.ErrClosed)
		r.must(c.Write(r.ctx, "/node", fmt.Sprint(i)))
	}
	if n := c.Stats().UnknownTokens; n != 0 {
		t.Errorf("%d stragglers were taken for strangers", n)
	}
}

func watchThatIsNotReadForgetsPathsNotChanges(t *testing.T, r *rig) {
	c, other := r.client(0), r.client(0)
	w := r.watch(c, "/busy")
	defer w.Close()
	r.event(w)
	for i := range 100 {
		r.must(other.Write(r.ctx, fmt.Sprintf("/busy/%d", i), ""))
	}
	_, err := c.Read(r.ctx, "/busy/99") // the reply comes after the events
	r.must(err)
	if paths, all := r.event(w); !all || paths != nil {
		t.Errorf("after 100 events: %d paths, all %v", len(paths), all)
	}
	r.quiet(c, w)
	r.must(other.Write(r.ctx, "/busy/0", ""))
	if paths, all := r.event(w); all || !slices.Equal(paths, []string{"/busy/0"}) {
		t.Errorf("next: %q, all %v", paths, all)
	}
}

func resetWatchesKeepsOurs(t *testing.T, r *rig) {
	c := r.client(7)
	w := r.watch(c, "node")
	r.event(w)
	r.must(c.ResetWatches(r.ctx))
	if _, all := r.event(w); !all {
		t.Error("set again without saying that anything may have changed")
	}
	// Setting the watch again causes an event too, perhaps after the one above.
	r.must(c.Write(r.ctx, "node", "1"))
	for !slices.Contains(first(r.event(w)), "node") {
	}
}

func first(paths []string, all bool) []string {
	if all {
		return []string{"node"}
	}
	return paths
}

func quotaIsAnError(t *testing.T, r *rig) {
	c := r.client(7)
	r.want(c.Write(r.ctx, "big", strings.Repeat("v", 2048)), xenstore.ErrQuota)
	var last error
	for n := 0; last == nil; n++ {
		if n > 1000 {
			t.Fatal("no limit on watches")
		}
		_, last = c.Watch(r.ctx, fmt.Sprint("w", n))
	}
	r.want(last, xenstore.ErrQuota)
	r.must(c.Write(r.ctx, "small", "still works"))
}

func domainsAreKnown(t *testing.T, r *rig) {
	zero, seven := r.client(0), r.client(7)
	if path, err := zero.GetDomainPath(r.ctx, 7); path != "/local/domain/7" || err != nil {
		t.Errorf("path %q, %v", path, err)
	}
	for dom, want := range map[hypercall.DomID]bool{7: true, 99: false} {
		if is, err := zero.IsIntroduced(r.ctx, dom); is != want || err != nil {
			t.Errorf("domain %d introduced: %v, %v", dom, is, err)
		}
	}
	r.want(seven.Introduce(r.ctx, 9, 1, 9), xenstore.ErrAccess)
	r.want(seven.Release(r.ctx, 7), xenstore.ErrAccess)
	r.want(seven.SetTarget(r.ctx, 7, 0), xenstore.ErrAccess)
}

func manyCallersShareAConnection(t *testing.T, r *rig) {
	for _, cfg := range []xenstore.Config{{}, {MaxPayload: 4096, Pipeline: 16}} {
		c, _ := r.breakable(0, cfg)
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				path := fmt.Sprintf("/p%d/n%d", cfg.Pipeline, i)
				for j := range 25 {
					v := fmt.Sprint(i, j)
					if err := c.Write(r.ctx, path, v); err != nil {
						t.Error(err)
						return
					}
					if got, err := c.Read(r.ctx, path); got != v || err != nil {
						t.Errorf("%q, %v; want %q", got, err, v)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}

func lostConnectionIsReplaced(t *testing.T, r *rig) {
	c, cut := r.breakable(0, xenstore.Config{})
	other := r.client(0)
	w := r.watch(c, "/watched")
	r.event(w)
	cut()
	r.must(other.Write(r.ctx, "/watched/behind-its-back", "1"))
	for {
		if _, all := r.event(w); all {
			break
		}
	}
	r.read(c, "/watched/behind-its-back")
	w.Paths()
	r.must(other.Write(r.ctx, "/watched/after", "1"))
	for {
		if paths, _ := r.event(w); slices.Contains(paths, "/watched/after") {
			break
		}
	}

	// An open transaction runs again on the new connection.
	runs := 0
	r.must(c.Transact(r.ctx, func(tx xenstore.Tx) error {
		if err := tx.Write("/t", "1"); err != nil {
			return err
		}
		if runs++; runs == 1 {
			cut()
			_, err := tx.Read("/t")
			r.want(err, xenstore.ErrAgain)
			return err
		}
		return nil
	}))
	if runs != 2 || r.read(other, "/t") != "1" {
		t.Errorf("%d runs", runs)
	}
	if n := c.Stats().Reconnects; n != 2 {
		t.Errorf("counted %d reconnects", n)
	}
}

func closeEndsEveryWait(t *testing.T, r *rig) {
	c := r.client(0)
	w := r.watch(c, "/x")
	c.Close()
	c.Close()
	for range w.C() { // until it is closed
	}
	r.want(w.Err(), net.ErrClosed)
	_, err := c.Read(r.ctx, "/x")
	r.want(err, net.ErrClosed)
	_, err = c.Watch(r.ctx, "/x")
	r.want(err, net.ErrClosed)
	r.want(c.Transact(r.ctx, func(xenstore.Tx) error { return nil }), net.ErrClosed)
	<-c.Done()
}
