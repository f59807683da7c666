"""Many runs: each cell in a process of its own, and what they say together."""
