"""Process 1 of a run on each node: one attempt from its start to a classified exit code."""
