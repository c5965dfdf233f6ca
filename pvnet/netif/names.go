package netif

import "strconv"

// nameOf returns the name of v, or what and its number if it has none.
func nameOf[T ~uint8 | ~uint16 | ~uint32](v T, what string, names ...string) string {
	if int64(v) < int64(len(names)) {
		return names[v]
	}
	return unnamed(what, v)
}

func unnamed[T ~uint8 | ~uint16 | ~uint32 | ~int16](what string, v T) string {
	return what + " " + strconv.FormatInt(int64(v), 10)
}
