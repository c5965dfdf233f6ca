package domaintest

import (
	"slices"
	"testing"
)

// Who checks what ran of the suite compares it with Cases.
func TestCasesAreNamedOnce(t *testing.T) {
	names := Cases()
	for _, want := range []string{
		"MemoryIsZeroedAndOurs", "PingPong", "Group/LosesNoEvent", "GroupOnThread/LosesNoEvent",
		"StormIsDelayedButNotWakeNorDeadline", "Threads/PingPong", "Threads/GroupOnThread/LosesNoEvent",
	} {
		if !slices.Contains(names, want) {
			t.Errorf("%s is missing", want)
		}
	}
	if n := len(memoryCases) + 2*len(eventCases) + 3*len(groupCases) + 1; len(names) != n {
		t.Errorf("%d names, %d cases", len(names), n)
	}
	slices.Sort(names)
	if n := len(names); len(slices.Compact(names)) != n {
		t.Error("a name comes twice")
	}
}
