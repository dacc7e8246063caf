// Package handshake holds what the core and a plugin must agree on before the
// first request: go-plugin's cookie and environment, and what a plugin inherits.
package handshake

const (
	// MagicCookieKey and MagicCookieValue tell a plugin that the core started it.
	MagicCookieKey   = "INSTAR_FORMAT_PLUGIN"
	MagicCookieValue = "7c1f7e0d-instar-format"

	// CoreProtocol is the version of go-plugin's own protocol: the first number
	// of the line in which a plugin says where it listens.
	CoreProtocol = 1

	// SocketDirKey is the environment variable with the directory in which a
	// plugin makes its socket.
	SocketDirKey = "PLUGIN_UNIX_SOCKET_DIR"

	// DescriptorFD is the inherited socket over which the core passes open
	// files. Its end of file means that the core is gone.
	DescriptorFD = 3

	// ConnectionKey is the environment variable that is set where the plugin
	// inherits its connection to the core as ConnectionFD: a stream socket on which
	// it serves gRPC at once, and says nothing on stdout. Else it listens.
	ConnectionKey = "INSTAR_CONNECTION"
	ConnectionFD  = 4

	// LogLevelKey is the environment variable with the level, in hclog's words,
	// below which a plugin need not log. Unset means off.
	LogLevelKey = "INSTAR_LOG"
)

// TicketSize is the length of a message on the descriptor socket: the ticket
// number in little-endian order, with one descriptor attached.
const TicketSize = 4
