package launch

import (
	"bytes"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// What go-plugin says of itself is for debugging; what plugins log is not.
func TestFrame(t *testing.T) {
	for level, want := range map[hclog.Level]string{hclog.Info: "[INFO]  instar.p: logged\n", hclog.Debug: "[DEBUG] instar: exited\n[INFO]  instar.p: logged\n"} {
		var out bytes.Buffer
		l := frame{hclog.New(&hclog.LoggerOptions{Name: "instar", Output: &out, Level: level, DisableTime: true})}
		l.Info("exited")
		l.Named("p").Info("logged")
		if out.String() != want {
			t.Errorf("at %v: %q, want %q", level, out.String(), want)
		}
	}
}
