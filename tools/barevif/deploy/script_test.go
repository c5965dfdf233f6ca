package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// xl's script succeeds once the vif is set up, and fails if that cannot be done. xl then
// prints hotplug-error, which back has written; or the script, if there is no back.
func TestTheHotplugScriptWaitsForTheBackend(t *testing.T) {
	script, err := filepath.Abs("vif-barevif")
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(script); err != nil || st.Mode()&0o111 == 0 {
		t.Fatalf("%v, %v: not executable", st, err)
	}
	for _, c := range []struct {
		action, status, later string // hotplug-status at first, and from the third look on
		fails, writes         bool
	}{
		{action: "online", status: "connected", later: "connected"},
		{action: "online", status: "", later: "connected"},
		{action: "online", status: "error", later: "error", fails: true},
		{action: "online", status: "", later: "error", fails: true},
		{action: "online", status: "", later: "", fails: true, writes: true},
		{action: "offline", status: "", later: ""},
		{action: "add", status: "error", later: "error"},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{
			"xenstore-read":  `echo "$1" >>"$0.log"; [ $(wc -l <"$0.log") -lt 3 ] && echo "` + c.status + `" || echo "` + c.later + `"`,
			"xenstore-write": `echo "$*" >"$0.log"`,
			"sleep":          `exit 0`,
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command(script, c.action, "type_if=vif")
		cmd.Env = []string{"XENBUS_PATH=backend/vif/1/0", "PATH=" + dir + ":/usr/bin:/bin"}
		out, err := cmd.CombinedOutput()
		if fails := err != nil; fails != c.fails || len(out) > 0 {
			t.Errorf("%+v: %v, %s", c, err, out)
		}
		read, _ := os.ReadFile(filepath.Join(dir, "xenstore-read.log"))
		if c.action == "online" && !strings.HasPrefix(string(read), "backend/vif/1/0/hotplug-status\n") {
			t.Errorf("%+v: it reads %q", c, read)
		}
		wrote, _ := os.ReadFile(filepath.Join(dir, "xenstore-write.log"))
		if c.writes != strings.HasPrefix(string(wrote), "backend/vif/1/0/hotplug-error barevif back") {
			t.Errorf("%+v: it writes %q", c, wrote)
		}
	}
}
