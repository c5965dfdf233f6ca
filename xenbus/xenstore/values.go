package xenstore

import "fmt"

// A ValueError is a xenstore value of the wrong form.
type ValueError struct {
	Path  string // or the key alone; "" if neither was known
	Value string // what was found, clipped
	Want  string // what was expected, as "a number from 0 to 9"
}

func (e *ValueError) Error() string {
	if e.Path == "" {
		return fmt.Sprintf("%q is not %s", e.Value, e.Want)
	}
	return fmt.Sprintf("xenstore %s: %q is not %s", e.Path, e.Value, e.Want)
}

func badValue(value, want string) error {
	return &ValueError{Value: Clip(value), Want: want}
}

// ParseUint parses a decimal number from 0 to limit as the tools write it: digits only,
// no leading zero. The error is a [*ValueError].
func ParseUint(s string, limit uint64) (uint64, error) {
	var n uint64
	ok := len(s) > 0 && len(s) <= 20 && (s[0] != '0' || len(s) == 1)
	for i := 0; ok && i < len(s); i++ {
		d := uint64(s[i]) - '0' // wraps to a large number below '0'
		ok = d <= 9 && n <= (limit-min(d, limit))/10
		n = n*10 + d
	}
	if !ok || n > limit {
		return 0, badValue(s, fmt.Sprintf("a number from 0 to %d", limit))
	}
	return n, nil
}

// ParseBool parses "0" or "1". The error is a [*ValueError].
func ParseBool(s string) (bool, error) {
	switch s {
	case "0":
		return false, nil
	case "1":
		return true, nil
	}
	return false, badValue(s, "0 or 1")
}

// ParseMAC parses six pairs of hexadecimal digits joined by colons. It does not check
// whether the address suits a network device. The error is a [*ValueError].
func ParseMAC(s string) (mac [6]byte, err error) {
	ok := len(s) == 17
	for i := 0; ok && i < 6; i++ {
		hi, ok1 := hexDigit(s[3*i])
		lo, ok2 := hexDigit(s[3*i+1])
		ok = ok1 && ok2 && (i == 5 || s[3*i+2] == ':')
		mac[i] = hi<<4 | lo
	}
	if !ok {
		return [6]byte{}, badValue(s, "a MAC address")
	}
	return mac, nil
}

func hexDigit(b byte) (byte, bool) {
	switch {
	case '0' <= b && b <= '9':
		return b - '0', true
	case 'a' <= b && b <= 'f':
		return b - 'a' + 10, true
	case 'A' <= b && b <= 'F':
		return b - 'A' + 10, true
	}
	return 0, false
}

// Values holds keys of one directory that were read together. A key that did not exist is
// not in the map.
type Values map[string]string

// Has reports whether the key existed.
func (v Values) Has(key string) bool { _, ok := v[key]; return ok }

// Uint returns the number under key, or absent if the key is missing. The error is a
// [*ValueError] if the value is no number from 0 to limit.
func (v Values) Uint(key string, limit, absent uint64) (uint64, error) {
	s, ok := v[key]
	if !ok {
		return absent, nil
	}
	n, err := ParseUint(s, limit)
	return n, atKey(key, err)
}

// Bool returns true for "1" under key, false for "0", or absent if the key is missing.
// Any other value gives a [*ValueError].
func (v Values) Bool(key string, absent bool) (bool, error) {
	s, ok := v[key]
	if !ok {
		return absent, nil
	}
	b, err := ParseBool(s)
	return b, atKey(key, err)
}

// MAC returns the address under key. A missing key or any other value gives a
// [*ValueError].
func (v Values) MAC(key string) ([6]byte, error) {
	mac, err := ParseMAC(v[key])
	return mac, atKey(key, err)
}

func atKey(key string, err error) error {
	if e, ok := err.(*ValueError); ok {
		e.Path = key
	}
	return err
}
