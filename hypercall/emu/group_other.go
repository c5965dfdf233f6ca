//go:build !linux

package emu

// A group needs Linux's epoll: elsewhere a Domain has no Group method.
type group struct{}

func (g *group) Wake()          {}
func (g *group) remove(*waiter) {}

type seat struct{ g *group }

func (s *seat) ring() {}
