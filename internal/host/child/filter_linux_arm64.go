package child

// refusedHere are system calls that other architectures do not have: none.
var refusedHere []uint32
