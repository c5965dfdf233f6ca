// Package xenlab boots a real Xen with a real Linux dom0 on an emulated CPU and runs
// scenarios inside. (to be written)
package xenlab
