package descriptor

import "golang.org/x/sys/unix"

func receiveMessage(fd int, buf, oob []byte) (n, oobn int, err error) {
	n, oobn, flags, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		closeAttached(oob[:oobn])
		return 0, 0, unix.EMSGSIZE
	}
	return n, oobn, err
}

func closeAttached(oob []byte) {
	fds, _ := attached(oob)
	for _, fd := range fds {
		unix.Close(fd)
	}
}
