package emu

import (
	"fmt"

	"barevif/hypercall/epoll"
)

var thisSystem = system{eventfd: newFDBell, sleeper: newEpollSleeper}

func newEpollSleeper(onThread bool) (sleeper, error) {
	set, err := epoll.New(onThread)
	if err != nil {
		return nil, fmt.Errorf("emu: %w", err)
	}
	return set, nil
}
