//go:build linux && (amd64 || arm64)

package confine

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Action is what a filter answers to a system call.
type Action uint32

// Allow lets the call through.
const Allow Action = unix.SECCOMP_RET_ALLOW

// Fail makes the call fail with an error number.
func Fail(errno unix.Errno) Action {
	return Action(unix.SECCOMP_RET_ERRNO | uint32(errno)&unix.SECCOMP_RET_DATA)
}

// Condition is true where the low half of an argument, after Mask, equals
// Value. Only arguments that the kernel takes as int, or bits that lie in the
// low half, can be tested.
type Condition struct {
	Arg   int
	Mask  uint32 // 0: all bits
	Value uint32
}

// Filter assembles a seccomp program. Of the rules for one system call the
// first that matches decides.
//
// The filter is made here rather than by go-seccomp-bpf for the sake of
// start-up: that library builds tables of every architecture when it is
// initialised, and compares one number after the other, for which the kernel
// pays when it works out, at each load, what the filter does with each call.
type Filter struct {
	rules     []rule
	otherwise Action
}

type rule struct {
	number     uint32
	conditions []Condition
	action     Action
}

// NewFilter returns a filter without rules, that answers otherwise to what no
// rule matches, and kills callers of other architectures' system calls.
func NewFilter(otherwise Action) *Filter {
	return &Filter{rules: make([]rule, 0, 256), otherwise: otherwise}
}

// On answers the listed system calls.
func (f *Filter) On(action Action, numbers ...uint32) {
	for _, n := range numbers {
		f.rules = append(f.rules, rule{number: n, action: action})
	}
}

// When answers a system call whose arguments meet every condition.
func (f *Filter) When(action Action, number uint32, conditions ...Condition) {
	f.rules = append(f.rules, rule{number: number, conditions: conditions, action: action})
}

// Offsets in struct seccomp_data (linux/seccomp.h).
const (
	offsetNumber = 0
	offsetArch   = 4
	offsetArgs   = 16 // eight bytes each, the low half first on both architectures
)

const (
	load        = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	ret         = unix.BPF_RET | unix.BPF_K
	jumpAlways  = unix.BPF_JMP | unix.BPF_JA | unix.BPF_K
	jumpEqual   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jumpAtLeast = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	and         = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
)

// assembler builds a program from its end to its beginning, because jumps only
// lead forward: where one is written, its targets are known. Places count
// instructions from the end.
type assembler struct {
	code    []unix.SockFilter // in reverse
	returns map[Action]int    // places of the answers
}

func (a *assembler) add(op uint16, k uint32) int {
	a.code = append(a.code, unix.SockFilter{Code: op, K: k})
	return len(a.code) - 1
}

// answer returns the place of an instruction that answers.
func (a *assembler) answer(action Action) int {
	place, ok := a.returns[action]
	if !ok {
		place = a.add(ret, uint32(action))
		a.returns[action] = place
	}
	return place
}

// branch adds a conditional jump. Its reach is 255 instructions.
func (a *assembler) branch(op uint16, k uint32, ifTrue, ifFalse int) int {
	const reach = 250 // and up to two more jumps
	for _, target := range []*int{&ifTrue, &ifFalse} {
		if distance := len(a.code) - 1 - *target; distance > reach {
			*target = a.add(jumpAlways, uint32(distance))
		}
	}
	here := len(a.code)
	a.code = append(a.code, unix.SockFilter{
		Code: op, K: k, Jt: uint8(here - 1 - ifTrue), Jf: uint8(here - 1 - ifFalse),
	})
	return here
}

// program returns the filter's instructions: a binary search for the number,
// whose leaves are the answers. Its length is what loading costs.
func (f *Filter) program() []unix.SockFilter {
	a := &assembler{code: make([]unix.SockFilter, 0, 512), returns: make(map[Action]int)}
	first := a.search(f.leaves(), f.otherwise)
	if runtime.GOARCH == "amd64" {
		const x32 = 0x40000000 // __X32_SYSCALL_BIT
		other := a.answer(Fail(unix.ENOSYS))
		first = a.branch(jumpAtLeast, x32, other, first)
	}
	// The search's entry need not be the last instruction added.
	if distance := len(a.code) - 1 - first; distance > 0 {
		a.add(jumpAlways, uint32(distance))
	}
	number := a.add(load, offsetNumber)
	killed := a.add(ret, unix.SECCOMP_RET_KILL_PROCESS)
	a.branch(jumpEqual, auditArch, number, killed)
	a.add(load, offsetArch)
	slices.Reverse(a.code)
	return a.code
}

// leaf is the answer to the system calls from its start to the next leaf's:
// what its rules say, and if none matches the filter's.
type leaf struct {
	start uint32
	rules []rule
}

// plain returns the answer of a leaf that does not depend on arguments.
func (l leaf) plain(otherwise Action) (Action, bool) {
	if len(l.rules) == 0 {
		return otherwise, true
	}
	return l.rules[0].action, len(l.rules[0].conditions) == 0
}

func (f *Filter) leaves() []leaf {
	slices.SortStableFunc(f.rules, func(a, b rule) int { return cmp.Compare(a.number, b.number) })
	leaves := make([]leaf, 0, len(f.rules))
	add := func(l leaf) {
		if len(leaves) > 0 {
			before, plainBefore := leaves[len(leaves)-1].plain(f.otherwise)
			if now, plain := l.plain(f.otherwise); plain && plainBefore && now == before {
				return // goes on
			}
		}
		leaves = append(leaves, l)
	}
	next := uint32(0) // the first number not yet answered
	for i := 0; i < len(f.rules); {
		number := f.rules[i].number
		end := i + 1
		for end < len(f.rules) && f.rules[end].number == number {
			end++
		}
		if number > next {
			add(leaf{start: next})
		}
		add(leaf{start: number, rules: f.rules[i:end]})
		next, i = number+1, end
	}
	add(leaf{start: next})
	return leaves
}

// search returns the place of code that finds the leaf for the number in the
// accumulator.
func (a *assembler) search(leaves []leaf, otherwise Action) int {
	if len(leaves) == 1 {
		if action, plain := leaves[0].plain(otherwise); plain {
			return a.answer(action)
		}
		return a.conditional(leaves[0].rules, otherwise)
	}
	middle := len(leaves) / 2
	right := a.search(leaves[middle:], otherwise)
	left := a.search(leaves[:middle], otherwise)
	return a.branch(jumpAtLeast, leaves[middle].start, right, left)
}

// conditional returns the place of the code for the rules of one system call.
func (a *assembler) conditional(rules []rule, otherwise Action) int {
	next := a.answer(otherwise)
	for _, r := range slices.Backward(rules) {
		met := a.answer(r.action)
		for _, c := range slices.Backward(r.conditions) {
			a.branch(jumpEqual, c.Value, met, next)
			if c.Mask != 0 {
				a.add(and, c.Mask)
			}
			met = a.add(load, uint32(offsetArgs+8*c.Arg))
		}
		next = met
	}
	return next
}

// RestrictThread loads the filter for the calling thread and all that it
// starts. The thread must have no_new_privs set.
func (f *Filter) RestrictThread() error { return f.load(0) }

// RestrictAll loads the filter for every thread of the process.
func (f *Filter) RestrictAll() error { return f.load(unix.SECCOMP_FILTER_FLAG_TSYNC) }

func (f *Filter) load(flags uintptr) error {
	code := f.program()
	program := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	if r != 0 {
		return fmt.Errorf("seccomp: thread %d cannot be synchronised", r)
	}
	return nil
}

// HasSeccomp reports whether the kernel takes filters.
var HasSeccomp = sync.OnceValue(func() bool {
	action := uint32(unix.SECCOMP_RET_ERRNO)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	return errno == 0
})
