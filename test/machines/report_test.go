//go:build linux

package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

const printed = `go: downloading something
{"Action":"start","Package":"barevif/a"}
{"Action":"run","Package":"barevif/a","Test":"TestGood"}
{"Action":"output","Package":"barevif/a","Test":"TestGood","Output":"=== RUN   TestGood\n"}
{"Action":"pass","Package":"barevif/a","Test":"TestGood"}
{"Action":"output","Package":"barevif/a","Test":"TestSkipped","Output":"=== RUN   TestSkipped\n"}
{"Action":"output","Package":"barevif/a","Test":"TestSkipped","Output":"    a_test.go:5: this machine gives no TAP: no such file\n"}
{"Action":"output","Package":"barevif/a","Test":"TestSkipped","Output":"--- SKIP: TestSkipped (0.00s)\n"}
{"Action":"skip","Package":"barevif/a","Test":"TestSkipped"}
{"Action":"output","Package":"barevif/a","Test":"TestRows/one/deep","Output":"    a_test.go:9: wrong\n"}
{"Action":"fail","Package":"barevif/a","Test":"TestRows/one/deep"}
{"Action":"fail","Package":"barevif/a","Test":"TestRows/one"}
{"Action":"pass","Package":"barevif/a","Test":"TestRows/two"}
{"Action":"fail","Package":"barevif/a","Test":"TestRows"}
{"Action":"fail","Package":"barevif/a"}
{"Action":"output","Package":"barevif/b","Output":"panic: test timed out after 20m0s\n"}
{"Action":"fail","Package":"barevif/b"}
{"ImportPath":"barevif/c [barevif/c.test]","Action":"build-output","Output":"c_test.go:3:1: syntax error\n"}
{"ImportPath":"barevif/c [barevif/c.test]","Action":"build-fail"}
{"Action":"fail","Package":"barevif/c"}
{"Action":"skip","Package":"barevif/none"}
`

// A failure is the failed test, not its parents. A package fails by itself if none of its
// tests failed.
func TestSummaryNamesWhatFailedAndWhatWasMissing(t *testing.T) {
	r, err := summarize(strings.NewReader(printed))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range r.failures {
		names = append(names, f.test)
	}
	if want := []string{"barevif/a.TestRows/one/deep", "barevif/b", "barevif/c"}; !slices.Equal(names, want) {
		t.Errorf("failures %q, want %q", names, want)
	}
	if r.passed != 2 || !r.failed() {
		t.Errorf("%d passed, failed %v", r.passed, r.failed())
	}
	skipped := r.skips["this machine gives no TAP: no such file"]
	if len(r.skips) != 1 || !slices.Equal(skipped, []string{"barevif/a.TestSkipped"}) {
		t.Errorf("skips %q", r.skips)
	}
	r.name, r.about, r.took = "here", "a machine", 90*time.Second
	other := r
	other.name, other.failures = "there", r.failures[:1]
	text := table([]result{r, other, {name: "fine", about: "another"}, {name: "odd", status: errors.New("signal: killed")}})
	for _, want := range []string{
		"| here | a machine | FAIL | 90 | 2 | 3 | 1 |\n", "| fine | another | pass | 0 | 0 | 0 | 0 |\n", "| odd |  | FAIL |",
		"  FAIL barevif/a.TestRows/one/deep\n       a_test.go:9: wrong\n", "  FAIL barevif/b\n       panic: test timed out",
		"  FAIL go test: signal: killed\n", "  skip 1 (barevif/a.TestSkipped): this machine gives no TAP: no such file\n",
		"  2 of 4: barevif/a.TestRows/one/deep\n", "  1 of 4: barevif/b\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestRowsAreChosenByName(t *testing.T) {
	all, err := choose(rows, nil)
	if err != nil || len(all) != len(rows) {
		t.Errorf("%d rows, %v", len(all), err)
	}
	two, err := choose(rows, []string{"busy", "user"})
	if err != nil || len(two) != 2 || two[0].Name != "busy" || two[1].Name != "user" {
		t.Errorf("%+v, %v", two, err)
	}
	if _, err := choose(rows, []string{"moon"}); err == nil || !strings.Contains(err.Error(), "-list") {
		t.Errorf("an unknown name: %v", err)
	}
	seen := map[string]bool{}
	for _, r := range rows {
		if seen[r.Name] || r.About == "" {
			t.Errorf("row %+v", r)
		}
		seen[r.Name] = true
	}
}

func TestLastOfAVariableCounts(t *testing.T) {
	got := lastSettings([]string{"TMPDIR=/theirs", "A=1", "TMPDIR=/ours", "B="})
	if want := []string{"A=1", "TMPDIR=/ours", "B="}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
