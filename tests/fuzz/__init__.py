"""Random calls of every public op: what a case is, what float64 says of it, and how many there were."""
