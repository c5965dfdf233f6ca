package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestPageShowsWhatTheProgramWasStartedWith(t *testing.T) {
	h := page([]string{"/app/hello", "-addr", "10.9.0.2/24", "two words"}, []string{"MSG=it's me"})
	for path, want := range map[string]string{
		"/":       "args [\"/app/hello\" \"-addr\" \"10.9.0.2/24\" \"two words\"]\nenv [\"MSG=it's me\"]\n",
		"/memory": "MemTotal:",
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s: %d, %q", path, w.Code, w.Body)
		}
	}
}

func TestAddressThatIsNoneIsNamed(t *testing.T) {
	if err := serve(t.Context(), "10.9.0.2", "0", ""); err == nil || !strings.Contains(err.Error(), `-addr "10.9.0.2": not IP/BITS`) {
		t.Errorf("%v", err)
	}
}
