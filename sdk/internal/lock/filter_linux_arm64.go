package lock

// allowedHere are system calls that other architectures do not have: none.
var allowedHere []uint32
