module barevif/test/wasm

go 1.26.0

require (
	barevif v0.0.0-00010101000000-000000000000
	github.com/tetratelabs/wazero v1.12.0
)

require golang.org/x/sys v0.49.0 // indirect

replace barevif => ../..
