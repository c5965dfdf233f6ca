package cli_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"barevif/tools/cli"
	"barevif/tools/cli/clitest"

	"github.com/spf13/cobra"
)

// talks is a command that says, notes and logs something, and then fails.
func talks(p *cli.Program) *cobra.Command {
	return &cobra.Command{Use: "talks", Args: cli.Arguments(0), RunE: func(*cobra.Command, []string) error {
		p.Say("vif %d: connected\n  to domain 2\n", 7)
		p.Note("talks: a remark")
		p.Log().Warn("a key is not honoured", "vif", "7")
		p.Log().Info("for -v")
		return &cli.Advice{Err: errors.New("no such vif"), Next: "name another", Refused: true}
	}}
}

// records parses lines of JSON.
func records(t *testing.T, text string) (all []map[string]any) {
	t.Helper()
	for line := range strings.Lines(text) {
		var r map[string]any
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Errorf("%q: %v", line, err)
		}
		if r["time"] == nil || r["level"] == nil {
			t.Errorf("%q has no time or level", line)
		}
		all = append(all, r)
	}
	return all
}

func TestEachLineIsARecordWithLogJSON(t *testing.T) {
	code, stdout, stderr := clitest.Build(talks).Run(t, "--log", "json")
	if code != cli.ExitRefused {
		t.Errorf("exit %d", code)
	}
	said := records(t, stdout)
	if len(said) != 2 || said[0]["msg"] != "vif 7: connected" || said[1]["msg"] != "to domain 2" || said[0]["level"] != "INFO" {
		t.Errorf("%v", said)
	}
	logged := records(t, stderr)
	if len(logged) != 3 {
		t.Fatalf("%v", logged)
	}
	if r := logged[0]; r["msg"] != "talks: a remark" || r["level"] != "WARN" {
		t.Errorf("%v", r)
	}
	if r := logged[1]; r["msg"] != "a key is not honoured" || r["vif"] != "7" {
		t.Errorf("%v", r)
	}
	if r := logged[2]; r["msg"] != "no such vif" || r["next"] != "name another" || r["level"] != "ERROR" || r["exit"] != float64(cli.ExitRefused) || r["command"] != "talks" {
		t.Errorf("%v", r)
	}
	if _, _, stderr := clitest.Build(talks).Run(t, "--log=json", "-v"); len(records(t, stderr)) != 4 {
		t.Errorf("-v says nothing more: %s", stderr)
	}
	// An error of the command line, behind the flag, is a record too.
	_, _, stderr = clitest.Build(talks).Run(t, "--log=json", "--no-such-flag")
	if r := records(t, stderr); len(r) != 1 || r[0]["exit"] != float64(cli.ExitUsage) {
		t.Errorf("%s", stderr)
	}
}

func TestTextIsTheDefault(t *testing.T) {
	for _, args := range [][]string{nil, {"--log", "text"}} {
		_, stdout, stderr := clitest.Build(talks).Run(t, args...)
		if stdout != "vif 7: connected\n  to domain 2\n\n" || !strings.Contains(stderr, `level=WARN msg="a key is not honoured" vif=7`) ||
			!strings.HasSuffix(stderr, "talks: no such vif\n  next: name another\n") || !strings.HasPrefix(stderr, "talks: a remark\n") {
			t.Errorf("%q: %q, %q", args, stdout, stderr)
		}
	}
	clitest.Build(talks).Fails(t, cli.ExitUsage, []string{"--log", "yaml"}, `--log "yaml": not text or json`)
}
