"""Every kernel compiled ahead of time, without a GPU, and held to its limits."""
