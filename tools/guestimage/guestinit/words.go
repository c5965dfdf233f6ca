package guestinit

import (
	"errors"
	"strings"
)

// Errors of [Words].
var (
	errOpen      = errors.New("a quotation mark is not closed")
	errBackslash = errors.New("nothing follows the last backslash")
)

// Words splits text into words, as a shell does:
//
//   - White space separates words.
//   - Between single quotes every character stands for itself.
//   - Between double quotes a backslash makes the next double quote or backslash stand for
//     itself, and is an ordinary character before any other.
//   - Elsewhere a backslash makes the next character stand for itself.
//
// Quotes may begin and end within a word, and two quotes with nothing between them are an empty word. Nothing else has a meaning.
func Words(text string) ([]string, error) {
	var words []string
	var word strings.Builder
	open := false // a word has begun
	for i := 0; i < len(text); i++ {
		c := text[i]
		if isSpace(c) {
			if open {
				words = append(words, word.String())
				word.Reset()
				open = false
			}
			continue
		}
		open = true
		var err error
		if i, err = take(text, i, &word); err != nil {
			return nil, err
		}
	}
	if open {
		words = append(words, word.String())
	}
	return words, nil
}

// take adds what begins at text[i] to the word, a character or a quoted part, and returns the index of its
// last byte.
func take(text string, i int, word *strings.Builder) (int, error) {
	switch text[i] {
	case '\\':
		if i++; i == len(text) {
			return 0, errBackslash
		}
		word.WriteByte(text[i])
	case '\'':
		end := strings.IndexByte(text[i+1:], '\'')
		if end < 0 {
			return 0, errOpen
		}
		word.WriteString(text[i+1 : i+1+end])
		return i + 1 + end, nil
	case '"':
		for i++; i < len(text); i++ {
			switch {
			case text[i] == '"':
				return i, nil
			case text[i] == '\\' && i+1 < len(text) && (text[i+1] == '"' || text[i+1] == '\\'):
				i++
			}
			word.WriteByte(text[i])
		}
		return 0, errOpen
	default:
		word.WriteByte(text[i])
	}
	return i, nil
}

// Quote returns text for which [Words] finds the one word s.
func Quote(s string) string {
	plain := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-_./:=,@%+", c)
	}
	if s != "" && strings.IndexFunc(s, func(c rune) bool { return !plain(c) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
