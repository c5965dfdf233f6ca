package main

import (
	"bytes"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"barevif/tools/cli"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "write docs anew")

// pages returns the pages of all commands, by file name, as cobra makes them from the help.
func pages(t *testing.T) map[string]string {
	t.Helper()
	root := (&cli.Program{Stdout: io.Discard, Stderr: io.Discard}).Command(rootCommand)
	root.InitDefaultCompletionCmd()
	out := make(map[string]string)
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if !cmd.IsAvailableCommand() && cmd != root || cmd.Name() == "help" {
			return
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
		cmd.DisableAutoGenTag = true // it has the day
		if cmd.Long != "" {          // its lines are laid out, as a terminal shows them
			cmd.Long = "```text\n" + strings.TrimSpace(cmd.Long) + "\n```"
		}
		cmd.Flags().VisitAll(ofAnyMachine)
		var b bytes.Buffer
		if err := doc.GenMarkdown(cmd, &b); err != nil {
			t.Fatal(err)
		}
		out[strings.ReplaceAll(cmd.CommandPath(), " ", "_")+".md"] = b.String()
	}
	walk(root)
	return out
}

// ofAnyMachine takes this user and this machine's directory for temporary files out of the
// default of a flag.
func ofAnyMachine(f *pflag.Flag) {
	if strings.HasSuffix(f.DefValue, "/host.sock") {
		f.DefValue = "/tmp/barevif-UID/host.sock"
	}
}

// There is a page for each command, and it says what the command's help says.
func TestThePagesAreThoseOfTheHelp(t *testing.T) {
	want := pages(t)
	if len(want) < 12 || !strings.Contains(want["barevif_serve.md"], "--take-over") {
		t.Fatalf("%d pages", len(want))
	}
	if *update {
		for name, text := range want {
			if err := os.WriteFile(filepath.Join("docs", name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	const again = "; write the pages anew: go test ./tools/barevif -run Pages -update"
	files, err := filepath.Glob("docs/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if _, ok := want[filepath.Base(file)]; !ok {
			t.Errorf("%s is the page of no command", file)
		}
	}
	for name, text := range want {
		got, err := os.ReadFile(filepath.Join("docs", name))
		if err != nil {
			t.Errorf("%v%s", err, again)
		} else if string(got) != text {
			t.Errorf("docs/%s does not say what the help does%s", name, again)
		}
	}
}
