"""The simulator: what a plan or a layout will run at, and what limits it."""
