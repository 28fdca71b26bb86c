"""Start a plan: one process per rank, in plan order."""
