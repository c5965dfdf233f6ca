package domain

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"barevif/hypercall/xendev"
	"barevif/tools/xenhost"
	"barevif/xenbus/xenstore"
)

// XenstoreSocket returns the default socket of the xenstore of the emulated host that listens
// at socket.
func XenstoreSocket(socket string) string {
	return filepath.Join(filepath.Dir(socket), "xenstored.sock")
}

// Vifs returns the ids of the frontends of the selected domain, in order. It only reads: this
// process does not become the domain, in which another one may run.
func (f *Flags) Vifs(ctx context.Context) (ids []string, err error) {
	if f.Xen {
		return xenVifs(xendev.Config{})
	}
	if socket, owner := joinPlace(); f.Socket == socket && f.User == "" {
		if err := checkPlace(filepath.Dir(socket), owner); err != nil {
			return nil, err
		}
	}
	store, err := xenstore.Dial(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
		return new(net.Dialer).DialContext(ctx, "unix", XenstoreSocket(f.Socket))
	}, xenstore.Config{})
	if err != nil {
		return nil, err
	}
	defer store.Close()
	ids, err = store.Directory(ctx, "/local/domain/"+strconv.Itoa(int(f.Dom))+"/device/vif")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // it has none
	}
	return inOrder(ids), err
}

// Candidates returns the ids that may be meant by a command line which is not complete. Without an
// emulated host these are the vifs of the Xen domain, for which --xen may follow. cfg says where that is.
func (f *Flags) Candidates(ctx context.Context, cfg xendev.Config) []string {
	if !f.Xen {
		if ids, err := f.Vifs(ctx); err == nil {
			return ids
		}
	}
	ids, _ := xenVifs(cfg) // there is no place for an error between two words of a command line
	return ids
}

func xenVifs(cfg xendev.Config) (ids []string, err error) {
	all, err := xenhost.Vifs(cfg)
	for _, v := range all {
		if id, ok := FrontendID(v); ok {
			ids = append(ids, id)
		}
	}
	return inOrder(ids), err
}

// FrontendID returns the id of a vif whose frontend is in this domain.
func FrontendID(v xenhost.Vif) (id string, ok bool) {
	id, ok = strings.CutPrefix(v.Name, "vif-")
	return id, ok && !v.Backend
}

// inOrder sorts ids as numbers, and leaves out what is no number.
func inOrder(ids []string) []string {
	ids = slices.DeleteFunc(ids, func(id string) bool {
		_, err := strconv.ParseUint(id, 10, 32)
		return err != nil
	})
	slices.SortFunc(ids, func(a, b string) int {
		x, _ := strconv.ParseUint(a, 10, 32)
		y, _ := strconv.ParseUint(b, 10, 32)
		return int(int64(x) - int64(y))
	})
	return ids
}
