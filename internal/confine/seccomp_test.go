//go:build linux && (amd64 || arm64)

package confine

import (
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// run interprets a program as the kernel does.
func run(t *testing.T, code []unix.SockFilter, number, arch uint32, args [6]uint64) uint32 {
	t.Helper()
	word := func(offset uint32) uint32 {
		switch {
		case offset == offsetNumber:
			return number
		case offset == offsetArch:
			return arch
		case offset >= offsetArgs && offset%8 == 0 && offset < offsetArgs+48:
			return uint32(args[(offset-offsetArgs)/8])
		}
		t.Fatalf("load from %d", offset)
		return 0
	}
	var a uint32
	for pc := 0; ; {
		if pc >= len(code) {
			t.Fatal("fell off the end")
		}
		i := code[pc]
		pc++
		branch := func(taken bool) {
			if taken {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		}
		switch i.Code {
		case load:
			a = word(i.K)
		case and:
			a &= i.K
		case ret:
			return i.K
		case jumpAlways:
			pc += int(i.K)
		case jumpEqual:
			branch(a == i.K)
		case jumpAtLeast:
			branch(a >= i.K)
		default:
			t.Fatalf("instruction %#x", i.Code)
		}
	}
}

// expected is what the rules say, in order.
func expected(rules []rule, otherwise Action, number uint32, args [6]uint64) uint32 {
	for _, r := range rules {
		if r.number != number {
			continue
		}
		met := true
		for _, c := range r.conditions {
			v := uint32(args[c.Arg])
			if c.Mask != 0 {
				v &= c.Mask
			}
			met = met && v == c.Value
		}
		if met {
			return uint32(r.action)
		}
	}
	return uint32(otherwise)
}

func TestFilterAnswersAsItsRulesSay(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	actions := []Action{Allow, Fail(unix.EPERM), Fail(unix.ENOSYS)}
	for range 300 {
		f := NewFilter(actions[rng.IntN(3)])
		var inOrder []rule
		for range rng.IntN(300) {
			number, action := rng.Uint32N(500), actions[rng.IntN(3)]
			var conditions []Condition
			for range rng.IntN(4) {
				conditions = append(conditions, Condition{Arg: rng.IntN(6), Mask: rng.Uint32N(4), Value: rng.Uint32N(4)})
			}
			f.When(action, number, conditions...)
			inOrder = append(inOrder, rule{number, conditions, action})
		}
		code := f.program()
		for number := uint32(0); number < 520; number++ {
			var args [6]uint64
			for i := range args {
				args[i] = uint64(rng.Uint32N(4))
			}
			if got, want := run(t, code, number, auditArch, args), expected(inOrder, f.otherwise, number, args); got != want {
				t.Fatalf("system call %d%v: %#x, want %#x (rules %v)", number, args, got, want, inOrder)
			}
		}
		if got := run(t, code, 1, auditArch+1, [6]uint64{}); got != unix.SECCOMP_RET_KILL_PROCESS {
			t.Fatalf("another architecture: %#x", got)
		}
	}
}
