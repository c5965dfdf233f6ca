//go:build !(amd64 || arm64 || loong64 || mips64le || ppc64le || riscv64 || wasm)

package shm

// Records lie in shared memory as the machine holds them, and Xen's are little-endian.
// The ioctls of a 32-bit domain have layouts of their own, which are not written here.
var _ = barevif_needs_a_64_bit_little_endian_GOARCH
