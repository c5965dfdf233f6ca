package appliance

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// A Blob is a file of pseudo-random bytes that is computed, not stored. Byte i is the
// same in every Blob that has one. It is an io.ReadSeeker for one goroutine.
type Blob struct {
	size, at int64
	stream   cipher.Stream // positioned at at; nil after a Seek
}

// NewBlob returns a Blob of size bytes, which must not be negative.
func NewBlob(size int64) *Blob { return &Blob{size: size} }

func (b *Blob) Read(p []byte) (int, error) {
	if b.at >= b.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), b.size-b.at)]
	if b.stream == nil {
		s, err := keystream(b.at)
		if err != nil {
			return 0, err
		}
		b.stream = s
	}
	clear(p)
	b.stream.XORKeyStream(p, p)
	b.at += int64(len(p))
	return len(p), nil
}

// Seek implements io.Seeker.
func (b *Blob) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += b.at
	case io.SeekEnd:
		offset += b.size
	}
	if offset < 0 {
		return 0, fmt.Errorf("seek to byte %d: %w", offset, fs.ErrInvalid)
	}
	if offset != b.at {
		b.at, b.stream = offset, nil
	}
	return offset, nil
}

// keystream returns AES-128 in counter mode with a key of zeros, from byte at on. It is
// fast, the same everywhere, and starts at any offset without computing the bytes before
// it.
func keystream(at int64) (cipher.Stream, error) {
	block, err := aes.NewCipher(make([]byte, 16))
	if err != nil {
		return nil, err
	}
	iv := make([]byte, aes.BlockSize)
	for i, n := aes.BlockSize-1, uint64(at)/aes.BlockSize; n > 0; i, n = i-1, n>>8 {
		iv[i] = byte(n)
	}
	s := cipher.NewCTR(block, iv)
	skip := make([]byte, at%aes.BlockSize)
	s.XORKeyStream(skip, skip)
	return s, nil
}

// Sum returns the SHA-256 of a Blob of size bytes, in hexadecimal. The error is ctx's
// cause.
func Sum(ctx context.Context, size int64) (string, error) {
	h := sha256.New()
	b := NewBlob(size)
	for ctx.Err() == nil {
		switch _, err := io.CopyN(h, b, 1<<20); {
		case errors.Is(err, io.EOF):
			return hex.EncodeToString(h.Sum(nil)), nil
		case err != nil:
			return "", err
		}
	}
	return "", context.Cause(ctx)
}
