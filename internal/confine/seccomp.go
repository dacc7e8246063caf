//go:build linux && (amd64 || arm64)

package confine

import (
	"fmt"
	"runtime"
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

// Condition is true where the low or high half of an argument, after Mask,
// equals Value. Arguments that the kernel takes as int need the low half alone.
type Condition struct {
	Arg   int
	High  bool
	Mask  uint32 // 0: all bits
	Value uint32
}

// Filter assembles a seccomp program: the first rule that matches decides. The
// filter is made here rather than by a library because that library builds
// tables of every architecture at start-up, twice for each command.
type Filter struct {
	code []unix.SockFilter
}

// Offsets in struct seccomp_data (linux/seccomp.h).
const (
	offsetNumber = 0
	offsetArch   = 4
	offsetArgs   = 16
)

func statement(op uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: op, K: k} }

func jump(op uint16, k uint32, ifTrue, ifFalse uint8) unix.SockFilter {
	return unix.SockFilter{Code: op, Jt: ifTrue, Jf: ifFalse, K: k}
}

const (
	load        = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	ret         = unix.BPF_RET | unix.BPF_K
	jumpEqual   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jumpAtLeast = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	and         = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
)

// NewFilter returns a filter that kills callers of other architectures' system
// calls and has no rules yet.
func NewFilter() *Filter {
	f := &Filter{code: make([]unix.SockFilter, 0, 512)}
	f.code = append(f.code,
		statement(load, offsetArch),
		jump(jumpEqual, auditArch, 1, 0),
		statement(ret, unix.SECCOMP_RET_KILL_PROCESS),
		statement(load, offsetNumber))
	if runtime.GOARCH == "amd64" {
		const x32 = 0x40000000 // __X32_SYSCALL_BIT
		f.code = append(f.code,
			jump(jumpAtLeast, x32, 0, 1),
			statement(ret, uint32(Fail(unix.ENOSYS))))
	}
	return f
}

// On answers the listed system calls.
func (f *Filter) On(action Action, numbers ...uint32) {
	for _, n := range numbers {
		f.code = append(f.code, jump(jumpEqual, n, 0, 1), statement(ret, uint32(action)))
	}
}

// When answers a system call whose arguments meet every condition.
func (f *Filter) When(action Action, number uint32, conditions ...Condition) {
	var body []unix.SockFilter
	for _, c := range conditions {
		offset := uint32(offsetArgs + 8*c.Arg)
		if c.High { // both architectures are little-endian
			offset += 4
		}
		body = append(body, statement(load, offset))
		if c.Mask != 0 {
			body = append(body, statement(and, c.Mask))
		}
		body = append(body, jump(jumpEqual, c.Value, 0, 0))
	}
	body = append(body, statement(ret, uint32(action)))
	// A failed condition skips the action.
	for i := range body {
		if body[i].Code == jumpEqual {
			body[i].Jf = uint8(len(body) - 1 - i)
		}
	}
	f.code = append(f.code, jump(jumpEqual, number, 0, uint8(len(body)+1)))
	f.code = append(f.code, body...)
	f.code = append(f.code, statement(load, offsetNumber))
}

// Otherwise answers what no rule matched. It is the last rule.
func (f *Filter) Otherwise(action Action) {
	f.code = append(f.code, statement(ret, uint32(action)))
}

// RestrictThread loads the filter for the calling thread and all that it
// starts. The thread must have no_new_privs set.
func (f *Filter) RestrictThread() error { return f.load(0) }

// RestrictAll loads the filter for every thread of the process.
func (f *Filter) RestrictAll() error { return f.load(unix.SECCOMP_FILTER_FLAG_TSYNC) }

func (f *Filter) load(flags uintptr) error {
	program := unix.SockFprog{Len: uint16(len(f.code)), Filter: &f.code[0]}
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
