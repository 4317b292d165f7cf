"""One file an op: CASES from real UNets, inputs(), arms(), and how the op is called."""
