"""Between steps: load and waits, and balancing that keeps or changes outputs."""
