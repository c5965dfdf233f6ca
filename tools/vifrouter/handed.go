package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"

	"barevif/hypercall"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/tools/vifrouter/config"
	"barevif/xenbus/xenstore"
)

// Keys below the directory of --store. Dom0 writes the configuration, in the value of the first key or
// in pieces below it, config/1, config/2 ...; the router answers under the second.
const (
	keyConfig = "config"
	keyResult = "result"
)

const (
	mostPieces = 256  // of a configuration
	mostResult = 1000 // bytes; xenstored takes 2048 of a domain
)

// storeRoot is the directory that libxl makes for what a domain and dom0 tell each other. Both may
// write it, and no other domain may read it.
const storeRoot = "data/"

// checkStore checks the value of --store.
func checkStore(dir string) error {
	if !strings.HasPrefix(dir, storeRoot) || !xenstore.ValidPath(dir) {
		return cli.BadValue("store", dir, "a directory below data in the domain's xenstore, such as data/vifrouter")
	}
	return nil
}

// A handed is the directory of xenstore where dom0 hands the router's domain a configuration, and finds the
// answer. It is for one goroutine.
type handed struct {
	store *xenstore.Client
	watch *xenstore.Watch
	dir   string
	log   *slog.Logger

	text string // the configuration that was read last
	said string // the last answer
	done bool   // the configuration that was read last has its answer: each of its pieces fires the watch
}

// openHanded watches the directory dir of this domain's xenstore. The caller closes what it returns.
func openHanded(ctx context.Context, domain hypercall.Domain, dir string, log *slog.Logger) (*handed, error) {
	store, err := xenstore.Dial(ctx, domain.Store, xenstore.Config{Logger: log})
	if err != nil {
		return nil, fmt.Errorf("--store: %w", err)
	}
	h := &handed{store: store, dir: dir, log: log}
	if h.watch, err = store.Watch(ctx, h.key(keyConfig)); err != nil {
		h.close()
		return nil, fmt.Errorf("--store: watch %s: %w", h.key(keyConfig), err)
	}
	select {
	case <-h.watch.C(): // a watch fires once when it is set
	case <-ctx.Done():
		h.close()
		return nil, context.Cause(ctx)
	}
	return h, nil
}

func (h *handed) close() {
	h.store.Close()
	<-h.store.Done()
}

func (h *handed) key(name string) string { return h.dir + "/" + name }

// source names the configuration in errors and for "vifrouter status".
func (h *handed) source() string { return "xenstore:" + h.key(keyConfig) }

// changed delivers when a configuration may have been handed. It is nil without --store.
func (h *handed) changed() <-chan struct{} {
	if h == nil {
		return nil
	}
	return h.watch.C()
}

// read returns the configuration that was handed, or nil if there is none.
func (h *handed) read(ctx context.Context) (*config.Config, error) {
	var text, result string
	err := h.store.Transact(ctx, func(tx xenstore.Tx) error {
		var err error
		if result, err = tx.Read(h.key(keyResult)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		text, err = h.whole(tx)
		return err
	})
	h.done = err == nil && text == h.text && result == h.said
	h.text = text
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%s: %w", h.source(), err)
	case strings.TrimSpace(text) == "":
		return nil, nil
	}
	return config.Parse(h.source(), []byte(text))
}

// whole returns the value of the key and of the pieces below it, one after the other.
func (h *handed) whole(tx xenstore.Tx) (string, error) {
	at := h.key(keyConfig)
	text, err := tx.Read(at)
	if err != nil {
		return "", err
	}
	names, err := tx.Directory(at)
	if err != nil {
		return "", err
	}
	if len(names) > mostPieces {
		return "", fmt.Errorf("%d pieces, and at most %d are read: write longer ones", len(names), mostPieces)
	}
	numbers := map[string]uint64{}
	for _, name := range names {
		if numbers[name], err = xenstore.ParseUint(name, 1<<32); err != nil {
			return "", fmt.Errorf("the piece %q: name the pieces %s/1, %s/2 and so on", xenstore.Clip(name), at, at)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Compare(numbers[a], numbers[b]) })
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = at + "/" + name
	}
	values, errs := tx.ReadAll(paths...)
	return text + strings.Join(values, ""), errors.Join(errs...)
}

// answer writes what became of the configuration that was handed.
func (h *handed) answer(ctx context.Context, cfg *config.Config, err error) {
	var said string
	if err == nil {
		said = "taken: " + counts(cfg)
	} else {
		said = "refused: " + strings.Join(strings.Split(strings.TrimSpace(err.Error()), "\n"), "; ")
	}
	if len(said) > mostResult {
		said = said[:mostResult] + "…"
	}
	h.said = strings.ToValidUTF8(said, "")
	if err := h.store.Write(ctx, h.key(keyResult), h.said); err != nil && ctx.Err() == nil {
		h.log.Warn("the answer is not in xenstore", "key", h.key(keyResult), "err", err)
	}
}

// counts says how much there is in a configuration.
func counts(cfg *config.Config) string {
	return fmt.Sprintf("%d networks, %d guests, %d rules, %d forwards", len(cfg.Networks), len(cfg.Guests), len(cfg.Rules), len(cfg.Forwards))
}

// begin returns the configuration to begin with, and where it comes from: the one that is handed, or
// that of the command line. If there is neither it waits. It returns nil when ctx has ended.
func (r *run) begin(ctx context.Context, dom *domain.Domain, h *handed, own *config.Config) (*config.Config, string, error) {
	if h == nil {
		return own, r.file, nil
	}
	for waits := false; ; {
		cfg, err := h.read(ctx)
		if ctx.Err() != nil {
			return nil, "", nil
		}
		if err != nil && !h.done {
			h.answer(ctx, nil, err)
			r.logRefused("the configuration in xenstore is not used", err)
		}
		switch {
		case cfg != nil && err == nil: // the answer comes when it is in use
			return cfg, h.source(), nil
		case own != nil:
			return own, r.file, nil
		case !waits:
			waits = true
			r.Say("domain %d waits for a configuration: write it to %s of this domain's xenstore", dom.ID(), h.key(keyConfig))
		}
		select {
		case <-ctx.Done():
			return nil, "", nil
		case <-dom.Gone:
			return nil, "", domain.ErrHostGone
		case _, ok := <-h.changed():
			if !ok {
				return nil, "", fmt.Errorf("--store: %w", h.watch.Err())
			}
		}
	}
}

// logRefused logs each line of an error about a configuration.
func (r *run) logRefused(text string, err error) {
	for line := range strings.Lines(err.Error()) {
		r.Log().Error(text, "err", strings.TrimSpace(line))
	}
}
