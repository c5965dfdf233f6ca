package emu

// NewWithoutSystem is New for a machine that takes nothing of the operating system, as one
// takes nothing where there is none.
func NewWithoutSystem(cfg Config) (*Machine, error) {
	m, err := New(cfg)
	if err == nil {
		m.sys = noSystem
	}
	return m, err
}
