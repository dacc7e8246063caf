//go:build unix && !linux

package descriptor

import "golang.org/x/sys/unix"

func receiveMessage(fd int, buf, oob []byte) (n, oobn int, err error) {
	n, oobn, _, _, err = unix.Recvmsg(fd, buf, oob, 0)
	if err != nil {
		return n, oobn, err
	}
	fds, _ := attached(oob[:oobn])
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return n, oobn, nil
}
