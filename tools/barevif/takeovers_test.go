package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"barevif/hypercall/emu/emutest"
)

// A process that has closed its part in hand-overs does not begin to listen afterwards: nobody would
// close that listener, and its socket would stay.
func TestNobodyListensForASuccessorAfterTheEnd(t *testing.T) {
	h := &takeovers{command: "back", path: filepath.Join(emutest.SocketDir(t), "s"), slog: slog.New(slog.DiscardHandler)}
	h.ready = func() { t.Error("it is called ready after the end") }
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h.close()
	h.run(ctx, func() { t.Error("it is handed over after the end") })
	if _, err := os.Lstat(h.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is there: %v", err)
	}
	if h.listener != nil {
		t.Error("it listens")
		h.listener.Close()
	}
}
