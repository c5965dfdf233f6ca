//go:build !linux

package emu

var thisSystem = noSystem

func newThreadBell(bell) (bell, error) { return nil, errNoThread }
