package main

import (
	"context"
	"io"
	"testing"
	"time"
)

// Verbs that look at metadata end under --untrusted, which inspect implies;
// those that copy give up on a plugin that does not answer.
func TestUntrustedIsBounded(t *testing.T) {
	t.Setenv(untrustedVariable, "")
	missing := t.TempDir() + "/missing"
	for _, x := range []struct {
		args    []string
		bounded bool
		cpu     int64
		idle    time.Duration
	}{
		{[]string{"inspect", missing}, true, untrustedCPUSeconds, untrustedIdle},
		{[]string{"inspect", "--idle-timeout=1s", missing}, true, untrustedCPUSeconds, time.Second},
		{[]string{"info", "--untrusted", missing}, true, untrustedCPUSeconds, untrustedIdle},
		{[]string{"info", missing}, false, 0, 0},
		{[]string{"info", "--timeout=1h", missing}, true, 0, 0},
		{[]string{"convert", "--untrusted", missing, missing}, false, 0, untrustedIdle},
		{[]string{"compare", "--untrusted", missing, missing}, false, 0, untrustedIdle},
		{[]string{"convert", missing, missing}, false, 0, 0},
	} {
		a := &app{name: "instar", out: io.Discard, err: io.Discard}
		root := a.rootCommand()
		root.SetArgs(x.args)
		if err := root.ExecuteContext(context.Background()); err == nil {
			t.Errorf("%q: no error", x.args)
		}
		a.close(false)
		cmd, _, err := root.Find(x.args)
		if err != nil {
			t.Fatal(err)
		}
		// A time limit is over when its command has ended.
		if bounded := cmd.Context().Err() != nil; bounded != x.bounded {
			t.Errorf("%q: bounded %v, want %v", x.args, bounded, x.bounded)
		}
		if a.limits.CPUSeconds != x.cpu || a.policy.bounds().Idle != x.idle {
			t.Errorf("%q: %d s of processor time, idle for %v; want %d and %v", x.args, a.limits.CPUSeconds, a.policy.bounds().Idle, x.cpu, x.idle)
		}
	}
}
