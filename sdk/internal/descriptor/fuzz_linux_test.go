package descriptor

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzMessage receives any bytes as a message that should bring a ticket and a
// file, and reads any bytes as what came beside them.
func FuzzMessage(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0}, unix.UnixRights(0))
	f.Add([]byte{1, 0, 0, 0}, unix.UnixRights(0, 1, 2))
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, message, oob []byte) {
		if fds, err := attached(oob); err == nil && len(fds) > len(oob)/4 {
			t.Errorf("%d descriptors in %d bytes", len(fds), len(oob))
		}
		pair, err := unix.Socketpair(unix.AF_UNIX, socketType, 0)
		if err != nil {
			t.Fatal(err)
		}
		from, to := os.NewFile(uintptr(pair[0]), "from"), os.NewFile(uintptr(pair[1]), "to")
		defer from.Close()
		defer to.Close()
		// Without a file: none may come of it, whatever the bytes.
		if err := unix.Sendmsg(pair[1], message[:min(len(message), 1<<16)], nil, nil, 0); err != nil {
			t.Skip(err)
		}
		raw, err := from.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if ticket, file, err := receiveOne(raw); err == nil || file != nil {
			t.Errorf("ticket %d, %v", ticket, err)
		}
	})
}
