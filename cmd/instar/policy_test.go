package main

import (
	"context"
	"io"
	"strings"
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
		{[]string{"info", "--timeout=300", "--idle-timeout=1.5", missing}, true, 0, 1500 * time.Millisecond},
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

// Times are seconds or have a unit, and none is so short that it means nothing.
func TestTimes(t *testing.T) {
	for _, x := range []struct {
		s    string
		want time.Duration
	}{
		{"5", 5 * time.Second}, {"0.5", 500 * time.Millisecond}, {"5s", 5 * time.Second}, {"2m", 2 * time.Minute}, {"1h30m", 90 * time.Minute},
		{"", 0}, {"0", 0}, {"0s", 0}, {"-1", 0}, {"-5s", 0}, {"soon", 0}, {"5 s", 0}, {"1h30", 0}, {"1.2.3", 0}, {".", 0}, {"99999999999999", 0},
	} {
		var f timeFlag
		err := f.Set(x.s)
		if time.Duration(f) != x.want || (err == nil) != (x.want > 0) {
			t.Errorf("%q: %v, %v; want %v", x.s, time.Duration(f), err, x.want)
		}
		if err != nil && !strings.Contains(err.Error(), "30, 90s, 2m, 1h") {
			t.Errorf("%q: %v does not say what is accepted", x.s, err)
		}
	}
}
