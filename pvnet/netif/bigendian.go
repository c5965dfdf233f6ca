//go:build !(386 || amd64 || arm || arm64 || loong64 || mips64le || mipsle || ppc64le || riscv64 || wasm)

package netif

// The records are written as the machine holds them, and Xen's are
// little-endian.
var _ = barevif_netif_needs_a_little_endian_GOARCH
