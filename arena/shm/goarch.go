//go:build !(amd64 || arm64 || loong64 || mips64le || ppc64le || riscv64 || wasm)

package shm

// Records are copied between shared memory and Go structs without conversion, and Xen's
// are little-endian. The ioctls of a 32-bit domain have other layouts, which are not
// implemented.
var _ = barevif_needs_a_64_bit_little_endian_GOARCH
