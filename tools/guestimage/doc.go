// Package guestimage makes the files from which a Linux guest of Xen boots: a kernel from a
// package of Debian or from files, an initramfs with modules and programs, and a configuration
// for xl.
//
// [Build] makes the image of one Go program, whose process 1 is that of [guestinit]. The lab
// in test/xenlab makes its domains with the same pieces.
//
// A package is read, never installed, and its names and sizes are those of a stranger: nothing
// of it is written to this machine under a name that it chose, and what it may unpack to
// is bounded.
//
// The same input gives the same bytes: archives hold no times and no owners.
package guestimage
