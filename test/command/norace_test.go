//go:build !race

package command_test

const raceFlag = "-race=false"
